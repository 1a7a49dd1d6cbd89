//! Speed of the attention kernel on one thread: multiply-adds with the cache's pages at hand.
//!
//! `cargo run --release -p tilec-kernels-gen --features llvm --example attention_speed [CPU]`

use inkwell::OptimizationLevel;
use inkwell::context::Context;
use inkwell::module::Linkage;
use std::time::Instant;
use tilec_ir::abi::{KvLayout, KvType};
use tilec_kernels_gen::Target;
use tilec_kernels_gen::attention::Attention;
use tilec_kernels_gen::llvm::{Kernels, host_target, machine, optimize};

const PAGE: usize = 64;
const MAX_ROWS: usize = 64;

type Kernel = unsafe extern "C" fn(
    *const f32,
    usize,
    *const u32,
    *const u32,
    *const u32,
    usize,
    *const u8,
    usize,
    usize,
    usize,
    *const f32,
    *mut f32,
    usize,
    *mut u8,
    *const u32,
);

/// Bytes at the alignment that kernels ask for.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let host = host_target()?;
    let target = match std::env::args().nth(1) {
        Some(cpu) => Target::parse(&host.triple, &cpu, "")?,
        None => host,
    };
    println!("{:>5} {:>4} {:>5} {:>8} {:>8} {:>10}", "group", "dim", "rows", "context", "GMAC/s", "us a row");
    for (group, dim) in [(3, 64), (4, 128), (1, 64), (8, 128)] {
        measure(group, dim, &target)?;
    }
    Ok(())
}

fn measure(group: usize, dim: usize, target: &Target) -> Result<(), Box<dyn std::error::Error>> {
    let layout =
        KvLayout { kv_type: KvType::F16, layers: 1, kv_heads: 1, qk_dim: dim, v_dim: dim, page_tokens: PAGE };
    let spec = Attention {
        layout,
        group,
        scale: 0.125,
        softcap: None,
        window: None,
        sinks: false,
        bidirectional: false,
    };
    let context = Context::create();
    let module = context.create_module("kernels");
    let function = Kernels::new(&context, &module, target).attention("attention", &spec)?;
    function.set_linkage(Linkage::External);
    optimize(&module, &machine(target)?)?;
    if std::env::var_os("ATTENTION_SPEED_ASM").is_some() {
        let file = std::path::PathBuf::from(format!("attention_{group}_{dim}.s"));
        machine(target)?.write_to_file(&module, inkwell::targets::FileType::Assembly, &file)?;
    }
    let engine = module.create_jit_execution_engine(OptimizationLevel::Aggressive)?;
    let address = engine.get_function_address("attention")?;
    // SAFETY: the builder documents these parameters.
    let kernel = unsafe { std::mem::transmute::<usize, Kernel>(address) };
    for (rows, position) in [(1, 63), (1, 511), (1, 4095), (64, 511), (64, 4095)] {
        let pages = (position + 1usize).div_ceil(PAGE);
        let table: Vec<u32> = (0..pages as u32).collect();
        let kv = vec![Line([0x2c; 64]); layout.total_bytes(pages).ok_or("too large")? / 64];
        let q = vec![0.3f32; MAX_ROWS * group * dim];
        let first = (position + 1).saturating_sub(rows) as u32;
        let positions: Vec<u32> = (0..rows as u32).map(|r| first + r).collect();
        let sequences = vec![0u32; rows];
        let mut out = vec![0f32; MAX_ROWS * group * dim];
        let mut scratch = vec![Line([0; 64]); spec.scratch_bytes() / 64 + 1];
        let mut run = || {
            // SAFETY: all buffers hold what `rows` rows need.
            unsafe {
                kernel(
                    q.as_ptr(),
                    group * dim,
                    positions.as_ptr(),
                    sequences.as_ptr(),
                    table.as_ptr(),
                    pages,
                    kv.as_ptr().cast(),
                    0,
                    0,
                    rows,
                    std::ptr::null(),
                    out.as_mut_ptr(),
                    group * dim,
                    scratch.as_mut_ptr().cast(),
                    std::ptr::null(),
                );
            }
        };
        let mut best = f64::INFINITY;
        for _ in 0..(200_000_000 / (rows * position * group * dim)).clamp(10, 5000) {
            let start = Instant::now();
            run();
            best = best.min(start.elapsed().as_secs_f64());
        }
        let work: usize = positions.iter().map(|p| spec.multiply_adds(*p as usize)).sum();
        println!(
            "{group:>5} {dim:>4} {rows:>5} {:>8} {:>8.1} {:>10.2}",
            position + 1,
            work as f64 / best / 1e9,
            best / rows as f64 * 1e6,
        );
    }
    Ok(())
}
