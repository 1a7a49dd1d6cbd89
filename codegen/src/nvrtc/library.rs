//! NVRTC's shared library: opening it at a path of our choosing, and its functions.
//!
//! cudarc's bindings are not used here. They open whichever library the loader's search finds under one of
//! many names, panic when there is none, and read result codes into an enum that newer libraries outgrow.

use super::{NvrtcError, Version};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

/// NVRTC's handle of a program.
type Handle = *mut c_void;

const SUCCESS: c_int = 0;
/// Results of a compilation that come with a log: the input, the options, the text, or a missing builtin.
const WITH_LOG: [c_int; 4] = [3, 5, 6, 7];

/// Older ones know neither of the Blackwell architectures.
const OLDEST: Version = Version { major: 12, minor: 8 };

/// Fetches one function of a library by its C name.
macro_rules! functions {
    ($($field:ident: $symbol:literal ($($argument:ty),*),)*) => {
        /// The functions that are used. All return a result code.
        #[derive(Clone, Copy)]
        struct Functions { $($field: unsafe extern "C" fn($($argument),*) -> c_int,)* }

        impl Functions {
            /// # Safety
            /// The library has to be NVRTC, and has to stay loaded.
            unsafe fn of(library: &libloading::Library) -> Result<Functions, String> {
                $(
                    // SAFETY: NVRTC's function of this name has this type.
                    let $field = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> c_int>($symbol) };
                    let $field = *$field.map_err(|error| whole(&error))?;
                )*
                Ok(Functions { $($field),* })
            }
        }
    };
}

functions! {
    version: b"nvrtcVersion\0" (*mut c_int, *mut c_int),
    arch_count: b"nvrtcGetNumSupportedArchs\0" (*mut c_int),
    archs: b"nvrtcGetSupportedArchs\0" (*mut c_int),
    create: b"nvrtcCreateProgram\0"
        (*mut Handle, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char),
    destroy: b"nvrtcDestroyProgram\0" (*mut Handle),
    compile: b"nvrtcCompileProgram\0" (Handle, c_int, *const *const c_char),
    log_size: b"nvrtcGetProgramLogSize\0" (Handle, *mut usize),
    log: b"nvrtcGetProgramLog\0" (Handle, *mut c_char),
    cubin_size: b"nvrtcGetCUBINSize\0" (Handle, *mut usize),
    cubin: b"nvrtcGetCUBIN\0" (Handle, *mut c_char),
    ptx_size: b"nvrtcGetPTXSize\0" (Handle, *mut usize),
    ptx: b"nvrtcGetPTX\0" (Handle, *mut c_char),
}

/// An NVRTC that is loaded, and stays so until the process ends.
#[derive(Clone)]
pub(super) struct Library {
    functions: Functions,
    error_text: unsafe extern "C" fn(c_int) -> *const c_char,
    pub(super) path: PathBuf,
    pub(super) version: Version,
    /// Architectures by number, 90 for `sm_90` and `sm_90a`.
    pub(super) archs: Vec<u32>,
    /// Bytes of the library: builds of one version differ in it.
    pub(super) file_bytes: u64,
}

/// What a compilation gave.
pub(super) struct Outcome {
    /// Whether there is code.
    pub(super) done: bool,
    /// The cubin; empty when not done.
    pub(super) cubin: Vec<u8>,
    /// The PTX, where the front end came that far and the caller asked for it.
    pub(super) ptx: String,
    /// What the compiler said.
    pub(super) log: String,
}

impl Library {
    /// Opens a library by path or, for a plain file name, wherever the system's loader finds it. The reason of
    /// a failure is a sentence.
    pub(super) fn open(file: &Path) -> Result<Library, String> {
        // SAFETY: the file is named libnvrtc by who installed it; its initialisers are NVIDIA's own.
        let handle = unsafe { libloading::Library::new(file) }.map_err(|error| whole(&error))?;
        // SAFETY: NVRTC has this function, and any library without it is refused by its name.
        let version = unsafe { handle.get::<unsafe extern "C" fn()>(b"nvrtcVersion\0") };
        version.map_err(|error| whole(&error))?;
        // SAFETY: the library is NVRTC, and it is never closed (see below).
        let functions = unsafe { Functions::of(&handle) }?;
        // SAFETY: as before; this is its documented type.
        let error_text =
            unsafe { handle.get::<unsafe extern "C" fn(c_int) -> *const c_char>(b"nvrtcGetErrorString\0") };
        let error_text = *error_text.map_err(|error| whole(&error))?;
        // It keeps threads and exit handlers of its own: unloading it is not safe, and gains nothing.
        std::mem::forget(handle);

        let path = if file.components().count() > 1 { file.to_path_buf() } else { origin(functions.version) };
        let mut library = Library {
            functions,
            error_text,
            path,
            version: Version { major: 0, minor: 0 },
            archs: Vec::new(),
            file_bytes: 0,
        };
        library.file_bytes = std::fs::metadata(&library.path).map_or(0, |file| file.len());
        library.version = library.read_version().map_err(|error| error.to_string())?;
        if library.version < OLDEST {
            return Err(format!("it is version {}, and {OLDEST} is the oldest of use", library.version));
        }
        library.archs = library.read_archs().map_err(|error| error.to_string())?;
        library.open_builtins()?;
        Ok(library)
    }

    /// NVRTC opens its second library by name alone, which fails outside the loader's search path. A library
    /// of that name that is loaded already is taken, so it is loaded here from beside the first.
    fn open_builtins(&self) -> Result<(), String> {
        let name = format!("libnvrtc-builtins.so.{}", self.version);
        let folder =
            std::fs::canonicalize(&self.path).ok().and_then(|path| Some(path.parent()?.to_path_buf()));
        let beside = folder.map(|folder| folder.join(&name)).filter(|path| path.is_file());
        let file = beside.unwrap_or_else(|| PathBuf::from(&name));
        // SAFETY: NVIDIA's own library, which NVRTC itself would open.
        let handle = unsafe { libloading::Library::new(file) };
        let handle =
            handle.map_err(|error| format!("its second library {name} is missing: {}", whole(&error)))?;
        std::mem::forget(handle);
        Ok(())
    }

    fn read_version(&self) -> Result<Version, NvrtcError> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are to integers of our own.
        let code = unsafe { (self.functions.version)(&mut major, &mut minor) };
        self.check("nvrtcVersion", code)?;
        Ok(Version { major: u32::try_from(major).unwrap_or(0), minor: u32::try_from(minor).unwrap_or(0) })
    }

    fn read_archs(&self) -> Result<Vec<u32>, NvrtcError> {
        let mut count = 0;
        // SAFETY: the pointer is to an integer of our own.
        self.check("nvrtcGetNumSupportedArchs", unsafe { (self.functions.arch_count)(&mut count) })?;
        let mut archs: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: the array has as many places as the library asked for.
        self.check("nvrtcGetSupportedArchs", unsafe { (self.functions.archs)(archs.as_mut_ptr()) })?;
        Ok(archs.into_iter().filter_map(|arch| u32::try_from(arch).ok()).collect())
    }

    /// Compiles. Neither `name` nor `text` nor an option may hold a zero byte, which `CStr` sees to.
    ///
    /// # Errors
    /// When a call fails for another reason than the text or the options; those end in `done: false`.
    pub(super) fn compile(
        &self,
        name: &CStr,
        text: &CStr,
        options: &[&CStr],
        want_ptx: bool,
    ) -> Result<Outcome, NvrtcError> {
        let mut handle: Handle = ptr::null_mut();
        // SAFETY: both strings end in zero and outlive the call; there are no headers.
        let code = unsafe {
            (self.functions.create)(&mut handle, text.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null())
        };
        self.check("nvrtcCreateProgram", code)?;
        let program = Program { library: self, handle };
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let count =
            c_int::try_from(options.len()).map_err(|_| NvrtcError::Input("too many options".into()))?;
        // SAFETY: the program is alive, and the array has `count` strings that end in zero.
        let code = unsafe { (self.functions.compile)(handle, count, options.as_ptr()) };
        if code != SUCCESS && !WITH_LOG.contains(&code) {
            self.check("nvrtcCompileProgram", code)?;
        }
        let functions = &self.functions;
        let log = program.fetch("nvrtcGetProgramLog", functions.log_size, functions.log)?;
        let mut log = text_of(log);
        if code != SUCCESS && log.trim().is_empty() {
            log = format!("nvrtc: error: {}", self.error_text(code));
        }
        let cubin = match code {
            SUCCESS => program.fetch("nvrtcGetCUBIN", functions.cubin_size, functions.cubin)?,
            _ => Vec::new(),
        };
        let ptx = match want_ptx {
            // There is none when the front end failed.
            true => {
                program.fetch("nvrtcGetPTX", functions.ptx_size, functions.ptx).map_or(String::new(), text_of)
            }
            false => String::new(),
        };
        Ok(Outcome { done: code == SUCCESS, cubin, ptx, log })
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), NvrtcError> {
        match code {
            SUCCESS => Ok(()),
            _ => Err(NvrtcError::Call { call, reason: self.error_text(code) }),
        }
    }

    fn error_text(&self, code: c_int) -> String {
        // SAFETY: the function takes any number and returns a constant string.
        let text = unsafe { (self.error_text)(code) };
        if text.is_null() {
            return format!("error {code}");
        }
        // SAFETY: the string ends in zero and lives as long as the library.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

/// A program that is destroyed with the value.
struct Program<'a> {
    library: &'a Library,
    handle: Handle,
}

impl Program<'_> {
    /// Asks for the size of something, then for the thing.
    fn fetch(
        &self,
        call: &'static str,
        size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, NvrtcError> {
        let mut bytes = 0;
        // SAFETY: the program is alive; the pointer is to a number of our own.
        self.library.check(call, unsafe { size(self.handle, &mut bytes) })?;
        let mut buffer = vec![0u8; bytes];
        // SAFETY: the buffer has the size that the library asked for.
        self.library.check(call, unsafe { get(self.handle, buffer.as_mut_ptr().cast()) })?;
        Ok(buffer)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the program is alive and not used after this.
        unsafe { (self.library.functions.destroy)(&mut self.handle) };
    }
}

/// An error with its causes: the loader's own words are the cause of a plain "it failed".
fn whole(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(deeper) = cause {
        words = format!("{words}: {deeper}");
        cause = deeper.source();
    }
    words
}

/// A C string's text.
fn text_of(mut bytes: Vec<u8>) -> String {
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The file that a function was loaded from; empty when the loader does not say.
fn origin(function: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    let mut info = libc::Dl_info {
        dli_fname: ptr::null(),
        dli_fbase: ptr::null_mut(),
        dli_sname: ptr::null(),
        dli_saddr: ptr::null_mut(),
    };
    // SAFETY: any address may be asked for; `info` is ours.
    let found = unsafe { libc::dladdr(function as *const c_void, &mut info) };
    if found == 0 || info.dli_fname.is_null() {
        return PathBuf::new();
    }
    // SAFETY: the loader's name of a library that stays loaded; it ends in zero.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes()))
}
