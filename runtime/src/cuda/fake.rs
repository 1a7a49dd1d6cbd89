//! A device in software: memory is the host's, a thread does what is queued, and a function is the
//! kernel. The toy kernel is the one of the processor's tests: its next token is the sum of all tokens in
//! the context, which it remembers in the cache's pages.

use super::device::{Device, HostMemory, Memory, Program};
use super::error::CudaError;
use crate::engine::tests::{VOCAB, toy_plan};
use crate::engine::{Engine, EngineOptions};
use crate::sampling::choose_as_kernels;
use std::alloc::{Layout, alloc, dealloc};
use std::ops::Range;
use std::ptr::{NonNull, write_bytes};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tilec_ir::abi::KvLayout;
use tilec_ir::launch::{
    LAUNCH_ROWS, LAUNCH_VERSION, LaunchArgs, SLICE_ROWS, STALL_WORDS, SYNC_BYTES, SampleRow, TRACE_FIELDS,
};
use tilec_ir::plan::{Plan, ResidentPlan};

/// SMs of the device.
pub const BLOCKS: usize = 3;

/// What a launch runs.
pub type FakeKernel = Arc<dyn Fn(&LaunchArgs) -> Result<(), CudaError> + Send + Sync>;

type Job = Box<dyn FnOnce() -> Result<(), CudaError> + Send>;

/// What tests see of the device.
#[derive(Default)]
pub struct Seen {
    /// Arguments of every launch of the model's kernel.
    pub launches: Mutex<Vec<LaunchArgs>>,
    /// Arguments of every launch of rounds.
    pub rounds: Mutex<Vec<LaunchArgs>>,
    /// Which kernels were launched.
    pub programs: Mutex<Vec<Program>>,
    /// Copies to the device.
    pub copies_in: AtomicUsize,
    /// Bytes of device memory that are held.
    pub held: AtomicU64,
    /// Bytes that there are; 0 is any number.
    pub limit: AtomicU64,
    abandoned: AtomicBool,
    pending: AtomicUsize,
    failed: Mutex<Option<CudaError>>,
}

/// See the module.
pub struct FakeDevice {
    seen: Arc<Seen>,
    kernel: FakeKernel,
    draft: Option<[FakeKernel; 2]>,
    round: Option<FakeKernel>,
    queue: Sender<Job>,
}

impl FakeDevice {
    /// A device with a kernel, and with those of a draft: that which injects, and that of a block.
    pub fn with_draft(kernel: FakeKernel, draft: [FakeKernel; 2]) -> FakeDevice {
        FakeDevice { draft: Some(draft), ..FakeDevice::new(kernel) }
    }

    /// The same with a kernel of whole rounds.
    pub fn with_rounds(self, round: FakeKernel) -> FakeDevice {
        FakeDevice { round: Some(round), ..self }
    }

    /// A device with a kernel.
    pub fn new(kernel: FakeKernel) -> FakeDevice {
        let seen = Arc::new(Seen::default());
        let (queue, jobs) = channel::<Job>();
        let state = Arc::clone(&seen);
        std::thread::spawn(move || {
            for job in jobs {
                // As on a GPU, nothing happens after an error.
                let failed = state.failed.lock().unwrap().is_some();
                if let Some(error) = (!failed).then(job).and_then(Result::err) {
                    *state.failed.lock().unwrap() = Some(error);
                }
                state.pending.fetch_sub(1, Ordering::AcqRel);
            }
        });
        FakeDevice { seen, kernel, draft: None, round: None, queue }
    }

    /// What tests see.
    pub fn seen(&self) -> Arc<Seen> {
        Arc::clone(&self.seen)
    }

    fn queue(&self, job: impl FnOnce() -> Result<(), CudaError> + Send + 'static) -> Result<(), CudaError> {
        self.seen.pending.fetch_add(1, Ordering::AcqRel);
        self.queue.send(Box::new(job)).unwrap();
        Ok(())
    }
}

struct Block {
    address: NonNull<u8>,
    layout: Layout,
    device: bool,
    seen: Arc<Seen>,
}

// SAFETY: owns its memory.
unsafe impl Send for Block {}

impl Block {
    fn new(bytes: usize, device: bool, seen: &Arc<Seen>) -> Block {
        let layout = Layout::from_size_align(bytes.max(1), 256).unwrap();
        // SAFETY: not of size zero; written whole before anybody reads it.
        let address = unsafe {
            let address = NonNull::new(alloc(layout)).unwrap();
            // Device memory holds anything at first.
            write_bytes(address.as_ptr(), if device { 0xa5 } else { 0 }, layout.size());
            address
        };
        if device {
            seen.held.fetch_add(bytes.max(1) as u64, Ordering::Relaxed);
        }
        Block { address, layout, device, seen: Arc::clone(seen) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.seen.abandoned.load(Ordering::Relaxed) {
            return;
        }
        while self.seen.pending.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        if self.device {
            self.seen.held.fetch_sub(self.layout.size() as u64, Ordering::Relaxed);
        }
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.address.as_ptr(), self.layout) };
    }
}

impl Device for FakeDevice {
    fn blocks(&self) -> usize {
        BLOCKS
    }

    fn memory_rate(&self) -> Option<u64> {
        Some(1_000_000)
    }

    fn code_bytes(&self) -> usize {
        100
    }

    fn allocate(
        &self,
        what: &'static str,
        bytes: Option<usize>,
        lower: &'static str,
    ) -> Result<Memory, CudaError> {
        let bytes = bytes.ok_or(CudaError::Overflow { what, lower })?;
        let (held, total) = (self.seen.held.load(Ordering::Relaxed), self.seen.limit.load(Ordering::Relaxed));
        if total > 0 && held + bytes as u64 > total {
            return Err(CudaError::Memory { what, wanted: bytes as u64, free: total - held, total, lower });
        }
        let block = Block::new(bytes, true, &self.seen);
        Ok(Memory::new(block.address.as_ptr() as u64, bytes, Box::new(block)))
    }

    fn allocate_host(&self, bytes: usize) -> Result<HostMemory, CudaError> {
        let block = Block::new(bytes, false, &self.seen);
        let host = block.address;
        // SAFETY: zeroed, this long, aligned.
        Ok(unsafe { HostMemory::new(host, host.as_ptr() as u64, bytes, Box::new(block)) })
    }

    unsafe fn fill(&mut self, at: u64, byte: u8, bytes: usize) -> Result<(), CudaError> {
        self.queue(move || {
            // SAFETY: the caller's promise.
            unsafe { write_bytes(at as *mut u8, byte, bytes) };
            Ok(())
        })
    }

    unsafe fn copy_in(&mut self, to: u64, host: &HostMemory, from: Range<usize>) -> Result<(), CudaError> {
        self.seen.copies_in.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { self.copy_within(to, host.address() + from.start as u64, from.len()) }
    }

    unsafe fn copy_out(&mut self, host: &HostMemory, to: Range<usize>, from: u64) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.copy_within(host.address() + to.start as u64, from, to.len()) }
    }

    unsafe fn copy_within(&mut self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError> {
        self.queue(move || {
            if bytes == 4 {
                // A word may be watched meanwhile.
                // SAFETY: the caller's promise; words are aligned.
                unsafe { (*(to as *const AtomicU32)).store(*(from as *const u32), Ordering::Release) };
            } else {
                // SAFETY: the caller's promise.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
            }
            Ok(())
        })
    }

    unsafe fn launch(&mut self, program: Program, args: &LaunchArgs) -> Result<(), CudaError> {
        let kernel = match (program, &self.draft) {
            (Program::Model, _) => &self.kernel,
            (Program::Inject, Some([inject, _])) => inject,
            (Program::Block, Some([_, block])) => block,
            (Program::Round, Some(_)) => self.round.as_ref().expect("a kernel of rounds"),
            (_, None) => panic!("the device has no draft"),
        };
        let (args, kernel) = (*args, Arc::clone(kernel));
        if program == Program::Model {
            self.seen.launches.lock().unwrap().push(args);
        }
        if program == Program::Round {
            self.seen.rounds.lock().unwrap().push(args);
        }
        self.seen.programs.lock().unwrap().push(program);
        self.queue(move || kernel(&args))
    }

    fn idle(&mut self) -> Result<bool, CudaError> {
        if let Some(error) = &*self.seen.failed.lock().unwrap() {
            return Err(error.clone());
        }
        Ok(self.seen.pending.load(Ordering::Acquire) == 0)
    }

    fn abandon(&mut self) {
        self.seen.abandoned.store(true, Ordering::Relaxed);
    }
}

/// What a driver says of a kernel that trapped.
pub fn trap() -> CudaError {
    CudaError::Call {
        call: "cuStreamQuery",
        number: 719,
        name: "CUDA_ERROR_LAUNCH_FAILED".into(),
        text: "unspecified launch failure".into(),
        remedy: "load the plan again",
    }
}

/// A plan of the toy for a GPU: 3 sequences, 20 rows.
pub fn cuda_plan() -> Plan {
    let mut plan = toy_plan(1);
    plan.target.device = "cuda".into();
    plan.target.arch = "sm_90a".into();
    plan.resident = Some(ResidentPlan {
        launch_version: LAUNCH_VERSION,
        threads: 288,
        shared_bytes: 1 << 16,
        step_rows: SLICE_ROWS,
    });
    plan.limits.sequences = 3;
    plan.limits.max_rows = 20;
    plan.buffers[0].rows = 20;
    plan.verify().unwrap();
    plan
}

/// An engine on a plan of the toy and what its device sees.
pub fn fake_engine_on(plan: Plan, kernel: FakeKernel, options: &EngineOptions) -> (Engine, Arc<Seen>) {
    let device = FakeDevice::new(kernel);
    let seen = device.seen();
    (Engine::on_device(plan, Box::new(device), options).unwrap(), seen)
}

/// An engine on the toy.
pub fn fake_engine(options: &EngineOptions) -> (Engine, Arc<Seen>) {
    fake_engine_on(cuda_plan(), toy_kernel(cuda_plan().kv), options)
}

/// Where the toy keeps the token of a position: the first dimension of the last layer's last key.
///
/// # Safety
/// The arguments are those of a launch, and the position has a page.
pub unsafe fn cell(layout: &KvLayout, args: &LaunchArgs, sequence: u32, position: u32) -> *mut f32 {
    let (entry, lane) = (position as usize / layout.page_tokens, position as usize % layout.page_tokens);
    assert!(entry < args.pages_per_sequence as usize);
    // SAFETY: the table has this entry, the cache this block and lane.
    unsafe {
        let entry = sequence as usize * args.pages_per_sequence as usize + entry;
        let page = *(args.page_table as *const u32).add(entry);
        assert!(page < args.kv_pages);
        let (layer, head) = (layout.layers - 1, layout.kv_heads - 1);
        let offset = layout.block_offset(args.kv_pages as usize, layer, page as usize, head);
        (args.kv as *mut u8).add(offset).cast::<f32>().add(lane * layout.qk_dim)
    }
}

/// The toy. Takes a millisecond for a step of a launch of several.
pub fn toy_kernel(layout: KvLayout) -> FakeKernel {
    // SAFETY: the engine keeps the arguments valid.
    Arc::new(move |args| unsafe {
        let rows = args.rows as usize;
        assert!((1..=LAUNCH_ROWS).contains(&rows) && args.logit_rows <= args.rows && args.steps >= 1);
        let column = |address: u64| std::slice::from_raw_parts(address as *const u32, rows).to_vec();
        let (mut tokens, mut positions) = (column(args.tokens), column(args.positions));
        let (sequences, wanted) = (column(args.sequences), column(args.logit_index));
        let wanted = &wanted[..args.logit_rows as usize];
        let stops = &args.stop_tokens[..args.stop_count as usize];
        assert!(args.steps == 1 || (args.logit_rows == args.rows && args.chosen != 0));
        let sync = std::slice::from_raw_parts(args.sync as *const u8, SYNC_BYTES);
        assert!(sync.iter().all(|byte| *byte == 0), "the counters start at zero");
        for step in 0..args.steps as usize {
            for row in 0..rows {
                let cell = cell(&layout, args, sequences[row], positions[row]);
                if (positions[row] as usize).is_multiple_of(layout.page_tokens) && *cell == 0.0 {
                    let page = std::slice::from_raw_parts(cell, layout.page_tokens * layout.qk_dim);
                    assert!(page.iter().all(|value| *value == 0.0), "pages start zeroed");
                }
                *cell = tokens[row] as f32;
            }
            let mut chosen = vec![0; wanted.len()];
            for (at, row) in wanted.iter().map(|row| *row as usize).enumerate() {
                let values = (0..=positions[row]).map(|at| *self::cell(&layout, args, sequences[row], at));
                let best = values.sum::<f32>() as usize % VOCAB;
                let logits = (args.logits as *mut f32).add(at * VOCAB);
                for token in 0..VOCAB {
                    *logits.add(token) = if token == best { 1.0 } else { 0.0 };
                }
                chosen[at] = best as u32;
                if args.sampling != 0 {
                    let parameters = *(args.sampling as *const SampleRow).add(at);
                    let logits = std::slice::from_raw_parts(logits, VOCAB);
                    let position = u64::from(positions[row]) + 1;
                    chosen[at] = choose_as_kernels(logits, &parameters, position).unwrap();
                }
            }
            if args.trace != 0 {
                for block in 0..BLOCKS {
                    // Stage 1 of the two.
                    let record = (args.trace as *mut u64).add((block * 2 + 1) * TRACE_FIELDS);
                    (0..TRACE_FIELDS).for_each(|field| *record.add(field) = (block * 10 + field + 1) as u64);
                }
            }
            if args.chosen != 0 {
                if args.steps > 1 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                for (row, token) in chosen.iter().enumerate() {
                    let word = (args.chosen as *const AtomicU32).add(step * LAUNCH_ROWS + row);
                    (*word).store(token + 1, Ordering::Release);
                }
            }
            let halt = (*(args.halt as *const AtomicU32)).load(Ordering::Acquire) != 0;
            if halt || chosen.iter().any(|token| stops.contains(token)) {
                break;
            }
            tokens = chosen;
            positions.iter_mut().for_each(|position| *position += 1);
        }
        Ok(())
    })
}

/// A kernel that leaves a record of a stuck wait and traps.
pub fn stuck_kernel(record: [u32; STALL_WORDS]) -> FakeKernel {
    Arc::new(move |args| {
        for (at, value) in record.iter().enumerate().rev() {
            // SAFETY: the engine keeps the record's memory.
            unsafe { (*(args.stall as *const AtomicU32).add(at)).store(*value, Ordering::Release) };
        }
        Err(trap())
    })
}
