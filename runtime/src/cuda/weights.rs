//! Fills the weights of a GPU: packed ones through page-locked memory; large synthetic ones mostly by
//! copying on the GPU.

use super::device::{Device, HostMemory, Memory};
use super::engine::wait_for_copies;
use crate::checkpoint::Checkpoint;
use crate::engine::{EngineError, EngineOptions, open_checkpoint, packed_weights};
use crate::pack::{PackError, PackedWeights, pack};
use std::collections::BTreeMap;
use tilec_ir::format::Format;
use tilec_ir::launch::OCTET;
use tilec_ir::octet::{apart_scales, octet_bytes};
use tilec_ir::pack::{OCTET_FORMATS, PackContent, PackItem, Packing, RowSegment, RowView};
use tilec_ir::plan::{Plan, WeightsFrom};
use tilec_ir::tensor::TensorInfo;

/// Bytes that are copied at a time.
const PIECE: usize = 32 << 20;

/// Threads that copy into page-locked memory: a few reach what the bus takes.
const COPIERS: usize = 8;

/// Synthetic weights of more bytes than this are mostly repeated on the GPU.
const REPEAT_FROM: u64 = 2 << 30;

/// Bytes that are repeated.
const BLOCK: usize = 64 << 20;

/// Fills `weights` as the plan's packing says. `progress(done, total)` is told of bytes packed and copied.
///
/// Synthetic weights of more than 2 GiB would take minutes to make: of their octets only 64 MiB for every
/// format and number of columns are made, of the same distribution, and repeated all over from varying
/// places (and so are scales that lie apart, which are much alike). They are as good for measuring, but they are not the weights that the same plan has on the
/// processor.
///
/// # Errors
/// [`EngineError`] if weights cannot be read, packed or copied.
pub fn load(
    device: &mut dyn Device,
    weights: &Memory,
    plan: &Plan,
    options: &EngineOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), EngineError> {
    let checkpoint = open_checkpoint(plan, options)?;
    // Octets are repeated whosever they are: a draft's that are not made up would be lost.
    let trained_draft =
        plan.draft.as_ref().is_some_and(|draft| matches!(draft.weights, WeightsFrom::Checkpoint { .. }));
    let synthetic = match &plan.weights {
        WeightsFrom::Synthetic { seed, .. } if options.checkpoint.is_none() && !trained_draft => Some(*seed),
        _ => None,
    };
    if let Some(seed) = synthetic.filter(|_| plan.packing.bytes > REPEAT_FROM) {
        tracing::info!("large synthetic weights: blocks of them are repeated");
        return fill(device, weights, &checkpoint, &plan.packing, seed, BLOCK, progress);
    }
    let copied = plan.packing.bytes;
    let mut packed = 0;
    let host = packed_weights(&checkpoint, plan, options, &mut |done, total| {
        packed = total;
        progress(done, total + copied);
    })?;
    let mut staging = Staging::new(device, PIECE)?;
    staging.upload(device, weights.address(), host.as_slice(), &mut |done| {
        progress(packed + done, packed + copied);
    })
}

/// Two pieces of page-locked memory: one is filled while the other is copied.
struct Staging {
    halves: [HostMemory; 2],
    piece: usize,
}

impl Staging {
    fn new(device: &dyn Device, piece: usize) -> Result<Staging, EngineError> {
        Ok(Staging { halves: [device.allocate_host(piece)?, device.allocate_host(piece)?], piece })
    }

    /// Copies `bytes` to the device; nothing is queued before or after.
    fn upload(
        &mut self,
        device: &mut dyn Device,
        to: u64,
        bytes: &[u8],
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), EngineError> {
        let result = self.upload_pieces(device, to, bytes, progress);
        // Also after an error: the memory that is copied from must stay.
        wait_for_copies(device).and(result)
    }

    fn upload_pieces(
        &mut self,
        device: &mut dyn Device,
        to: u64,
        bytes: &[u8],
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), EngineError> {
        for (number, piece) in bytes.chunks(self.piece).enumerate() {
            let offset = number * self.piece;
            let half = &mut self.halves[number % 2];
            // SAFETY: the last copy from this half was waited for below, one piece ago.
            copy(unsafe { half.slice_mut(0..piece.len()) }, piece);
            // The other half's copy, which went on meanwhile.
            wait_for_copies(device)?;
            progress(offset as u64);
            // SAFETY: inside of the weights; this half is not touched until the wait in the next round.
            unsafe { device.copy_in(to + offset as u64, half, 0..piece.len()) }?;
        }
        wait_for_copies(device)?;
        progress(bytes.len() as u64);
        Ok(())
    }
}

/// Copies with several threads: one alone does not keep up with the bus, least of all when it reads from
/// a mapped file.
fn copy(to: &mut [u8], from: &[u8]) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(COPIERS);
    let part = from.len().div_ceil(threads).next_multiple_of(4096);
    std::thread::scope(|scope| {
        for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
            scope.spawn(|| to.copy_from_slice(from));
        }
    });
}

/// Fills the weights with blocks of at most `block` bytes that are repeated.
fn fill(
    device: &mut dyn Device,
    weights: &Memory,
    checkpoint: &Checkpoint,
    packing: &Packing,
    seed: u64,
    block: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), EngineError> {
    packing.verify().map_err(PackError::from)?;
    let total = packing.bytes;
    // Items by kind and columns that are repeated; the others are packed as usual, one behind the other.
    let mut repeated: BTreeMap<(Kind, usize), Vec<(u64, u64)>> = BTreeMap::new();
    let mut usual = Packing::default();
    let mut places = Vec::new();
    for item in &packing.items {
        // Verified above.
        let bytes = item.content.bytes().unwrap_or(0);
        match repeatable(&item.content) {
            Some(kind) => repeated.entry(kind).or_default().push((item.offset, bytes)),
            None => {
                let offset = usual.bytes;
                usual.items.push(PackItem { offset, content: item.content.clone() });
                usual.bytes = (offset + bytes).next_multiple_of(tilec_ir::pack::PACK_ALIGN);
                places.push((offset, item.offset, bytes));
            }
        }
    }
    let mut done = 0;
    let mut staging = Staging::new(device, PIECE)?;
    let host = pack(checkpoint, &usual, &mut |_, _| progress(0, total))?;
    for (from, to, bytes) in places {
        let piece = &host.as_slice()[from as usize..(from + bytes) as usize];
        staging.upload(device, weights.address() + to, piece, &mut |_| ())?;
        done += bytes;
        progress(done, total);
    }
    drop(host);
    for ((kind, k), items) in repeated {
        let host = random_item(kind, k, seed, block)?;
        let unit = kind.unit(k) as u64;
        let source = device.allocate("block of weights", Some(host.len()), "model.synthetic")?;
        staging.upload(device, source.address(), host.as_slice(), &mut |_| ())?;
        let mut number = 0u64;
        for (offset, bytes) in items {
            let mut at = 0;
            while at < bytes {
                let (from, len) = source_range(number, unit, source.bytes() as u64, bytes - at);
                let to = weights.address() + offset + at;
                // SAFETY: inside of the block and of the item; the block stays until the wait below.
                unsafe { device.copy_within(to, source.address() + from, len as usize) }?;
                at += len;
                number += 1;
            }
            done += bytes;
            progress(done, total);
        }
        wait_for_copies(device)?;
    }
    progress(total, total);
    Ok(())
}

/// What is repeated: octets, or the scales of some that lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    /// Format of the octets, by its place among [`OCTET_FORMATS`].
    format: usize,
    scales: bool,
    /// Octets of a band.
    band: usize,
}

impl Kind {
    fn new(format: Format, scales: bool, band: usize) -> Option<Kind> {
        let format = OCTET_FORMATS.iter().position(|known| *known == format)?;
        Some(Kind { format, scales, band })
    }

    fn format(self) -> Format {
        OCTET_FORMATS[self.format]
    }

    /// Bytes of an octet, or of a band of them, or of an octet's scales: what is copied as a whole, so that padding stays where it is.
    fn unit(self, k: usize) -> usize {
        match self.scales {
            true => apart_scales(self.format(), k) * 4,
            // Of a plan that was verified: it can be counted.
            false => octet_bytes(self.format(), k).unwrap_or(1) * self.band,
        }
    }
}

/// Kind and columns of an item that may be repeated: octets of eight features each, and their scales. A router's
/// octets, which are always full, are repeated like those of any bfloat16, so that no products have to be made.
fn repeatable(content: &PackContent) -> Option<(Kind, usize)> {
    let whole = |segments: &[RowSegment]| segments.iter().all(|segment| segment.rows.is_multiple_of(OCTET));
    let band = match content {
        PackContent::ExpertOctets { band, .. } => *band,
        _ => 1,
    };
    let (format, k, scales, whole) = match content {
        PackContent::Octets { format, k, segments, .. } => (format, k, false, whole(segments)),
        PackContent::ExpertOctets { format, k, rows, .. } => (format, k, false, rows.is_multiple_of(OCTET)),
        PackContent::RouterOctets { k, .. } => (&Format::BF16, k, false, true),
        PackContent::OctetScales { format, k, segments, .. } => (format, k, true, whole(segments)),
        PackContent::ExpertScales { format, k, rows, .. } => (format, k, true, rows.is_multiple_of(OCTET)),
        _ => return None,
    };
    Kind::new(*format, scales, band).filter(|_| whole).map(|kind| (kind, *k))
}

/// An item of a kind, of about as many features as `bytes` of codes hold.
fn random_item(kind: Kind, k: usize, seed: u64, bytes: usize) -> Result<PackedWeights, EngineError> {
    let format = kind.format();
    let block_octets = format.block_rows.div_ceil(OCTET);
    let octet = octet_bytes(format, k).unwrap_or(1);
    let octets = (bytes / octet).max(1).next_multiple_of(block_octets * kind.band);
    let rows = octets * OCTET;
    let name = format!("block of {k} columns");
    let tensors = BTreeMap::from([(name.clone(), TensorInfo::new([rows, k], format))]);
    let sources = vec![RowView::whole(&name)];
    let segments = vec![RowSegment::new(name, 0, rows)];
    let content = match kind.scales {
        false if kind.band > 1 => {
            PackContent::ExpertOctets { format, k, experts: 1, rows, sources, band: kind.band }
        }
        true => PackContent::OctetScales { format, k, segments, interleave: 1, octets },
        false => PackContent::Octets { format, k, segments, interleave: 1, octets },
    };
    // Of a plan that was verified: `k` is a matrix's, and `bytes` small.
    let bytes = content.bytes().unwrap_or(0);
    let packing = Packing { items: vec![PackItem { offset: 0, content }], bytes };
    let checkpoint = Checkpoint::synthetic(serde_json::Value::Null, seed, tensors);
    Ok(pack(&checkpoint, &packing, &mut |_, _| ())?)
}

/// Where copy `number` of a block of `block` bytes starts, and how long it is if `left` are wanted: from
/// another place each time, a whole number of `unit`s.
fn source_range(number: u64, unit: u64, block: u64, left: u64) -> (u64, u64) {
    let units = (block / unit).max(1);
    // A prime stride visits many places; half of the block keeps the copies long.
    let from = (number.wrapping_mul(7919) % units.div_ceil(2)) * unit;
    (from, left.min(units * unit - from))
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeDevice;
    use super::*;
    use std::collections::HashSet;
    use std::sync::Arc;

    fn device() -> FakeDevice {
        FakeDevice::new(Arc::new(|_| Ok(())))
    }

    fn bytes_of(memory: &Memory) -> &[u8] {
        // SAFETY: the fake's memory is the host's, initialised, and nothing is queued.
        unsafe { std::slice::from_raw_parts(memory.address() as *const u8, memory.bytes()) }
    }

    #[test]
    fn bytes_arrive_in_pieces_of_any_number() {
        for len in [0, 1, 4096, 4097, 8192, 20_001] {
            let mut device = device();
            let from: Vec<u8> = (0..len).map(|at| (at * 31 % 251) as u8).collect();
            let memory = device.allocate("weights", Some(len), "nothing").unwrap();
            let mut staging = Staging::new(&device, 4096).unwrap();
            let mut heard = Vec::new();
            staging.upload(&mut device, memory.address(), &from, &mut |done| heard.push(done)).unwrap();
            assert!(bytes_of(&memory) == from, "{len} bytes");
            assert!(heard.is_sorted() && heard.last() == Some(&(len as u64)), "{heard:?}");
        }
    }

    /// A recipe with octets that are repeated, octets that have padding, scales of a norm, a router's octets,
    /// and gaps.
    fn recipe() -> (Checkpoint, Packing) {
        let tensors = BTreeMap::from([
            ("a".to_string(), TensorInfo::new([96, 64], Format::BF16)),
            ("b".to_string(), TensorInfo::new([200, 64], Format::BF16)),
            ("c".to_string(), TensorInfo::new([12, 64], Format::BF16)),
            ("d".to_string(), TensorInfo::new([16, 32], Format::F16)),
            ("e".to_string(), TensorInfo::new([512, 192], Format::FP8_BLOCK)),
            ("f.0".to_string(), TensorInfo::new([24, 40], Format::MXFP4)),
            ("f.1".to_string(), TensorInfo::new([24, 40], Format::MXFP4)),
            ("f.2".to_string(), TensorInfo::new([24, 40], Format::MXFP4)),
            ("norm".to_string(), TensorInfo::new([70], Format::F32)),
            ("router".to_string(), TensorInfo::new([32, 70], Format::BF16)),
        ]);
        let checkpoint = Checkpoint::synthetic(serde_json::Value::Null, 3, tensors);
        let mut packing = Packing::default();
        let mut add = |content: PackContent| {
            let offset = packing.bytes;
            packing.bytes = (offset + content.bytes().unwrap()).next_multiple_of(256) + 256;
            packing.items.push(PackItem { offset, content });
        };
        let octets = |format, k, tensors: &[(&str, usize)]| {
            let segment = |(tensor, rows): &(&str, usize)| RowSegment::new(*tensor, 0, *rows);
            let octets = tensors.iter().map(|(_, rows)| rows.div_ceil(OCTET)).sum();
            let segments = tensors.iter().map(segment).collect();
            PackContent::Octets { format, k, segments, interleave: 1, octets }
        };
        add(octets(Format::BF16, 64, &[("a", 96), ("b", 200)]));
        add(PackContent::F32 { tensor: "norm".into(), len: 70 });
        add(octets(Format::BF16, 64, &[("c", 12)]));
        add(octets(Format::F16, 32, &[("d", 16)]));
        // 40 columns: most of an octet is padding.
        for band in [1, 3] {
            let sources = vec![RowView::whole("f.{}")];
            add(PackContent::ExpertOctets {
                format: Format::MXFP4,
                k: 40,
                experts: 3,
                rows: 24,
                sources,
                band,
            });
        }
        let fp8 = octets(Format::FP8_BLOCK, 192, &[("e", 512)]);
        if let PackContent::Octets { format, k, segments, interleave, octets } = fp8.clone() {
            add(PackContent::OctetScales { format, k, segments, interleave, octets });
        }
        add(fp8);
        let vector = |tensor: &str, len| Box::new(PackContent::F32 { tensor: tensor.into(), len });
        let (router, gain) = (vector("router", 32 * 70), vector("norm", 70));
        let product = vec![RowSegment::new("b", 0, 70)];
        add(PackContent::RouterOctets { k: 64, experts: 32, hidden: 70, router, gain, product });
        (checkpoint, packing)
    }

    #[test]
    fn large_synthetic_weights_repeat_a_block_and_are_otherwise_the_usual_ones() {
        let (checkpoint, packing) = recipe();
        let usual = pack(&checkpoint, &packing, &mut |_, _| ()).unwrap();
        let mut device = device();
        let memory = device.allocate("weights", Some(packing.bytes as usize), "nothing").unwrap();
        // SAFETY: all of the memory.
        unsafe { device.zero(memory.address(), memory.bytes()) }.unwrap();
        let block = 5 * 1024;
        let mut heard = Vec::new();
        let mut progress = |done, total| {
            assert_eq!(total, packing.bytes);
            heard.push(done);
        };
        fill(&mut device, &memory, &checkpoint, &packing, 3, block, &mut progress).unwrap();
        assert!(heard.is_sorted() && heard.last() == Some(&packing.bytes), "{heard:?}");

        let found = bytes_of(&memory);
        let mut at = 0;
        for item in &packing.items {
            let range = item.offset as usize..(item.offset + item.content.bytes().unwrap()) as usize;
            assert!(found[at..range.start].iter().all(|byte| *byte == 0), "the gap before {range:?}");
            at = range.end;
            let Some((kind, k)) = repeatable(&item.content) else {
                assert!(found[range.clone()] == usual.as_slice()[range], "{:?}", item.content);
                continue;
            };
            let source = random_item(kind, k, 3, block).unwrap();
            let unit = kind.unit(k);
            let blocks: HashSet<&[u8]> = source.as_slice().chunks(unit).collect();
            let mut seen = HashSet::new();
            for piece in found[range].chunks(unit) {
                assert!(blocks.contains(piece), "an octet of the source, whole");
                seen.insert(piece);
            }
            // The few octets of the source lie in one block of 128 rows, with the same scales.
            assert!(seen.len() > 1 || kind.scales, "copies start at different places");
        }
        assert!(found[at..].iter().all(|byte| *byte == 0));
        // The one with a padded octet is not repeated.
        let repeats: Vec<bool> =
            packing.items.iter().map(|item| repeatable(&item.content).is_some()).collect();
        assert_eq!(repeats, [true, false, false, true, true, true, true, true, true]);
    }

    #[test]
    fn copies_start_all_over_the_block() {
        let block = 64 << 20;
        let starts: HashSet<u64> =
            (0..256).map(|number| source_range(number, 512, block, u64::MAX).0).collect();
        assert_eq!(starts.len(), 256);
        for number in 0..256 {
            let (from, len) = source_range(number, 512, block, u64::MAX);
            assert!(from.is_multiple_of(512) && from + len == block && len >= block / 2);
            assert_eq!(source_range(number, 512, block, 100), (from, 100));
        }
        assert_eq!(source_range(9, 512, 512, 4096), (0, 512));
        assert_eq!(source_range(9, 500, 512, 4096), (0, 500));
    }
}
