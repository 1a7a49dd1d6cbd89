use super::*;
use std::collections::BTreeMap;
use tilec_ir::convert::{PlaneView, unpack_panel};
use tilec_ir::format::Format;
use tilec_ir::tensor::TensorInfo;

const K: usize = 96;

/// A matrix and a norm in every format, 100 rows each.
fn checkpoint(seed: u64) -> Checkpoint {
    let mut tensors = BTreeMap::new();
    for (name, format) in Format::NAMED {
        tensors.insert(format!("{name}.a"), TensorInfo::new([100, K], *format));
        tensors.insert(format!("{name}.b"), TensorInfo::new([100, K], *format));
    }
    tensors.insert("norm".into(), TensorInfo::new([K], Format::BF16));
    Checkpoint::synthetic(serde_json::json!({"model_type": "llama"}), seed, tensors)
}

fn segment(tensor: &str, row_start: usize, rows: usize) -> RowSegment {
    RowSegment::new(tensor, row_start, rows)
}

/// One item after the other, at aligned offsets, with a gap in front.
fn recipe(contents: Vec<PackContent>) -> Packing {
    let mut packing = Packing { items: Vec::new(), bytes: 128 };
    for content in contents {
        let offset = packing.bytes;
        packing.bytes = (offset + content.bytes().unwrap()).next_multiple_of(64);
        packing.items.push(PackItem { offset, content });
    }
    packing
}

fn panels(format: Format, segments: Vec<RowSegment>, interleave: usize) -> PackContent {
    let panels = segments.iter().map(RowSegment::panels).sum();
    PackContent::Panels { layout: PanelLayout::new(format, K), segments, interleave, panels }
}

/// A recipe of every kind of item.
fn everything() -> Packing {
    recipe(vec![
        panels(Format::Q4_1, vec![segment("q4_1.a", 0, 100), segment("q4_1.b", 20, 33)], 1),
        PackContent::F32 { tensor: "norm".into(), len: K },
        panels(Format::MXFP4, vec![segment("mxfp4.a", 0, 100), segment("mxfp4.b", 0, 100)], 2),
        PackContent::RopeTable { inv_freq: vec![1.0, 0.25], positions: 5, attention_factor: 2.0 },
    ])
}

fn packed(checkpoint: &Checkpoint, packing: &Packing) -> PackedWeights {
    pack(checkpoint, packing, &mut |_, _| {}).unwrap()
}

fn item<'a>(weights: &'a PackedWeights, packing: &Packing, index: usize) -> &'a [u8] {
    let PackItem { offset, content } = &packing.items[index];
    &weights.as_slice()[*offset as usize..][..content.bytes().unwrap() as usize]
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn decoded(view: &PlaneView<'_>) -> Vec<f32> {
    let mut out = vec![0.0; view.rows() * view.cols()];
    dequantize(view, &mut out).unwrap();
    out
}

/// The weights in a panel: 16 rows of K.
fn panel_values(layout: &PanelLayout, panel: &[u8]) -> Vec<f32> {
    decoded(&unpack_panel(layout, panel).unwrap().view())
}

/// What a panel of a segment should hold: its rows, then zeros.
fn expected_panel(checkpoint: &Checkpoint, segment: &RowSegment, panel: usize) -> Vec<f32> {
    let all = checkpoint.tensor_f32(&segment.tensor).unwrap();
    let start = segment.row_start + panel * PANEL;
    let end = (segment.row_start + segment.rows).min(start + PANEL);
    let mut rows = all[start * K..end * K].to_vec();
    rows.resize(PANEL * K, 0.0);
    rows
}

#[test]
fn every_format_is_packed_as_stored() {
    let checkpoint = checkpoint(1);
    for (name, format) in Format::NAMED {
        let segments = vec![segment(&format!("{name}.a"), 3, 50), segment(&format!("{name}.b"), 0, 100)];
        let packing = recipe(vec![panels(*format, segments.clone(), 1)]);
        let weights = packed(&checkpoint, &packing);
        let layout = PanelLayout::new(*format, K);
        let mut found = item(&weights, &packing, 0).chunks_exact(layout.bytes());
        for segment in &segments {
            let stored = checkpoint.rows(&segment.tensor, segment.row_start..segment.row_start + 16).unwrap();
            for panel in 0..segment.panels() {
                let panel_bytes = found.next().unwrap();
                let values = panel_values(&layout, panel_bytes);
                assert_eq!(values, expected_panel(&checkpoint, segment, panel), "{name} {panel}");
                if panel == 0 {
                    let unpacked = unpack_panel(&layout, panel_bytes).unwrap();
                    assert_eq!(unpacked.codes, &stored.codes[..], "{name}: codes are copied");
                    assert_eq!(unpacked.scales, &stored.scales[..], "{name}: scales are copied");
                }
            }
        }
        assert!(found.next().is_none());
    }
}

#[test]
fn interleaved_segments_alternate_panel_by_panel() {
    let checkpoint = checkpoint(2);
    let layout = PanelLayout::new(Format::Q8_0, K);
    let check = |segments: Vec<RowSegment>, interleave: usize, order: &[(usize, usize)]| {
        let packing = recipe(vec![panels(Format::Q8_0, segments.clone(), interleave)]);
        let weights = packed(&checkpoint, &packing);
        let found: Vec<_> = item(&weights, &packing, 0).chunks_exact(layout.bytes()).collect();
        assert_eq!(found.len(), order.len());
        for (panel, (s, p)) in found.iter().zip(order) {
            assert_eq!(
                panel_values(&layout, panel),
                expected_panel(&checkpoint, &segments[*s], *p),
                "{s} {p}"
            );
        }
    };
    let (gate, up) = ("q8_0.a", "q8_0.b");
    let pair = vec![segment(gate, 0, 40), segment(up, 0, 40)];
    check(pair.clone(), 2, &[(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]);
    check(pair, 1, &[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
    // Tiles of 24 rows: two groups, each padded.
    let tiles = vec![segment(gate, 0, 24), segment(up, 0, 24), segment(gate, 24, 20), segment(up, 24, 20)];
    check(tiles, 2, &[(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]);
}

#[test]
fn large_items_are_split_without_a_seam() {
    let rows = 5000;
    let tensors = ["a", "b"].map(|n| (n.to_string(), TensorInfo::new([rows, K], Format::F32)));
    let checkpoint = Checkpoint::synthetic(serde_json::Value::Null, 3, tensors.into());
    let segments = vec![segment("a", 0, rows), segment("b", 0, rows)];
    let packing = recipe(vec![panels(Format::F32, segments.clone(), 2)]);
    let layout = PanelLayout::new(Format::F32, K);
    assert!(packing.bytes as usize > 3 * JOB_BYTES && layout.bytes() * 4 < JOB_BYTES);
    let weights = packed(&checkpoint, &packing);
    let all: Vec<_> = segments.iter().map(|s| checkpoint.tensor_f32(&s.tensor).unwrap()).collect();
    for (index, panel) in item(&weights, &packing, 0).chunks_exact(layout.bytes()).enumerate() {
        let values = panel_values(&layout, panel);
        let source = &all[index % 2][index / 2 * PANEL * K..];
        let have = source.len().min(PANEL * K);
        assert_eq!(values[..have], source[..have], "panel {index}");
        assert!(values[have..].iter().all(|v| *v == 0.0));
    }
}

fn view(tensor: &str, start: usize, block: usize, stride: usize) -> RowView {
    RowView { start, block, stride, ..RowView::whole(tensor) }
}

/// Experts of 20 rows each: one tensor an expert, and rows of gate and up that alternate in one tensor.
#[test]
fn panels_of_experts_lie_one_expert_behind_the_other() {
    let tensors = [("e.{}.up", vec![3, 20, K]), ("all", vec![3, 40, K])]
        .map(|(name, shape)| (name.to_string(), TensorInfo::new(shape, Format::MXFP4)));
    let checkpoint =
        Checkpoint::synthetic(serde_json::json!({"model_type": "x"}), 5, tensors.into_iter().collect());
    assert_eq!(checkpoint.tensors().len(), 4, "the mark stands for three tensors");
    let layout = PanelLayout::new(Format::MXFP4, K);
    let experts = |sources: Vec<RowView>| PackContent::ExpertPanels { layout, experts: 3, rows: 20, sources };
    let packing = recipe(vec![
        experts(vec![view("e.{}.up", 0, 1, 1)]),
        experts(vec![view("all", 0, 1, 2), view("all", 1, 1, 2)]),
        experts(vec![view("all", 0, 20, 40), view("all", 20, 20, 40)]),
    ]);
    let weights = packed(&checkpoint, &packing);
    let each: Vec<Vec<f32>> = (0..3).map(|e| checkpoint.tensor_f32(&format!("e.{e}.up")).unwrap()).collect();
    let all = checkpoint.tensor_f32("all").unwrap();
    let row_of = |item: usize, expert: usize, source: usize, row: usize| match item {
        0 => &each[expert][row * K..][..K],
        1 => &all[(expert * 40 + 2 * row + source) * K..][..K],
        _ => &all[(expert * 40 + 20 * source + row) * K..][..K],
    };
    for (number, sources) in [(0, 1), (1, 2), (2, 2)] {
        let mut panels = item(&weights, &packing, number).chunks_exact(layout.bytes());
        for expert in 0..3 {
            for (first, source) in [0, PANEL].into_iter().flat_map(|row| (0..sources).map(move |s| (row, s)))
            {
                let mut expected: Vec<f32> = (first..20.min(first + PANEL))
                    .flat_map(|row| row_of(number, expert, source, row).to_vec())
                    .collect();
                expected.resize(PANEL * K, 0.0);
                let found = panel_values(&layout, panels.next().unwrap());
                assert_eq!(found, expected, "item {number}, expert {expert}, source {source}, row {first}");
            }
        }
        assert!(panels.next().is_none());
    }
}

#[test]
fn elements_are_picked_from_a_vector() {
    let tensors = BTreeMap::from([("bias".to_string(), TensorInfo::new([2, 6], Format::BF16))]);
    let checkpoint = Checkpoint::synthetic(serde_json::json!({"model_type": "x"}), 5, tensors);
    let picked = |len, start, block, stride| {
        recipe(vec![PackContent::Elements { tensor: "bias".into(), len, start, block, stride, share: None }])
    };
    let packing = picked(6, 1, 1, 2);
    let all = checkpoint.tensor_f32("bias").unwrap();
    let found = floats(item(&packed(&checkpoint, &packing), &packing, 0));
    assert_eq!(found, [1, 3, 5, 7, 9, 11].map(|i| all[i]));
    for (bad, word) in [(picked(7, 1, 1, 2), "element 13"), (picked(6, 1, 0, 2), "cannot lie")] {
        let error = pack(&checkpoint, &bad, &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains("bias") && error.contains(word), "{error}");
    }
}

#[test]
fn experts_that_do_not_fit_are_refused() {
    let tensors = BTreeMap::from([
        ("e.{}.up".to_string(), TensorInfo::new([3, 20, K], Format::F32)),
        ("all".to_string(), TensorInfo::new([3, 20, K], Format::F32)),
    ]);
    let checkpoint = Checkpoint::synthetic(serde_json::json!({"model_type": "x"}), 5, tensors);
    let refused = |experts: usize, rows: usize, k: usize, source: RowView, words: &[&str]| {
        let layout = PanelLayout::new(Format::F32, k);
        let packing =
            recipe(vec![PackContent::ExpertPanels { layout, experts, rows, sources: vec![source] }]);
        let error = pack(&checkpoint, &packing, &mut |_, _| {}).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{word} is not in {error}"));
    };
    refused(4, 20, K, view("e.{}.up", 0, 1, 1), &["e.3.up", "no tensor"]);
    refused(3, 21, K, view("e.{}.up", 0, 1, 1), &["e.0.up", "21 rows"]);
    refused(3, 20, K - 32, view("e.{}.up", 0, 1, 1), &["e.0.up", "64 columns"]);
    refused(3, 20, K, view("all", 0, 1, 2), &["all", "60 rows"]);
    refused(3, 20, K, view("all", 0, 2, 1), &["all", "cannot lie"]);
    refused(0, 20, K, view("all", 0, 1, 1), &["0 experts"]);
}

#[test]
fn another_format_is_converted_through_float32() {
    let checkpoint = checkpoint(4);
    let packing = recipe(vec![panels(Format::Q8_0, vec![segment("f32.a", 0, 100)], 1)]);
    let weights = packed(&checkpoint, &packing);
    let values = checkpoint.tensor_f32("f32.a").unwrap();
    let direct = quantize(Format::Q8_0, 100, K, &values).unwrap();
    let layout = PanelLayout::new(Format::Q8_0, K);
    let mut found: Vec<f32> = item(&weights, &packing, 0)
        .chunks_exact(layout.bytes())
        .flat_map(|panel| panel_values(&layout, panel))
        .collect();
    found.truncate(100 * K);
    assert_eq!(found, decoded(&direct.view()));

    // What that cost is told, per kind.
    let [told] = weights.conversions() else { panic!("{:?}", weights.conversions()) };
    let changes = values.iter().zip(&found).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    let squares = values.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
    assert!((told.relative_error - (changes / squares).sqrt()).abs() < 1e-9, "{told}");
    assert_eq!((told.what, told.from.as_str(), told.to.as_str()), ("matrices", "f32", "q8_0"));
    assert_eq!(told.weights, 100 * K as u64);
    let as_stored = recipe(vec![panels(Format::F32, vec![segment("f32.a", 0, 100)], 1)]);
    assert!(packed(&checkpoint, &as_stored).conversions().is_empty());
}

#[test]
fn vectors_tables_and_gaps_are_what_they_should_be() {
    let checkpoint = checkpoint(5);
    let packing = everything();
    let mut steps = Vec::new();
    let weights = pack(&checkpoint, &packing, &mut |done, total| steps.push((done, total))).unwrap();
    assert_eq!(weights.len() as u64, packing.bytes);
    assert_eq!(weights.as_ptr() as usize % 64, 0);
    assert_eq!(floats(item(&weights, &packing, 1)), checkpoint.tensor_f32("norm").unwrap());
    assert!(weights.as_slice()[..128].iter().all(|&b| b == 0), "gaps are zero");

    let table = floats(item(&weights, &packing, 3));
    for position in 0..5 {
        for (pair, frequency) in [1.0f32, 0.25].into_iter().enumerate() {
            let angle = f64::from(position as f32 * frequency);
            let (cos, sin) = (table[position * 2 + pair], table[10 + position * 2 + pair]);
            assert_eq!((cos, sin), (2.0 * angle.cos() as f32, 2.0 * angle.sin() as f32));
        }
    }
    let total: u64 = packing.items.iter().map(|i| i.content.bytes().unwrap()).sum();
    assert_eq!((steps[0], *steps.last().unwrap()), ((0, total), (total, total)));
    assert!(steps.is_sorted());
}

#[test]
fn recipes_that_do_not_fit_are_refused() {
    let checkpoint = checkpoint(6);
    let refused = |contents: Vec<PackContent>, words: &[&str]| {
        let message = pack(&checkpoint, &recipe(contents), &mut |_, _| {}).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "no {word:?} in {message}");
        }
    };
    refused(vec![panels(Format::Q8_0, vec![segment("nothing", 0, 16)], 1)], &["nothing", "no tensor"]);
    refused(vec![panels(Format::Q8_0, vec![segment("q8_0.a", 90, 16)], 1)], &["q8_0.a", "90..106"]);
    refused(vec![PackContent::F32 { tensor: "norm".into(), len: 5 }], &["norm", "5 elements"]);
    let layout = PanelLayout::new(Format::Q8_0, K + 32);
    let segments = vec![segment("q8_0.a", 0, 16)];
    let content = PackContent::Panels { layout, segments, interleave: 1, panels: 1 };
    refused(vec![content], &["q8_0.a", "128 columns"]);
    let mut crooked = everything();
    crooked.items[1].offset += 4;
    let error = pack(&checkpoint, &crooked, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, PackError::Recipe(PackingError::Misaligned { item: 1, .. })), "{error}");
}

#[test]
fn an_empty_recipe_is_empty() {
    let weights = packed(&checkpoint(7), &Packing::default());
    assert!(weights.is_empty());
}

// ---------------------------------------------------------------- the cache

fn cached(checkpoint: &Checkpoint, packing: &Packing, folder: &Path) -> PackedWeights {
    pack_cached(checkpoint, packing, folder, &mut |_, _| {}).unwrap()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn the_second_time_is_a_map_of_the_first() {
    let (checkpoint, packing) = (checkpoint(8), everything());
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("made/on/demand");
    let reference = packed(&checkpoint, &packing);
    let first = cached(&checkpoint, &packing, &cache);
    assert!(!first.from_cache());
    let second = cached(&checkpoint, &packing, &cache);
    assert!(second.from_cache());
    for weights in [&first, &second] {
        assert_eq!(weights.as_slice(), reference.as_slice());
        assert_eq!(weights.as_ptr() as usize % 64, 0);
    }
    assert_eq!(files(&cache).len(), 1, "no temporary file stays");

    let other = self::checkpoint(9);
    assert!(!cached(&other, &packing, &cache).from_cache(), "another checkpoint is packed anew");
    let fewer = Packing { items: packing.items[..2].to_vec(), bytes: packing.bytes };
    assert!(!cached(&checkpoint, &fewer, &cache).from_cache(), "another recipe is packed anew");
    assert_eq!(files(&cache).len(), 3);
}

#[test]
fn a_changed_file_is_packed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let write = |value: f32| {
        let header = br#"{"norm":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let file = [&(header.len() as u64).to_le_bytes()[..], header, &value.to_le_bytes()].concat();
        fs::write(folder.path().join("model.safetensors"), file).unwrap();
        fs::write(folder.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    };
    let packing = recipe(vec![PackContent::F32 { tensor: "norm".into(), len: 1 }]);
    let cache = folder.path().join("cache");
    for value in [1.5f32, 2.5] {
        write(value);
        let weights = cached(&Checkpoint::open(folder.path()).unwrap(), &packing, &cache);
        assert!(!weights.from_cache());
        assert_eq!(floats(item(&weights, &packing, 0)), [value]);
        // File systems with coarse clocks would give both files the same time.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn damaged_files_of_the_cache_are_replaced() {
    let (checkpoint, packing) = (checkpoint(10), everything());
    let folder = tempfile::tempdir().unwrap();
    let reference = packed(&checkpoint, &packing);
    drop(cached(&checkpoint, &packing, folder.path()));
    let path = files(folder.path()).remove(0);
    let sound = fs::read(&path).unwrap();
    let damages: Vec<(&str, Vec<u8>)> = vec![
        ("empty", vec![]),
        ("cut in the header", sound[..50].to_vec()),
        ("cut in the data", sound[..sound.len() - 1].to_vec()),
        ("too long", [&sound[..], &[0]].concat()),
        ("magic", flip(&sound, 0)),
        ("version", flip(&sound, 8)),
        ("length", flip(&sound, 16)),
        ("hash", flip(&sound, 30)),
        ("checksum", flip(&sound, 60)),
    ];
    for (what, bytes) in damages {
        fs::write(&path, bytes).unwrap();
        let weights = cached(&checkpoint, &packing, folder.path());
        assert!(!weights.from_cache(), "{what}");
        assert_eq!(weights.as_slice(), reference.as_slice(), "{what}");
        assert!(cached(&checkpoint, &packing, folder.path()).from_cache(), "{what}: repaired");
    }
}

fn flip(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 0x10;
    bytes
}

#[test]
fn a_failure_leaves_no_file() {
    let checkpoint = checkpoint(11);
    let folder = tempfile::tempdir().unwrap();
    let bad = recipe(vec![PackContent::F32 { tensor: "nothing".into(), len: 1 }]);
    assert!(pack_cached(&checkpoint, &bad, folder.path(), &mut |_, _| {}).is_err());
    assert_eq!(files(folder.path()), [] as [PathBuf; 0]);

    // No disk holds this: the space is refused before anything is packed.
    let huge = Packing { items: Vec::new(), bytes: 1 << 62 };
    let error = pack_cached(&checkpoint, &huge, folder.path(), &mut |_, _| {}).unwrap_err();
    assert!(matches!(&error, PackError::Cache { .. }), "{error}");
    assert!(error.to_string().contains("reserving space"), "{error}");
    assert_eq!(files(folder.path()), [] as [PathBuf; 0]);

    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = pack_cached(&checkpoint, &everything(), &file, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("making the folder"), "{error}");
}

// ---------------------------------------------------------------- octets

/// Tensors of a checkpoint in a folder, by name: dtype, shape, bytes.
type Stored<'a> = (&'a str, &'a str, Vec<usize>, Vec<u8>);

fn folder(tensors: &[Stored<'_>]) -> (tempfile::TempDir, Checkpoint) {
    folder_with(r#"{"model_type": "llama"}"#, tensors)
}

/// The same with this config.
fn folder_with(config: &str, tensors: &[Stored<'_>]) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        data.extend_from_slice(bytes);
        header.insert(
            name.to_string(),
            serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
        );
    }
    let header = serde_json::to_vec(&header).unwrap();
    let file = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
    fs::write(folder.path().join("model.safetensors"), file).unwrap();
    fs::write(folder.path().join("config.json"), config).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

/// Bytes without a pattern.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn octets(format: Format, k: usize, segments: Vec<RowSegment>, interleave: usize) -> PackContent {
    let octets = segments.iter().map(RowSegment::octets).sum();
    PackContent::Octets { format, k, segments, interleave, octets }
}

fn octet_scales(k: usize, segments: Vec<RowSegment>, interleave: usize) -> PackContent {
    let octets = segments.iter().map(RowSegment::octets).sum();
    PackContent::OctetScales { format: Format::FP8_BLOCK, k, segments, interleave, octets }
}

/// Segment and octet of the segment, in the order in which an item has its octets.
fn octet_order(segments: &[RowSegment], interleave: usize) -> Vec<(usize, usize)> {
    let mut order = Vec::new();
    for group in (0..segments.len()).step_by(interleave) {
        for octet in 0..segments[group].rows.div_ceil(8) {
            for segment in group..group + interleave {
                order.push((segment, octet));
            }
        }
    }
    order
}

/// The octets byte by byte; `byte(tensor, row, i)` is byte `i` of a row of `row_bytes` bytes.
fn slow_octets(
    segments: &[RowSegment],
    interleave: usize,
    row_bytes: usize,
    byte: &dyn Fn(&str, usize, usize) -> u8,
) -> Vec<u8> {
    let blocks = row_bytes.div_ceil(64);
    let order = octet_order(segments, interleave);
    let mut out = vec![0; order.len() * blocks * 512];
    for (number, (segment, octet)) in order.into_iter().enumerate() {
        let RowSegment { tensor, row_start, rows, .. } = &segments[segment];
        for feature in (0..8).filter(|feature| octet * 8 + feature < *rows) {
            for i in 0..row_bytes {
                let at = ((number * blocks + i / 64) * 8 + feature) * 64 + i % 64;
                out[at] = byte(tensor, row_start + octet * 8 + feature, i);
            }
        }
    }
    out
}

/// The octets of FP8: four codes of a word, the first two and the last two in each other's gaps.
fn slow_fp8_octets(
    segments: &[RowSegment],
    interleave: usize,
    k: usize,
    code: &dyn Fn(&str, usize, usize) -> u8,
) -> Vec<u8> {
    let mut out = slow_octets(segments, interleave, k, code);
    for word in out.chunks_exact_mut(4) {
        let codes: [u16; 4] = std::array::from_fn(|i| u16::from(word[i]));
        for half in 0..2 {
            let bit = |column: usize, bit: u32, to: u32| (codes[column] >> bit & 1) << to;
            let first = (0..7).fold(bit(half, 7, 15), |all, i| all | bit(half, i, 4 + i));
            let low = (0..4).fold(bit(half + 2, 7, 11), |all, i| all | bit(half + 2, i, i));
            let high = (4..7).fold(0, |all, i| all | bit(half + 2, i, 8 + i));
            word[2 * half..][..2].copy_from_slice(&(first | low | high).to_le_bytes());
        }
    }
    out
}

/// Packs over poison and checks that nothing but the items is touched.
fn packed_over_poison(checkpoint: &Checkpoint, contents: Vec<PackContent>) -> Vec<Vec<u8>> {
    const POISON: u8 = 0xa5;
    let packing = recipe(contents);
    packing.verify().unwrap();
    let mut out = vec![POISON; packing.bytes as usize];
    fill(checkpoint, &packing, &mut out, &mut |_, _| {}).unwrap();
    let mut found = Vec::new();
    let mut at = 0;
    for PackItem { offset, content } in &packing.items {
        let (start, len) = (*offset as usize, content.bytes().unwrap() as usize);
        assert!(out[at..start].iter().all(|b| *b == POISON), "the gap before byte {start}");
        found.push(out[start..start + len].to_vec());
        at = start + len;
    }
    assert!(out[at..].iter().all(|b| *b == POISON), "the gap at the end");
    found
}

/// 16-bit numbers of magnitude 2^-7 to 2^8, in f16 and in bf16.
fn halves(seed: u64, count: usize) -> [Vec<u8>; 2] {
    let numbers = noise(seed, 2 * count);
    let value = |b: &[u8]| (f32::from(b[0] as i8) + 0.5) * 2f32.powi(i32::from(b[1] % 9) - 7);
    let encode = |to: fn(f32) -> [u8; 2]| numbers.chunks(2).flat_map(|b| to(value(b))).collect();
    [encode(|v| half::f16::from_f32(v).to_le_bytes()), encode(|v| half::bf16::from_f32(v).to_le_bytes())]
}

/// What `format` holds of every row of a tensor, made one weight at a time.
fn rounded(checkpoint: &Checkpoint, tensor: &str, format: Format) -> Vec<u8> {
    let values = checkpoint.tensor_f32(tensor).unwrap();
    let round = |v: f32| match format {
        Format::F16 => half::f16::from_f32(v).to_le_bytes(),
        _ => half::bf16::from_f32(v).to_le_bytes(),
    };
    values.into_iter().flat_map(round).collect()
}

#[test]
fn sixteen_bit_octets_are_copied_as_stored() {
    for k in [1, 31, 32, 33, 576] {
        for rows in [1, 7, 8, 9, 41] {
            // Any bits: what is copied is not looked at.
            let codes =
                ["a", "b"].map(|name| noise((k * 100 + rows) as u64 + name.len() as u64, rows * k * 2));
            for (dtype, format) in [("F16", Format::F16), ("BF16", Format::BF16)] {
                let stored = ["a", "b"]
                    .map(|name| (name, dtype, vec![rows, k], codes[usize::from(name == "b")].clone()));
                let (_folder, checkpoint) = folder(&stored);
                for interleave in [1, 2] {
                    let segments = vec![segment("a", 0, rows), segment("b", 0, rows)];
                    let found = packed_over_poison(
                        &checkpoint,
                        vec![octets(format, k, segments.clone(), interleave)],
                    );
                    let expected = slow_octets(&segments, interleave, k * 2, &|tensor, row, i| {
                        codes[usize::from(tensor == "b")][row * k * 2 + i]
                    });
                    assert!(found[0] == expected, "{format}, {rows} rows of {k}, interleave {interleave}");
                }
            }
        }
    }
}

#[test]
fn other_formats_are_rounded_to_sixteen_bits() {
    let checkpoint = checkpoint(20);
    for (name, stored) in Format::NAMED {
        for format in [Format::F16, Format::BF16] {
            let segments = vec![segment(&format!("{name}.a"), 3, 50), segment(&format!("{name}.b"), 0, 100)];
            let found = packed_over_poison(&checkpoint, vec![octets(format, K, segments.clone(), 1)]);
            let codes: Vec<_> = segments.iter().map(|s| rounded(&checkpoint, &s.tensor, format)).collect();
            let expected = slow_octets(&segments, 1, K * 2, &|tensor, row, i| {
                codes[usize::from(tensor.ends_with(".b"))][row * K * 2 + i]
            });
            assert!(found[0] == expected, "{stored} to {format}");
            assert!(found[0].iter().any(|b| *b != 0));
        }
    }
}

#[test]
fn halves_round_to_nearest_even() {
    let ulp = f32::EPSILON;
    // (weight, as f16, as bf16): ties go to the even code, a hair more goes up.
    let cases: [(f32, u16, u16); 6] = [
        (1.0 + 4096.0 * ulp, 0x3c00, 0x3f80),
        (1.0 + 4097.0 * ulp, 0x3c01, 0x3f80),
        (1.0 + 3.0 * 4096.0 * ulp, 0x3c02, 0x3f80),
        (-(1.0 + 32768.0 * ulp), 0xbc04, 0xbf80),
        (1.0 + 3.0 * 32768.0 * ulp, 0x3c0c, 0x3f82),
        (65519.0, 0x7bff, 0x4780),
    ];
    let values: Vec<u8> = cases.iter().flat_map(|(v, ..)| v.to_le_bytes()).collect();
    let (_folder, checkpoint) = folder(&[("w", "F32", vec![1, cases.len()], values)]);
    for (format, which) in [(Format::F16, 0), (Format::BF16, 1)] {
        let content = octets(format, cases.len(), vec![segment("w", 0, 1)], 1);
        let found = packed_over_poison(&checkpoint, vec![content]);
        for (i, (value, half, brain)) in cases.iter().enumerate() {
            let code = u16::from_le_bytes(found[0][2 * i..][..2].try_into().unwrap());
            assert_eq!(code, [*half, *brain][which], "{value} in {format}");
        }
    }
}

/// Codes without NaN, and one float32 scale per block, in the formats of safetensors.
fn fp8_tensor(
    name: &str,
    rows: usize,
    k: usize,
    per_rows: usize,
    per_cols: usize,
) -> [(String, Stored<'static>); 2] {
    let seed = name.bytes().map(u64::from).sum::<u64>() + (rows * 1000 + k) as u64;
    let codes = noise(seed, rows * k).into_iter().map(|b| if b & 0x7f == 0x7f { b ^ 1 } else { b }).collect();
    let shape = vec![rows.div_ceil(per_rows), k.div_ceil(per_cols)];
    let scales = (0..shape[0] * shape[1]).flat_map(|i| (0.25f32 + i as f32).to_le_bytes()).collect();
    [
        (name.to_string(), ("", "F8_E4M3", vec![rows, k], codes)),
        (format!("{name}_scale_inv"), ("", "F32", shape, scales)),
    ]
}

#[test]
fn block_fp8_is_copied_as_stored_and_its_scales_are_repeated() {
    for (rows, k) in [(1, 1), (7, 31), (8, 64), (9, 65), (136, 128), (300, 576)] {
        let tensors: Vec<_> = ["a", "b"].into_iter().flat_map(|n| fp8_tensor(n, rows, k, 128, 128)).collect();
        let stored: Vec<Stored<'_>> = tensors
            .iter()
            .map(|(n, (_, dtype, shape, bytes))| (n.as_str(), *dtype, shape.clone(), bytes.clone()))
            .collect();
        let (_folder, checkpoint) = folder(&stored);
        let bytes = |name: &str| &stored.iter().find(|t| t.0 == name).unwrap().3;
        // Whole tensors; and the second half of each, from a row inside a block of 128.
        let later = rows / 16 * 8;
        for (segments, interleave) in [
            (vec![segment("a", 0, rows), segment("b", 0, rows)], 1),
            (vec![segment("a", 0, rows), segment("b", 0, rows)], 2),
            (vec![segment("b", later, rows - later), segment("a", later, rows - later)], 2),
        ] {
            let contents = vec![
                octets(Format::FP8_BLOCK, k, segments.clone(), interleave),
                octet_scales(k, segments.clone(), interleave),
            ];
            let found = packed_over_poison(&checkpoint, contents);
            let expected =
                slow_fp8_octets(&segments, interleave, k, &|tensor, row, i| bytes(tensor)[row * k + i]);
            assert!(found[0] == expected, "codes of {rows} x {k}, interleave {interleave}");
            let mut scales = Vec::new();
            for (s, octet) in octet_order(&segments, interleave) {
                let row = segments[s].row_start + octet * 8;
                let plane = floats(bytes(&format!("{}_scale_inv", segments[s].tensor)));
                let per_row = k.div_ceil(128);
                scales.extend_from_slice(&plane[row / 128 * per_row..][..per_row]);
            }
            assert_eq!(floats(&found[1]), scales, "scales of {rows} x {k}, interleave {interleave}");
        }
    }
}

#[test]
fn parts_of_a_fused_projection_keep_codes_and_scales() {
    // Two groups of 136 rows, whose scales start anew: two rows of them each, and 128 + 8 rows.
    const NAME: &str = "l.self_attn.qkv_proj.weight";
    let (rows, k) = (272, 160);
    let codes: Vec<u8> = noise(3, rows * k).into_iter().map(|code| code & 0x77).collect();
    let scales: Vec<u8> = (0..8).flat_map(|i| (0.5f32 + i as f32).to_le_bytes()).collect();
    let config =
        r#"{"model_type": "mimo_v2", "attention_projection_layout": "fused_qkv", "num_key_value_heads": 2}"#;
    let (_folder, checkpoint) = folder_with(
        config,
        &[
            (NAME, "F8_E4M3", vec![rows, k], codes.clone()),
            ("l.self_attn.qkv_proj.weight_scale_inv", "F32", vec![4, 2], scales),
        ],
    );
    // Queries, keys and values of both groups, 96, 24 and 16 rows each.
    let part = |start: usize, rows| [segment(NAME, start, rows), segment(NAME, 136 + start, rows)];
    let segments = [part(0, 96), part(96, 24), part(120, 16)].concat();
    let contents =
        vec![octets(Format::FP8_BLOCK, k, segments.clone(), 1), octet_scales(k, segments.clone(), 1)];
    let found = packed_over_poison(&checkpoint, contents);
    assert!(found[0] == slow_fp8_octets(&segments, 1, k, &|_, row, i| codes[row * k + i]));
    let row_of_scales = |row: usize| row / 136 * 2 + row % 136 / 128;
    let wanted: Vec<f32> = octet_order(&segments, 1)
        .into_iter()
        .map(|(s, octet)| row_of_scales(segments[s].row_start + octet * 8))
        .flat_map(|row| [0, 1].map(|column| (row * 2 + column) as f32 + 0.5))
        .collect();
    assert_eq!(floats(&found[1]), wanted);
}

#[test]
fn one_fp8_scale_of_the_tensor_is_kept() {
    let k = 160;
    let codes = vec![0x31; 20 * k];
    let (_folder, checkpoint) = folder(&[
        ("w", "F8_E4M3", vec![20, k], codes.clone()),
        ("w_scale", "F32", vec![], 0.375f32.to_le_bytes().to_vec()),
    ]);
    let segments = vec![segment("w", 0, 20)];
    let contents =
        vec![octets(Format::FP8_BLOCK, k, segments.clone(), 1), octet_scales(k, segments.clone(), 1)];
    let found = packed_over_poison(&checkpoint, contents);
    assert!(found[0] == slow_fp8_octets(&segments, 1, k, &|_, row, i| codes[row * k + i]));
    assert_eq!(floats(&found[1]), [0.375; 3 * 2]);
}

/// Octets and scales of rows that are quantized while packing: those of the tensor quantized as a whole.
fn check_quantized(
    checkpoint: &Checkpoint,
    tensor: &str,
    k: usize,
    segments: &[RowSegment],
    interleave: usize,
) {
    let contents = vec![
        octets(Format::FP8_BLOCK, k, segments.to_vec(), interleave),
        octet_scales(k, segments.to_vec(), interleave),
    ];
    let found = packed_over_poison(checkpoint, contents);
    let values = checkpoint.tensor_f32(tensor).unwrap();
    let whole = quantize(Format::FP8_BLOCK, values.len() / k, k, &values).unwrap();
    let expected = slow_fp8_octets(segments, interleave, k, &|_, row, i| whole.codes[row * k + i]);
    assert!(found[0] == expected, "codes of {tensor}");
    let per_row = k.div_ceil(128);
    let mut scales = Vec::new();
    for (s, octet) in octet_order(segments, interleave) {
        let row = segments[s].row_start + octet * 8;
        scales.extend_from_slice(&whole.scales[row / 128 * per_row * 4..][..per_row * 4]);
    }
    assert!(found[1] == scales, "scales of {tensor}");
}

#[test]
fn other_formats_are_quantized_to_block_fp8() {
    let (rows, k) = (300, 160);
    let formats = Format::NAMED.iter().map(|(n, f)| (n.to_string(), TensorInfo::new([rows, k], *f)));
    let checkpoint = Checkpoint::synthetic(serde_json::Value::Null, 21, formats.collect());
    for (name, _) in Format::NAMED {
        check_quantized(&checkpoint, name, k, &[segment(name, 0, rows)], 1);
        // Small tiles, two halves of one matrix in turn, none on a block of 128 rows.
        let tiles: Vec<_> =
            (0..6).flat_map(|t| [segment(name, t * 24, 24), segment(name, 144 + t * 24, 20)]).collect();
        check_quantized(&checkpoint, name, k, &tiles, 2);
    }
}

#[test]
fn fp8_rows_with_scales_of_their_own_are_quantized_again() {
    let (rows, k) = (140, 64);
    let scales: Vec<u8> = (0..rows).flat_map(|row| (1.0 + row as f32).to_le_bytes()).collect();
    let (_folder, checkpoint) = folder(&[
        ("w", "F8_E4M3", vec![rows, k], noise(5, rows * k).into_iter().map(|b| b & 0x77).collect()),
        ("w_scale", "F32", vec![rows, 1], scales),
    ]);
    check_quantized(&checkpoint, "w", k, &[segment("w", 0, rows)], 1);
    check_quantized(&checkpoint, "w", k, &[segment("w", 120, 17)], 1);
}

#[test]
fn large_octet_items_are_split_without_a_seam() {
    let (rows, k) = (3000, 700);
    let codes = ["a", "b"].map(|name| noise(u64::from(name.as_bytes()[0]), rows * k * 2));
    let (_folder, checkpoint) = folder(&[
        ("a", "BF16", vec![rows, k], codes[0].clone()),
        ("b", "BF16", vec![rows, k], codes[1].clone()),
    ]);
    let segments =
        vec![segment("a", 0, 2000), segment("b", 1, 1999), segment("b", 2000, 1000), segment("a", 1, 999)];
    let content = octets(Format::BF16, k, segments.clone(), 2);
    let packing = recipe(vec![content.clone()]);
    let mut out = vec![0; packing.bytes as usize];
    assert!(jobs(&packing, &mut out).len() > 4);
    let found = packed_over_poison(&checkpoint, vec![content]);
    let expected = slow_octets(&segments, 2, k * 2, &|tensor, row, i| {
        codes[usize::from(tensor == "b")][row * k * 2 + i]
    });
    assert!(found[0] == expected);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(48))]

    #[test]
    fn random_segments_are_packed_as_the_slow_loop_does(
        k in 1usize..200,
        pairs in proptest::collection::vec((0usize..19, 0usize..19, 1usize..7, 0usize..8, 0usize..8), 1..6),
        interleave in 1usize..3,
        seed in 0u64..1000,
        which in 0usize..3,
    ) {
        // Rows 0..200 of two tensors; those of a pair fill equally many octets.
        let [half, brain] = halves(seed, 200 * k);
        let (_folder, checkpoint) = folder(&[
            ("a", "F16", vec![200, k], half.clone()),
            ("b", "BF16", vec![200, k], brain.clone()),
        ]);
        let format = [Format::F16, Format::BF16, Format::FP8_BLOCK][which];
        let crooked = if which == 2 { 0 } else { seed as usize % 8 };
        let segments: Vec<_> = pairs.iter().flat_map(|(a, b, octets, less_a, less_b)| [
            segment("a", a * 8 + crooked.min(5), octets * 8 - less_a),
            segment("b", b * 8, octets * 8 - less_b),
        ]).collect();
        let codes = ["a", "b"].map(|name| match format {
            Format::FP8_BLOCK => {
                let values = checkpoint.tensor_f32(name).unwrap();
                quantize(Format::FP8_BLOCK, 200, k, &values).unwrap().codes
            }
            _ => rounded(&checkpoint, name, format),
        });
        let found = packed_over_poison(&checkpoint, vec![octets(format, k, segments.clone(), interleave)]);
        let row_bytes = k * format.code.bits() / 8;
        let lay = if format == Format::FP8_BLOCK { slow_fp8_octets } else { slow_octets };
        let expected = lay(&segments, interleave, row_bytes, &|tensor: &str, row: usize, i: usize| {
            codes[usize::from(tensor == "b")][row * row_bytes + i]
        });
        proptest::prop_assert!(found[0] == expected);
    }
}

#[test]
fn octets_that_do_not_fit_are_refused() {
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut bad = vec![1.0f32; 200 * 4];
    bad[170 * 4 + 2] = f32::NAN;
    let mut infinite = vec![1.0f32; 20 * 4];
    infinite[19 * 4 + 3] = f32::INFINITY;
    let mut large = vec![1.0f32; 20 * 4];
    large[9 * 4 + 1] = -65520.0;
    let mut huge = vec![1.0f32; 4];
    huge[2] = f32::MAX;
    let mut odd_code = vec![0x38; 800];
    odd_code[150 * 4 + 3] = 0xff;
    let (_folder, checkpoint) = folder(&[
        ("nan", "F32", vec![200, 4], floats(&bad)),
        ("infinite", "F32", vec![20, 4], floats(&infinite)),
        ("large", "F32", vec![20, 4], floats(&large)),
        ("huge", "F32", vec![1, 4], floats(&huge)),
        ("fp8", "F8_E4M3", vec![200, 4], vec![0x38; 800]),
        ("fp8_scale_inv", "F32", vec![2, 1], floats(&[1.0, f32::NAN])),
        ("code", "F8_E4M3", vec![200, 4], odd_code),
        ("code_scale_inv", "F32", vec![2, 1], floats(&[1.0, 1.0])),
    ]);
    let refused = |content: PackContent, words: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let packing = recipe(vec![content]);
        let message = pack(&checkpoint, &packing, &mut |_, _| {}).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "no {word:?} in {message}");
        }
        assert!(pack_cached(&checkpoint, &packing, folder.path(), &mut |_, _| {}).is_err());
        assert_eq!(files(folder.path()), [] as [PathBuf; 0]);
    };
    let one = |tensor: &str, row_start, rows| vec![segment(tensor, row_start, rows)];
    for format in [Format::F16, Format::BF16] {
        refused(octets(format, 4, one("nan", 100, 100), 1), &["\"nan\"", "row 170, column 2", "NaN"]);
        refused(octets(format, 4, one("infinite", 0, 20), 1), &["\"infinite\"", "row 19, column 3", "inf"]);
        refused(octets(format, 4, one("huge", 0, 1), 1), &["\"huge\"", "row 0, column 2"]);
        refused(octets(format, 4, one("nothing", 0, 8), 1), &["nothing", "no tensor"]);
        refused(octets(format, 4, one("large", 16, 5), 1), &["large", "16..21"]);
        refused(octets(format, 5, one("large", 0, 8), 1), &["large", "5 columns"]);
        refused(octets(format, 4, one("fp8", 130, 8), 1), &["\"fp8\"", "row 130", "scale"]);
    }
    refused(
        octets(Format::F16, 4, one("large", 0, 20), 1),
        &["\"large\"", "row 9, column 1", "-65520", "f16"],
    );
    pack(&checkpoint, &recipe(vec![octets(Format::BF16, 4, one("large", 0, 20), 1)]), &mut |_, _| {})
        .unwrap();
    for item in [|s| octets(Format::FP8_BLOCK, 4, s, 1), |s| octet_scales(4, s, 1)] {
        refused(item(one("nan", 160, 16)), &["\"nan\"", "row 170, column 2", "NaN"]);
        refused(item(one("fp8", 128, 8)), &["\"fp8\"", "row 128", "scale"]);
        refused(item(one("code", 144, 8)), &["\"code\"", "row 150, column 3", "NaN"]);
        refused(item(one("large", 16, 5)), &["large", "16..21"]);
        refused(item(one("large", 4, 8)), &["row 4 of large", "compile the model again"]);
    }
    refused(octets(Format::Q8_0, 4, one("large", 0, 8), 1), &["not q8_0"]);
}

// ---------------------------------------------------------------- shares of one rank

fn share(start: usize, len: usize, of: usize) -> Option<Share> {
    Some(Share { start, len, of })
}

/// Columns of a tensor are those of its whole rows, whether they are whole blocks or not.
fn check_columns(checkpoint: &Checkpoint, name: &str, columns: Range<usize>) {
    let info = checkpoint.tensor(name).unwrap();
    let (all, cols) = (checkpoint.tensor_f32(name).unwrap(), info.cols());
    let rows = info.rows().unwrap();
    let range = rows / 3..rows;
    let found = checkpoint.columns(name, range.clone(), columns.clone()).unwrap();
    assert_eq!((found.rows, found.cols), (range.len(), columns.len()), "{name}");
    let wanted: Vec<f32> = range.flat_map(|row| all[row * cols..][columns.clone()].to_vec()).collect();
    assert_eq!(decoded(&found.view().unwrap()), wanted, "columns {columns:?} of {name}");
}

#[test]
fn columns_are_those_of_whole_rows() {
    let tensors =
        Format::NAMED.iter().map(|(name, format)| (name.to_string(), TensorInfo::new([9, 288], *format)));
    let checkpoint = Checkpoint::synthetic(serde_json::Value::Null, 3, tensors.collect());
    for (name, format) in Format::NAMED {
        for columns in [0..288, 32..64, 128..256, 256..288, 5..77, 287..288, 100..200] {
            check_columns(&checkpoint, name, columns.clone());
        }
        // What is cut between blocks keeps its codes.
        let kept = checkpoint.columns(name, 0..9, 128..256).unwrap();
        assert_eq!(kept.format, row_format(*format));
    }
    for (rows, columns) in [(0..10, 0..8), (0..9, 288..289), (0..9, 8..8), (9..12, 0..8)] {
        checkpoint.columns("bf16", rows, columns).unwrap_err();
    }
    // Stored in files, one of each kind of plane.
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let mut seen = std::collections::BTreeSet::new();
    for kind in ["hf/mimo-v2", "hf/gpt-oss", "hf/llama-f16", "gguf"] {
        let folders = match kind {
            "gguf" => fs::read_dir(fixtures.join(kind)).unwrap().map(|entry| entry.unwrap().path()).collect(),
            _ => vec![fixtures.join(kind)],
        };
        for folder in folders {
            let gguf = folder.join("model.gguf");
            if !folder.is_dir() {
                continue;
            }
            let checkpoint = Checkpoint::open(if gguf.exists() { &gguf } else { &folder }).unwrap();
            for (name, info) in checkpoint.tensors().iter().filter(|(_, info)| info.shape.len() > 1) {
                let half = info.cols() / 2;
                seen.insert(info.format.to_string());
                for columns in [0..half, half..info.cols(), half / 2..half / 2 + 1] {
                    check_columns(&checkpoint, name, columns);
                }
            }
        }
    }
    for format in ["mxfp4", "fp8", "bf16", "f16", "q4_0", "q4_1", "q8_0", "q4_k", "q6_k"] {
        assert!(seen.contains(format), "{format} is not among {seen:?}");
    }
}

#[test]
fn shares_of_columns_are_octets_of_their_own() {
    let (rows, k) = (24, 384);
    let [halves, brains] = halves(8, rows * k);
    let fp8 = fp8_tensor("fp8", rows, k, 128, 128);
    let mut tensors = vec![("half", "F16", vec![rows, k], halves), ("brain", "BF16", vec![rows, k], brains)];
    tensors.extend(
        fp8.iter().map(|(n, (_, dtype, shape, bytes))| (n.as_str(), *dtype, shape.clone(), bytes.clone())),
    );
    let (_folder, checkpoint) = folder(&tensors);
    let bytes = |name: &str| &tensors.iter().find(|tensor| tensor.0 == name).unwrap().3;
    for (start, len) in [(0, 128), (128, 128), (256, 128), (128, 256)] {
        let part =
            |name: &str, row, rows| RowSegment { columns: share(start, len, k), ..segment(name, row, rows) };
        for (name, format, width) in
            [("half", Format::F16, 2), ("brain", Format::BF16, 2), ("fp8", Format::FP8_BLOCK, 1)]
        {
            let segments = vec![part(name, 8, 16), part(name, 0, 12)];
            let mut contents = vec![octets(format, len, segments.clone(), 1)];
            if width == 1 {
                contents.push(octet_scales(len, segments.clone(), 1));
            }
            let found = packed_over_poison(&checkpoint, contents);
            let lay = if width == 1 { slow_fp8_octets } else { slow_octets };
            let expected = lay(&segments, 1, len * width, &|tensor: &str, row: usize, i: usize| {
                bytes(tensor)[(row * k + start) * width + i]
            });
            assert!(found[0] == expected, "{len} columns of {name} from {start} on");
            if width == 1 {
                let plane = floats(bytes("fp8_scale_inv"));
                let own = &plane[start / 128..][..len / 128];
                assert!(floats(&found[1]).chunks(own.len()).all(|octet| octet == own));
            }
        }
    }
    // Panels of the processor are cut alike.
    let segments = vec![RowSegment { columns: share(128, K, k), ..segment("brain", 3, 16) }];
    let found = packed_over_poison(&checkpoint, vec![panels(Format::BF16, segments, 1)]);
    let all = checkpoint.tensor_f32("brain").unwrap();
    let wanted: Vec<f32> = (3..19).flat_map(|row| all[row * k + 128..][..K].to_vec()).collect();
    assert_eq!(panel_values(&PanelLayout::new(Format::BF16, K), &found[0]), wanted);
}

#[test]
fn shares_of_experts_and_vectors_are_counted_through() {
    // 3 experts of 16 rows of gate and up that alternate; a rank has rows 8 to 16 and columns 32 to 64.
    let tensors = [("all", vec![3, 32, 64]), ("e.{}.down", vec![3, 8, 64]), ("bias", vec![3, 32])]
        .map(|(name, shape)| (name.to_string(), TensorInfo::new(shape, Format::BF16)));
    let checkpoint = Checkpoint::synthetic(serde_json::Value::Null, 5, tensors.into_iter().collect());
    let half = |number: usize| RowView {
        rows: share(8, 8, 16),
        columns: share(32, 32, 64),
        ..view("all", number, 1, 2)
    };
    let down = RowView { columns: share(32, 32, 64), ..RowView::whole("e.{}.down") };
    let experts = |sources| PackContent::ExpertOctets {
        format: Format::BF16,
        k: 32,
        experts: 3,
        rows: 8,
        sources,
        band: 1,
    };
    let bias = PackContent::Elements {
        tensor: "bias".into(),
        len: 24,
        start: 1,
        block: 1,
        stride: 2,
        share: share(8, 8, 16),
    };
    let found =
        packed_over_poison(&checkpoint, vec![experts(vec![half(0), half(1)]), experts(vec![down]), bias]);
    let all = rounded(&checkpoint, "all", Format::BF16);
    for expert in 0..3 {
        let downs = rounded(&checkpoint, &format!("e.{expert}.down"), Format::BF16);
        for row in 0..8 {
            for source in 0..2 {
                let stored = expert * 32 + 2 * (8 + row) + source;
                let wanted = &all[(stored * 64 + 32) * 2..][..64];
                let octet = (expert * 2 + source) * 512;
                assert_eq!(
                    &found[0][octet + row * 64..][..64],
                    wanted,
                    "expert {expert}, row {row}, {source}"
                );
            }
            assert_eq!(&found[1][expert * 512 + row * 64..][..64], &downs[(row * 64 + 32) * 2..][..64]);
        }
    }
    let values = checkpoint.tensor_f32("bias").unwrap();
    let wanted: Vec<f32> = (0..24).map(|i| values[i / 8 * 32 + 2 * (8 + i % 8) + 1]).collect();
    assert_eq!(floats(&found[2]), wanted);
}

/// Octets in bands are those that lie one behind the other, block by block; of formats with scales apart as well.
#[test]
fn bands_have_the_blocks_of_their_octets_side_by_side() {
    let (experts, rows, k, band) = (2, 48, 300, 3);
    for format in [Format::MXFP4, Format::NVFP4, Format::BF16] {
        let tensors = (0..experts).map(|n| (format!("e.{n}"), TensorInfo::new([rows, k], Format::BF16)));
        let checkpoint = Checkpoint::synthetic(serde_json::Value::Null, 5, tensors.collect());
        let content = |band| {
            let sources = vec![RowView::whole("e.{}")];
            PackContent::ExpertOctets { format, k, experts, rows, sources, band }
        };
        let found = packed_over_poison(&checkpoint, vec![content(1), content(band)]);
        let (blocks, each) = (octet_blocks(format, k), octet_block_bytes(format));
        assert!(blocks > 2 && found[0].len() == experts * rows / 8 * blocks * each);
        let (mut at, mut blocks_of) = (0, found[1].chunks_exact(each));
        while at < experts * rows / 8 {
            for block in 0..blocks {
                for octet in at..at + band {
                    let wanted = &found[0][(octet * blocks + block) * each..][..each];
                    assert!(blocks_of.next() == Some(wanted), "{format}: block {block} of octet {octet}");
                }
            }
            at += band;
        }
        assert!(blocks_of.next().is_none());
    }
    let checkpoint = Checkpoint::synthetic(
        serde_json::Value::Null,
        5,
        BTreeMap::from([("e".to_string(), TensorInfo::new([40, 64], Format::BF16))]),
    );
    for band in [0, 2, 3, usize::MAX] {
        let sources = vec![RowView::whole("e")];
        let content =
            PackContent::ExpertOctets { format: Format::BF16, k: 64, experts: 1, rows: 40, sources, band };
        let error = pack(&checkpoint, &recipe(vec![content]), &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains(&format!("no bands of {band} octets")), "{error}");
    }
}

/// Recipes and checkpoints that do not fit a share, and faults in one: errors that name the place.
#[test]
fn shares_that_do_not_fit_are_refused() {
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut bad = vec![1.0f32; 8 * 256];
    bad[3 * 256 + 200] = f32::INFINITY;
    let (_folder, checkpoint) = folder(&[("bad", "F32", vec![8, 256], floats(&bad))]);
    let refused = |content: PackContent, words: &[&str]| {
        let error = pack(&checkpoint, &recipe(vec![content]), &mut |_, _| {}).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "no {word:?} in {error}"));
    };
    let cut = |start, len, of| vec![RowSegment { columns: share(start, len, of), ..segment("bad", 0, 8) }];
    let bf16 = |k, segments| octets(Format::BF16, k, segments, 1);
    refused(bf16(128, cut(128, 128, 256)), &["row 3, column 200", "inf"]);
    pack(&checkpoint, &recipe(vec![bf16(128, cut(0, 128, 256))]), &mut |_, _| {}).unwrap();
    refused(bf16(128, cut(0, 128, 512)), &["[8, 256]", "512 columns"]);
    refused(bf16(128, cut(0, 64, 256)), &["are no 128", "compile the model again"]);
    refused(bf16(128, cut(200, 128, 256)), &["are no 128"]);
    refused(bf16(128, cut(usize::MAX, 128, 256)), &["are no 128"]);
    for item in [|s| octets(Format::FP8_BLOCK, 64, s, 1), |s| octet_scales(64, s, 1)] {
        refused(item(cut(64, 64, 256)), &["128", "share scales"]);
    }
    let view = |rows, columns| RowView { rows, columns, ..RowView::whole("bad") };
    let experts = |source| PackContent::ExpertOctets {
        format: Format::BF16,
        k: 256,
        experts: 2,
        rows: 4,
        sources: vec![source],
        band: 1,
    };
    refused(experts(view(share(0, 4, 8), None)), &["bad", "[8, 256]"]);
    refused(experts(view(share(0, 3, 4), None)), &["cannot lie"]);
    refused(experts(view(share(2, 4, 5), None)), &["cannot lie"]);
    refused(experts(view(None, share(0, 128, 256))), &["cannot lie"]);
    refused(experts(view(share(usize::MAX, 4, usize::MAX), None)), &["cannot lie"]);
}

/// Prints how fast 16-bit weights become octets, from the page cache, beside a plain copy of the bytes:
/// `cargo test --release -p tilec-runtime octet_speed -- --ignored --nocapture`.
#[test]
#[ignore = "measures; takes 2 GB of memory and 0.6 GB of disk"]
fn octet_speed() {
    let (rows, k) = (65536, 4096);
    let codes = noise(1, rows * k * 2);
    let (_folder, checkpoint) = folder(&[("w", "BF16", vec![rows, k], codes)]);
    let packing = recipe(vec![octets(Format::BF16, k, vec![segment("w", 0, rows)], 1)]);
    let gigabytes = packing.bytes as f64 / 1e9;
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..7 {
        let start = std::time::Instant::now();
        let weights = packed(&checkpoint, &packing);
        let packing_time = start.elapsed().as_secs_f64();
        assert!(weights.as_slice()[weights.len() - 64..].iter().any(|b| *b != 0));
        drop(weights);

        let start = std::time::Instant::now();
        let mut copy = MmapMut::map_anon(rows * k * 2).unwrap();
        copy.advise(memmap2::Advice::HugePage).unwrap();
        std::thread::scope(|scope| {
            for (number, part) in copy.chunks_mut(rows / workers * k * 2).enumerate() {
                let first = number * (rows / workers);
                let checkpoint = &checkpoint;
                scope.spawn(move || {
                    let stored = checkpoint.rows("w", first..rows.min(first + rows / workers)).unwrap();
                    part.copy_from_slice(&stored.codes);
                });
            }
        });
        let copying_time = start.elapsed().as_secs_f64();
        assert!(copy[copy.len() - 64..].iter().any(|b| *b != 0));
        checkpoint.release_pages();
        println!(
            "octets {:.2} GB/s, plain copy {:.2} GB/s ({gigabytes:.2} GB, {workers} workers)",
            gigabytes / packing_time,
            gigabytes / copying_time
        );
    }
}

/// The same of another format than block FP8.
fn scales_of(format: Format, k: usize, segments: Vec<RowSegment>, interleave: usize) -> PackContent {
    let octets = segments.iter().map(RowSegment::octets).sum();
    PackContent::OctetScales { format, k, segments, interleave, octets }
}

/// FP8 with a scale a row, as published: codes as stored, and scales in the order of the octets' features, with zeros
/// where there is none. Segments may begin with any row.
#[test]
fn fp8_with_scales_of_rows_is_copied_as_stored() {
    for (k, rows, first, interleave) in [(1, 9, 3, 1), (130, 41, 0, 2), (256, 16, 5, 2), (64, 7, 1, 1)] {
        let all = rows + first;
        let codes = ["a", "b"].map(|name| {
            let mut codes = noise((k + rows) as u64 + name.len() as u64 * 7, all * k);
            codes.iter_mut().for_each(|code| *code &= 0xfe); // no NaN
            codes
        });
        let scales =
            [1.0f32, -3.0].map(|by| (0..all).map(|row| by * (row as f32 + 0.25)).collect::<Vec<_>>());
        let bytes = |of: &[f32]| of.iter().flat_map(|scale| scale.to_le_bytes()).collect::<Vec<u8>>();
        let (_folder, checkpoint) = folder(&[
            ("a", "F8_E4M3", vec![all, k], codes[0].clone()),
            ("a_scale", "F32", vec![all, 1], bytes(&scales[0])),
            ("b", "F8_E4M3", vec![all, k], codes[1].clone()),
            ("b_scale", "F32", vec![all], bytes(&scales[1])),
        ]);
        let segments = vec![segment("a", first, rows), segment("b", first, rows)];
        let format = Format::FP8_CHANNEL;
        let found = packed_over_poison(
            &checkpoint,
            vec![
                octets(format, k, segments.clone(), interleave),
                scales_of(format, k, segments.clone(), interleave),
            ],
        );
        let number = |tensor: &str| usize::from(tensor == "b");
        let code = |tensor: &str, row: usize, i: usize| codes[number(tensor)][row * k + i];
        assert!(found[0] == slow_fp8_octets(&segments, interleave, k, &code), "{rows} rows of {k}");
        let mut wanted = Vec::new();
        for (index, octet) in octet_order(&segments, interleave) {
            wanted.extend(
                (octet * 8..octet * 8 + 8)
                    .map(|row| if row < rows { scales[index][first + row] } else { 0.0 }),
            );
        }
        assert_eq!(floats(&found[1]), wanted, "{rows} rows of {k}");
    }
}

/// Experts' codes that are NaN, scales that are, and weights that no scaled format can hold: errors that name the
/// place.
#[test]
fn experts_that_mean_nothing_are_refused() {
    let mut codes = vec![0x38; 2 * 8 * 64];
    codes[8 * 64 + 3 * 64 + 5] = 0xff;
    let ones: Vec<u8> = (0..16).flat_map(|_| 1f32.to_le_bytes()).collect();
    let mut brains: Vec<u8> = (0..16 * 64).flat_map(|_| half::bf16::ONE.to_le_bytes()).collect();
    brains[(9 * 64 + 7) * 2..][..2].copy_from_slice(&half::bf16::INFINITY.to_le_bytes());
    let mut scales = vec![0x38; 16 * 4];
    scales[11 * 4 + 2] = 0x7f;
    let (_folder, checkpoint) = folder(&[
        ("codes", "F8_E4M3", vec![2, 8, 64], codes),
        ("codes_scale", "F32", vec![2, 8, 1], ones),
        ("brain", "BF16", vec![2, 8, 64], brains),
        ("nv", "U8", vec![2, 8, 32], vec![0x22; 16 * 32]),
        ("nv_scale", "F8_E4M3", vec![2, 8, 4], scales),
        ("nv_scale_2", "F32", vec![], 1f32.to_le_bytes().to_vec()),
    ]);
    let refused = |tensor: &str, format, words: &[&str]| {
        let content = PackContent::ExpertOctets {
            format,
            k: 64,
            experts: 2,
            rows: 8,
            sources: vec![RowView::whole(tensor)],
            band: 1,
        };
        let error = pack(&checkpoint, &recipe(vec![content]), &mut |_, _| {}).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "no {word:?} in {error}"));
    };
    for format in [Format::FP8_CHANNEL, Format::FP8_1X128, Format::FP8_BLOCK] {
        refused("codes", format, &["codes", "row 11, column 5 is NaN", "sound"]);
        refused("brain", format, &["brain", "row 9, ", "column 7 is inf", "as stored"]);
    }
    refused("brain", Format::NVFP4, &["brain", "row 9, ", "column 7 is inf", "as stored"]);
    refused("nv", Format::NVFP4, &["nv", "row 11 from column 32 on is NaN", "quantize"]);
}

// ---------------------------------------------------------------- a router's scores

/// The numbers of bfloat16 octets: `[features][all columns of their blocks]`.
fn octet_values(octets: &[u8], k: usize) -> Vec<Vec<f64>> {
    let blocks = (2 * k).div_ceil(64);
    let number = |at: usize| half::bf16::from_le_bytes([octets[at], octets[at + 1]]).to_f64();
    let feature = |feature: usize| {
        let columns = 0..blocks * 32;
        let block = |column: usize| feature / 8 * blocks + column / 32;
        columns.map(|column| number(block(column) * 512 + feature % 8 * 64 + column % 32 * 2)).collect()
    };
    (0..octets.len() / (blocks * 64)).map(feature).collect()
}

fn vector(tensor: &str, len: usize) -> Box<PackContent> {
    Box::new(PackContent::F32 { tensor: tensor.into(), len })
}

#[test]
fn scores_in_two_halves_are_those_of_router_gain_and_product() {
    // 70 and 13 rows of the product, of whose 141 columns 45 are taken: more rows than are read at a time.
    let (experts, hidden, cols, own) = (8, 83, 141, 47..92);
    let tensors = BTreeMap::from([
        ("router".to_string(), TensorInfo::new([experts, hidden], Format::BF16)),
        ("alternating".to_string(), TensorInfo::new([2 * experts, hidden], Format::F32)),
        ("gain".to_string(), TensorInfo::new([hidden], Format::F32)),
        ("a".to_string(), TensorInfo::new([100, cols], Format::BF16)),
        ("b".to_string(), TensorInfo::new([13, cols], Format::BF16)),
    ]);
    let checkpoint = Checkpoint::synthetic(serde_json::Value::Null, 31, tensors);
    let columns = share(own.start, own.len(), cols);
    let product =
        vec![RowSegment { columns, ..segment("a", 20, 70) }, RowSegment { columns, ..segment("b", 0, 13) }];
    let every_second = PackContent::Elements {
        tensor: "alternating".into(),
        len: experts * hidden,
        start: hidden,
        block: hidden,
        stride: 2 * hidden,
        share: None,
    };
    let values = |name: &str| checkpoint.tensor_f32(name).unwrap();
    let rows_of = |name: &str, rows: Range<usize>| -> Vec<Vec<f32>> {
        let all = values(name);
        rows.map(|row| all[row * cols..][own.clone()].to_vec()).collect()
    };
    let rows = [rows_of("a", 20..90), rows_of("b", 0..13)].concat();
    let second = values("alternating").chunks(hidden).skip(1).step_by(2).collect::<Vec<_>>().concat();
    let gain = values("gain");
    for (router, weights) in
        [(vector("router", experts * hidden), values("router")), (Box::new(every_second), second)]
    {
        let content = PackContent::RouterOctets {
            k: own.len(),
            experts,
            hidden,
            router,
            gain: vector("gain", hidden),
            product: product.clone(),
        };
        let found = packed_over_poison(&checkpoint, vec![content]);
        let features = octet_values(&found[0], own.len());
        assert_eq!(features.len(), 2 * experts);
        for (expert, features) in features.chunks(2).enumerate() {
            let scores: Vec<f64> = (0..own.len())
                .map(|j| {
                    let weight = |i: usize| f64::from(weights[expert * hidden + i]) * f64::from(gain[i]);
                    (0..hidden).map(|i| weight(i) * f64::from(rows[i][j])).sum()
                })
                .collect();
            let largest = scores.iter().fold(0f64, |most, score| most.max(score.abs()));
            assert!(largest > 0.0);
            for (j, score) in scores.iter().enumerate() {
                let sum = features[0][j] + features[1][j];
                assert!((sum - score).abs() <= largest * 2f64.powi(-16), "{expert}, {j}: {sum}, not {score}");
                let high = half::bf16::from_f32(*score as f32).to_f64();
                assert_eq!(features[0][j], high, "{expert}, {j}");
            }
            assert!(features.iter().all(|feature| feature[own.len()..].iter().all(|v| v.to_bits() == 0)));
        }
    }
}

#[test]
fn scores_that_do_not_fit_are_refused() {
    let floats = |len: usize, at: usize, value: f32| -> Vec<u8> {
        (0..len).flat_map(|i| if i == at { value } else { 1f32 }.to_le_bytes()).collect()
    };
    let (_folder, checkpoint) = folder(&[
        ("sound", "F32", vec![4, 6], floats(24, 24, 0.0)),
        ("nan", "F32", vec![4, 6], floats(24, 2 * 6 + 5, f32::NAN)),
        ("huge", "F32", vec![4, 6], floats(24, 6, f32::MAX)),
        ("gain", "F32", vec![6], floats(6, 6, 0.0)),
        ("bad gain", "F32", vec![6], floats(6, 3, f32::INFINITY)),
        ("product", "F32", vec![6, 3], floats(18, 18, 0.0)),
        ("bad product", "F32", vec![6, 3], floats(18, 13, f32::NEG_INFINITY)),
    ]);
    let content = |router: &str, gain: &str, product| PackContent::RouterOctets {
        k: 3,
        experts: 4,
        hidden: 6,
        router: vector(router, 24),
        gain: vector(gain, 6),
        product,
    };
    let whole = |tensor: &str| vec![segment(tensor, 0, 6)];
    let refused = |content: PackContent, words: &[&str]| {
        let error = pack(&checkpoint, &recipe(vec![content]), &mut |_, _| {}).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "no {word:?} in {error}"));
    };
    packed(&checkpoint, &recipe(vec![content("sound", "gain", whole("product"))]));
    let named = ["\"nan\"", "\"gain\"", "\"product\"", "expert 2", "column 0", "NaN", "sound"];
    refused(content("nan", "gain", whole("product")), &named);
    refused(content("huge", "gain", whole("product")), &["\"huge\"", "expert 1", "bf16 cannot hold"]);
    refused(content("sound", "bad gain", whole("product")), &["\"bad gain\"", "expert 0", "inf"]);
    refused(content("sound", "gain", whole("bad product")), &["\"bad product\"", "column 1", "-inf"]);
    // Shapes are checked before any work.
    refused(content("nothing", "gain", whole("product")), &["nothing", "no tensor"]);
    refused(content("gain", "gain", whole("product")), &["\"gain\"", "[6]", "24 elements"]);
    refused(content("sound", "nan", whole("product")), &["\"nan\"", "[4, 6]", "6 elements"]);
    refused(content("sound", "gain", whole("sound")), &["\"sound\"", "[4, 6]", "3 columns"]);
    refused(content("sound", "gain", vec![segment("product", 1, 6)]), &["\"product\"", "rows 1..7"]);
    let columns = share(1, 3, 4);
    let part = vec![RowSegment { columns, ..segment("product", 0, 6) }];
    refused(content("sound", "gain", part), &["\"product\"", "4 columns"]);
    refused(content("sound", "gain", vec![segment("product", 0, 5)]), &["fill 5 rows", "compile"]);
}
