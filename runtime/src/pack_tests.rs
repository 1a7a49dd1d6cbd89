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
    RowSegment { tensor: tensor.into(), row_start, rows }
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
