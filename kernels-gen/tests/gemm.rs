//! The GEMM kernels against scalar references: every format, odd sizes, every target.
#![cfg(feature = "llvm")]

mod common;

use common::*;
use tilec_ir::format::{Format, PANEL, PanelLayout};
use tilec_kernels_gen::gemm::{Activations, Gemm};

const SIZES: &[(usize, usize)] = &[(32, 16), (40, 20), (96, 33), (576, 16), (608, 5)];
const ROWS: usize = 17;

/// Runs `rows` rows from `first` on, on all panels.
fn run(
    address: usize,
    weights: &Weights,
    gemm: &Gemm,
    activations: *const u8,
    first: usize,
    rows: usize,
) -> Vec<f32> {
    let panels = weights.features.div_ceil(PANEL);
    let stride = panels * PANEL + 3;
    let mut out = vec![f32::NAN; rows * stride];
    let mut scratch = Bytes::new(gemm.scratch_bytes(rows));
    call!(
        address,
        weights.packed.as_ptr(),
        panels,
        activations,
        first,
        rows,
        out.as_mut_ptr(),
        stride,
        scratch.as_mut_ptr(),
    );
    out.chunks(stride).flat_map(|row| row[..panels * PANEL].to_vec()).collect()
}

#[test]
fn integer_kernels_are_exact_on_every_target() {
    for (name, format) in Format::NAMED.iter().filter(|(_, f)| f.integer_codes()) {
        for &(k, features) in SIZES {
            let mut random = Random(42 + k as u64);
            let weights = Weights::random(*format, features, k, &mut random);
            let x = Quant::random(k, ROWS, &mut random);
            let gemm = Gemm { layout: weights.layout, activations: Activations::Int8(x.layout) };
            let lanes = features.div_ceil(PANEL) * PANEL;
            let want: Vec<f32> = (0..ROWS)
                .flat_map(|row| (0..lanes).map(move |feature| (row, feature)))
                .map(|(row, feature)| weights.int8_dot(feature, &x, row))
                .collect();
            for (cpu, target) in targets() {
                with_kernel(
                    &target,
                    |kernels| kernels.gemm("gemm", &gemm),
                    |address| {
                        for (first, rows) in [(0, ROWS), (0, 1), (3, 7), (16, 1), (2, 12), (5, 2), (5, 0)] {
                            let got = run(address, &weights, &gemm, x.data.as_ptr(), first, rows);
                            let want = &want[first * lanes..(first + rows) * lanes];
                            assert_eq!(bits(&got), bits(want), "{name} {cpu} k {k} rows {first}+{rows}");
                        }
                    },
                );
            }
        }
    }
}

#[test]
fn float_kernels_are_close_and_row_independent() {
    for (name, format) in Format::NAMED {
        // Whole steps of columns, a tail of 8, and one of 3.
        for (k, features) in [(96, 20), (40, 16), (579, 5)] {
            let mut random = Random(7 + k as u64);
            let weights = Weights::random(*format, features, k, &mut random);
            let stride = k + 5;
            let x = random.units(ROWS * stride);
            let gemm = Gemm { layout: weights.layout, activations: Activations::F32 { stride } };
            let lanes = features.div_ceil(PANEL) * PANEL;
            for (cpu, target) in targets() {
                with_kernel(
                    &target,
                    |kernels| kernels.gemm("gemm", &gemm),
                    |address| {
                        let all = run(address, &weights, &gemm, x.as_ptr().cast(), 0, ROWS);
                        for row in 0..ROWS {
                            for feature in 0..features {
                                let terms = (0..k)
                                    .map(|c| weights.value(feature, c) * f64::from(x[row * stride + c]));
                                let size: f64 = terms.clone().map(f64::abs).sum();
                                let want: f64 = terms.sum();
                                let got = f64::from(all[row * lanes + feature]);
                                assert!(
                                    (got - want).abs() <= 2e-6 * size.max(1e-3),
                                    "{name} {cpu} k {k} row {row} feature {feature}: {got}, should be {want}"
                                );
                            }
                        }
                        for (first, rows) in [(0, 1), (3, 7), (16, 1), (2, 12), (5, 2)] {
                            let got = run(address, &weights, &gemm, x.as_ptr().cast(), first, rows);
                            let same = &all[first * lanes..(first + rows) * lanes];
                            assert_eq!(bits(&got), bits(same), "{name} {cpu} k {k} rows {first}+{rows}");
                        }
                    },
                );
            }
        }
    }
}

#[test]
fn illegal_shapes_are_errors() {
    let context = inkwell::context::Context::create();
    let module = context.create_module("kernels");
    let target = tilec_kernels_gen::llvm::host_target().unwrap();
    let kernels = tilec_kernels_gen::llvm::Kernels::new(&context, &module, &target);
    let layout = PanelLayout::new(Format::BF16, 64);
    let activations = Activations::Int8(tilec_ir::abi::QuantRows { k: 64, max_rows: 1 });
    let error = kernels.gemm("gemm", &Gemm { layout, activations }).unwrap_err();
    assert!(error.to_string().contains("bf16"), "{error}");
}
