//! Speed of the GEMM kernels on one thread: arithmetic with everything in cache, and bytes while
//! weights stream from memory, beside a plain read of the same memory.
//!
//! `cargo run --release -p tilec-kernels-gen --features llvm --example gemm_speed [CPU]`

use inkwell::OptimizationLevel;
use inkwell::context::Context;
use inkwell::module::Linkage;
use std::hint::black_box;
use std::time::Instant;
use tilec_ir::abi::QuantRows;
use tilec_ir::format::{Code, Format, PANEL, PanelLayout, ScaleType};
use tilec_kernels_gen::Target;
use tilec_kernels_gen::gemm::{Activations, Gemm};
use tilec_kernels_gen::llvm::{Kernels, host_target, machine, optimize};

const K: usize = 576;
const FEATURES: usize = 1536;
const STREAM_BYTES: usize = 256 << 20;
const MAX_ROWS: usize = 64;
/// Streaming is timed in pieces, and the quickest counts: other processes disturb the rest.
const PIECES: usize = 64;

/// Bytes at the alignment that kernels ask for.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

type Kernel = unsafe extern "C" fn(*const u8, usize, *const u8, usize, usize, *mut f32, usize, *mut u8);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let host = host_target()?;
    let target = match std::env::args().nth(1) {
        Some(cpu) => Target::parse(&host.triple, &cpu, "")?,
        None => host,
    };
    println!("{} {:?}", target.cpu, target.isa);
    println!("k {K}, {FEATURES} features when hot, {} MB when streamed", STREAM_BYTES >> 20);
    let lines = vec![[1u64; 8]; STREAM_BYTES / 64];
    let piece = lines.len() / PIECES;
    let seconds = best_piece(|i| {
        let mut sums = [0u64; 8];
        for line in &lines[i * piece..(i + 1) * piece] {
            for (sum, value) in sums.iter_mut().zip(line) {
                *sum = sum.wrapping_add(*value);
            }
        }
        black_box(sums);
    });
    println!("plain read: {:.1} GB/s", (piece * 64) as f64 / seconds / 1e9);
    drop(lines);
    println!("{:<6} {:>4} {:>12} {:>12} {:>12}", "format", "rows", "hot GMAC/s", "hot GB/s", "stream GB/s");
    for name in ["q4_1", "q8_0", "mxfp4", "bf16"] {
        measure(name, &target)?;
    }
    Ok(())
}

fn measure(name: &str, target: &Target) -> Result<(), Box<dyn std::error::Error>> {
    let format = Format::by_name(name).ok_or("no such format")?;
    let layout = PanelLayout::new(format, K);
    let quant = QuantRows { k: K, max_rows: MAX_ROWS };
    let (activations, bytes) = if format.integer_codes() {
        (Activations::Int8(quant), quant.bytes())
    } else {
        (Activations::F32 { stride: K }, MAX_ROWS * K * 4)
    };
    let gemm = Gemm { layout, activations };
    let context = Context::create();
    let module = context.create_module("kernels");
    let function = Kernels::new(&context, &module, target).gemm("gemm", &gemm)?;
    function.set_linkage(Linkage::External);
    optimize(&module, &machine(target)?)?;
    if std::env::var_os("GEMM_SPEED_ASM").is_some() {
        let file = std::path::PathBuf::from(format!("{name}.s"));
        machine(target)?.write_to_file(&module, inkwell::targets::FileType::Assembly, &file)?;
    }
    let engine = module.create_jit_execution_engine(OptimizationLevel::Aggressive)?;
    let address = engine.get_function_address("gemm")?;
    // SAFETY: the builder documents these parameters for every GEMM.
    let kernel = unsafe { std::mem::transmute::<usize, Kernel>(address) };

    let panels = (STREAM_BYTES / layout.bytes()).max(FEATURES / PANEL);
    let weights = panels_of(&layout, panels);
    let x = vec![Line([0x3c; 64]); bytes / 64 + 1];
    let mut scratch = vec![Line([0; 64]); gemm.scratch_bytes(MAX_ROWS) / 64 + 1];
    for rows in [1, 8, 64] {
        let hot_panels = FEATURES / PANEL;
        let mut out = vec![0f32; rows * panels * PANEL];
        let mut run = |first: usize, panels: usize| {
            // SAFETY: all buffers hold what `rows` rows and `panels` panels need.
            unsafe {
                kernel(
                    weights.as_ptr().cast::<u8>().add(first * layout.bytes()),
                    panels,
                    x.as_ptr().cast(),
                    0,
                    rows,
                    out.as_mut_ptr(),
                    panels * PANEL,
                    scratch.as_mut_ptr().cast(),
                );
            }
        };
        let repeats = 2000 / rows;
        let hot = best(5, || (0..repeats).for_each(|_| run(0, hot_panels))) / repeats as f64;
        let piece = panels / PIECES;
        let stream = best_piece(|i| run(i * piece, piece));
        let giga = |n: usize, seconds: f64| n as f64 / seconds / 1e9;
        println!(
            "{name:<6} {rows:>4} {:>12.1} {:>12.1} {:>12.1}",
            giga(gemm.multiply_adds(rows, FEATURES), hot),
            giga(gemm.weight_bytes(FEATURES), hot),
            giga(piece * layout.bytes(), stream),
        );
    }
    Ok(())
}

/// Panels of ordinary numbers.
fn panels_of(layout: &PanelLayout, panels: usize) -> Vec<Line> {
    let scales: &[u8] = match layout.format.scale {
        Some(ScaleType::F16) => &[0x00, 0x24],
        Some(ScaleType::E8m0) => &[120],
        _ => &[0, 0, 0x80, 0x3c],
    };
    let codes: &[u8] = match layout.format.code {
        Code::Bf16 | Code::F16 => &[0x12, 0x3c, 0x9f, 0xbb],
        _ => &[0x12, 0x7c, 0x9f, 0xe3, 0x58],
    };
    let line = |index: usize, pattern: &[u8]| {
        Line(std::array::from_fn(|i| pattern[(index * 64 + i) % pattern.len()]))
    };
    let (all, of_scales) = (layout.bytes() / 64, layout.code_offset() / 64);
    let panel: Vec<Line> = (0..all).map(|i| line(i, if i < of_scales { scales } else { codes })).collect();
    panel.iter().cycle().take(all * panels).copied().collect()
}

/// The shortest of `n` runs, in seconds.
fn best(n: usize, mut run: impl FnMut()) -> f64 {
    (0..n)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

/// The shortest piece of two passes over all, in seconds.
fn best_piece(mut run: impl FnMut(usize)) -> f64 {
    (0..2 * PIECES).map(|i| best(1, || run(i % PIECES))).fold(f64::INFINITY, f64::min)
}
