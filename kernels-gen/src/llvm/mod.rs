//! Builders that emit the kernels as LLVM IR functions.
//!
//! [`Kernels`] adds private functions to a module; a caller links them together with calls. All
//! functions return `void`, take only pointers (`ptr`) and 64-bit integers (`i64`), and touch no
//! memory but what their arguments name. Strides and columns count elements, not bytes; `rows`,
//! `cols` and `panels` may be 0. Pointers to `f32` need 4-byte alignment; panels, quantized rows,
//! the KV cache and scratch need 64. "tile" is f32 `[rows][tile_stride]`, usually in private
//! scratch, and a caller passes the address of the tile's first column of interest.
//!
//! | builder | arguments of the function, in order |
//! |---|---|
//! | [`gemm`](Kernels::gemm) | `ptr panels, i64 panel_count, ptr activations, i64 row_start, i64 rows, ptr out, i64 out_stride, ptr scratch` |
//! | [`rms_norm`](Kernels::rms_norm) | `ptr src, i64 src_stride, ptr index, i64 rows, ptr weight, ptr dst, i64 dst_stride, ptr quant, i64 quant_row` |
//! | [`quantize`](Kernels::quantize) | `ptr tile, i64 tile_stride, i64 rows, i64 cols, ptr quant, i64 quant_row, i64 quant_col` |
//! | [`embed`](Kernels::embed) | `ptr table, ptr tokens, i64 rows, ptr dst, i64 dst_stride` |
//! | [`copy_rows`](Kernels::copy_rows) | `ptr tile, i64 tile_stride, i64 rows, i64 cols, ptr dst, i64 dst_stride` |
//! | [`gather_rows`](Kernels::gather_rows) | `ptr src, i64 src_stride, ptr index, i64 rows, i64 cols, ptr dst, i64 dst_stride` |
//! | [`gather_quant`](Kernels::gather_quant) | `ptr quant, ptr index, i64 rows, ptr dst` |
//! | [`add_rows`](Kernels::add_rows) | `ptr tile, i64 tile_stride, i64 rows, i64 cols, ptr dst, i64 dst_stride` |
//! | [`add_weighted`](Kernels::add_weighted) | `ptr tile, i64 tile_stride, ptr row_weights, i64 rows, i64 cols, ptr dst, i64 dst_stride` |
//! | [`bias`](Kernels::bias) | `ptr tile, i64 tile_stride, i64 rows, i64 cols, ptr bias` |
//! | [`head_norm`](Kernels::head_norm) | `ptr tile, i64 tile_stride, i64 rows, i64 heads, ptr weight` |
//! | [`rope`](Kernels::rope) | `ptr tile, i64 tile_stride, i64 rows, i64 heads, ptr positions, ptr cos, ptr sin` |
//! | [`kv_write`](Kernels::kv_write) | `ptr tile, i64 tile_stride, i64 rows, ptr positions, ptr sequences, ptr page_table, i64 pages_per_sequence, ptr kv_layer, i64 kv_head` |
//! | [`glu`](Kernels::glu) | `ptr gate, ptr up, i64 tile_stride, i64 rows, i64 cols, ptr dst, i64 dst_stride` |
//! | [`scale`](Kernels::scale) | `ptr tile, i64 tile_stride, i64 rows, i64 cols` |
//! | [`clear_rows`](Kernels::clear_rows) | `ptr tile, i64 tile_stride, i64 rows, i64 cols` |
//! | [`route`](Kernels::route) | `ptr scores, i64 rows, ptr correction, ptr experts, ptr weights, ptr scratch` |
//! | [`expert_lists`](Kernels::expert_lists) | `ptr experts, ptr weights, i64 rows, ptr lists` |
//! | [`add_slots`](Kernels::add_slots) | `ptr tile, i64 tile_stride, ptr row_list, ptr weights, i64 slots, i64 cols, ptr dst, i64 dst_stride` |
//! | [`dynamic_conv`](Kernels::dynamic_conv) | `ptr x, i64 row_start, i64 row_end, ptr sequences, ptr own, ptr base, ptr added, ptr dst` |
//! | [`top_k`](Kernels::top_k) | `ptr logits, i64 rows, ptr tokens, ptr values, ptr scratch` |
//! | [`pair_scores`](Kernels::pair_scores) | `ptr before, ptr behind, ptr hidden, ptr logits, ptr dst` |
//! | [`attention`](Kernels::attention) | `ptr q, i64 q_stride, ptr positions, ptr sequences, ptr page_table, i64 pages_per_sequence, ptr kv_layer, i64 kv_head, i64 row_start, i64 row_end, ptr sinks, ptr out, i64 out_stride, ptr scratch, ptr ends` |
//!
//! * `gemm`: `panels` is the first of `panel_count` adjacent panels. `activations` is the base of
//!   the whole buffer ([`QuantRows`](tilec_ir::abi::QuantRows), or f32 rows); rows `row_start..
//!   row_start + rows` are read. Row `i` of the call and panel `p` write the 16 floats
//!   `out[i * out_stride + 16 * p ..]`, so `out` has room for whole panels. `scratch` has
//!   [`Gemm::scratch_bytes`](crate::gemm::Gemm::scratch_bytes)`(rows)`.
//! * `rms_norm`: `index` (`u32`), `dst` and `quant` are read only if the descriptor asks for them;
//!   pass null otherwise. Row `i` goes to `dst` row `i` and to quantized row `quant_row + i`.
//!   `src` and `dst` may be the same if not gathered.
//! * `quantize`: `tile` columns `0..cols` go to columns `quant_col..quant_col + cols` of quantized rows
//!   `quant_row..`; `quant_col` is a multiple of 32, and so is `cols` unless the columns end at K (then
//!   the last block's tail is written as zeros).
//! * `embed`: `tokens` are `u32`, and every one is inside the table.
//! * `gather_rows`, `gather_quant`: row `i` of `dst` is source row `index[i]` (`u32`); `gather_quant`
//!   copies between two buffers of quantized rows, `dst` starting at its row 0.
//! * `add_rows`: `dst += tile`; `add_weighted`: `dst = fma(tile, row_weights[row], dst)`.
//! * `rope`: `cos` and `sin` are f32 `[max_position][rotary_dims / 2]`; `positions` (`u32`) is the
//!   address of the tile's first row's entry. `heads` heads lie side by side, `head_dim` columns each.
//! * `kv_write`: `tile` is the first column of this head; `positions` and `sequences` (`u32`) are the
//!   addresses of the tile's first row's entries; `page_table` is the whole table; `kv_layer` is the
//!   cache's address plus [`KvLayout::block_offset`](tilec_ir::abi::KvLayout::block_offset)`(pages, layer, 0, 0)`.
//! * `glu`: `dst` may be `gate` or `up` (then with `dst_stride = tile_stride`).
//! * `route`: `scores` is f32 `[rows][experts]`, `correction` f32 `[experts]` or null without one; `experts`
//!   (`u32 [rows][top_k]`, ascending in a row) and `weights` (f32, the same shape) are written. `scratch`
//!   has [`Route::scratch_bytes`](crate::experts::Route::scratch_bytes).
//! * `expert_lists`: sorts the slots of `rows` rows of routes by expert, those of one expert by row, into
//!   `lists`, as [`ExpertLists`](crate::experts::ExpertLists) lays them out.
//! * `add_slots`: `dst[row_list[i]] = fma(tile[i], weights[i], dst[row_list[i]])`, slots ascending.
//! * `dynamic_conv`: `x`, `sequences` (`u32`), `own`, `added` and `dst` are whole buffers, indexed by the
//!   absolute rows `row_start..row_end`; of `x` the row before them is read as well if it is of the same
//!   sequence. `own` is f32 `[rows][4][groups]` from the first value of the side, of which 2 `groups` are
//!   read, `base` f32 `[2][cols]`. `added` is read if the descriptor says so, else null; it may be `dst`.
//! * `top_k`: `tokens` (`u32 [rows][k]`) and `values` (f32, the same shape) are written, the largest first.
//!   `scratch` has [`TopK::scratch_bytes`](crate::selector::TopK::scratch_bytes).
//! * `pair_scores`: `before` and `behind` are f32 `[k]` rows of [`PairScores::stride`](crate::selector::PairScores::stride)
//!   elements, of which those of `before` are changed; `hidden` is f32 `[rank]`, `logits` f32 `[k]`. `dst`
//!   `[k][k]` becomes `logits[b] + <before[a] * hidden, behind[b]>`.
//! * `attention`: `q` (f32, turned already), `positions`, `sequences` and `out` are whole buffers,
//!   indexed by the absolute rows `row_start..row_end`. Query head `h` reads `q[row][h * qk_dim ..]`
//!   and writes `out[row][h * v_dim ..]`, for the `group` heads `h` of `kv_head`. `sinks` is
//!   f32 `[query heads of the model]`, or null without sinks. `ends` (`u32`, indexed like `positions`) is
//!   the position of the last row of the row's sequence in the step; it is read if rows see both ways. `scratch` has
//!   [`Attention::scratch_bytes`](crate::attention::Attention::scratch_bytes). To get quantized rows,
//!   call `quantize` on the columns afterwards.
//!
//! **Row independence.** A row's bits depend on nothing but the row: not on `rows`, on the block of
//! rows that it is computed in, or on how rows are split into calls. The integer GEMM, the norms
//! and the quantization give the same bits on every target as well: no fast-math flag is set and
//! every fused multiply-add is an explicit one.
//!
//! Functions carry the attribute `no-builtins`, so that LLVM does not turn their loops into calls
//! of `memcpy`; a function that they are to be inlined into needs it too: use
//! [`Kernels::function`]. Optimize the module with [`optimize`], which leaves out the vectorizers:
//! the kernels are vector code already, and the SLP vectorizer undoes their broadcasts.

mod attention;
mod body;
mod conv;
mod dot;
mod experts;
mod gemm;
mod math;
mod pieces;
mod rows;
mod selector;

pub use body::{Body, Param};

use crate::{Isa, KernelError, Target};
use inkwell::OptimizationLevel;
use inkwell::attributes::AttributeLoc;
use inkwell::context::Context;
use inkwell::module::{Linkage, Module};
use inkwell::passes::PassBuilderOptions;
use inkwell::targets::{
    CodeModel, InitializationConfig, RelocMode, Target as LlvmTarget, TargetMachine, TargetTriple,
};
use inkwell::values::FunctionValue;

/// Adds kernels to a module.
pub struct Kernels<'a, 'ctx> {
    /// The module's context.
    pub context: &'ctx Context,
    /// Where functions are added.
    pub module: &'a Module<'ctx>,
    /// The processor.
    pub target: &'a Target,
}

impl<'a, 'ctx> Kernels<'a, 'ctx> {
    /// A builder of kernels for `target` in `module`.
    pub fn new(context: &'ctx Context, module: &'a Module<'ctx>, target: &'a Target) -> Self {
        Kernels { context, module, target }
    }

    /// Adds a function without results, with the attributes that all generated code has: the
    /// target's CPU and features, no unwinding, no calls of library functions. Kernels are private
    /// and not inlined.
    pub fn function(&self, name: &str, params: &[Param], linkage: Linkage) -> FunctionValue<'ctx> {
        let types: Vec<_> = params
            .iter()
            .map(|param| match param {
                Param::Ptr => self.context.ptr_type(Default::default()).into(),
                Param::I64 => self.context.i64_type().into(),
            })
            .collect();
        let ty = self.context.void_type().fn_type(&types, false);
        let function = self.module.add_function(name, ty, Some(linkage));
        let texts = [
            ("target-cpu", self.target.cpu.as_str()),
            ("target-features", self.target.features.as_str()),
            ("no-builtins", ""),
        ];
        for (key, value) in texts {
            // An empty feature string would override nothing, but reads as noise.
            if key != "target-features" || !value.is_empty() {
                let attribute = self.context.create_string_attribute(key, value);
                function.add_attribute(AttributeLoc::Function, attribute);
            }
        }
        self.flag(function, AttributeLoc::Function, "nounwind");
        function
    }

    fn flag(&self, function: FunctionValue<'ctx>, place: AttributeLoc, name: &str) {
        let kind = inkwell::attributes::Attribute::get_named_enum_kind_id(name);
        function.add_attribute(place, self.context.create_enum_attribute(kind, 0));
    }

    /// A private kernel and the body to fill. Memory that kernels write through one argument is
    /// never read through another unless the kernel's documentation says so, which `noalias` tells
    /// LLVM for those in `distinct`.
    fn kernel(&self, name: &str, params: &[Param], distinct: &[u32]) -> Body<'a, 'ctx> {
        let function = self.function(name, params, Linkage::Internal);
        self.flag(function, AttributeLoc::Function, "noinline");
        for &index in distinct {
            self.flag(function, AttributeLoc::Param(index), "noalias");
        }
        Body::new(self.context, self.module, self.target.isa, function)
    }
}

/// The machine that this runs on.
///
/// # Errors
/// An architecture without kernels.
pub fn host_target() -> Result<Target, KernelError> {
    let triple = TargetMachine::get_default_triple();
    let cpu = TargetMachine::get_host_cpu_name();
    let features = TargetMachine::get_host_cpu_features();
    Target::parse(&triple.as_str().to_string_lossy(), &cpu.to_string_lossy(), &features.to_string_lossy())
}

/// LLVM's machine for a target, generating position independent code.
///
/// # Errors
/// LLVM knows no such triple or CPU.
pub fn machine(target: &Target) -> Result<TargetMachine, KernelError> {
    let config = InitializationConfig::default();
    LlvmTarget::initialize_x86(&config);
    LlvmTarget::initialize_aarch64(&config);
    let triple = TargetTriple::create(&target.triple);
    let llvm = LlvmTarget::from_triple(&triple).map_err(|e| KernelError::Llvm(e.to_string()))?;
    let level = OptimizationLevel::Aggressive;
    llvm.create_target_machine(
        &triple,
        &target.cpu,
        &target.features,
        level,
        RelocMode::PIC,
        CodeModel::Small,
    )
    .ok_or_else(|| KernelError::Target {
        target: target.triple.clone(),
        problem: format!("LLVM makes no machine for CPU `{}`", target.cpu),
    })
}

/// Verifies and optimizes a module of kernels.
///
/// # Errors
/// The module is not well formed.
pub fn optimize(module: &Module<'_>, machine: &TargetMachine) -> Result<(), KernelError> {
    module.set_triple(&machine.get_triple());
    module.set_data_layout(&machine.get_target_data().get_data_layout());
    module.verify().map_err(|e| KernelError::Llvm(e.to_string()))?;
    let options = PassBuilderOptions::create();
    options.set_loop_vectorization(false);
    options.set_loop_slp_vectorization(false);
    options.set_loop_unrolling(false);
    options.set_loop_interleaving(false);
    module.run_passes("default<O2>", machine, options).map_err(|e| KernelError::Llvm(e.to_string()))
}

/// Whether `isa` has everything that `needs` has.
pub fn covers(isa: &Isa, needs: &Isa) -> bool {
    let pairs = [
        (isa.fma, needs.fma),
        (isa.f16c, needs.f16c),
        (isa.avx2, needs.avx2),
        (isa.avx512, needs.avx512),
        (isa.vnni512, needs.vnni512),
        (isa.vnni256, needs.vnni256),
    ];
    pairs.iter().all(|(has, need)| *has || !need)
}
