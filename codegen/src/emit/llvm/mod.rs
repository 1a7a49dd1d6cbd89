//! The LLVM backend: one entry function that every worker calls once a step, with the schedule as
//! straight code, a loop over the layers, and a function for each stage.

mod draft;
mod experts;
mod scalar;
mod stage;

use inkwell::context::Context;
use inkwell::module::{Linkage, Module};
use inkwell::targets::FileType;
use inkwell::values::{BasicValue, FunctionValue, IntValue, PointerValue};
use inkwell::{AtomicOrdering, AtomicRMWBinOp, IntPredicate};
use scalar::Scalar;
use std::collections::HashMap;
use std::mem::offset_of;
use tilec_ir::abi::QuantRows;
use tilec_ir::abi::{COUNTER_STRIDE, ENTRY, StepArgs};
use tilec_ir::format::PANEL;
use tilec_ir::schedule::{Instr, Schedule, Share};
use tilec_ir::stages::{Stage, StageAnchor, StagePiece, StageProgram};
use tilec_kernels_gen::attention::Attention;
use tilec_kernels_gen::conv::DynamicConv;
use tilec_kernels_gen::experts::{ExpertLists, Route};
use tilec_kernels_gen::gemm::{Activations, Gemm};
use tilec_kernels_gen::llvm::{Kernels, machine, optimize};
use tilec_kernels_gen::pieces::{Glu, HeadNorm, KvWrite, Rope, Scale};
use tilec_kernels_gen::rows::{Embed, Quantize, RmsNorm};
use tilec_kernels_gen::selector::{PairScores, TopK};
use tilec_kernels_gen::{KernelError, Target};

/// Spins between two looks at whether another worker has given up, and two yields of the processor:
/// a few microseconds. The hand-offs of an undisturbed step are shorter; a longer wait means that the
/// worker that is waited for does not run, perhaps because this one holds its processor.
const SPINS_PER_LOOK: u64 = 128;

/// Why no code could be made.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    /// A kernel refused its shapes or the target.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The workers' programs differ in more than their shares.
    #[error("worker {worker}'s program has another shape than worker 0's; one entry cannot run both")]
    Programs {
        /// The worker.
        worker: usize,
    },
    /// LLVM could not write the object.
    #[error("LLVM: {0}")]
    Llvm(String),
}

/// Native code of a scheduled program.
#[derive(Debug)]
pub struct Native {
    /// A relocatable ELF object.
    pub object: Vec<u8>,
    /// The module's text before optimization.
    pub text: String,
    /// Private scratch that each worker needs.
    pub scratch_bytes: usize,
}

/// Sizes of a worker's scratch: the tile, what kernels ask for, then for experts the sums of a tile,
/// the rows of each expert, and one expert's rows of activations.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scratch {
    tile: usize,
    kernel: usize,
    sums: usize,
    lists: usize,
    gathered: usize,
}

impl Scratch {
    fn bytes(&self) -> usize {
        self.gathered_at() + self.gathered
    }

    fn sums_at(&self) -> usize {
        self.tile + self.kernel
    }

    fn lists_at(&self) -> usize {
        self.sums_at() + self.sums
    }

    fn gathered_at(&self) -> usize {
        self.lists_at() + self.lists
    }
}

/// Emits the code of a scheduled program.
///
/// # Errors
/// [`EmitError`].
pub fn emit(program: &StageProgram, schedule: &Schedule, target: &Target) -> Result<Native, EmitError> {
    let context = Context::create();
    let module = context.create_module("tilec");
    // A fixed name: the text and the object must not depend on where they are made.
    module.set_source_file_name("tilec");
    let mut emitter = Emitter {
        kernels: Kernels::new(&context, &module, target),
        program,
        scratch: scratch(program),
        known: HashMap::new(),
        tables: 0,
    };
    emitter.step(schedule)?;
    let text = module.print_to_string().to_string();
    let machine = machine(target)?;
    optimize(&module, &machine)?;
    let object = machine
        .write_to_memory_buffer(&module, FileType::Object)
        .map_err(|error| EmitError::Llvm(error.to_string()))?;
    Ok(Native { object: object.as_slice().to_vec(), text, scratch_bytes: emitter.scratch.bytes() })
}

fn all_stages(program: &StageProgram) -> impl Iterator<Item = &Stage> {
    program.before.iter().chain(program.bodies.iter().flat_map(|body| &body.stages)).chain(&program.after)
}

fn scratch(program: &StageProgram) -> Scratch {
    let rows = program.max_rows;
    let mut scratch = Scratch::default();
    for stage in all_stages(program) {
        match &stage.anchor {
            StageAnchor::Route { experts, routing, correction, .. } => {
                let route = Route { experts: *experts, routing: *routing, correction: correction.is_some() };
                scratch.kernel = scratch.kernel.max(route.scratch_bytes());
            }
            StageAnchor::Experts { input, experts, top_k, per_slot, .. } => {
                let buffer = program.buffer(*input);
                let activations = experts::activations(program, *input, *per_slot);
                for part in &stage.parts {
                    let weights = part.weights.expect("a part of experts has weights");
                    let tile = rows * part.tile_panels() * weights.operands * PANEL * 4;
                    let kernel = Gemm { layout: weights.layout, activations }.scratch_bytes(rows);
                    scratch.tile = scratch.tile.max(tile);
                    scratch.kernel = scratch.kernel.max(kernel);
                    if part.pieces.contains(&StagePiece::Combine) {
                        scratch.sums = scratch.sums.max(tile);
                    }
                }
                let lists = ExpertLists { experts: *experts, top_k: *top_k, max_rows: rows };
                scratch.lists = scratch.lists.max(lists.bytes());
                if !per_slot {
                    let gathered = match activations {
                        Activations::Int8(quant) => quant.bytes(),
                        Activations::F32 { .. } => rows * buffer.cols * 4,
                    };
                    scratch.gathered = scratch.gathered.max(gathered);
                }
            }
            StageAnchor::Gemm { input } => {
                let buffer = program.buffer(*input);
                for part in &stage.parts {
                    let weights = part.weights.expect("a gemm's part has weights");
                    let activations = if buffer.quantized() {
                        Activations::Int8(buffer.quant_rows())
                    } else {
                        Activations::F32 { stride: buffer.cols }
                    };
                    let tile = rows * part.tile_panels() * weights.operands * PANEL * 4;
                    let kernel = Gemm { layout: weights.layout, activations }.scratch_bytes(rows);
                    scratch.tile = scratch.tile.max(tile);
                    scratch.kernel = scratch.kernel.max(kernel);
                }
            }
            StageAnchor::Attention { heads, kv_heads, scale, window, sinks, bidirectional, .. } => {
                let layout = program.kv;
                let group = heads / kv_heads;
                let sinks = sinks.is_some();
                let attention = Attention {
                    layout,
                    group,
                    scale: *scale,
                    softcap: None,
                    window: *window,
                    sinks,
                    bidirectional: *bidirectional,
                };
                scratch.tile = scratch.tile.max(rows * group * layout.v_dim * 4);
                scratch.kernel = scratch.kernel.max(attention.scratch_bytes());
            }
            StageAnchor::TopK { vocab, k, factor, softcap, .. } => {
                let top = TopK { vocab: *vocab, k: *k, factor: *factor, softcap: *softcap };
                scratch.kernel = scratch.kernel.max(top.scratch_bytes());
            }
            StageAnchor::PairScores { k, tables, .. } => {
                let pairs = PairScores { k: *k, rank: tables[0].1.k };
                scratch.kernel = scratch.kernel.max(2 * pairs.gathered_bytes());
            }
            StageAnchor::Embed { .. }
            | StageAnchor::DynamicConv { .. }
            | StageAnchor::Input
            | StageAnchor::Taps { .. }
            | StageAnchor::Rows { .. } => {}
        }
    }
    let whole = |bytes: usize| bytes.next_multiple_of(64);
    Scratch {
        tile: whole(scratch.tile),
        kernel: whole(scratch.kernel),
        sums: whole(scratch.sums),
        lists: whole(scratch.lists),
        gathered: whole(scratch.gathered),
    }
}

/// A module under construction.
pub(crate) struct Emitter<'a, 'ctx> {
    pub(crate) kernels: Kernels<'a, 'ctx>,
    pub(crate) program: &'a StageProgram,
    pub(crate) scratch: Scratch,
    known: HashMap<String, FunctionValue<'ctx>>,
    tables: usize,
}

/// A kernel, or why there is none: builders that take any shape return the kernel itself.
trait Built<'ctx> {
    fn built(self) -> Result<FunctionValue<'ctx>, KernelError>;
}

impl<'ctx> Built<'ctx> for FunctionValue<'ctx> {
    fn built(self) -> Result<FunctionValue<'ctx>, KernelError> {
        Ok(self)
    }
}

impl<'ctx> Built<'ctx> for Result<FunctionValue<'ctx>, KernelError> {
    fn built(self) -> Result<FunctionValue<'ctx>, KernelError> {
        self
    }
}

/// A getter that builds a kernel once for each descriptor.
macro_rules! kernels {
    ($($name:ident($descriptor:ty);)*) => {
        $(pub(crate) fn $name(&mut self, descriptor: &$descriptor) -> Result<FunctionValue<'ctx>, KernelError> {
            let key = format!("{} {descriptor:?}", stringify!($name));
            if let Some(function) = self.known.get(&key) {
                return Ok(*function);
            }
            let name = format!("{}_{}", stringify!($name), self.known.len());
            let function = self.kernels.$name(&name, descriptor).built()?;
            self.known.insert(key, function);
            Ok(function)
        })*
    };
}

/// A getter of a kernel that takes any shape.
macro_rules! plain_kernels {
    ($($name:ident;)*) => {
        $(pub(crate) fn $name(&mut self) -> Result<FunctionValue<'ctx>, KernelError> {
            if let Some(function) = self.known.get(stringify!($name)) {
                return Ok(*function);
            }
            let function = self.kernels.$name(stringify!($name));
            self.known.insert(stringify!($name).to_string(), function);
            Ok(function)
        })*
    };
}

impl<'ctx> Emitter<'_, 'ctx> {
    kernels! {
        gemm(Gemm);
        rms_norm(RmsNorm);
        quantize(Quantize);
        embed(Embed);
        head_norm(HeadNorm);
        rope(Rope);
        kv_write(KvWrite);
        glu(Glu);
        attention(Attention);
        scale(Scale);
        route(Route);
        expert_lists(ExpertLists);
        dynamic_conv(DynamicConv);
        top_k(TopK);
        pair_scores(PairScores);
    }

    /// Copies quantized rows by index from one buffer to another of the same columns.
    pub(crate) fn gather_quant(
        &mut self,
        from: &QuantRows,
        to: &QuantRows,
    ) -> Result<FunctionValue<'ctx>, KernelError> {
        let key = format!("gather_quant {from:?} {to:?}");
        if let Some(function) = self.known.get(&key) {
            return Ok(*function);
        }
        let name = format!("gather_quant_{}", self.known.len());
        let function = self.kernels.gather_quant(&name, from, to)?;
        self.known.insert(key, function);
        Ok(function)
    }

    plain_kernels! {
        bias;
        copy_rows;
        add_rows;
        gather_rows;
        add_slots;
        clear_rows;
    }

    fn module(&self) -> &Module<'ctx> {
        self.kernels.module
    }

    /// A constant table of 64-bit numbers.
    pub(crate) fn table(&mut self, name: &str, values: &[u64]) -> PointerValue<'ctx> {
        let ty = self.kernels.context.i64_type();
        let values: Vec<IntValue<'ctx>> = values.iter().map(|value| ty.const_int(*value, false)).collect();
        let array = ty.const_array(&values);
        let global = self.module().add_global(array.get_type(), None, &format!("{name}_{}", self.tables));
        self.tables += 1;
        global.set_initializer(&array);
        global.set_constant(true);
        global.set_linkage(Linkage::Private);
        global.as_pointer_value()
    }

    /// The entry: the schedule of every worker, which differ in shares only.
    fn step(&mut self, schedule: &Schedule) -> Result<(), EmitError> {
        let program = self.program;
        let leader = &schedule.programs[0];
        let shape = |instrs: &[Instr]| -> Vec<Instr> {
            let shareless = |instr: &Instr| match instr {
                Instr::Run { stage, .. } => Instr::Run { stage: *stage, share: Share::Tiles(Vec::new()) },
                other => other.clone(),
            };
            instrs.iter().map(shareless).collect()
        };
        for (worker, other) in schedule.programs.iter().enumerate() {
            let same = shape(&other.before) == shape(&leader.before)
                && shape(&other.after) == shape(&leader.after)
                && other.bodies.len() == leader.bodies.len()
                && other.bodies.iter().zip(&leader.bodies).all(|(a, b)| shape(a) == shape(b));
            if !same {
                return Err(EmitError::Programs { worker });
            }
        }
        let lists = |select: &dyn Fn(&tilec_ir::schedule::Program) -> Vec<Instr>| -> Vec<Vec<Instr>> {
            schedule.programs.iter().map(select).collect()
        };
        let before = self.stage_functions("before", &program.before, &lists(&|p| p.before.clone()))?;
        let mut bodies = Vec::new();
        for (number, body) in program.bodies.iter().enumerate() {
            let name = format!("body{number}");
            bodies.push(self.stage_functions(&name, &body.stages, &lists(&|p| p.bodies[number].clone()))?);
        }
        let after = self.stage_functions("after", &program.after, &lists(&|p| p.after.clone()))?;

        let slots = program.layers.iter().map(|layer| layer.offsets.len()).max().unwrap_or(0).max(1);
        let mut offsets = Vec::new();
        for layer in &program.layers {
            let mut own = layer.offsets.clone();
            own.resize(slots, 0);
            offsets.extend(own);
        }
        let offsets = self.table("layer_offsets", &offsets);
        let caches: Vec<u64> = program.layers.iter().map(|layer| layer.cache as u64).collect();
        let caches = self.table("layer_caches", &caches);
        let kinds: Vec<u64> = program.layers.iter().map(|layer| layer.body as u64).collect();
        let kinds = self.table("layer_bodies", &kinds);

        let wait = self.wait_function();
        let entry = self.entry_function();
        let code = Scalar::new(self.kernels.context, entry);
        let worker = code.widen(code.int_arg(1));
        let walk =
            Walk { module: self.kernels.module, code: &code, worker, wait, stages: program.sequence().len() };
        walk.list(&leader.before, &before, code.int(0), code.null(), code.int(0));

        // The place of a layer's first stage in the sequence, which the bodies move on.
        let place = code.builder.build_alloca(code.i64(), "place").expect("inside a block");
        code.store(code.size(program.before.len()), place);
        code.each(code.int(0), code.size(program.layers.len()), |layer| {
            let entry_of = |table| code.load_i64(code.at(table, code.mul(layer, code.int(8))));
            let own = code.at(offsets, code.mul(layer, code.size(slots * 8)));
            let (cache, kind) = (entry_of(caches), entry_of(kinds));
            for (number, functions) in bodies.iter().enumerate() {
                let is = code.compare(IntPredicate::EQ, kind, code.size(number));
                code.when(is, || {
                    let first = code.load_i64(place);
                    walk.list(&leader.bodies[number], functions, first, own, cache);
                    code.store(code.add(first, code.size(functions.len())), place);
                });
            }
        });
        let layers: usize = program.layers.iter().map(|layer| bodies[layer.body].len()).sum();
        walk.list(&leader.after, &after, code.size(program.before.len() + layers), code.null(), code.int(0));
        code.ret();
        Ok(())
    }

    fn stage_functions(
        &mut self,
        prefix: &str,
        stages: &[Stage],
        programs: &[Vec<Instr>],
    ) -> Result<Vec<FunctionValue<'ctx>>, EmitError> {
        let mut functions = Vec::new();
        for (number, stage) in stages.iter().enumerate() {
            let share_of = |instrs: &Vec<Instr>| {
                instrs.iter().find_map(|instr| match instr {
                    Instr::Run { stage, share } if *stage == number => Some(share.clone()),
                    _ => None,
                })
            };
            let shares: Vec<Share> = programs.iter().filter_map(share_of).collect();
            functions.push(stage::emit(self, &format!("{prefix}.{}", stage.name), stage, &shares)?);
        }
        Ok(functions)
    }

    fn entry_function(&self) -> FunctionValue<'ctx> {
        let context = self.kernels.context;
        let ptr = context.ptr_type(Default::default());
        let ty = context.void_type().fn_type(&[ptr.into(), context.i32_type().into()], false);
        let function = self.module().add_function(ENTRY, ty, Some(Linkage::External));
        self.like_kernels(function);
        function
    }

    /// Gives a function the attributes of the kernels' own.
    fn like_kernels(&self, function: FunctionValue<'ctx>) {
        let target = self.kernels.target;
        let texts = [
            ("target-cpu", target.cpu.as_str()),
            ("target-features", target.features.as_str()),
            ("no-builtins", ""),
        ];
        for (key, value) in texts {
            let attribute = self.kernels.context.create_string_attribute(key, value);
            function.add_attribute(inkwell::attributes::AttributeLoc::Function, attribute);
        }
    }

    /// `fn(args, counter address, count, stage waited for, worker) -> bool`: whether the counter got
    /// there. Acquires what the workers that signalled had written. Gives up, and says so in
    /// `args.abort`, after `args.spin_limit` spins; gives up silently when another worker has.
    fn wait_function(&self) -> FunctionValue<'ctx> {
        let context = self.kernels.context;
        let (ptr, i64, i32) = (context.ptr_type(Default::default()), context.i64_type(), context.i32_type());
        let params = [ptr.into(), ptr.into(), i64.into(), i64.into(), i64.into()];
        let ty = context.bool_type().fn_type(&params, false);
        let function = self.module().add_function("wait", ty, Some(Linkage::Private));
        self.like_kernels(function);
        let code = Scalar::new(context, function);
        let builder = &code.builder;
        let built = "inside a block";
        let (args, counter, count) = (code.ptr_arg(0), code.ptr_arg(1), code.int_arg(2));
        let abort = code.load_ptr(code.at(args, code.size(offset_of!(StepArgs, abort))));
        let limit = code.load_i64(code.at(args, code.size(offset_of!(StepArgs, spin_limit))));
        let yield_now = code.load_ptr(code.at(args, code.size(offset_of!(StepArgs, yield_now))));
        let entry = builder.get_insert_block().expect(built);
        let [look, done, spin, check, late, claim, failed] =
            ["look", "done", "spin", "check", "late", "claim", "failed"].map(|name| code.block(name));
        code.jump(look);

        code.enter(look);
        let spins = builder.build_phi(i64, "spins").expect(built);
        let spun = spins.as_basic_value().into_int_value();
        let seen = builder.build_load(i32, counter, "seen").expect(built);
        let load = seen.as_instruction_value().expect("a load is an instruction");
        load.set_atomic_ordering(AtomicOrdering::Acquire).expect("a load may acquire");
        let seen = seen.into_int_value();
        code.branch(code.compare(IntPredicate::UGE, code.widen(seen), count), done, spin);

        code.enter(done);
        builder.build_return(Some(&context.bool_type().const_int(1, false))).expect(built);

        code.enter(spin);
        if self.kernels.target.triple.starts_with("x86_64") {
            let pause = inkwell::intrinsics::Intrinsic::find("llvm.x86.sse2.pause").expect("x86 has pause");
            let pause = pause.get_declaration(self.module(), &[]).expect("pause takes no types");
            code.call(pause, &[]);
        }
        let next = code.add(spun, code.int(1));
        let due = builder.build_and(next, code.int(SPINS_PER_LOOK - 1), "").expect(built);
        code.branch(code.compare(IntPredicate::EQ, due, code.int(0)), check, look);

        code.enter(check);
        // The worker that is waited for may need this very processor.
        let yield_type = context.void_type().fn_type(&[], false);
        builder.build_indirect_call(yield_type, yield_now, &[], "").expect(built);
        let given_up = builder.build_load(i32, abort, "").expect(built);
        let load = given_up.as_instruction_value().expect("a load is an instruction");
        load.set_atomic_ordering(AtomicOrdering::Monotonic).expect("a load may be relaxed");
        let given_up = given_up.into_int_value();
        code.branch(code.compare(IntPredicate::NE, given_up, i32.const_zero()), failed, late);

        code.enter(late);
        code.branch(code.compare(IntPredicate::ULT, next, limit), look, claim);
        spins.add_incoming(&[(&code.int(0), entry), (&next, spin), (&next, late)]);

        code.enter(claim);
        // One worker reports: the first that gave up.
        let claimed = builder
            .build_cmpxchg(
                abort,
                i32.const_zero(),
                i32.const_int(1, false),
                AtomicOrdering::AcquireRelease,
                AtomicOrdering::Monotonic,
            )
            .expect(built);
        let mine = builder.build_extract_value(claimed, 1, "").expect(built).into_int_value();
        code.when(mine, || {
            for (index, value) in
                [(1, code.narrow(code.int_arg(3))), (2, code.narrow(code.int_arg(4))), (3, seen)]
            {
                code.store(value, code.at(abort, code.int(index * 4)));
            }
        });
        code.jump(failed);

        code.enter(failed);
        builder.build_return(Some(&context.bool_type().const_zero())).expect(built);
        function
    }
}

/// The entry function, as instructions are emitted into it.
struct Walk<'w, 'ctx> {
    module: &'w Module<'ctx>,
    code: &'w Scalar<'ctx>,
    worker: IntValue<'ctx>,
    wait: FunctionValue<'ctx>,
    /// Stages of the unrolled sequence.
    stages: usize,
}

/// Which of a stage's three time stamps.
#[derive(Clone, Copy)]
enum Stamp {
    Start = 0,
    Waited = 1,
    Done = 2,
}

impl<'ctx> Walk<'_, 'ctx> {
    /// The instructions of a list of stages whose first has place `first` in the sequence.
    fn list(
        &self,
        instrs: &[Instr],
        functions: &[FunctionValue<'ctx>],
        first: IntValue<'ctx>,
        offsets: PointerValue<'ctx>,
        cache: IntValue<'ctx>,
    ) {
        let code = self.code;
        let args = code.ptr_arg(0);
        let mut started = None;
        for instr in instrs {
            let (Instr::Wait { stage, .. } | Instr::Run { stage, .. } | Instr::Signal { stage }) = instr;
            let place = code.add(first, code.size(*stage));
            if started != Some(*stage) {
                started = Some(*stage);
                self.stamp(place, Stamp::Start);
            }
            match instr {
                Instr::Wait { back, count, .. } => {
                    let before = code.sub(place, code.size(*back));
                    let counter = self.counter(before);
                    let wait_args = [
                        args.into(),
                        counter.into(),
                        code.size(*count).into(),
                        before.into(),
                        self.worker.into(),
                    ];
                    let call = code.builder.build_call(self.wait, &wait_args, "").expect("inside a block");
                    let arrived = call.try_as_basic_value().unwrap_basic().into_int_value();
                    let (leave, on) = (code.block("leave"), code.block("on"));
                    code.branch(arrived, on, leave);
                    code.enter(leave);
                    code.ret();
                    code.enter(on);
                }
                Instr::Run { stage, .. } => {
                    self.stamp(place, Stamp::Waited);
                    code.call(
                        functions[*stage],
                        &[args.into(), self.worker.into(), offsets.into(), cache.into()],
                    );
                    self.stamp(place, Stamp::Done);
                }
                Instr::Signal { .. } => {
                    // Releases all that this worker wrote in the stage to whoever waits for it.
                    let one = code.context.i32_type().const_int(1, false);
                    code.builder
                        .build_atomicrmw(
                            AtomicRMWBinOp::Add,
                            self.counter(place),
                            one,
                            AtomicOrdering::Release,
                        )
                        .expect("inside a block");
                }
            }
        }
    }

    fn counter(&self, place: IntValue<'ctx>) -> PointerValue<'ctx> {
        let code = self.code;
        let counters = code.load_ptr(code.at(code.ptr_arg(0), code.size(offset_of!(StepArgs, counters))));
        code.at(counters, code.mul(place, code.size(COUNTER_STRIDE)))
    }

    /// Writes the processor's time stamp if the step is profiled.
    fn stamp(&self, place: IntValue<'ctx>, which: Stamp) {
        let code = self.code;
        let profile = code.load_ptr(code.at(code.ptr_arg(0), code.size(offset_of!(StepArgs, profile))));
        let wanted = code.builder.build_is_not_null(profile, "").expect("inside a block");
        code.when(wanted, || {
            let clock =
                inkwell::intrinsics::Intrinsic::find("llvm.readcyclecounter").expect("LLVM has a clock");
            let clock = clock.get_declaration(self.module, &[]).expect("the clock takes no types");
            let call = code.builder.build_call(clock, &[], "").expect("inside a block");
            let now = call.try_as_basic_value().unwrap_basic().into_int_value();
            let row = code.add(code.mul(self.worker, code.size(self.stages)), place);
            let entry = code.add(code.mul(row, code.int(3)), code.int(which as u64));
            code.store(now, code.at(profile, code.mul(entry, code.int(8))));
        });
    }
}
