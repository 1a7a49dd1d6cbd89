//! llama.cpp's C interface, loaded at run time from the prebuilt library.
//!
//! Parameter structs cross this interface by value, so their layout has to be exactly that of the library's version.
//! [`Library::load`] therefore looks at what the library writes when asked for its defaults: how many bytes, and the
//! values of known fields. It refuses to go on when either differs.

use std::ffi::{CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::Library as Shared;

use crate::error::{Context, Error, Result};

/// The llama.cpp release that the layouts below belong to.
pub const RELEASE: &str = "v0.5.0";

/// A token id as llama.cpp counts them.
pub type Token = i32;

/// `struct llama_model_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ModelParams {
    devices: *mut c_void,
    tensor_buft_overrides: *const c_void,
    n_gpu_layers: i32,
    split_mode: i32,
    load_mode: i32,
    lazy_mode: i32,
    main_gpu: i32,
    tensor_split: *const f32,
    progress_callback: *const c_void,
    progress_callback_user_data: *mut c_void,
    kv_overrides: *const c_void,
    vocab_only: u8,
    check_tensors: u8,
    use_extra_bufts: u8,
    no_host: u8,
    no_alloc: u8,
    load_mtp: u8,
}

/// `struct llama_context_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ContextParams {
    n_ctx: u32,
    n_batch: u32,
    n_ubatch: u32,
    n_seq_max: u32,
    n_rs_seq: u32,
    n_outputs_max: u32,
    n_outputs_max_per_seq: u32,
    n_threads: i32,
    n_threads_batch: i32,
    ctx_type: i32,
    rope_scaling_type: i32,
    pooling_type: i32,
    attention_type: i32,
    flash_attn_type: i32,
    rope_freq_base: f32,
    rope_freq_scale: f32,
    yarn_ext_factor: f32,
    yarn_attn_factor: f32,
    yarn_beta_fast: f32,
    yarn_beta_slow: f32,
    yarn_orig_ctx: u32,
    defrag_thold: f32,
    cb_eval: *const c_void,
    cb_eval_user_data: *mut c_void,
    type_k: i32,
    type_v: i32,
    abort_callback: *const c_void,
    abort_callback_data: *mut c_void,
    embeddings: u8,
    offload_kqv: u8,
    no_perf: u8,
    op_offload: u8,
    swa_full: u8,
    kv_unified: u8,
    samplers: *mut c_void,
    n_samplers: usize,
    ctx_other: *mut c_void,
}

/// `struct llama_batch`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Batch {
    n_tokens: i32,
    token: *mut Token,
    embd: *mut f32,
    pos: *mut i32,
    n_seq_id: *mut i32,
    seq_id: *mut *mut i32,
    logits: *mut i8,
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<ModelParams>() == 80);
    assert!(size_of::<ContextParams>() == 160);
    assert!(size_of::<Batch>() == 56);
};

/// `GGML_TYPE_F16`, the default type of the KV cache.
const GGML_TYPE_F16: i32 = 1;

/// Fills a caller's struct with defaults. In C it returns a struct of more than 16 bytes by value, which the x86-64
/// System V ABI passes as a pointer in the first argument; calling it so lets us see how many bytes are written.
type Defaults = unsafe extern "C" fn(*mut u8) -> *mut u8;
type LogCallback = unsafe extern "C" fn(i32, *const c_char, *mut c_void);

/// Declares the functions used and the code that looks them all up.
macro_rules! functions {
    ($($name:ident: $signature:ty,)*) => {
        struct Functions { $($name: $signature,)* }

        impl Functions {
            fn load(shared: &Shared) -> Result<Self> {
                Ok(Self { $(
                    // SAFETY: the signature is that of the function in llama.cpp's header of release `RELEASE`, and the
                    // pointer stays beside the library that holds the function.
                    $name: *unsafe { shared.get::<$signature>(stringify!($name)) }
                        .context(|| concat!("llama.cpp's library lacks ", stringify!($name)))?,
                )* })
            }
        }
    };
}

functions! {
    ggml_backend_load_all_from_path: unsafe extern "C" fn(*const c_char),
    llama_backend_init: unsafe extern "C" fn(),
    llama_log_set: unsafe extern "C" fn(Option<LogCallback>, *mut c_void),
    llama_model_default_params: Defaults,
    llama_context_default_params: Defaults,
    llama_model_load_from_file: unsafe extern "C" fn(*const c_char, ModelParams) -> *mut c_void,
    llama_model_free: unsafe extern "C" fn(*mut c_void),
    llama_init_from_model: unsafe extern "C" fn(*mut c_void, ContextParams) -> *mut c_void,
    llama_free: unsafe extern "C" fn(*mut c_void),
    llama_model_get_vocab: unsafe extern "C" fn(*const c_void) -> *const c_void,
    llama_vocab_n_tokens: unsafe extern "C" fn(*const c_void) -> i32,
    llama_model_size: unsafe extern "C" fn(*const c_void) -> u64,
    llama_model_n_layer: unsafe extern "C" fn(*const c_void) -> i32,
    llama_model_n_embd: unsafe extern "C" fn(*const c_void) -> i32,
    llama_model_n_head: unsafe extern "C" fn(*const c_void) -> i32,
    llama_model_n_head_kv: unsafe extern "C" fn(*const c_void) -> i32,
    llama_tokenize: unsafe extern "C" fn(*const c_void, *const c_char, i32, *mut Token, i32, bool, bool) -> i32,
    llama_get_memory: unsafe extern "C" fn(*const c_void) -> *mut c_void,
    llama_memory_clear: unsafe extern "C" fn(*mut c_void, bool),
    llama_decode: unsafe extern "C" fn(*mut c_void, Batch) -> i32,
    llama_synchronize: unsafe extern "C" fn(*mut c_void),
    llama_get_logits_ith: unsafe extern "C" fn(*mut c_void, i32) -> *mut f32,
}

/// llama.cpp, loaded and checked.
pub struct Library {
    functions: Functions,
    model_defaults: ModelParams,
    context_defaults: ContextParams,
    folder: PathBuf,
    // Keeps the code mapped that `functions` points to.
    _shared: Shared,
}

impl Library {
    /// Loads the library and its CPU backends from `folder`. `verbose` lets llama.cpp print its own log.
    ///
    /// # Errors
    /// When the library is missing, lacks a function, or has other parameter layouts than the release known here.
    pub fn load(folder: &Path, verbose: bool) -> Result<Self> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            return Err(Error::new("llama.cpp's interface is known for x86-64 Linux only"));
        }
        let path = folder.join(format!("libllama.{RELEASE}.so"));
        // SAFETY: the file is llama.cpp's library out of a package whose hash is pinned; its initialisers only set up
        // its own state.
        let shared = unsafe { Shared::new(&path) }.context(|| format!("cannot load {}", path.display()))?;
        let functions = Functions::load(&shared)?;
        let model_defaults: ModelParams =
            defaults(functions.llama_model_default_params, "llama_model_params")?;
        let context_defaults: ContextParams =
            defaults(functions.llama_context_default_params, "llama_context_params")?;
        model_defaults.check()?;
        context_defaults.check()?;
        let backends = c_string(&folder.to_string_lossy())?;
        // SAFETY: the functions take no pointers that outlive the calls; the callback is a plain function.
        unsafe {
            if !verbose {
                (functions.llama_log_set)(Some(drop_log), ptr::null_mut());
            }
            (functions.ggml_backend_load_all_from_path)(backends.as_ptr());
            (functions.llama_backend_init)();
        }
        Ok(Self { functions, model_defaults, context_defaults, folder: folder.to_owned(), _shared: shared })
    }

    /// The file name of the CPU backend that ggml chose for this machine, such as `libggml-cpu-zen4.so`.
    pub fn cpu_backend(&self) -> String {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let folder = self.folder.canonicalize().unwrap_or_else(|_| self.folder.clone());
        let loaded = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).map(Path::new);
        let mut backends =
            loaded.filter(|path| path.starts_with(&folder)).filter_map(|path| path.file_name()?.to_str());
        backends.find(|name| name.contains("ggml-cpu")).unwrap_or("no CPU backend").to_owned()
    }

    /// Loads a GGUF model file, with llama.cpp's default settings.
    ///
    /// # Errors
    /// When llama.cpp refuses the file.
    pub fn model(&self, path: &Path) -> Result<Model<'_>> {
        let name = c_string(&path.to_string_lossy())?;
        // SAFETY: the name is a C string that outlives the call; the parameters are the library's own defaults.
        let handle =
            unsafe { (self.functions.llama_model_load_from_file)(name.as_ptr(), self.model_defaults) };
        if handle.is_null() {
            return Err(Error::new(format!(
                "llama.cpp cannot load {}; --verbose shows its log",
                path.display()
            )));
        }
        Ok(Model { library: self, handle })
    }
}

/// Reads a C function's defaults and checks that it writes exactly a `T`.
fn defaults<T: Copy>(function: Defaults, name: &str) -> Result<T> {
    const ROOM: usize = 1024;
    // Written over two different patterns, bytes that differ between the results were not written.
    let filled = [0xA5u8, 0x5A].map(|pattern| {
        let mut buffer = Box::new(Aligned([pattern; ROOM]));
        // SAFETY: the struct is far smaller than the buffer, which is aligned for any of its fields.
        unsafe { function(buffer.0.as_mut_ptr()) };
        buffer
    });
    let [first, second] = &filled;
    let written = (0..ROOM).rev().find(|&at| first.0[at] == second.0[at]).map_or(0, |last| last + 1);
    let size = size_of::<T>();
    // The struct may end in padding, which compilers leave alone: less than one alignment.
    if written > size || written + align_of::<T>() <= size {
        return Err(Error::new(format!(
            "llama.cpp's {name} has about {written} bytes, not the {size} of release {RELEASE}: \
             another version of the library was loaded"
        )));
    }
    // SAFETY: all fields are integers, floats or raw pointers, valid for any bytes; the buffer holds more than a `T`.
    Ok(unsafe { first.0.as_ptr().cast::<T>().read() })
}

#[repr(align(16))]
struct Aligned([u8; 1024]);

impl ModelParams {
    fn check(&self) -> Result<()> {
        let fits = self.devices.is_null()
            && self.n_gpu_layers == -1
            && (self.split_mode, self.load_mode, self.lazy_mode, self.main_gpu) == (1, -1, 1, 0)
            && self.tensor_split.is_null()
            && self.kv_overrides.is_null()
            && (self.vocab_only, self.check_tensors, self.use_extra_bufts, self.no_host) == (0, 0, 1, 0);
        refuse_unless(fits, self)
    }
}

impl ContextParams {
    fn check(&self) -> Result<()> {
        let fits = (self.n_ctx, self.n_batch, self.n_ubatch, self.n_seq_max) == (512, 2048, 512, 1)
            && (1..=64).contains(&self.n_threads)
            && self.n_threads == self.n_threads_batch
            && (self.rope_scaling_type, self.pooling_type, self.attention_type, self.flash_attn_type)
                == (-1, -1, -1, -1)
            && (self.yarn_ext_factor, self.defrag_thold) == (-1.0, -1.0)
            && (self.type_k, self.type_v) == (GGML_TYPE_F16, GGML_TYPE_F16)
            && (self.embeddings, self.offload_kqv, self.no_perf, self.op_offload) == (0, 1, 1, 1)
            && self.samplers.is_null()
            && self.n_samplers == 0
            && self.ctx_other.is_null();
        refuse_unless(fits, self)
    }
}

fn refuse_unless(fits: bool, found: &impl std::fmt::Debug) -> Result<()> {
    if fits {
        return Ok(());
    }
    Err(Error::new(format!(
        "llama.cpp's defaults are not those of release {RELEASE}, so its layouts are unknown: {found:?}"
    )))
}

unsafe extern "C" fn drop_log(_level: i32, _text: *const c_char, _data: *mut c_void) {}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).context(|| format!("{text:?} holds a zero byte"))
}

/// A loaded model.
pub struct Model<'l> {
    library: &'l Library,
    handle: *mut c_void,
}

impl Drop for Model<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle came from llama.cpp and contexts borrow the model, so none is left.
        unsafe { (self.library.functions.llama_model_free)(self.handle) };
    }
}

impl<'l> Model<'l> {
    /// Calls one of llama.cpp's functions that read a number off the model.
    fn number<T>(&self, function: unsafe extern "C" fn(*const c_void) -> T) -> T {
        // SAFETY: the handle is a live model.
        unsafe { function(self.handle) }
    }

    fn vocab(&self) -> *const c_void {
        self.number(self.library.functions.llama_model_get_vocab)
    }

    /// The number of tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        // SAFETY: the vocabulary belongs to the live model.
        let count = unsafe { (self.library.functions.llama_vocab_n_tokens)(self.vocab()) };
        count.try_into().unwrap_or(0)
    }

    /// The bytes of all weight tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.number(self.library.functions.llama_model_size)
    }

    /// The bytes of K and V (f16) that one position of context adds, over all layers.
    pub fn kv_bytes_per_position(&self) -> u64 {
        let functions = &self.library.functions;
        let of = |function| u64::try_from(self.number::<i32>(function)).unwrap_or(0);
        let head_dim = of(functions.llama_model_n_embd) / of(functions.llama_model_n_head).max(1);
        2 * 2 * of(functions.llama_model_n_layer) * of(functions.llama_model_n_head_kv) * head_dim
    }

    /// The token ids of a text, with no special tokens added.
    ///
    /// # Errors
    /// When the text holds a zero byte or llama.cpp cannot tokenize it.
    pub fn tokenize(&self, text: &str) -> Result<Vec<Token>> {
        let c_text = c_string(text)?;
        let failed = || Error::new(format!("llama.cpp cannot tokenize {text:?}"));
        let length = i32::try_from(text.len()).map_err(|_| failed())?;
        // A token stands for at least one byte.
        let mut tokens = vec![0; text.len() + 1];
        let room = length.checked_add(1).ok_or_else(failed)?;
        // SAFETY: text and token buffer are as long as said and outlive the call.
        let count = unsafe {
            let tokenize = self.library.functions.llama_tokenize;
            tokenize(self.vocab(), c_text.as_ptr(), length, tokens.as_mut_ptr(), room, false, true)
        };
        tokens.truncate(usize::try_from(count).map_err(|_| failed())?);
        Ok(tokens)
    }

    /// A context of `n_ctx` positions whose work is shared by `threads` threads.
    ///
    /// # Errors
    /// When llama.cpp cannot make one.
    pub fn context(&self, n_ctx: u32, threads: usize) -> Result<LlamaContext<'_>> {
        let n_threads = i32::try_from(threads).context(|| format!("{threads} threads are too many"))?;
        let params =
            ContextParams { n_ctx, n_threads, n_threads_batch: n_threads, ..self.library.context_defaults };
        // SAFETY: the model is live; the parameters are the library's own defaults but for plain numbers.
        let handle = unsafe { (self.library.functions.llama_init_from_model)(self.handle, params) };
        if handle.is_null() {
            return Err(Error::new(format!("llama.cpp cannot make a context of {n_ctx} positions")));
        }
        Ok(LlamaContext { functions: &self.library.functions, handle, vocab: self.vocab_size(), model: self })
    }
}

/// A sequence being decoded.
pub struct LlamaContext<'m> {
    functions: &'m Functions,
    handle: *mut c_void,
    vocab: usize,
    model: &'m Model<'m>,
}

impl Drop for LlamaContext<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle is a live context and its model, borrowed here, still lives.
        unsafe { (self.functions.llama_free)(self.handle) };
    }
}

impl LlamaContext<'_> {
    /// Forgets all positions.
    pub fn clear(&mut self) {
        // SAFETY: the context and its memory are live.
        unsafe { (self.functions.llama_memory_clear)((self.functions.llama_get_memory)(self.handle), false) };
    }

    /// Appends tokens to the sequence and waits for the result. Logits are computed for the last token, or for every
    /// token with `all_logits`.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or llama.cpp reports a failure (such as a full context).
    pub fn decode(&mut self, tokens: &[Token], all_logits: bool) -> Result<()> {
        if let Some(bad) =
            tokens.iter().find(|&&token| usize::try_from(token).map_or(true, |token| token >= self.vocab))
        {
            return Err(Error::new(format!(
                "token {bad} is outside the vocabulary of {}",
                self.model.vocab_size()
            )));
        }
        // llama.cpp takes pointers to mutable data but only reads it; copies keep that its own business.
        let mut tokens = tokens.to_vec();
        let mut wanted = vec![1i8; tokens.len()];
        let batch = Batch {
            n_tokens: i32::try_from(tokens.len()).context(|| "too many tokens in a batch")?,
            token: tokens.as_mut_ptr(),
            embd: ptr::null_mut(),
            pos: ptr::null_mut(),
            n_seq_id: ptr::null_mut(),
            seq_id: ptr::null_mut(),
            logits: if all_logits { wanted.as_mut_ptr() } else { ptr::null_mut() },
        };
        // SAFETY: the context is live and the batch's arrays hold `n_tokens` values for the time of the call.
        let status = unsafe {
            let status = (self.functions.llama_decode)(self.handle, batch);
            (self.functions.llama_synchronize)(self.handle);
            status
        };
        if status == 0 {
            Ok(())
        } else {
            Err(Error::new(format!("llama_decode failed with status {status}")))
        }
    }

    /// The logits (one per token of the vocabulary) of row `row` of the last batch; -1 is the last row.
    ///
    /// # Errors
    /// When that row has no logits.
    pub fn logits(&mut self, row: i32) -> Result<&[f32]> {
        // SAFETY: the context is live; llama.cpp returns null for a row without logits.
        let logits = unsafe { (self.functions.llama_get_logits_ith)(self.handle, row) };
        if logits.is_null() {
            return Err(Error::new(format!("llama.cpp has no logits for row {row}")));
        }
        // SAFETY: a row holds one float per token and stays until the next decode, which needs `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(logits, self.vocab) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes `size` bytes, as a C function returning a struct of that size would.
    unsafe fn write(out: *mut u8, size: usize) -> *mut u8 {
        // SAFETY: `defaults` passes a buffer of 1024 bytes.
        unsafe { ptr::write_bytes(out, 0, size) };
        out
    }

    unsafe extern "C" fn returns_160(out: *mut u8) -> *mut u8 {
        // SAFETY: the caller's buffer has room.
        unsafe { write(out, 160) }
    }

    unsafe extern "C" fn returns_168(out: *mut u8) -> *mut u8 {
        // SAFETY: the caller's buffer has room.
        unsafe { write(out, 168) }
    }

    #[test]
    fn another_struct_size_is_refused() {
        assert!(defaults::<ContextParams>(returns_160, "llama_context_params").is_ok());
        let error = defaults::<ContextParams>(returns_168, "llama_context_params").unwrap_err().to_string();
        assert!(error.contains("168 bytes, not the 160"), "{error}");
        let error = defaults::<ModelParams>(returns_160, "llama_model_params").unwrap_err().to_string();
        assert!(error.contains("160 bytes, not the 80"), "{error}");
    }

    #[test]
    fn other_default_values_are_refused() {
        let params: ContextParams = defaults(returns_160, "llama_context_params").unwrap();
        let error = params.check().unwrap_err().to_string();
        assert!(error.contains("n_batch: 0"), "{error}");
    }

    #[test]
    fn a_missing_library_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Library::load(folder.path(), false).err().unwrap().to_string();
        assert!(error.contains("libllama.v0.5.0.so"), "{error}");
    }
}
