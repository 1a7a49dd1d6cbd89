//! Norms, quantization, embedding, copies and epilogue pieces against scalar references.
#![cfg(feature = "llvm")]

mod common;

use common::*;
use tilec_ir::abi::{KvLayout, KvType, QuantRows};
use tilec_ir::format::{Code, Format};
use tilec_kernels_gen::pieces::{Glu, HeadNorm, KvHalf, KvWrite, Rope};
use tilec_kernels_gen::rows::{Embed, Quantize, RmsNorm, Table};

const NULL: usize = 0;

/// The quantization of one block as documented: codes, scale, sum.
fn quantize_block(x: &[f32]) -> (Vec<i8>, f32, i32) {
    let amax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    if amax < 1e-35 {
        return (vec![0; 32], 0.0, 0);
    }
    let mut codes: Vec<i8> = x.iter().map(|v| (v * (127.0 / amax)).round_ties_even() as i8).collect();
    codes.resize(32, 0);
    let sum = codes.iter().map(|c| i32::from(*c)).sum();
    (codes, amax / 127.0, sum)
}

#[track_caller]
fn assert_quantized(quant: &Quant, row: usize, x: &[f32], what: &str) {
    for (block, x) in x.chunks(32).enumerate() {
        let (codes, scale, sum) = quantize_block(x);
        let got: Vec<i8> = (0..32).map(|c| quant.code(row, block * 32 + c)).collect();
        assert_eq!(got, codes, "{what} row {row} block {block}");
        assert_eq!(quant.scale(row, block).to_bits(), scale.to_bits(), "{what} row {row} block {block}");
        assert_eq!(quant.sum(row, block), sum, "{what} row {row} block {block}");
    }
}

#[test]
fn rms_norm_matches_and_quantizes_what_it_writes() {
    for dim in [32, 40, 576, 2880, 7] {
        let (rows, stride) = (5, dim + 3);
        let mut random = Random(dim as u64);
        let (x, weight) = (random.units(rows * stride), random.units(dim));
        let index: Vec<u32> = vec![4, 0, 3, 3, 1];
        let mut across = Vec::new();
        for (cpu, target) in targets() {
            for gathered in [false, true] {
                let mut quant = Quant::empty(dim, rows + 1);
                let norm = RmsNorm { dim, eps: 1e-5, f32_out: true, quant_out: Some(quant.layout), gathered };
                let mut out = vec![f32::NAN; rows * stride];
                with_kernel(
                    &target,
                    |k| k.rms_norm("norm", &norm),
                    |address| {
                        call!(
                            address,
                            x.as_ptr(),
                            stride,
                            index.as_ptr(),
                            rows,
                            weight.as_ptr(),
                            out.as_mut_ptr(),
                            stride,
                            quant.data.as_mut_ptr(),
                            1usize,
                        );
                    },
                );
                for row in 0..rows {
                    let from = if gathered { index[row] as usize } else { row };
                    let x = &x[from * stride..from * stride + dim];
                    let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / dim as f64;
                    for c in 0..dim {
                        let want = f64::from(x[c]) / (mean + 1e-5).sqrt() * f64::from(weight[c]);
                        close(out[row * stride + c], want, 1e-6, || format!("{cpu} {dim} row {row} {c}"));
                    }
                    assert_quantized(&quant, row + 1, &out[row * stride..row * stride + dim], cpu);
                    assert!(out[row * stride + dim].is_nan(), "{cpu}: written past the row");
                }
                if gathered {
                    across.push(bits(&out));
                }
            }
        }
        assert!(across.windows(2).all(|w| w[0] == w[1]), "targets differ at {dim}");
    }
}

#[test]
fn quantize_keeps_columns_apart_and_infinities_visible() {
    let (k, rows, stride) = (136, 3, 140);
    let mut random = Random(3);
    let mut x = random.units(rows * stride);
    x[stride..stride + 32].fill(0.0);
    x[2 * stride + 7] = f32::INFINITY;
    x[2 * stride + 40] = f32::NAN;
    x[2 * stride + 64..2 * stride + 96].fill(1e-38);
    for (cpu, target) in targets() {
        let mut quant = Quant::empty(k, rows);
        let layout = quant.layout;
        with_kernel(
            &target,
            |b| Ok(b.quantize("quantize", &Quantize { quant: layout })),
            |address| {
                // Two calls, as two tiles make them: 64 columns, then the other 72.
                for (col, cols) in [(0usize, 64usize), (64, 72)] {
                    // SAFETY: inside the rows.
                    let from = unsafe { x.as_ptr().add(col) };
                    call!(address, from, stride, rows, cols, quant.data.as_mut_ptr(), NULL, col);
                }
            },
        );
        for row in 0..2 {
            assert_quantized(&quant, row, &x[row * stride..row * stride + k], cpu);
        }
        assert!(quant.scale(2, 0).is_nan() && quant.scale(2, 1).is_nan(), "{cpu}");
        assert_eq!((quant.scale(2, 2), quant.sum(2, 2)), (0.0, 0), "{cpu}");
        assert!(quant.scale(2, 3) > 0.0, "{cpu}");
    }
}

#[test]
fn embed_reads_every_format() {
    let tokens: Vec<u32> = vec![0, 33, 17, 15, 16];
    for (cpu, target) in targets() {
        for (name, format) in Format::NAMED {
            for dim in [40, 64] {
                let mut random = Random(11);
                let weights = Weights::random(*format, 34, dim, &mut random);
                let embed = Embed { table: Table::Panels(weights.layout), dim, scale: Some(3.0) };
                let mut out = vec![f32::NAN; tokens.len() * (dim + 1)];
                with_kernel(
                    &target,
                    |k| k.embed("embed", &embed),
                    |address| {
                        let (table, to) = (weights.packed.as_ptr(), out.as_mut_ptr());
                        call!(address, table, tokens.as_ptr(), tokens.len(), to, dim + 1);
                    },
                );
                for (row, token) in tokens.iter().enumerate() {
                    for c in 0..dim {
                        let want = 3.0 * weights.value(*token as usize, c);
                        close(out[row * (dim + 1) + c], want, 1e-6, || format!("{cpu} {name} {token} {c}"));
                    }
                    assert!(out[row * (dim + 1) + dim].is_nan());
                }
            }
        }
        let (dim, mut random) = (37, Random(5));
        for code in [Code::F32, Code::F16, Code::Bf16] {
            let values = random.units(4 * dim);
            let bytes: Vec<u8> = match code {
                Code::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                Code::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            };
            let embed = Embed { table: Table::Plain(code), dim, scale: None };
            let mut out = vec![f32::NAN; dim];
            with_kernel(
                &target,
                |k| k.embed("embed", &embed),
                |address| {
                    call!(address, bytes.as_ptr(), [3u32].as_ptr(), 1usize, out.as_mut_ptr(), dim);
                },
            );
            for c in 0..dim {
                let v = values[3 * dim + c];
                let want = match code {
                    Code::F32 => v,
                    Code::F16 => half::f16::from_f32(v).to_f32(),
                    _ => half::bf16::from_f32(v).to_f32(),
                };
                assert_eq!(out[c], want, "{cpu} {code:?} {c}");
            }
        }
    }
}

#[test]
fn copies_sums_and_bias() {
    let (rows, cols, stride) = (3usize, 37usize, 40usize);
    let mut random = Random(9);
    let (tile, old) = (random.units(rows * stride), random.units(rows * stride));
    let (bias, shares) = (random.units(cols), random.units(rows));
    let index: Vec<u32> = vec![2, 2, 0];
    for (cpu, target) in targets() {
        let check = |got: &[f32], want: &dyn Fn(usize, usize) -> f32, what: &str| {
            for row in 0..rows {
                for c in 0..stride {
                    // Columns past the last are left alone.
                    let want = if c < cols { want(row, c) } else { old[row * stride + c] };
                    assert_eq!(got[row * stride + c], want, "{cpu} {what} {row} {c}");
                }
            }
        };
        let at = |row: usize, c: usize| tile[row * stride + c];
        let mut dst = old.clone();
        with_kernel(
            &target,
            |k| Ok(k.copy_rows("copy")),
            |f| {
                call!(f, tile.as_ptr(), stride, rows, cols, dst.as_mut_ptr(), stride);
            },
        );
        check(&dst, &at, "copy");
        let mut dst = old.clone();
        with_kernel(
            &target,
            |k| Ok(k.gather_rows("gather")),
            |f| {
                call!(f, tile.as_ptr(), stride, index.as_ptr(), rows, cols, dst.as_mut_ptr(), stride);
            },
        );
        check(&dst, &|row, c| at(index[row] as usize, c), "gather");
        let mut dst = old.clone();
        with_kernel(
            &target,
            |k| Ok(k.add_rows("add")),
            |f| {
                call!(f, tile.as_ptr(), stride, rows, cols, dst.as_mut_ptr(), stride);
            },
        );
        check(&dst, &|row, c| old[row * stride + c] + at(row, c), "add");
        let mut dst = old.clone();
        with_kernel(
            &target,
            |k| Ok(k.add_weighted("add")),
            |f| {
                let shares = shares.as_ptr();
                call!(f, tile.as_ptr(), stride, shares, rows, cols, dst.as_mut_ptr(), stride);
            },
        );
        check(&dst, &|row, c| at(row, c).mul_add(shares[row], old[row * stride + c]), "weighted");
        let mut dst = old.clone();
        with_kernel(
            &target,
            |k| Ok(k.bias("bias")),
            |f| {
                call!(f, dst.as_mut_ptr(), stride, rows, cols, bias.as_ptr());
            },
        );
        check(&dst, &|row, c| old[row * stride + c] + bias[c], "bias");

        let from = Quant::random(100, 3, &mut random);
        let mut to = Quant::empty(100, 5);
        let layouts: (QuantRows, QuantRows) = (from.layout, to.layout);
        with_kernel(
            &target,
            |k| k.gather_quant("gather", &layouts.0, &layouts.1),
            |f| {
                call!(f, from.data.as_ptr(), index.as_ptr(), 3usize, to.data.as_mut_ptr());
            },
        );
        for (row, source) in index.iter().enumerate() {
            let source = *source as usize;
            assert!((0..128).all(|c| to.code(row, c) == from.code(source, c)), "{cpu}");
            assert!((0..4).all(|b| to.scale(row, b) == from.scale(source, b)), "{cpu}");
            assert!((0..4).all(|b| to.sum(row, b) == from.sum(source, b)), "{cpu}");
        }
    }
}

#[test]
fn head_norm_and_rope() {
    let (rows, heads) = (3usize, 2usize);
    for (head_dim, rotary_dims) in [(64, 64), (64, 20), (128, 64), (16, 2), (40, 40)] {
        let stride = heads * head_dim + 1;
        let mut random = Random(head_dim as u64);
        let x = random.units(rows * stride);
        let weight = random.units(head_dim);
        let (half, positions) = (rotary_dims / 2, [5u32, 0, 8]);
        let (cos, sin) = (random.units(9 * half), random.units(9 * half));
        for (cpu, target) in targets() {
            let mut got = x.clone();
            let norm = HeadNorm { head_dim, eps: 1e-6 };
            with_kernel(
                &target,
                |k| k.head_norm("norm", &norm),
                |f| {
                    call!(f, got.as_mut_ptr(), stride, rows, heads, weight.as_ptr());
                },
            );
            let mut turned = x.clone();
            let rope = Rope { head_dim, rotary_dims };
            with_kernel(
                &target,
                |k| k.rope("rope", &rope),
                |f| {
                    let (tile, positions) = (turned.as_mut_ptr(), positions.as_ptr());
                    call!(f, tile, stride, rows, heads, positions, cos.as_ptr(), sin.as_ptr());
                },
            );
            for (row, position) in positions.iter().enumerate() {
                for head in 0..heads {
                    let base = row * stride + head * head_dim;
                    let x: Vec<f64> = x[base..base + head_dim].iter().map(|v| f64::from(*v)).collect();
                    let mean = x.iter().map(|v| v * v).sum::<f64>() / head_dim as f64;
                    for c in 0..head_dim {
                        let what = || format!("{cpu} {head_dim}/{rotary_dims} row {row} head {head} {c}");
                        let want = x[c] / (mean + 1e-6).sqrt() * f64::from(weight[c]);
                        close(got[base + c], want, 1e-6, what);
                        let pair = c % half + *position as usize * half;
                        let (cos, sin) = (f64::from(cos[pair]), f64::from(sin[pair]));
                        let want = match c {
                            c if c < half => x[c] * cos - x[c + half] * sin,
                            c if c < rotary_dims => x[c] * cos + x[c - half] * sin,
                            c => x[c],
                        };
                        close(turned[base + c], want, 1e-6, what);
                    }
                }
                let end = row * stride + heads * head_dim;
                assert_eq!((got[end], turned[end]), (x[end], x[end]), "{cpu}: written past the heads");
            }
        }
    }
}

#[test]
fn glu_is_accurate_over_the_whole_range() {
    let edge = [0.0, -0.0, 1e-30, 88.0, -88.0, 100.0, -100.0, 300.0, 7.5, -7.5, 1e-3, -1e-3];
    let gate: Vec<f32> = (0..2048).map(|i| (i as f32 - 1024.0) / 23.0).chain(edge).collect();
    let up: Vec<f32> = (0..gate.len()).map(|i| (i % 37) as f32 / 3.0 - 6.0).collect();
    let n = gate.len();
    for (cpu, target) in targets() {
        for glu in [Glu::Silu, Glu::GeluTanh, Glu::Clamped { alpha: 1.702, limit: 7.0 }] {
            let mut out = vec![f32::NAN; n];
            with_kernel(
                &target,
                |k| Ok(k.glu("glu", &glu)),
                |f| {
                    call!(f, gate.as_ptr(), up.as_ptr(), n, 1usize, n, out.as_mut_ptr(), n);
                },
            );
            for i in 0..n {
                let (g, u) = (f64::from(gate[i]), f64::from(up[i]));
                let want = match glu {
                    Glu::Silu => g / (1.0 + (-g).exp()) * u,
                    Glu::GeluTanh => {
                        let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
                        0.5 * g * (1.0 + inner.tanh()) * u
                    }
                    Glu::Clamped { alpha, limit } => {
                        let (g, limit) = (g.min(f64::from(limit)), f64::from(limit));
                        g / (1.0 + (-f64::from(alpha) * g).exp()) * (u.clamp(-limit, limit) + 1.0)
                    }
                };
                close(out[i], want, 3e-7, || format!("{cpu} {glu:?} gate {g} up {u}"));
            }
        }
    }
}

#[test]
fn kv_write_rounds_and_transposes() {
    let (rows, stride) = (4usize, 50usize);
    let mut x = Random(21).units(rows * stride);
    // Values that round up to the next power of two, to infinity (f16), to subnormals.
    x[..6].copy_from_slice(&[65519.9, 70000.0, 3e-8, 5.96e-8, 1.0 + 3.0 / 2048.0, 2049.0]);
    let (positions, sequences) = ([15u32, 16, 40, 3], [1u32, 1, 0, 0]);
    let table = [2u32, 0, 3, 1];
    for kv_type in [KvType::F32, KvType::F16, KvType::Bf16] {
        let layout = KvLayout { kv_type, layers: 1, kv_heads: 2, qk_dim: 40, v_dim: 24, page_tokens: 32 };
        for (cpu, target) in targets() {
            let mut kv = Bytes::new(layout.total_bytes(4).unwrap());
            kv.bytes_mut().fill(0);
            for half in [KvHalf::Key, KvHalf::Value] {
                with_kernel(
                    &target,
                    |k| k.kv_write("write", &KvWrite { layout, half }),
                    |f| {
                        call!(
                            f,
                            x.as_ptr(),
                            stride,
                            rows,
                            positions.as_ptr(),
                            sequences.as_ptr(),
                            table.as_ptr(),
                            2usize,
                            kv.as_mut_ptr(),
                            1usize,
                        );
                    },
                );
            }
            let size = kv_type.bytes();
            let read = |at: usize| match kv_type {
                KvType::F32 => kv.f32_at(at),
                KvType::F16 => half::f16::from_le_bytes(kv.bytes()[at..at + 2].try_into().unwrap()).to_f32(),
                KvType::Bf16 => {
                    half::bf16::from_le_bytes(kv.bytes()[at..at + 2].try_into().unwrap()).to_f32()
                }
            };
            let round = |v: f32| match kv_type {
                KvType::F32 => v,
                KvType::F16 => half::f16::from_f32(v).to_f32(),
                KvType::Bf16 => half::bf16::from_f32(v).to_f32(),
            };
            let mut written = 0.0;
            for row in 0..rows {
                let (position, sequence) = (positions[row] as usize, sequences[row] as usize);
                let page = table[sequence * 2 + position / 32] as usize;
                let block = layout.block_offset(4, 0, page, 1);
                let inside = position % 32;
                for c in 0..40 {
                    let at = block + ((inside / 16 * 40 + c) * 16 + inside % 16) * size;
                    assert_eq!(read(at), round(x[row * stride + c]), "{cpu} {kv_type:?} key {row} {c}");
                    written += read(at);
                }
                for c in 0..32 {
                    let at = block + layout.v_offset() + (inside * 32 + c) * size;
                    let want = if c < 24 { round(x[row * stride + c]) } else { 0.0 };
                    assert_eq!(read(at), want, "{cpu} {kv_type:?} value {row} {c}");
                    written += read(at);
                }
            }
            let all: f32 = (0..kv.bytes().len()).step_by(size).map(read).filter(|v| v.is_finite()).sum();
            if written.is_finite() {
                assert!((all - written).abs() < 1.0, "{cpu}: something else was written");
            }
        }
    }
}
