//! A thin safe layer over the CUDA driver, which is loaded when it is first used.
//!
//! Every function makes the context current on its thread first, so that any thread may call it.

use super::error::CudaError;
use crate::memory::Size;
use cudarc::driver::sys::{self, CUresult};
use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The driver's functions that this module calls: `cudarc` panics on one that is missing.
const SYMBOLS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuMemFreeHost",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamQuery",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuLaunchCooperativeKernel",
];

/// Finds and starts the driver, once.
fn driver() -> Result<(), CudaError> {
    static STATE: OnceLock<Result<(), CudaError>> = OnceLock::new();
    STATE
        .get_or_init(|| {
            // SAFETY: looks for the library by its names; NVIDIA's may be loaded at any time.
            if !unsafe { sys::is_culib_present() } {
                return Err(CudaError::NoDriver);
            }
            // SAFETY: the library is there, so that this does not panic; the symbols are only looked for.
            let library = unsafe { sys::culib() };
            for symbol in SYMBOLS {
                // SAFETY: as above.
                if unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_err() {
                    return Err(CudaError::OldDriver { symbol });
                }
            }
            // SAFETY: the first call, as the driver wants it.
            check("cuInit", unsafe { sys::cuInit(0) })
        })
        .clone()
}

/// What to do about an error, as far as it can be said.
fn remedy(code: CUresult) -> &'static str {
    use CUresult::*;
    match code {
        CUDA_ERROR_NO_DEVICE => "look at CUDA_VISIBLE_DEVICES and nvidia-smi, or set target.device to cpu",
        CUDA_ERROR_OUT_OF_MEMORY => "end other programs on this GPU, or lower the limits in model.yaml",
        CUDA_ERROR_INVALID_IMAGE | CUDA_ERROR_NO_BINARY_FOR_GPU | CUDA_ERROR_NOT_FOUND => {
            "compile the model again for this GPU; if it is newer than the driver, update the driver"
        }
        CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => "the driver was updated: restart the machine",
        CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "another program has the GPU to itself: end it or choose another GPU"
        }
        CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE => {
            "other programs share the GPU's SMs (MPS?): give it the whole GPU"
        }
        CUDA_ERROR_LAUNCH_TIMEOUT => "the system limits kernels on a GPU with a display: use another GPU",
        CUDA_ERROR_LAUNCH_FAILED | CUDA_ERROR_ILLEGAL_INSTRUCTION | CUDA_ERROR_ILLEGAL_ADDRESS => {
            "the kernel is at fault: load the plan again; if it comes back, run the program under compute-sanitizer"
        }
        _ => "run `tilec doctor`; if the GPU is at fault, nvidia-smi and the system's log say more",
    }
}

fn check(call: &'static str, code: CUresult) -> Result<(), CudaError> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    type Ask = unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult;
    let ask = |ask: Ask| {
        let mut text = ptr::null();
        // SAFETY: writes a pointer to a static text of the driver's, or leaves null.
        unsafe {
            ask(code, &mut text);
            if text.is_null() {
                String::from("unknown")
            } else {
                CStr::from_ptr(text).to_string_lossy().into()
            }
        }
    };
    let (name, text) = (ask(sys::cuGetErrorName), ask(sys::cuGetErrorString));
    Err(CudaError::Call { call, number: code as u32, name, text, remedy: remedy(code) })
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The driver's number.
    pub number: usize,
    /// Its name.
    pub name: String,
    /// Streaming multiprocessors.
    pub sms: usize,
    /// Compute capability: major and minor.
    pub capability: (u32, u32),
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of shared memory that a block can have.
    pub shared_bytes: usize,
    /// Whether all blocks of a kernel can be made to run at once.
    pub cooperative: bool,
    /// Bytes per second that the memory's clock and width allow; `None` if the driver does not say.
    pub memory_rate: Option<u64>,
    /// CUDA version of the driver: major and minor.
    pub driver: (u32, u32),
}

impl DeviceInfo {
    /// The architecture to compile for, as NVIDIA names it: `sm_90a`.
    pub fn arch(&self) -> String {
        let (major, minor) = self.capability;
        // From 9.0 on the tensor cores need code for exactly this GPU.
        format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
    }
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, arch, sms) = (&self.name, self.arch(), self.sms);
        let (major, minor) = self.driver;
        write!(f, "{name} ({arch}, {sms} SMs, {}), driver for CUDA {major}.{minor}", Size(self.memory))
    }
}

/// All GPUs that the driver shows, by their numbers.
///
/// # Errors
/// [`CudaError`] if there is no driver or it fails; no GPU is none.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    match driver() {
        Err(CudaError::Call { number, .. }) if number == CUresult::CUDA_ERROR_NO_DEVICE as u32 => {
            return Ok(Vec::new());
        }
        other => other?,
    }
    (0..count()?).map(device).collect()
}

fn count() -> Result<usize, CudaError> {
    let mut count = 0;
    // SAFETY: the driver is started.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn handle(number: usize) -> Result<sys::CUdevice, CudaError> {
    let count = count()?;
    let ordinal = c_int::try_from(number).ok().filter(|_| number < count);
    let ordinal = ordinal.ok_or(CudaError::NoDevice { device: number, count })?;
    let mut raw = 0;
    // SAFETY: the driver is started.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut raw, ordinal) })?;
    Ok(raw)
}

fn device(number: usize) -> Result<DeviceInfo, CudaError> {
    use sys::CUdevice_attribute_enum::*;
    let raw = handle(number)?;
    let mut name = [0; 256];
    // SAFETY: the length is the array's; the driver ends the text with a zero.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 255, raw) })?;
    // SAFETY: as above; the last byte is zero in any case.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let mut memory = 0;
    // SAFETY: a question.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&mut memory, raw) })?;
    let mut version = 0;
    // SAFETY: a question.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    let attribute = |attribute| {
        let mut value = 0;
        // SAFETY: a question.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, raw) })?;
        Ok::<u32, CudaError>(value.max(0) as u32)
    };
    // Kilohertz and bits, two transfers a clock; newer drivers may not know the clock.
    let clock = attribute(CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).unwrap_or(0);
    let width = attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH).unwrap_or(0);
    let rate = u64::from(clock) * 1000 * 2 * u64::from(width) / 8;
    Ok(DeviceInfo {
        number,
        name,
        sms: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        capability: (
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory: memory as u64,
        shared_bytes: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        cooperative: attribute(CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? != 0,
        memory_rate: (rate > 0).then_some(rate),
        driver: ((version / 1000) as u32, (version % 1000 / 10) as u32),
    })
}

/// The primary context of a GPU.
#[derive(Debug)]
pub struct Context {
    info: DeviceInfo,
    device: sys::CUdevice,
    raw: sys::CUcontext,
    /// Whether a kernel runs that may never end: freeing would wait for it.
    abandoned: AtomicBool,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`CudaError`] if there is no driver or no such GPU.
    pub fn open(number: usize) -> Result<Arc<Context>, CudaError> {
        match driver() {
            Err(CudaError::Call { number: code, .. }) if code == CUresult::CUDA_ERROR_NO_DEVICE as u32 => {
                return Err(CudaError::NoDevice { device: number, count: 0 });
            }
            other => other?,
        }
        let info = device(number)?;
        let device = handle(number)?;
        let mut raw = ptr::null_mut();
        // SAFETY: released when dropped.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device) })?;
        Ok(Arc::new(Context { info, device, raw, abandoned: AtomicBool::new(false) }))
    }

    /// The GPU.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Bytes of memory that are free now, and in all.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: a question.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// From now on nothing of this context is freed: a kernel may run for ever, and every call that
    /// frees would wait for it. The system takes everything back when the process ends.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives as long as `self`.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }

    /// Runs `free` unless that could wait for ever. What a call says that frees is of no use to anybody.
    fn release(&self, free: impl FnOnce()) {
        if !self.abandoned.load(Ordering::Relaxed) && self.enter().is_ok() {
            free();
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once; nothing that belongs to it is left: all of it holds an `Arc`.
        self.release(|| unsafe {
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        });
    }
}

/// Memory of a GPU, aligned to 256 bytes and more.
#[derive(Debug)]
pub struct DeviceMemory {
    context: Arc<Context>,
    address: u64,
}

impl DeviceMemory {
    /// `bytes` of uninitialised memory for `what`; `lower` names the limits that the size comes from.
    ///
    /// # Errors
    /// [`CudaError::Memory`] with what is free.
    pub fn new(
        context: &Arc<Context>,
        what: &'static str,
        bytes: usize,
        lower: &'static str,
    ) -> Result<DeviceMemory, CudaError> {
        context.enter()?;
        let mut address = 0;
        // SAFETY: freed when dropped. An allocation of nothing is an error of the driver's.
        match unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = context.memory()?;
                Err(CudaError::Memory { what, wanted: bytes as u64, free, total, lower })
            }
            code => {
                check("cuMemAlloc", code)?;
                Ok(DeviceMemory { context: Arc::clone(context), address })
            }
        }
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`; the driver waits for what may use it.
        self.context.release(|| unsafe {
            sys::cuMemFree_v2(self.address);
        });
    }
}

/// Page-locked memory of the host, which the GPU can read and write.
#[derive(Debug)]
pub struct PinnedMemory {
    context: Arc<Context>,
    host: NonNull<u8>,
    address: u64,
}

// SAFETY: owns its memory; the driver's functions may be called from any thread.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// `bytes` of zeros, cached on the host as usual.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<PinnedMemory, CudaError> {
        context.enter()?;
        let mut host = ptr::null_mut();
        // SAFETY: freed when dropped.
        let code = unsafe { sys::cuMemHostAlloc(&mut host, bytes.max(1), sys::CU_MEMHOSTALLOC_DEVICEMAP) };
        check("cuMemHostAlloc", code)?;
        let host = NonNull::new(host.cast::<u8>()).expect("an allocation that succeeded is not null");
        let mut memory = PinnedMemory { context: Arc::clone(context), host, address: 0 };
        // SAFETY: the memory is as long as this and nobody's yet.
        unsafe { host.write_bytes(0, bytes.max(1)) };
        // SAFETY: the memory was allocated to be mapped.
        let code = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut memory.address, host.as_ptr().cast(), 0) };
        check("cuMemHostGetDevicePointer", code)?;
        Ok(memory)
    }

    /// Its address on the host.
    pub fn host(&self) -> NonNull<u8> {
        self.host
    }

    /// Its address on the GPU.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`; the driver waits for what may use it.
        self.context.release(|| unsafe {
            sys::cuMemFreeHost(self.host.as_ptr().cast());
        });
    }
}

/// A queue of work, done in order.
#[derive(Debug)]
pub struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for Stream {}

impl Stream {
    /// An empty queue, beside all others.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn new(context: &Arc<Context>) -> Result<Stream, CudaError> {
        context.enter()?;
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: destroyed when dropped.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, flags) })?;
        Ok(Stream { context: Arc::clone(context), raw })
    }

    /// Whether everything that was queued is done.
    ///
    /// # Errors
    /// The error of the first thing that failed.
    pub fn idle(&self) -> Result<bool, CudaError> {
        self.context.enter()?;
        // SAFETY: a question about a stream that lives.
        match unsafe { sys::cuStreamQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("the kernel, seen by cuStreamQuery,", code).map(|()| true),
        }
    }

    /// Queues writing zeros.
    ///
    /// # Safety
    /// The memory is the GPU's, this long, and stays until this is done.
    ///
    /// # Errors
    /// [`CudaError`].
    pub unsafe fn zero(&self, at: u64, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.fill(at, 0, bytes) }
    }

    /// Queues writing `bytes` times `byte`.
    ///
    /// # Safety
    /// The memory is the GPU's, this long, and stays until this is done.
    ///
    /// # Errors
    /// [`CudaError`].
    pub unsafe fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), CudaError> {
        self.context.enter()?;
        // SAFETY: the caller's promise.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(at, byte, bytes, self.raw) })
    }

    /// Queues a copy from page-locked memory of the host.
    ///
    /// # Safety
    /// Both sides are this long and stay until this is done; the host's does not change before.
    ///
    /// # Errors
    /// [`CudaError`].
    pub unsafe fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), CudaError> {
        self.context.enter()?;
        // SAFETY: the caller's promise.
        check("cuMemcpyHtoDAsync", unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.raw) })
    }

    /// Queues a copy to page-locked memory of the host.
    ///
    /// # Safety
    /// Both sides are this long and stay until this is done; the host's is not touched before.
    ///
    /// # Errors
    /// [`CudaError`].
    pub unsafe fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), CudaError> {
        self.context.enter()?;
        // SAFETY: the caller's promise.
        check("cuMemcpyDtoHAsync", unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.raw) })
    }

    /// Queues a copy on the GPU.
    ///
    /// # Safety
    /// Both sides are this long, do not overlap, and stay until this is done.
    ///
    /// # Errors
    /// [`CudaError`].
    pub unsafe fn copy_within(&self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError> {
        self.context.enter()?;
        // SAFETY: the caller's promise.
        check("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.raw) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created in `new`.
        self.context.release(|| unsafe {
            sys::cuStreamDestroy_v2(self.raw);
        });
    }
}

/// A kernel of a cubin, ready to be launched on all SMs at once.
#[derive(Debug)]
pub struct Kernel {
    context: Arc<Context>,
    module: sys::CUmodule,
    function: sys::CUfunction,
    threads: u32,
    shared_bytes: u32,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for Kernel {}

impl Kernel {
    /// Loads function `name` of a cubin for blocks of `threads` with `shared_bytes` of dynamic shared
    /// memory, and checks that a block fits on an SM.
    ///
    /// # Safety
    /// `cubin` is one that a compiler made, whole: the driver reads as much as its headers say.
    ///
    /// # Errors
    /// [`CudaError`] if the cubin is for other GPUs or the kernel needs more than this one has.
    pub unsafe fn load(
        context: &Arc<Context>,
        cubin: &[u8],
        name: &str,
        threads: u32,
        shared_bytes: u32,
    ) -> Result<Kernel, CudaError> {
        context.enter()?;
        let info = context.info();
        let unfit = |problem| CudaError::Unfit { device: info.name.clone(), problem };
        if !info.cooperative {
            return Err(unfit("cannot run all blocks of a kernel at once".to_string()));
        }
        let mut module = ptr::null_mut();
        // SAFETY: the caller answers for the cubin.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) })?;
        let context = Arc::clone(context);
        let mut kernel = Kernel { context, module, function: ptr::null_mut(), threads, shared_bytes };
        let name = CString::new(name).expect("names of kernels are constants without a zero");
        // SAFETY: the module is loaded; the name ends with a zero.
        let code = unsafe { sys::cuModuleGetFunction(&mut kernel.function, module, name.as_ptr()) };
        check("cuModuleGetFunction", code)?;

        let most =
            kernel.attribute(sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
        if threads as usize > most {
            return Err(unfit(format!("runs {most} threads of this kernel in a block, it needs {threads}")));
        }
        let fixed = kernel.attribute(sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let wanted = fixed.saturating_add(shared_bytes as usize);
        let most = info.shared_bytes;
        if wanted > most {
            return Err(unfit(format!(
                "has {most} bytes of shared memory for a block, the kernel needs {wanted}"
            )));
        }
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // At most the GPU's limit, which is far below 2^31.
        // SAFETY: the function is loaded.
        let code = unsafe { sys::cuFuncSetAttribute(kernel.function, attribute, shared_bytes as c_int) };
        check("cuFuncSetAttribute", code)?;
        let mut blocks = 0;
        // SAFETY: the function is loaded.
        let code = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                kernel.function,
                threads as c_int,
                shared_bytes as usize,
            )
        };
        check("cuOccupancyMaxActiveBlocksPerMultiprocessor", code)?;
        if blocks < 1 {
            return Err(unfit(format!(
                "has no room on an SM for a block of {threads} threads and {wanted} bytes of shared memory"
            )));
        }
        Ok(kernel)
    }

    fn attribute(&self, attribute: sys::CUfunction_attribute) -> Result<usize, CudaError> {
        let mut value = 0;
        // SAFETY: a question about a function that is loaded.
        let code = unsafe { sys::cuFuncGetAttribute(&mut value, attribute, self.function) };
        check("cuFuncGetAttribute", code)?;
        Ok(usize::try_from(value).unwrap_or(0))
    }

    /// Queues one block on every SM, all at once.
    ///
    /// # Safety
    /// The kernel takes one `T` by value, and whatever it leads to stays valid until the kernel ends.
    ///
    /// # Errors
    /// [`CudaError`].
    pub unsafe fn launch<T: Copy>(&self, stream: &Stream, argument: &T) -> Result<(), CudaError> {
        self.context.enter()?;
        let mut parameters = [ptr::from_ref(argument).cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies the argument during the call; the rest is the caller's promise.
        let code = unsafe {
            sys::cuLaunchCooperativeKernel(
                self.function,
                self.context.info().sms as u32,
                1,
                1,
                self.threads,
                1,
                1,
                self.shared_bytes,
                stream.raw,
                parameters.as_mut_ptr(),
            )
        };
        check("cuLaunchCooperativeKernel", code)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: loaded in `load`.
        self.context.release(|| unsafe {
            sys::cuModuleUnload(self.module);
        });
    }
}

/// Whether a cubin for `arch` (`sm_90a`) runs on a GPU of this compute capability; `None` if that is no
/// name of an architecture.
pub fn runs_on(arch: &str, capability: (u32, u32)) -> Option<bool> {
    let rest = arch.strip_prefix("sm_")?;
    let digits = rest.trim_end_matches(['a', 'f']);
    let number: u32 = digits.parse().ok().filter(|_| digits.len() >= 2)?;
    let (major, minor) = (number / 10, number % 10);
    match &rest[digits.len()..] {
        // Later GPUs of a generation run code for earlier ones.
        "" | "f" => Some(major == capability.0 && minor <= capability.1),
        "a" => Some((major, minor) == capability),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_is_an_error_with_a_remedy() {
        // Machines with a driver have nothing to show here but that asking works.
        // SAFETY: looks for the library.
        if unsafe { sys::is_culib_present() } {
            return;
        }
        assert_eq!(devices(), Err(CudaError::NoDriver));
        let text = Context::open(0).unwrap_err().to_string();
        assert!(text.contains("libcuda.so.1") && text.contains("target.device cpu"), "{text}");
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn bytes_travel_to_a_gpu_and_back() {
        let bytes = 3 << 20;
        let context = Context::open(0).unwrap();
        println!("{}, {:?}", context.info(), context.info());
        let stream = Stream::new(&context).unwrap();
        let one = DeviceMemory::new(&context, "test", bytes, "nothing").unwrap();
        let other = DeviceMemory::new(&context, "test", bytes, "nothing").unwrap();
        let from = PinnedMemory::new(&context, bytes).unwrap();
        let to = PinnedMemory::new(&context, bytes).unwrap();
        let pattern: Vec<u8> = (0..bytes).map(|at| (at * 31 % 251) as u8).collect();
        // SAFETY: all ranges are inside of memory that stays until the stream is idle, and the host looks
        // only then.
        let found = unsafe {
            std::ptr::copy_nonoverlapping(pattern.as_ptr(), from.host().as_ptr(), bytes);
            stream.copy_in(one.address(), from.host().as_ptr(), bytes).unwrap();
            stream.copy_within(other.address() + 512, one.address(), bytes - 512).unwrap();
            stream.zero(other.address(), 512).unwrap();
            stream.copy_out(to.host().as_ptr(), other.address(), bytes).unwrap();
            while !stream.idle().unwrap() {
                std::thread::yield_now();
            }
            std::slice::from_raw_parts(to.host().as_ptr(), bytes)
        };
        assert!(found[..512].iter().all(|byte| *byte == 0));
        assert!(found[512..] == pattern[..bytes - 512]);
        let (free, total) = context.memory().unwrap();
        let error = DeviceMemory::new(&context, "KV cache", total as usize, "limits.context").unwrap_err();
        assert!(free < total && error.to_string().contains("no GPU memory for the KV cache"), "{error}");
        // SAFETY: no cubin at all; the driver reads its magic number and refuses.
        let error = unsafe { Kernel::load(&context, &[0; 4096], "none", 32, 0) }.unwrap_err();
        assert!(error.to_string().contains("cuModuleLoadData failed"), "{error}");
        assert!(matches!(Context::open(99), Err(CudaError::NoDevice { device: 99, .. })));
    }

    #[test]
    fn a_gpu_reads_well() {
        let mut gpu = DeviceInfo {
            number: 0,
            name: "NVIDIA H200".into(),
            sms: 132,
            capability: (9, 0),
            memory: 150 << 30,
            shared_bytes: 232_448,
            cooperative: true,
            memory_rate: None,
            driver: (13, 0),
        };
        assert_eq!(gpu.to_string(), "NVIDIA H200 (sm_90a, 132 SMs, 150.00 GiB), driver for CUDA 13.0");
        assert_eq!(runs_on(&gpu.arch(), gpu.capability), Some(true));
        gpu.capability = (8, 9);
        assert_eq!(gpu.arch(), "sm_89");
    }

    #[test]
    fn architectures_are_matched_as_the_driver_does() {
        assert_eq!(runs_on("sm_80", (8, 0)), Some(true));
        assert_eq!(runs_on("sm_80", (8, 9)), Some(true));
        assert_eq!(runs_on("sm_89", (8, 0)), Some(false));
        assert_eq!(runs_on("sm_80", (9, 0)), Some(false));
        assert_eq!(runs_on("sm_90a", (9, 0)), Some(true));
        assert_eq!(runs_on("sm_100a", (10, 3)), Some(false));
        assert_eq!(runs_on("sm_100f", (10, 3)), Some(true));
        assert_eq!(runs_on("sm_120a", (12, 0)), Some(true));
        for bad in ["", "x86_64", "sm_", "sm_9", "sm_a", "sm_90aa", "compute_90"] {
            assert_eq!(runs_on(bad, (9, 0)), None, "{bad}");
        }
    }
}
