//! What the engine needs of a GPU: memory, copies, and a kernel that is launched. Tests have a device
//! in software.

use super::driver::{Context, DeviceInfo, DeviceMemory, Kernel, PinnedMemory, Stream, runs_on};
use super::error::CudaError;
use sha2::{Digest, Sha256};
use std::any::Any;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use tilec_ir::launch::{KERNEL, LaunchArgs};
use tilec_ir::plan::{DraftPlan, Plan, PlanFile, ResidentPlan};

/// Memory of a device; freed when dropped.
pub struct Memory {
    address: u64,
    bytes: usize,
    _owner: Box<dyn Any + Send>,
}

impl Memory {
    /// `bytes` at `address`, which stay for as long as `owner` lives.
    pub fn new(address: u64, bytes: usize, owner: Box<dyn Any + Send>) -> Memory {
        Memory { address, bytes, _owner: owner }
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Page-locked memory of the host that the device reads and writes; freed when dropped.
pub struct HostMemory {
    host: NonNull<u8>,
    address: u64,
    bytes: usize,
    _owner: Box<dyn Any + Send>,
}

// SAFETY: owns its memory.
unsafe impl Send for HostMemory {}

impl HostMemory {
    /// `bytes`, seen at `host` here and at `address` by the device.
    ///
    /// # Safety
    /// The memory is there and nobody else's for as long as `owner` lives, initialised, and aligned to
    /// 64 bytes.
    pub unsafe fn new(
        host: NonNull<u8>,
        address: u64,
        bytes: usize,
        owner: Box<dyn Any + Send>,
    ) -> HostMemory {
        HostMemory { host, address, bytes, _owner: owner }
    }

    /// The device's address of it.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its words, which both sides may touch at any time.
    pub fn words(&self) -> &[AtomicU32] {
        // SAFETY: aligned, this long, initialised; nobody writes it but through atomics or the device.
        unsafe { std::slice::from_raw_parts(self.host.as_ptr().cast(), self.bytes / 4) }
    }

    /// Its bytes.
    ///
    /// # Safety
    /// Nothing that is queued on the device writes them for as long as the result is there.
    ///
    /// # Panics
    /// If the range is not inside.
    pub unsafe fn slice(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range inside of the memory");
        // SAFETY: inside, initialised; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.host.as_ptr().add(range.start), range.len()) }
    }

    /// Its bytes.
    ///
    /// # Safety
    /// Nothing that is queued on the device reads or writes them for as long as the result is there.
    ///
    /// # Panics
    /// If the range is not inside.
    pub unsafe fn slice_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range inside of the memory");
        // SAFETY: inside, initialised; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.host.as_ptr().add(range.start), range.len()) }
    }
}

/// A kernel of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The model's step.
    Model,
    /// Makes a draft's context.
    Inject,
    /// A block of a draft.
    Block,
    /// Whole rounds of a draft.
    Round,
}

/// A device with a plan's kernels. Work is queued and done in order.
///
/// The `unsafe` functions want what they are given to stay, and host memory not to be touched (or, where
/// it is only read, not to be written), until [`Device::idle`] says that all is done.
pub trait Device: Send {
    /// Blocks of a launch: the SMs.
    fn blocks(&self) -> usize;

    /// Bytes per second that the memory can deliver at best, if that is known.
    fn memory_rate(&self) -> Option<u64>;

    /// Bytes of the kernels' code.
    fn code_bytes(&self) -> usize;

    /// `bytes` of uninitialised memory for `what`; `lower` names the limits that the size comes from. A
    /// size of `None` is one that overflowed.
    ///
    /// # Errors
    /// [`CudaError`] with what is wanted and what is free.
    fn allocate(
        &self,
        what: &'static str,
        bytes: Option<usize>,
        lower: &'static str,
    ) -> Result<Memory, CudaError>;

    /// `bytes` of page-locked, zeroed memory of the host.
    ///
    /// # Errors
    /// [`CudaError`].
    fn allocate_host(&self, bytes: usize) -> Result<HostMemory, CudaError>;

    /// Queues zeros.
    ///
    /// # Safety
    /// See [`Device`]; the range is inside of memory of this device.
    ///
    /// # Errors
    /// [`CudaError`].
    unsafe fn zero(&mut self, at: u64, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.fill(at, 0, bytes) }
    }

    /// Queues `bytes` times `byte`.
    ///
    /// # Safety
    /// See [`Device`]; the range is inside of memory of this device.
    ///
    /// # Errors
    /// [`CudaError`].
    unsafe fn fill(&mut self, at: u64, byte: u8, bytes: usize) -> Result<(), CudaError>;

    /// Queues a copy of the range `from` of `host` to the device.
    ///
    /// # Safety
    /// See [`Device`]; both ranges are inside.
    ///
    /// # Errors
    /// [`CudaError`].
    unsafe fn copy_in(&mut self, to: u64, host: &HostMemory, from: Range<usize>) -> Result<(), CudaError>;

    /// Queues a copy from the device to the range `to` of `host`.
    ///
    /// # Safety
    /// See [`Device`]; both ranges are inside.
    ///
    /// # Errors
    /// [`CudaError`].
    unsafe fn copy_out(&mut self, host: &HostMemory, to: Range<usize>, from: u64) -> Result<(), CudaError>;

    /// Queues a copy on the device between ranges that do not overlap.
    ///
    /// # Safety
    /// See [`Device`]; both ranges are inside.
    ///
    /// # Errors
    /// [`CudaError`].
    unsafe fn copy_within(&mut self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError>;

    /// Queues a launch of a kernel.
    ///
    /// # Safety
    /// See [`Device`]; the arguments are as [`LaunchArgs`] says.
    ///
    /// # Errors
    /// [`CudaError`].
    unsafe fn launch(&mut self, program: Program, args: &LaunchArgs) -> Result<(), CudaError>;

    /// Whether everything that was queued is done.
    ///
    /// # Errors
    /// What the work failed with.
    fn idle(&mut self) -> Result<bool, CudaError>;

    /// From now on nothing is freed: a kernel runs that may never end.
    fn abandon(&mut self);
}

/// Kernels of a draft.
struct DraftKernels<T> {
    inject: T,
    block: T,
    round: Option<T>,
}

impl<T> DraftKernels<T> {
    /// The same of something else.
    fn try_map<U, E>(&self, of: impl Fn(&T) -> Result<U, E>) -> Result<DraftKernels<U>, E> {
        let round = self.round.as_ref().map(&of).transpose()?;
        Ok(DraftKernels { inject: of(&self.inject)?, block: of(&self.block)?, round })
    }
}

/// A GPU with a plan's kernels.
pub struct Gpu {
    stream: Stream,
    kernel: Kernel,
    /// What makes a draft's context, a block, and whole rounds where there is such a kernel.
    draft: Option<DraftKernels<Kernel>>,
    context: Arc<Context>,
    code_bytes: usize,
}

impl Gpu {
    /// Opens GPU `number` and loads the kernel of the plan in `folder`, and those of its draft if it is
    /// to run, after checking their sums and that this GPU can run them.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn open(number: usize, folder: &Path, plan: &Plan, draft: bool) -> Result<Gpu, CudaError> {
        let cubin = Cubin::read(folder, &plan.code, plan.resident)?;
        let draft = match plan.draft.as_ref().filter(|_| draft) {
            Some(DraftPlan { inject, block_pass: block, round, .. }) => {
                let programs = DraftKernels { inject, block, round: round.as_ref() };
                Some(programs.try_map(|program| Cubin::read(folder, &program.code, program.resident))?)
            }
            None => None,
        };
        let context = Context::open(number)?;
        fits(&plan.target.arch, context.info())?;
        let stream = Stream::new(&context)?;
        let of_draft =
            draft.iter().flat_map(|draft| [&draft.inject, &draft.block].into_iter().chain(&draft.round));
        let all = std::iter::once(&cubin).chain(of_draft);
        let code_bytes = all.map(|cubin| cubin.bytes.len()).sum();
        let kernel = cubin.load(&context)?;
        let draft = draft.map(|draft| draft.try_map(|cubin| cubin.load(&context))).transpose()?;
        Ok(Gpu { stream, kernel, draft, context, code_bytes })
    }
}

/// Machine code that the compiler wrote.
struct Cubin {
    bytes: Vec<u8>,
    resident: ResidentPlan,
}

impl Cubin {
    /// Reads a file of the plan in `folder` and checks its sum.
    fn read(folder: &Path, file: &PlanFile, resident: Option<ResidentPlan>) -> Result<Cubin, CudaError> {
        let path = folder.join(&file.file);
        let fault = |problem: String| CudaError::Code { path: path.clone(), problem };
        let resident = resident.ok_or_else(|| fault("the plan has no resident kernel".into()))?;
        let bytes = std::fs::read(&path).map_err(|error| fault(error.to_string()))?;
        let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        if !found.eq_ignore_ascii_case(&file.sha256) {
            return Err(fault(format!("its SHA-256 is {found}, the plan says {}", file.sha256)));
        }
        Ok(Cubin { bytes, resident })
    }

    fn load(&self, context: &Arc<Context>) -> Result<Kernel, CudaError> {
        let ResidentPlan { threads, shared_bytes, .. } = self.resident;
        // SAFETY: the file is the one that the compiler wrote: its sum is the plan's.
        unsafe { Kernel::load(context, &self.bytes, KERNEL, threads, shared_bytes) }
    }
}

/// Checks that code for `arch` runs on a GPU.
fn fits(arch: &str, gpu: &DeviceInfo) -> Result<(), CudaError> {
    if runs_on(arch, gpu.capability) == Some(true) {
        return Ok(());
    }
    Err(CudaError::Arch {
        arch: arch.into(),
        device: gpu.name.clone(),
        capability: gpu.capability,
        wanted: gpu.arch(),
    })
}

impl Device for Gpu {
    fn blocks(&self) -> usize {
        self.context.info().sms
    }

    fn memory_rate(&self) -> Option<u64> {
        self.context.info().memory_rate
    }

    fn code_bytes(&self) -> usize {
        self.code_bytes
    }

    fn allocate(
        &self,
        what: &'static str,
        bytes: Option<usize>,
        lower: &'static str,
    ) -> Result<Memory, CudaError> {
        let bytes = bytes.ok_or(CudaError::Overflow { what, lower })?;
        let memory = DeviceMemory::new(&self.context, what, bytes, lower)?;
        Ok(Memory::new(memory.address(), bytes, Box::new(memory)))
    }

    fn allocate_host(&self, bytes: usize) -> Result<HostMemory, CudaError> {
        let memory = PinnedMemory::new(&self.context, bytes)?;
        let (host, address) = (memory.host(), memory.address());
        // SAFETY: zeroed and this long; pages are aligned to more than 64 bytes.
        Ok(unsafe { HostMemory::new(host, address, bytes, Box::new(memory)) })
    }

    unsafe fn fill(&mut self, at: u64, byte: u8, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.fill(at, byte, bytes) }
    }

    unsafe fn copy_in(&mut self, to: u64, host: &HostMemory, from: Range<usize>) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.copy_in(to, host.host.as_ptr().add(from.start), from.len()) }
    }

    unsafe fn copy_out(&mut self, host: &HostMemory, to: Range<usize>, from: u64) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.copy_out(host.host.as_ptr().add(to.start), from, to.len()) }
    }

    unsafe fn copy_within(&mut self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.copy_within(to, from, bytes) }
    }

    unsafe fn launch(&mut self, program: Program, args: &LaunchArgs) -> Result<(), CudaError> {
        let kernel = match (program, &self.draft) {
            (Program::Inject, Some(draft)) => &draft.inject,
            (Program::Block, Some(draft)) => &draft.block,
            (Program::Round, Some(DraftKernels { round: Some(round), .. })) => round,
            (Program::Model, _) => &self.kernel,
            (_, _) => {
                let problem = "the plan's draft was not loaded, or has no such kernel".into();
                return Err(CudaError::Code { path: KERNEL.into(), problem });
            }
        };
        // SAFETY: the plan's kernels take these arguments; the rest is the caller's promise.
        unsafe { kernel.launch(&self.stream, args) }
    }

    fn idle(&mut self) -> Result<bool, CudaError> {
        self.stream.idle()
    }

    fn abandon(&mut self) {
        self.context.abandon();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_for_another_gpu_says_what_to_compile_for() {
        let gpu = |name: &str, capability| DeviceInfo {
            number: 0,
            name: name.into(),
            sms: 1,
            capability,
            memory: 0,
            shared_bytes: 0,
            cooperative: true,
            memory_rate: None,
            driver: (13, 0),
        };
        fits("sm_90a", &gpu("H200", (9, 0))).unwrap();
        let text = fits("sm_90a", &gpu("B200", (10, 0))).unwrap_err().to_string();
        assert!(text.contains("kernel is for sm_90a, B200 has compute capability 10.0"), "{text}");
        assert!(text.contains("target.arch to sm_100a"), "{text}");
        let text = fits("sm_90a", &gpu("L4", (8, 9))).unwrap_err().to_string();
        assert!(text.contains("target.arch to sm_89 in"), "{text}");
        fits("nonsense", &gpu("L4", (8, 9))).unwrap_err();
    }

    #[test]
    fn a_kernel_that_is_damaged_or_missing_is_refused_before_the_driver_is_asked() {
        let folder = tempfile::tempdir().unwrap();
        let mut plan = crate::cuda::fake::cuda_plan();
        let refused =
            |plan: &Plan| Gpu::open(0, folder.path(), plan, true).map(|_| ()).unwrap_err().to_string();
        let text = refused(&plan);
        assert!(text.contains("kernel.o") && text.contains("compile the model again"), "{text}");
        std::fs::write(folder.path().join(&plan.code.file), b"cubin").unwrap();
        plan.code.sha256 = "00".into();
        assert!(refused(&plan).contains("the plan says 00"), "{}", refused(&plan));
        plan.resident = None;
        assert!(refused(&plan).contains("no resident kernel"), "{}", refused(&plan));
    }
}
