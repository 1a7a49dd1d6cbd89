use super::*;
use proptest::prelude::*;

/// Decodes a small float from its fields, independently of the tables.
fn small_float(code: u32, exponent_bits: u32, mantissa_bits: u32, bias: i32) -> f64 {
    let mantissa = f64::from(code & ((1 << mantissa_bits) - 1));
    let exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1);
    let unit = 2f64.powi(-(mantissa_bits as i32));
    let magnitude = match exponent {
        0 => mantissa * unit * 2f64.powi(1 - bias),
        e => (1.0 + mantissa * unit) * 2f64.powi(e as i32 - bias),
    };
    if code >> (exponent_bits + mantissa_bits) & 1 == 1 { -magnitude } else { magnitude }
}

#[test]
fn every_code_decodes_to_the_value_of_its_fields() {
    for code in 0..16u8 {
        assert_eq!(f64::from(e2m1_to_f32(code)), small_float(code.into(), 2, 1, 1), "{code}");
    }
    for code in 0..=255u8 {
        let value = e4m3_to_f32(code);
        match code & 0x7f {
            0x7f => assert!(value.is_nan()),
            _ => assert_eq!(f64::from(value), small_float(code.into(), 4, 3, 7), "{code}"),
        }
    }
    for code in 0..255u8 {
        assert_eq!(f64::from(e8m0_to_f32(code)), 2f64.powi(i32::from(code) - 127), "{code}");
    }
    assert!(e8m0_to_f32(255).is_nan());
}

/// The nearest of `table` (code, value), ties to the even code: rounding by exhaustive search.
fn nearest(x: f32, table: &[(u8, f32)]) -> u8 {
    let distance = |v: f32| (f64::from(v) - f64::from(x)).abs();
    let key = |&(code, value): &(u8, f32)| (distance(value), code & 1);
    table.iter().min_by(|a, b| key(a).partial_cmp(&key(b)).unwrap()).unwrap().0
}

#[test]
fn small_floats_round_to_nearest_even() {
    let e2m1: Vec<_> = (0..8).map(|c| (c, e2m1_to_f32(c))).collect();
    let e4m3: Vec<_> = (0..0x7f).map(|c| (c, e4m3_to_f32(c))).collect();
    for (table, encode) in [(&e2m1, f32_to_e2m1 as fn(f32) -> u8), (&e4m3, f32_to_e4m3)] {
        let mut points: Vec<f32> = table.iter().map(|t| t.1).collect();
        points.extend(table.windows(2).map(|w| (w[0].1 + w[1].1) / 2.0));
        let neighbours = points.iter().flat_map(|&p| [p.next_down().max(0.0), p, p.next_up()]);
        for x in neighbours.chain((0..4000).map(|i| i as f32 * 0.13)).chain([1e9, 1e-30]) {
            let expected = nearest(x, table);
            assert_eq!(encode(x), expected, "{x}");
            assert_eq!(encode(-x) & !expected, if table.len() == 8 { 8 } else { 0x80 }, "-{x}");
        }
    }
    assert_eq!(f32_to_e4m3(f32::INFINITY), 0x7e);
    assert_eq!(f32_to_e4m3(f32::NAN) & 0x7f, 0x7f);
}

#[test]
fn e8m0_takes_the_power_of_two_below() {
    for code in 0..255u8 {
        let x = e8m0_to_f32(code);
        assert_eq!(f32_to_e8m0_floor(x), code);
        assert_eq!(f32_to_e8m0_floor(x * 1.99), code);
    }
    for x in [0.0, -1.0, f32::NAN, 1e-45] {
        assert_eq!(f32_to_e8m0_floor(x), 0);
    }
    assert_eq!(f32_to_e8m0_floor(f32::INFINITY), 254);
}

/// One-row planes with every code of a format, under one scale.
fn codes_under_scale(format: Format, scale: &[u8]) -> Planes {
    let bits = format.code.bits();
    let cols = (1usize << bits.min(8)).max(format.block);
    let mut planes = Planes::zeroed(format, 1, cols).unwrap();
    for (i, byte) in planes.codes.iter_mut().enumerate() {
        *byte = if bits == 4 { (((2 * i) % 16) | (((2 * i + 1) % 16) << 4)) as u8 } else { i as u8 };
    }
    planes.scales.chunks_exact_mut(scale.len()).for_each(|s| s.copy_from_slice(scale));
    planes
}

#[test]
fn every_code_times_every_scale_dequantizes_exactly() {
    let value = |format: Format, i: usize| -> f64 {
        match format.code {
            Code::E2m1 => small_float((i % 16) as u32, 2, 1, 1),
            Code::E4m3 => f64::from(e4m3_to_f32(i as u8)),
            Code::U4 => (i % 16) as f64 - f64::from(format.zero),
            _ => i as f64 - f64::from(format.zero),
        }
    };
    let check = |planes: &Planes, scale: f64| {
        let mut out = vec![0.0; planes.cols];
        dequantize(&planes.view(), &mut out).unwrap();
        for (i, &got) in out.iter().enumerate() {
            let exact = (value(planes.format, i) * scale) as f32;
            let min = f64::from(if planes.mins.is_empty() {
                0.0
            } else {
                planes.format.scale.unwrap().decode(&planes.mins)
            });
            let expected = (f64::from(exact) + min) as f32;
            assert!(got == expected || (got.is_nan() && expected.is_nan()), "{} {i}: {got}", planes.format);
        }
    };
    for code in 0..=255u8 {
        check(&codes_under_scale(Format::MXFP4, &[code]), f64::from(e8m0_to_f32(code)));
        let mut nvfp4 = codes_under_scale(Format::NVFP4, &[code]);
        nvfp4.tensor_scale = 0.0123;
        check(&nvfp4, f64::from(e4m3_to_f32(code) * 0.0123));
    }
    for half in (0..=u16::MAX).step_by(7) {
        let scale = f16::from_bits(half);
        for format in [Format::Q4_0, Format::Q4_1, Format::Q8_0] {
            let mut planes = codes_under_scale(format, &scale.to_le_bytes());
            let min = f16::from_bits(half.rotate_left(3) & 0xbfff).to_le_bytes();
            planes.mins.chunks_exact_mut(2).for_each(|m| m.copy_from_slice(&min));
            check(&planes, scale.to_f64());
        }
    }
    for scale in [0.0f32, 1.0, -0.37, 1e-40, 3e30] {
        for format in [Format::Q4_K, Format::Q6_K, Format::FP8_BLOCK, Format::FP8_1X128] {
            check(&codes_under_scale(format, &scale.to_le_bytes()), f64::from(scale));
        }
    }
}

#[test]
fn all_16_bit_floats_survive_a_round_trip() {
    for format in [Format::F16, Format::BF16] {
        let codes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let view = PlaneView::new(format, 256, 256, &codes, &[], &[], 1.0).unwrap();
        let mut values = vec![0.0; 65536];
        dequantize(&view, &mut values).unwrap();
        let again = quantize(format, 256, 256, &values).unwrap();
        for (i, value) in values.iter().enumerate() {
            let same = again.codes[2 * i..][..2] == codes[2 * i..][..2];
            assert!(same || value.is_nan(), "{format} {i:#x} {value}");
        }
    }
    // Ties to even, in both directions.
    for (x, expected) in [(0x3f80_8000u32, 0x3f80u16), (0x3f81_8000, 0x3f82), (0x3f80_8001, 0x3f81)] {
        let planes = quantize(Format::BF16, 1, 1, &[f32::from_bits(x)]).unwrap();
        assert_eq!(planes.codes, expected.to_le_bytes());
    }
}

/// A worst-case bound on the error of one weight, given the extremes of its block.
fn bound(format: Format, value: f32, amax: f32, range: f32) -> f32 {
    let scale_slack = 1.0 + 1.0 / 1024.0;
    match format.name().unwrap() {
        "f32" => 0.0,
        "f16" => value.abs() / 2048.0 + 1e-7,
        "bf16" => value.abs() / 256.0,
        // Half of the widest gap (4 to 6) at scale amax / 4, or clipping from 8 to 6.
        "mxfp4" => amax / 4.0,
        // Half of the widest gap at amax / 6, with the E4M3 scale off by 1/16.
        "nvfp4" => amax / 6.0 * 1.0625 + amax / 16.0,
        "fp8" | "fp8_1x128" | "fp8_channel" => value.abs() / 16.0 + amax / 448.0 / 512.0,
        // The extreme of the other sign has only seven steps.
        "q4_0" => amax / 8.0 * scale_slack,
        "q4_1" => range / 30.0 + amax / 500.0,
        "q4_k" => range / 30.0 * scale_slack,
        "q8_0" => amax / 254.0 + amax / 1024.0,
        "q6_k" => amax / 254.0 * scale_slack,
        other => unreachable!("{other} has no bound"),
    }
}

fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(|_| next() + next() + next()).collect()
}

#[test]
fn every_format_round_trips_within_its_bound() {
    for (_, format) in Format::NAMED {
        for (rows, cols) in [(3, 256), (130, 160), (1, 33), (5, 1)] {
            let input = values(rows * cols, (rows * 1000 + cols) as u64);
            let planes = quantize(*format, rows, cols, &input).unwrap();
            let mut output = vec![0.0; rows * cols];
            dequantize(&planes.view(), &mut output).unwrap();
            let (block, block_rows) = (format.block.max(1), format.block_rows);
            for (i, (&x, &y)) in input.iter().zip(&output).enumerate() {
                let (row, col) = (i / cols, i % cols);
                let (r0, c0) = (row / block_rows * block_rows, col / block * block);
                let members = (r0..rows.min(r0 + block_rows))
                    .flat_map(|r| (c0..cols.min(c0 + block)).map(move |c| (r, c)))
                    .map(|(r, c)| input[r * cols + c]);
                let (mut low, mut high) = (f32::MAX, f32::MIN);
                members.for_each(|v| (low, high) = (low.min(v), high.max(v)));
                let limit = bound(*format, x, high.max(-low), high - low);
                assert!((x - y).abs() <= limit, "{format} {rows}x{cols} at {row},{col}: {x} {y} > {limit}");
            }
        }
    }
}

#[test]
fn quantizing_what_was_dequantized_changes_nothing() {
    for format in [Format::MXFP4, Format::Q6_K, Format::F16, Format::BF16, Format::F32] {
        let first = quantize(format, 4, 96, &values(384, 5)).unwrap();
        let mut decoded = vec![0.0; 384];
        dequantize(&first.view(), &mut decoded).unwrap();
        let second = quantize(format, 4, 96, &decoded).unwrap();
        let mut again = vec![0.0; 384];
        dequantize(&second.view(), &mut again).unwrap();
        let worst = decoded.iter().zip(&again).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-6, "{format}: {worst}");
    }
}

#[test]
fn mxfp4_never_does_worse_than_the_ocp_scale() {
    let input = values(32 * 64, 9);
    let planes = quantize(Format::MXFP4, 64, 32, &input).unwrap();
    let (mut raised, mut kept) = (0, 0);
    for (row, &scale) in input.chunks(32).zip(&planes.scales) {
        let amax = row.iter().fold(0f32, |a, v| a.max(v.abs()));
        let ocp = (amax.log2().floor() as i32 - 2 + 127) as u8;
        let error = |code: u8| -> f64 {
            let s = e8m0_to_f32(code);
            row.iter().map(|v| f64::from(e2m1_to_f32(f32_to_e2m1(v / s)) * s - v).powi(2)).sum()
        };
        assert!(scale == ocp || scale == ocp + 1);
        assert!(error(scale) <= error(ocp));
        if scale == ocp { kept += 1 } else { raised += 1 }
    }
    assert!(raised > 0 && kept > 0, "{raised} {kept}");
}

#[test]
fn nvfp4_uses_the_whole_range_of_its_scales() {
    let planes = quantize(Format::NVFP4, 8, 64, &values(512, 3)).unwrap();
    assert_eq!(planes.scales.iter().max(), Some(&0x7e), "the largest block has scale 448");
    let zero = quantize(Format::NVFP4, 1, 16, &[0.0; 16]).unwrap();
    assert_eq!(zero.tensor_scale, 1.0);
    assert_eq!(zero.codes, [0; 8]);
}

#[test]
fn bad_input_is_refused() {
    let e = quantize(Format::Q8_0, 2, 2, &[1.0, 2.0, f32::NAN, 0.0]).unwrap_err();
    assert!(matches!(e, ConvertError::NotFinite { row: 1, col: 0, .. }), "{e}");
    let e = quantize(Format::Q8_0, 2, 2, &[1.0]).unwrap_err();
    assert!(matches!(e, ConvertError::PlaneSize { plane: "values", expected: 4, found: 1, .. }), "{e}");
    let e = Planes::zeroed(Format::F32, usize::MAX / 4, 5).unwrap_err();
    assert!(matches!(e, ConvertError::Overflow { .. }), "{e}");
    for (codes, scales, mins) in [(15, 2, 2), (16, 1, 2), (16, 2, 0)] {
        let (codes, scales, mins) = (vec![0; codes], vec![0; scales], vec![0; mins]);
        assert!(PlaneView::new(Format::Q4_1, 1, 32, &codes, &scales, &mins, 1.0).is_err());
    }
    for format in
        [Format { scale: None, ..Format::Q8_0 }, Format { scale: Some(ScaleType::F32), ..Format::F32 }]
    {
        assert_eq!(quantize(format, 1, 1, &[1.0]), Err(ConvertError::Unsupported { format }));
    }
    assert!(quantize(Format::F16, 1, 1, &[f32::INFINITY]).is_ok(), "plain floats keep infinities");
}

#[test]
fn bad_scales_are_found_where_they_are() {
    let mut planes = quantize(Format::Q4_1, 3, 64, &values(192, 1)).unwrap();
    assert_eq!(planes.view().bad_scale(), None);
    planes.mins[5 * 2..][..2].copy_from_slice(&f16::INFINITY.to_le_bytes());
    assert_eq!(planes.view().bad_scale(), Some((2, 32, true)));
    planes.scales[2 * 2..][..2].copy_from_slice(&f16::NAN.to_le_bytes());
    assert_eq!(planes.view().bad_scale(), Some((1, 0, false)));
    for (format, bad) in [
        (Format::MXFP4, vec![0xff]),
        (Format::NVFP4, vec![0xff]),
        (Format::Q6_K, f32::NEG_INFINITY.to_le_bytes().to_vec()),
        (Format::FP8_BLOCK, f32::NAN.to_le_bytes().to_vec()),
    ] {
        let mut planes = quantize(format, 1, 256, &values(256, 1)).unwrap();
        assert_eq!(planes.view().bad_scale(), None);
        let at = planes.scales.len() - bad.len();
        planes.scales[at..].copy_from_slice(&bad);
        assert_eq!(planes.view().bad_scale(), Some((0, 256 - format.block, false)), "{format}");
    }
}

/// Packs, then checks every code through `code_at`, the padding and the round trip.
fn check_panel(format: Format, rows: usize, k: usize, seed: u64) {
    let stored = quantize(format, rows, k, &values(rows * k, seed)).unwrap();
    let planes = to_row_format(&stored.view());
    let (mut whole, mut expanded) = (vec![0.0; rows * k], vec![0.0; rows * k]);
    dequantize(&stored.view(), &mut whole).unwrap();
    dequantize(&planes.view(), &mut expanded).unwrap();
    assert_eq!(whole, expanded, "{format}: folding the scales changes no weight");

    let layout = PanelLayout::new(format, k);
    let mut panel = vec![0xee; layout.bytes()];
    pack_panel(&layout, &planes.view(), &mut panel).unwrap();
    let unpacked = unpack_panel(&layout, &panel).unwrap();
    let mut out = vec![0.0; PANEL * k];
    dequantize(&unpacked.view(), &mut out).unwrap();
    assert_eq!(out[..rows * k], whole, "{format} {rows}x{k}");
    assert!(out[rows * k..].iter().all(|&v| v == 0.0), "{format}: padded features are zero");

    let zero = match format.code {
        Code::I8 => 0x80,
        Code::U4 if format.zero == 8 => 8,
        _ => 0,
    };
    let bytes = format.code.bits().div_ceil(8);
    for lane in 0..PANEL {
        for col in 0..layout.k_pad() {
            if lane < rows && col < k {
                continue;
            }
            let (at, high) = layout.code_at(lane, col);
            let code = match format.code.bits() {
                4 => panel[at] >> (4 * high as u8) & 15,
                _ => panel[at..at + bytes].iter().copied().max().unwrap(),
            };
            assert_eq!(code, zero, "{format} {rows}x{k}: padding at {lane},{col}");
        }
    }
    if let Some(scale) = layout.format.scale {
        for lane in 0..PANEL {
            for b in 0..layout.blocks() {
                if lane < rows && b * layout.format.block < k {
                    continue;
                }
                let at = (b * PANEL + lane) * scale.bytes();
                let padding = &panel[at..at + scale.bytes()];
                assert!(padding.iter().all(|&b| b == 0), "{format} {rows}x{k}: scale {lane},{b}");
            }
        }
    }
}

#[test]
fn panels_hold_every_code_where_the_layout_says() {
    for (_, format) in Format::NAMED {
        for (rows, k) in
            [(16, 256), (16, 576), (7, 40), (1, 1), (16, 31), (3, 130), (1, 255), (2, 127), (0, 64)]
        {
            check_panel(*format, rows, k, 11);
        }
    }
}

#[test]
fn rows_of_another_kind_do_not_fit_a_panel() {
    let layout = PanelLayout::new(Format::Q8_0, 64);
    let mut panel = vec![0; layout.bytes()];
    for (format, rows, cols) in [(Format::Q8_0, 17, 64), (Format::Q8_0, 16, 32), (Format::Q4_0, 16, 64)] {
        let planes = Planes::zeroed(format, rows, cols).unwrap();
        let e = pack_panel(&layout, &planes.view(), &mut panel).unwrap_err();
        assert!(matches!(e, ConvertError::PanelMismatch { .. }), "{e}");
    }
    let planes = Planes::zeroed(Format::Q8_0, 16, 64).unwrap();
    assert!(pack_panel(&layout, &planes.view(), &mut panel[1..]).is_err());
}

proptest! {
    #[test]
    fn panels_round_trip(named in 0..Format::NAMED.len(), rows in 1..=16usize, k in 1..300usize, seed: u64) {
        check_panel(Format::NAMED[named].1, rows, k, seed);
    }

    #[test]
    fn quantization_survives_any_finite_input(
        named in 0..Format::NAMED.len(),
        input in proptest::collection::vec(any::<f32>().prop_filter("finite", |v| v.is_finite()), 1..200),
    ) {
        let format = Format::NAMED[named].1;
        let planes = quantize(format, 1, input.len(), &input).unwrap();
        prop_assert_eq!(planes.view().bad_scale(), None);
        let mut out = vec![0.0; input.len()];
        dequantize(&planes.view(), &mut out).unwrap();
        prop_assert!(out.iter().all(|v| !v.is_nan()));
    }
}
