//! Executes a packing recipe: reads the rows that it names from a checkpoint, lays them out as panels or
//! octets, and keeps the result in a file, so that the next start maps it instead of packing again.
//!
//! The file is a page of header and then the packed weights:
//!
//! | bytes | hold |
//! | --- | --- |
//! | 0..8 | `tilecpkw` |
//! | 8..12 | version |
//! | 12..16 | zero |
//! | 16..24 | bytes of weights |
//! | 24..56 | SHA-256 of what was packed: recipe, identity of the checkpoint, version |
//! | 56..88 | SHA-256 of bytes 0..56 |
//! | 4096.. | the weights |

use crate::checkpoint::{Checkpoint, CheckpointError, ErrorKind, StoredRows};
use crate::conversion::{Conversion, Ledger};
use memmap2::{Mmap, MmapMut};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use tilec_ir::convert::{ConvertError, dequantize, pack_panel, quantize, row_format};
use tilec_ir::format::{Code, Format, PANEL, PanelLayout};
use tilec_ir::graph::EXPERT;
use tilec_ir::launch::{OCTET, OCTET_BLOCK};
use tilec_ir::octet::{
    ScaleError, apart_scales, band_place, feature_scales, lay_fp8, lay_fp8_rows, lay_mxfp4,
    octet_block_bytes, octet_blocks,
};
use tilec_ir::pack::{FP8_COLUMNS, PackContent, PackItem, Packing, PackingError, RowSegment, RowView, Share};

mod router;
mod scaled;

use router::{RouterScores, lay_router};
use scaled::{FP8_ROWS, Scaled, Wanted, block_fp8, check_codes, gather};

/// Raised whenever the layout of the file or the packing of a format changes.
pub const PACKED_VERSION: u32 = 4;

/// Where the weights start in the file: a page, so that they can be mapped aligned.
const DATA_OFFSET: usize = 4096;

const MAGIC: &[u8; 8] = b"tilecpkw";

/// What to do about a recipe that asks for other shapes than the checkpoint has.
const COMPILE_AGAIN: &str = "compile the model again from this checkpoint";

/// Bytes of panels or octets that one job makes: large enough to hide its start, small enough to balance.
const JOB_BYTES: usize = 1 << 20;

/// Bytes that are packed before the pages of the sources are given back.
const RELEASE_EVERY: u64 = 64 << 20;

/// Why weights could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The recipe contradicts itself.
    #[error("{0}; compile the model again")]
    Recipe(#[from] PackingError),
    /// The checkpoint is at fault, or does not fit the recipe.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The memory for the packed weights was refused.
    #[error("{bytes} bytes for the packed weights: {source}; use a smaller model or a narrower format")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The cache could not be written.
    #[error(
        "{}: {action} ({bytes} bytes of packed weights): {source}; free some space, choose another cache \
         folder, or switch the cache off", path.display()
    )]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// Bytes of the packed weights.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// Packed weights, in memory of their own or mapped from the cache; aligned to 64 bytes and more.
#[derive(Debug)]
pub struct PackedWeights {
    map: Mmap,
    offset: usize,
    len: usize,
    cached: bool,
    conversions: Vec<Conversion>,
}

impl PackedWeights {
    /// Where the weights start; valid for as long as `self` lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.as_slice().as_ptr()
    }

    /// The packed weights.
    pub fn as_slice(&self) -> &[u8] {
        &self.map[self.offset..self.offset + self.len]
    }

    /// Bytes of the packed weights.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What was converted while packing, and what it cost; nothing of what came from the cache.
    pub fn conversions(&self) -> &[Conversion] {
        &self.conversions
    }

    /// Whether they came from the cache.
    pub fn from_cache(&self) -> bool {
        self.cached
    }
}

/// Receives (bytes done, bytes in all).
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Packs into memory.
///
/// # Errors
/// If the recipe is not sound, does not fit the checkpoint, or a weight cannot be converted.
pub fn pack(
    checkpoint: &Checkpoint,
    packing: &Packing,
    progress: Progress<'_>,
) -> Result<PackedWeights, PackError> {
    packing.verify()?;
    let memory = |source| PackError::Memory { bytes: packing.bytes, source };
    let len =
        usize::try_from(packing.bytes).map_err(|_| memory(io::Error::from(io::ErrorKind::OutOfMemory)))?;
    // Maps of no length are refused by some systems.
    let mut map = MmapMut::map_anon(len.max(1)).map_err(memory)?;
    // Zeroing page by page would cost more than the copy. It is a hint: no system has to follow it.
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::debug!(%error, "packing into pages of the usual size");
    }
    let conversions = fill(checkpoint, packing, &mut map[..len], progress)?;
    let map = map.make_read_only().map_err(memory)?;
    Ok(PackedWeights { map, offset: 0, len, cached: false, conversions })
}

/// Maps the packed weights from `cache`, or packs them into a file there first.
///
/// The file's name and header hold a hash of the recipe and of the checkpoint's identity (path, length
/// and time of change of every file), so that a changed model or checkpoint is packed anew. A file
/// that is cut short or has a damaged header is replaced.
///
/// # Errors
/// As [`pack`], and if the file cannot be written. Nothing is left behind then.
pub fn pack_cached(
    checkpoint: &Checkpoint,
    packing: &Packing,
    cache: &Path,
    progress: Progress<'_>,
) -> Result<PackedWeights, PackError> {
    packing.verify()?;
    let key = cache_key(checkpoint, packing);
    let path = cache.join(format!("packed-{}.tlw", hex(&key[..16])));
    let bytes = packing.bytes;
    match load(&path, &header(bytes, &key), bytes) {
        Ok(Some(weights)) => return Ok(weights),
        Ok(None) => {}
        Err(problem) => {
            tracing::warn!(file = %path.display(), problem, "the cached weights are not usable: packing again");
        }
    }
    let fault = |action, path: &Path| {
        let path = path.to_path_buf();
        move |source| PackError::Cache { path, action, bytes, source }
    };
    fs::create_dir_all(cache).map_err(fault("making the folder", cache))?;
    // Neither another process nor another thread of this one may write the same file.
    static ATTEMPT: AtomicU64 = AtomicU64::new(0);
    let attempt = ATTEMPT.fetch_add(1, Ordering::Relaxed);
    let name = format!("packed-{}.{}-{attempt}.tmp", hex(&key[..16]), std::process::id());
    let temporary = Temporary(cache.join(name));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&temporary.0)
        .map_err(fault("creating the file", &temporary.0))?;
    let len = bytes
        .checked_add(DATA_OFFSET as u64)
        .and_then(|len| usize::try_from(len).ok())
        .ok_or_else(|| fault("reserving space", &temporary.0)(io::ErrorKind::FileTooLarge.into()))?;
    reserve(&file, len as u64).map_err(fault("reserving space", &temporary.0))?;
    // SAFETY: the file is new, has a name that is used once, and its space is
    // reserved, so that no write to the map can fail for want of it.
    let mut map = unsafe { MmapMut::map_mut(&file) }.map_err(fault("mapping the file", &temporary.0))?;
    let conversions = fill(checkpoint, packing, &mut map[DATA_OFFSET..], progress)?;
    map[..HEADER_BYTES].copy_from_slice(&header(bytes, &key));
    map.flush().map_err(fault("writing", &temporary.0))?;
    drop(map);
    file.sync_all().map_err(fault("writing", &temporary.0))?;
    fs::rename(&temporary.0, &path).map_err(fault("renaming the file", &path))?;
    std::mem::forget(temporary);
    // SAFETY: see `load`.
    let map = unsafe { Mmap::map(&file) }.map_err(fault("mapping the file", &path))?;
    Ok(PackedWeights { map, offset: DATA_OFFSET, len: len - DATA_OFFSET, cached: false, conversions })
}

/// Removes its file when dropped: what is left half-done by an error.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // The error that led here is the one to report.
        let _ = fs::remove_file(&self.0);
    }
}

/// Makes the file `len` bytes long with all its space on the disk, so that a full disk is an error here
/// and not a signal in the middle of a write to the map.
fn reserve(file: &File, len: u64) -> io::Result<()> {
    let length = libc::off_t::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    // SAFETY: the descriptor is open for as long as `file` lives; the call touches no memory of ours.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, length) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

const HEADER_BYTES: usize = 88;

fn header(bytes: u64, key: &[u8; 32]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&PACKED_VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&bytes.to_le_bytes());
    header[24..56].copy_from_slice(key);
    let checksum = Sha256::digest(&header[..56]);
    header[56..].copy_from_slice(&checksum);
    header
}

/// Maps a file of the cache; `None` if there is none, an explanation if it is not usable.
fn load(path: &Path, expected: &[u8; HEADER_BYTES], bytes: u64) -> Result<Option<PackedWeights>, String> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|error| error.to_string())?,
    };
    let len = file.metadata().map_err(|error| error.to_string())?.len();
    if bytes.checked_add(DATA_OFFSET as u64) != Some(len) {
        return Err(format!(
            "the file has {len} bytes, {bytes} of weights and {DATA_OFFSET} of header are due"
        ));
    }
    // SAFETY: the map is only read. Files of the cache are written under another name and renamed, so
    // that no program of ours changes one that is mapped.
    let map = unsafe { Mmap::map(&file) }.map_err(|error| error.to_string())?;
    if map[..HEADER_BYTES] != expected[..] {
        return Err("the header is damaged".to_string());
    }
    let len = map.len() - DATA_OFFSET;
    Ok(Some(PackedWeights { map, offset: DATA_OFFSET, len, cached: true, conversions: Vec::new() }))
}

/// Hash of everything that the packed bytes depend on.
fn cache_key(checkpoint: &Checkpoint, packing: &Packing) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(PACKED_VERSION.to_le_bytes());
    let mut add = |text: String| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    add(serde_json::to_string(packing).expect("a recipe is plain data"));
    add(serde_json::to_string(&checkpoint.identity()).expect("an identity is plain data"));
    // For synthetic weights shape and format are part of what is made.
    add(serde_json::to_string(checkpoint.tensors()).expect("shapes are plain data"));
    hash.finalize().into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A piece of work and the bytes that it fills.
enum Job<'a> {
    Panels { layout: PanelLayout, groups: Vec<Group<'a>>, out: &'a mut [u8] },
    Octets { format: Format, k: usize, groups: Vec<Group<'a>>, out: &'a mut [u8] },
    OctetScales { format: Format, k: usize, groups: Vec<Group<'a>>, out: &'a mut [u8] },
    ExpertScales { experts: Experts<'a>, expert: usize, out: &'a mut [u8] },
    Experts { experts: Experts<'a>, expert: usize, out: &'a mut [u8] },
    Elements { tensor: &'a str, view: RowView, out: &'a mut [u8] },
    RouterOctets { scores: RouterScores<'a>, out: &'a mut [u8] },
    F32 { tensor: &'a str, len: usize, out: &'a mut [u8] },
    RopeTable { inv_freq: &'a [f32], positions: usize, factor: f32, out: &'a mut [u8] },
}

/// How rows are laid out, so many at a time.
#[derive(Clone, Copy)]
enum Layout {
    Panels(PanelLayout),
    Octets { format: Format, k: usize },
}

impl Layout {
    fn format(&self) -> Format {
        match self {
            Layout::Panels(layout) => layout.format,
            Layout::Octets { format, .. } => *format,
        }
    }

    fn k(&self) -> usize {
        match self {
            Layout::Panels(layout) => layout.k,
            Layout::Octets { k, .. } => *k,
        }
    }

    /// Rows of a panel or octet.
    fn unit_rows(&self) -> usize {
        match self {
            Layout::Panels(_) => PANEL,
            Layout::Octets { .. } => OCTET,
        }
    }

    /// Bytes of the scales of an octet that lie apart.
    fn apart_bytes(&self) -> usize {
        match self {
            Layout::Panels(_) => 0,
            Layout::Octets { format, k } => apart_scales(*format, *k) * 4,
        }
    }

    /// Bytes of a panel or octet, which a verified recipe can count.
    fn unit_bytes(&self) -> usize {
        match self {
            Layout::Panels(layout) => layout.bytes(),
            Layout::Octets { format, k } => octet_unit(*format, *k),
        }
    }
}

/// Bytes of an octet of a verified recipe.
fn octet_unit(format: Format, k: usize) -> usize {
    octet_blocks(format, k) * octet_block_bytes(format)
}

/// Panels or octets of experts, as the recipe says it.
#[derive(Clone, Copy)]
struct Experts<'a> {
    layout: Layout,
    rows: usize,
    sources: &'a [RowView],
    /// Octets of a band.
    band: usize,
}

impl Experts<'_> {
    /// Panels or octets of one expert.
    fn units(&self) -> usize {
        self.rows.div_ceil(self.layout.unit_rows()) * self.sources.len()
    }

    /// Bytes of one expert.
    fn bytes(&self) -> usize {
        self.units() * self.layout.unit_bytes()
    }
}

/// Units (panels or octets) `first..end` of each of the interleaved segments.
#[derive(Clone, Copy)]
struct Group<'a> {
    segments: &'a [RowSegment],
    first: usize,
    end: usize,
}

impl Group<'_> {
    fn units(&self) -> usize {
        (self.end - self.first) * self.segments.len()
    }
}

/// Splits the units of an item, `units` of each segment, into jobs of about `limit` units.
fn split<'a>(
    segments: &'a [RowSegment],
    interleave: usize,
    limit: usize,
    units: impl Fn(&RowSegment) -> usize,
    mut job: impl FnMut(Vec<Group<'a>>),
) {
    let mut pending: Vec<Group<'a>> = Vec::new();
    for segments in segments.chunks(interleave) {
        let (all, step) = (units(&segments[0]), (limit / interleave).max(1));
        for first in (0..all).step_by(step) {
            pending.push(Group { segments, first, end: all.min(first + step) });
            if pending.iter().map(Group::units).sum::<usize>() >= limit {
                job(std::mem::take(&mut pending));
            }
        }
    }
    if !pending.is_empty() {
        job(pending);
    }
}

/// Octets of a job. Those of fp8 come in whole blocks of rows, which are quantized together.
fn octets_per_job(format: Format, k: usize, interleave: usize) -> usize {
    let limit = (JOB_BYTES / octet_unit(format, k)).max(1);
    let block = (format.block_rows / OCTET).max(1).saturating_mul(interleave);
    limit.checked_next_multiple_of(block).unwrap_or(limit)
}

/// Cuts the first `units * unit_bytes` bytes off `rest`.
fn take<'a>(rest: &mut &'a mut [u8], units: usize, unit_bytes: usize) -> &'a mut [u8] {
    let (head, tail) = std::mem::take(rest).split_at_mut(units * unit_bytes);
    *rest = tail;
    head
}

fn count(groups: &[Group<'_>]) -> usize {
    groups.iter().map(Group::units).sum()
}

/// Splits the recipe, which is verified, into jobs over disjoint parts of `out`.
fn jobs<'a>(packing: &'a Packing, mut out: &'a mut [u8]) -> Vec<Job<'a>> {
    let mut items: Vec<&PackItem> = packing.items.iter().collect();
    items.sort_by_key(|item| item.offset);
    let mut jobs = Vec::new();
    let mut at = 0;
    for item in items {
        // In range: `verify` has checked every end, and the whole fits memory.
        let bytes = item.content.bytes().expect("a verified item has a size") as usize;
        let (_, rest) = out.split_at_mut(item.offset as usize - at);
        let (mut own, rest) = rest.split_at_mut(bytes);
        out = rest;
        at = item.offset as usize + bytes;
        match &item.content {
            PackContent::F32 { tensor, len } => jobs.push(Job::F32 { tensor, len: *len, out: own }),
            PackContent::Elements { tensor, start, block, stride, share, .. } => {
                let view = elements_view(tensor, *start, *block, *stride, *share);
                jobs.push(Job::Elements { tensor, view, out: own });
            }
            PackContent::RouterOctets { k, experts, router, gain, product, .. } => {
                let (k, experts) = (*k, *experts);
                // One job: splitting it would read the product again for every part, and layers are many.
                let scores = RouterScores { k, experts, router, gain, product };
                jobs.push(Job::RouterOctets { scores, out: own });
            }
            PackContent::ExpertScales { format, k, experts, rows, sources } => {
                let layout = Layout::Octets { format: *format, k: *k };
                let each = Experts { layout, rows: *rows, sources, band: 1 };
                for expert in 0..*experts {
                    let out = take(&mut own, each.units(), layout.apart_bytes());
                    jobs.push(Job::ExpertScales { experts: each, expert, out });
                }
            }
            PackContent::ExpertPanels { experts, rows, sources, .. }
            | PackContent::ExpertOctets { experts, rows, sources, .. } => {
                let (layout, band) = match &item.content {
                    PackContent::ExpertOctets { format, k, band, .. } => {
                        (Layout::Octets { format: *format, k: *k }, *band)
                    }
                    PackContent::ExpertPanels { layout, .. } => (Layout::Panels(*layout), 1),
                    _ => unreachable!("one of the two"),
                };
                let each = Experts { layout, rows: *rows, sources, band };
                for expert in 0..*experts {
                    let out = take(&mut own, 1, each.bytes());
                    jobs.push(Job::Experts { experts: each, expert, out });
                }
            }
            PackContent::RopeTable { inv_freq, positions, attention_factor } => {
                let (positions, factor) = (*positions, *attention_factor);
                jobs.push(Job::RopeTable { inv_freq, positions, factor, out: own });
            }
            PackContent::Panels { layout, segments, interleave, .. } => {
                let (layout, panel_bytes) = (*layout, layout.bytes());
                let limit = (JOB_BYTES / panel_bytes).max(1);
                split(segments, *interleave, limit, RowSegment::panels, |groups| {
                    let out = take(&mut own, count(&groups), panel_bytes);
                    jobs.push(Job::Panels { layout, groups, out });
                });
            }
            PackContent::Octets { format, k, segments, interleave, .. } => {
                let (format, k) = (*format, *k);
                let limit = octets_per_job(format, k, *interleave);
                split(segments, *interleave, limit, RowSegment::octets, |groups| {
                    let out = take(&mut own, count(&groups), octet_unit(format, k));
                    jobs.push(Job::Octets { format, k, groups, out });
                });
            }
            PackContent::OctetScales { format, k, segments, interleave, .. } => {
                let (format, k) = (*format, *k);
                // What is read counts, not the few bytes that are written.
                let limit = octets_per_job(format, k, *interleave);
                split(segments, *interleave, limit, RowSegment::octets, |groups| {
                    let out = take(&mut own, count(&groups), apart_scales(format, k) * 4);
                    jobs.push(Job::OctetScales { format, k, groups, out });
                });
            }
        }
    }
    jobs
}

/// Where elements of a tensor lie, as if they were rows.
fn elements_view(tensor: &str, start: usize, block: usize, stride: usize, share: Option<Share>) -> RowView {
    RowView { start, block, stride, rows: share, ..RowView::whole(tensor) }
}

/// Fills `out` with what the recipe asks for: every byte of every item. The gaps between them stay. Gives
/// what was converted.
fn fill(
    checkpoint: &Checkpoint,
    packing: &Packing,
    out: &mut [u8],
    progress: Progress<'_>,
) -> Result<Vec<Conversion>, PackError> {
    check(checkpoint, packing)?;
    let ledger = Ledger::default();
    let total: u64 = packing.items.iter().filter_map(|item| item.content.bytes()).sum();
    let queue = Mutex::new(jobs(packing, out).into_iter());
    let failed = AtomicBool::new(false);
    let since_release = AtomicU64::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for _ in 0..workers {
            let (queue, failed, since_release, sender) = (&queue, &failed, &since_release, sender.clone());
            let ledger = &ledger;
            threads.push(scope.spawn(move || -> Result<(), PackError> {
                loop {
                    let job = queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
                    let Some(job) = job.filter(|_| !failed.load(Ordering::Relaxed)) else { return Ok(()) };
                    let bytes = run(checkpoint, job, ledger)
                        .inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
                    if since_release.fetch_add(bytes, Ordering::Relaxed) + bytes >= RELEASE_EVERY {
                        since_release.store(0, Ordering::Relaxed);
                        checkpoint.release_pages();
                    }
                    // The receiver outlives the workers.
                    let _ = sender.send(bytes);
                }
            }));
        }
        drop(sender);
        let mut done = 0;
        progress(0, total);
        for bytes in receiver {
            done += bytes;
            progress(done, total);
        }
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    checkpoint.release_pages();
    Ok(ledger.conversions())
}

/// Checks the recipe against the checkpoint's shapes before any work, and says what will be converted.
fn check(checkpoint: &Checkpoint, packing: &Packing) -> Result<(), PackError> {
    // `to` is the format in which the item holds what it takes from the rows; scales are told of with
    // their codes.
    let check_rows = |segments: &[RowSegment], k: usize, from: fn(Format) -> Format, to: Option<Format>| {
        let mut last = "";
        for RowSegment { tensor, row_start, rows, columns } in segments {
            let info = checkpoint.tensor(tensor)?;
            let have = info.rows().unwrap_or(0);
            let cols = columns.map_or(k, |share| share.of);
            if info.cols() != cols || row_start + rows > have {
                let problem = format!(
                    "its shape is {:?}, the plan wants rows {row_start}..{} of {cols} columns",
                    info.shape,
                    row_start + rows,
                );
                return Err(checkpoint.fault(tensor, ErrorKind::Malformed, problem, COMPILE_AGAIN));
            }
            if let Some(to) = to.filter(|to| tensor != last && from(info.format) != *to) {
                let from = info.format;
                tracing::info!(%tensor, %from, %to, "converting through float32");
            }
            last = tensor;
        }
        Ok(())
    };
    for item in &packing.items {
        match &item.content {
            PackContent::Panels { layout, segments, .. } => {
                check_rows(segments, layout.k, row_format, Some(layout.format))?;
            }
            PackContent::Octets { format, k, segments, .. } => {
                check_rows(segments, *k, |format| format, Some(*format))?;
            }
            PackContent::OctetScales { k, segments, .. } => {
                check_rows(segments, *k, |format| format, None)?;
            }
            PackContent::ExpertPanels { layout, experts, rows, sources } => {
                let layout = Layout::Panels(*layout);
                for view in sources {
                    check_experts(checkpoint, &layout, *experts, *rows, view)?;
                }
            }
            PackContent::ExpertOctets { format, k, experts, rows, sources, .. }
            | PackContent::ExpertScales { format, k, experts, rows, sources } => {
                let layout = Layout::Octets { format: *format, k: *k };
                for view in sources {
                    check_experts(checkpoint, &layout, *experts, *rows, view)?;
                }
            }
            PackContent::RouterOctets { k, router, gain, product, .. } => {
                check_vector(checkpoint, router)?;
                check_vector(checkpoint, gain)?;
                // What converting costs is told of with the product's own octets.
                check_rows(product, *k, |format| format, None)?;
            }
            PackContent::Elements { .. } | PackContent::F32 { .. } => {
                check_vector(checkpoint, &item.content)?;
            }
            PackContent::RopeTable { .. } => {}
        }
    }
    Ok(())
}

/// Checks the tensor that float32 elements are taken from; other contents are none.
fn check_vector(checkpoint: &Checkpoint, content: &PackContent) -> Result<(), CheckpointError> {
    let wanted = match content {
        PackContent::Elements { tensor, len, start, block, stride, share } => {
            let info = checkpoint.tensor(tensor)?;
            let view = elements_view(tensor, *start, *block, *stride, *share);
            let last = view.row(len - 1);
            // Verified: it can be counted.
            let last = last.unwrap_or(usize::MAX);
            let short = info.elements().is_none_or(|have| last >= have);
            short.then(|| (tensor, info, format!("its element {last}")))
        }
        PackContent::F32 { tensor, len } => {
            let info = checkpoint.tensor(tensor)?;
            (info.elements() != Some(*len)).then(|| (tensor, info, format!("{len} elements")))
        }
        _ => None,
    };
    wanted.map_or(Ok(()), |(tensor, info, wanted)| {
        let problem = format!("its shape is {:?}, the plan wants {wanted}", info.shape);
        Err(checkpoint.fault(tensor, ErrorKind::Malformed, problem, COMPILE_AGAIN))
    })
}

/// Checks the tensors that the panels or octets of experts are made of.
fn check_experts(
    checkpoint: &Checkpoint,
    layout: &Layout,
    experts: usize,
    rows: usize,
    view: &RowView,
) -> Result<(), CheckpointError> {
    let each = view.tensor.contains(EXPERT);
    let (tensors, last) = if each { (experts, rows - 1) } else { (1, experts * rows - 1) };
    let mut first = None;
    for expert in 0..tensors {
        let name = tensor_of(view, expert);
        let info = checkpoint.tensor(&name)?;
        let have = info.rows().unwrap_or(0);
        let cols = view.columns.map_or(layout.k(), |share| share.of);
        if info.cols() != cols || view.row(last).is_none_or(|last| last >= have) {
            let problem = format!(
                "its shape is {:?}, the plan wants {} rows of {cols} columns as {view:?}",
                info.shape,
                last + 1,
            );
            return Err(checkpoint.fault(&name, ErrorKind::Malformed, problem, COMPILE_AGAIN));
        }
        first.get_or_insert(info.format);
    }
    if let Some(from) = first.filter(|from| *from != layout.format() && row_format(*from) != layout.format())
    {
        let (tensor, to) = (&view.tensor, layout.format());
        tracing::info!(%tensor, %from, %to, "converting through float32");
    }
    Ok(())
}

/// The stored tensor of an expert.
fn tensor_of(view: &RowView, expert: usize) -> Cow<'_, str> {
    match view.tensor.contains(EXPERT) {
        true => Cow::Owned(view.tensor.replace(EXPERT, &expert.to_string())),
        false => Cow::Borrowed(&view.tensor),
    }
}

/// Packs one expert's panels or octets of all sources, alternating.
fn pack_expert(
    checkpoint: &Checkpoint,
    experts: &Experts<'_>,
    expert: usize,
    ledger: &Ledger,
    out: &mut [u8],
) -> Result<(), CheckpointError> {
    let Experts { layout, rows, sources, .. } = experts;
    for (index, view) in sources.iter().enumerate() {
        let name = tensor_of(view, expert);
        // Rows of experts in one tensor are counted through.
        let first = if view.tensor.contains(EXPERT) { 0 } else { expert * rows };
        let at = |row: usize| view.row(first + row).expect("the recipe is verified");
        let read = |span| stored_rows(checkpoint, &name, span, view.columns);
        let stored = gather(&at, 0..*rows, read)?;
        let lowest = at(0);
        let places = out.chunks_exact_mut(layout.unit_bytes()).skip(index).step_by(sources.len());
        let first = (lowest, view.columns.map_or(0, |share| share.start));
        pack_rows(checkpoint, layout, ("experts", &name, first), &stored, ledger, places)?;
    }
    Ok(())
}

/// Puts an expert's octets, which lie one behind the other, into bands.
fn lay_bands(experts: &Experts<'_>, out: &mut [u8]) {
    let Layout::Octets { format, k } = experts.layout else { return };
    let (band, blocks, bytes) = (experts.band, octet_blocks(format, k), octet_block_bytes(format));
    if band == 1 {
        return;
    }
    for out in out.chunks_exact_mut(band * blocks * bytes) {
        let octets = out.to_vec();
        for (at, from) in octets.chunks_exact(bytes).enumerate() {
            let to = band_place(band, blocks, at / blocks, at % blocks) * bytes;
            out[to..to + bytes].copy_from_slice(from);
        }
    }
}

/// One expert's octets or their scales, of all sources, alternating, in a format whose scales lie apart: `fill` is
/// given each source's rows and, octet by octet, the parts of `out`, of `unit` bytes each.
fn fill_expert(
    checkpoint: &Checkpoint,
    experts: &Experts<'_>,
    expert: usize,
    ledger: Option<&Ledger>,
    (unit, out): (usize, &mut [u8]),
    fill: impl Fn(&Scaled, usize, &mut [u8]) -> Result<(), ScaleError>,
) -> Result<(), CheckpointError> {
    let Experts { layout, rows, sources, .. } = experts;
    for (index, view) in sources.iter().enumerate() {
        let name = tensor_of(view, expert);
        // Rows of the whole expert, of which this may be a share: blocks of rows are counted in those.
        let (start, all) = view.rows.map_or((0, *rows), |share| (share.start, share.of));
        let whole = RowView { rows: None, ..view.clone() };
        let first = if view.tensor.contains(EXPERT) { 0 } else { expert * all };
        let at = |row: usize| whole.row(first + row).expect("the recipe is verified");
        let wanted = Wanted { tensor: &name, at: &at, all, rows: start..start + rows, columns: view.columns };
        let ledger = ledger.map(|ledger| (ledger, "experts"));
        let scaled = Scaled::read(checkpoint, layout.format(), &wanted, ledger)?;
        let places = out.chunks_exact_mut(unit).skip(index).step_by(sources.len());
        for (octet, out) in places.enumerate() {
            let row = at(start + octet * OCTET);
            fill(&scaled, octet, out).map_err(|error| scale_fault(checkpoint, &name, row, error))?;
        }
    }
    Ok(())
}

/// An octet whose scales are at fault.
fn scale_fault(checkpoint: &Checkpoint, name: &str, first: usize, error: ScaleError) -> CheckpointError {
    let problem = format!("in the rows from {first} on, {error}");
    let remedy = "check that the checkpoint is sound, or take these weights in bf16";
    checkpoint.fault(name, ErrorKind::Value, problem, remedy)
}

/// Octets `units` of a segment, or their scales, in a format with scales of features: `fill` is given the rows and,
/// octet by octet, the parts of `places`.
fn fill_segment<'a>(
    checkpoint: &Checkpoint,
    format: Format,
    segment: &RowSegment,
    units: Range<usize>,
    ledger: Option<&Ledger>,
    places: impl Iterator<Item = &'a mut [u8]>,
    fill: impl Fn(&Scaled, usize, &mut [u8]) -> Result<(), ScaleError>,
) -> Result<(), CheckpointError> {
    let RowSegment { tensor, row_start, rows, columns } = segment;
    let rows = units.start * OCTET..(*rows).min(units.end * OCTET);
    let at = |row: usize| row_start + row;
    let wanted = Wanted { tensor, at: &at, all: segment.rows, rows: rows.clone(), columns: *columns };
    let scaled = Scaled::read(checkpoint, format, &wanted, ledger.map(|ledger| (ledger, "matrices")))?;
    for (octet, out) in places.enumerate() {
        let row = at(rows.start + octet * OCTET);
        fill(&scaled, octet, out).map_err(|error| scale_fault(checkpoint, tensor, row, error))?;
    }
    Ok(())
}

/// The first `len` elements of a view of `values`.
fn picked(values: &[f32], view: &RowView, len: usize) -> Vec<f32> {
    // In range: `check` has looked at the last.
    (0..len).map(|i| values[view.row(i).expect("the recipe is verified")]).collect()
}

/// The elements of a vector, which [`check_vector`] has checked.
fn vector_values(checkpoint: &Checkpoint, content: &PackContent) -> Result<Vec<f32>, CheckpointError> {
    match content {
        PackContent::F32 { tensor, .. } => checkpoint.tensor_f32(tensor),
        PackContent::Elements { tensor, len, start, block, stride, share } => {
            let view = elements_view(tensor, *start, *block, *stride, *share);
            Ok(picked(&checkpoint.tensor_f32(tensor)?, &view, *len))
        }
        _ => unreachable!("the recipe is verified"),
    }
}

/// Does a job and returns the bytes that it filled.
fn run(checkpoint: &Checkpoint, job: Job<'_>, ledger: &Ledger) -> Result<u64, PackError> {
    match job {
        Job::F32 { tensor, len, out } => {
            let values = checkpoint.tensor_f32(tensor)?;
            debug_assert_eq!(values.len(), len);
            for (bytes, value) in out.chunks_exact_mut(4).zip(values) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            Ok(out.len() as u64)
        }
        Job::Experts { experts, expert, out } if experts.layout.apart_bytes() > 0 => {
            let unit = (experts.layout.unit_bytes(), &mut *out);
            fill_expert(checkpoint, &experts, expert, Some(ledger), unit, Scaled::lay)?;
            lay_bands(&experts, out);
            Ok(out.len() as u64)
        }
        Job::Experts { experts, expert, out } => {
            pack_expert(checkpoint, &experts, expert, ledger, out)?;
            lay_bands(&experts, out);
            Ok(out.len() as u64)
        }
        Job::ExpertScales { experts, expert, out } => {
            let unit = (experts.layout.apart_bytes(), &mut *out);
            fill_expert(checkpoint, &experts, expert, None, unit, scales_of)?;
            Ok(out.len() as u64)
        }
        Job::Elements { tensor, view, out } => {
            let values = picked(&checkpoint.tensor_f32(tensor)?, &view, out.len() / 4);
            for (bytes, value) in out.chunks_exact_mut(4).zip(values) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            Ok(out.len() as u64)
        }
        Job::RouterOctets { scores, out } => {
            lay_router(checkpoint, &scores, out)?;
            Ok(out.len() as u64)
        }
        Job::RopeTable { inv_freq, positions, factor, out } => {
            rope_table(inv_freq, positions, factor, out);
            Ok(out.len() as u64)
        }
        Job::Panels { layout, groups, out } => {
            let layout = Layout::Panels(layout);
            for_each_part(&groups, layout.unit_bytes(), out, |segment, units, panels| {
                pack_segment(checkpoint, &layout, segment, units, ledger, panels)
            })?;
            Ok(out.len() as u64)
        }
        Job::Octets { format: Format::FP8_BLOCK, k, groups, out } => {
            let mut source = Fp8Source::new(checkpoint, &groups);
            for_each_part(&groups, octet_unit(Format::FP8_BLOCK, k), out, |part, units, octets| {
                for (octet, out) in units.zip(octets) {
                    let rows = OCTET.min(part.rows - octet * OCTET);
                    let (codes, _) = source.octet(&part.tensor, part.row_start + octet * OCTET)?;
                    match part.columns {
                        None => lay_octet(&codes[..rows * k], k, out),
                        Some(share) => {
                            let all = codes.chunks_exact(share.of).take(rows);
                            let own: Vec<u8> =
                                all.flat_map(|row| &row[share.start..share.end()]).copied().collect();
                            lay_octet(&own, k, out);
                        }
                    }
                    for word in out.as_chunks_mut::<4>().0 {
                        *word = lay_fp8(u32::from_le_bytes(*word)).to_le_bytes();
                    }
                }
                Ok(())
            })?;
            Ok(out.len() as u64)
        }
        Job::Octets { format, k, groups, out } if feature_scales(format) => {
            for_each_part(&groups, octet_unit(format, k), out, |segment, units, octets| {
                fill_segment(checkpoint, format, segment, units, Some(ledger), octets, Scaled::lay)
            })?;
            Ok(out.len() as u64)
        }
        Job::OctetScales { format, k, groups, out } if feature_scales(format) => {
            for_each_part(&groups, apart_scales(format, k) * 4, out, |segment, units, octets| {
                fill_segment(checkpoint, format, segment, units, None, octets, scales_of)
            })?;
            Ok(out.len() as u64)
        }
        Job::Octets { format, k, groups, out } => {
            let layout = Layout::Octets { format, k };
            for_each_part(&groups, layout.unit_bytes(), out, |segment, units, octets| {
                pack_segment(checkpoint, &layout, segment, units, ledger, octets)
            })?;
            Ok(out.len() as u64)
        }
        Job::OctetScales { format: _, k, groups, out } => {
            let mut source = Fp8Source::new(checkpoint, &groups);
            for_each_part(&groups, k.div_ceil(FP8_COLUMNS) * 4, out, |part, units, octets| {
                for (octet, out) in units.zip(octets) {
                    let (_, scales) = source.octet(&part.tensor, part.row_start + octet * OCTET)?;
                    let first = part.columns.map_or(0, |share| share.start / FP8_COLUMNS * 4);
                    out.copy_from_slice(&scales[first..][..out.len()]);
                }
                Ok(())
            })?;
            Ok(out.len() as u64)
        }
    }
}

/// The scales of an octet, which cannot be at fault.
fn scales_of(scaled: &Scaled, octet: usize, out: &mut [u8]) -> Result<(), ScaleError> {
    scaled.scales(octet, out);
    Ok(())
}

/// Calls `pack(segment, units, places)` for every segment of every group: the units of the segment and,
/// in their order, the parts of `out` that they fill.
fn for_each_part<'a>(
    groups: &[Group<'a>],
    unit_bytes: usize,
    mut out: &mut [u8],
    mut pack: impl FnMut(
        &'a RowSegment,
        Range<usize>,
        &mut dyn Iterator<Item = &mut [u8]>,
    ) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    for group in groups {
        let own = take(&mut out, group.units(), unit_bytes);
        for (index, segment) in group.segments.iter().enumerate() {
            let mut places = own.chunks_exact_mut(unit_bytes).skip(index).step_by(group.segments.len());
            pack(segment, group.first..group.end, &mut places)?;
        }
    }
    Ok(())
}

/// Rows of a tensor, all columns or a share.
fn stored_rows<'c>(
    checkpoint: &'c Checkpoint,
    name: &str,
    rows: Range<usize>,
    columns: Option<Share>,
) -> Result<StoredRows<'c>, CheckpointError> {
    match columns {
        None => checkpoint.rows(name, rows),
        Some(share) => checkpoint.columns(name, rows, share.start..share.end()),
    }
}

/// Packs panels or octets `units` of a segment into `places`.
fn pack_segment<'a>(
    checkpoint: &Checkpoint,
    layout: &Layout,
    segment: &RowSegment,
    units: Range<usize>,
    ledger: &Ledger,
    places: impl Iterator<Item = &'a mut [u8]>,
) -> Result<(), CheckpointError> {
    let (first, end) = (units.start * layout.unit_rows(), segment.rows.min(units.end * layout.unit_rows()));
    let rows = segment.row_start + first..segment.row_start + end;
    let stored = stored_rows(checkpoint, &segment.tensor, rows.clone(), segment.columns)?;
    let first = (rows.start, segment.columns.map_or(0, |share| share.start));
    pack_rows(checkpoint, layout, ("matrices", &segment.tensor, first), &stored, ledger, places)
}

/// Packs rows of the tensor `name`, of which `first` are the first row and column, into `places`; `what` it
/// is, conversions are noted by.
fn pack_rows<'a>(
    checkpoint: &Checkpoint,
    layout: &Layout,
    (what, name, (first, first_col)): (&'static str, &str, (usize, usize)),
    stored: &StoredRows<'_>,
    ledger: &Ledger,
    places: impl Iterator<Item = &'a mut [u8]>,
) -> Result<(), CheckpointError> {
    let fault = |error| checkpoint.convert_fault(name, &error);
    let mut view = stored.view().map_err(fault)?;
    let converted;
    if stored.format != layout.format() {
        let mut values = vec![0.0; stored.rows * stored.cols];
        dequantize(&view, &mut values).map_err(fault)?;
        converted =
            quantize(layout.format(), stored.rows, stored.cols, &values).map_err(|error| match error {
                ConvertError::NotFinite { row, col, value } => {
                    fault(ConvertError::NotFinite { row: first + row, col: first_col + col, value })
                }
                error => fault(error),
            })?;
        if let Layout::Octets { format, .. } = layout
            && let Some(at) = not_finite(format.code, &converted.codes)
        {
            let (row, col, value) = (first + at / stored.cols, first_col + at % stored.cols, values[at]);
            let problem =
                format!("the weight in row {row}, column {col} is {value}, which {format} cannot hold");
            let remedy = "check that the checkpoint is sound, or take its weights as stored or in bf16";
            return Err(checkpoint.fault(name, ErrorKind::Value, problem, remedy));
        }
        view = converted.view();
        let (from, to) = (stored.format.to_string(), layout.format().to_string());
        ledger.add(what, from, to, &values, &view).map_err(fault)?;
    } else if matches!(layout, Layout::Octets { format: Format::FP8_1X128, .. }) {
        check_codes(checkpoint, name, stored, &|row| first + row)?;
    }
    for (index, out) in places.enumerate() {
        let start = index * layout.unit_rows();
        let rows = view.slice(start..view.rows().min(start + layout.unit_rows()));
        match layout {
            Layout::Panels(layout) => pack_panel(layout, &rows, out).map_err(fault)?,
            Layout::Octets { format: Format::MXFP4, .. } => lay_mxfp4(&rows, out).map_err(|error| {
                let error = ScaleError { column: first_col + error.column, ..error };
                scale_fault(checkpoint, name, first + start, error)
            })?,
            Layout::Octets { format: Format::FP8_1X128, .. } => lay_fp8_rows(&rows, out),
            Layout::Octets { format, k } => lay_octet(rows.codes(), k * format.code.bits() / 8, out),
        }
    }
    Ok(())
}

/// Lays up to 8 rows of `row_bytes` bytes each, one behind the other in `rows`, out as an octet, `out`,
/// all of which is written.
fn lay_octet(rows: &[u8], row_bytes: usize, out: &mut [u8]) {
    const PIECE: usize = OCTET_BLOCK / OCTET;
    let mut sources: [&[u8]; OCTET] = [&[]; OCTET];
    for (source, row) in sources.iter_mut().zip(rows.chunks_exact(row_bytes)) {
        *source = row;
    }
    for block in out.as_chunks_mut::<OCTET_BLOCK>().0 {
        for (piece, source) in block.as_chunks_mut::<PIECE>().0.iter_mut().zip(&mut sources) {
            match source.split_first_chunk::<PIECE>() {
                Some((head, tail)) => {
                    *piece = *head;
                    *source = tail;
                }
                // The end of a row, or none.
                None => {
                    let (head, padding) = piece.split_at_mut(source.len());
                    head.copy_from_slice(source);
                    padding.fill(0);
                    *source = &[];
                }
            }
        }
    }
}

/// The first of these f16 or bf16 numbers that is infinite or NaN; none of other codes.
fn not_finite(code: Code, codes: &[u8]) -> Option<usize> {
    let exponent: u16 = match code {
        Code::F16 => 0x7c00,
        Code::Bf16 => 0x7f80,
        _ => return None,
    };
    codes.as_chunks::<2>().0.iter().position(|bytes| u16::from_le_bytes(*bytes) & exponent == exponent)
}

/// Rows of a tensor that share scales in block FP8, in that format.
struct Fp8Rows<'a> {
    tensor: &'a str,
    block: usize,
    /// `[rows][columns]`.
    codes: Cow<'a, [u8]>,
    /// `f32 [octets][columns / 128]`, little endian.
    scales: Vec<u8>,
    cols: usize,
}

/// Reads tensors as block FP8, a block of 128 rows at a time.
///
/// What it gives depends on tensor and row alone, not on the segments of the recipe: that keeps codes and
/// scales, which are items of their own, together.
struct Fp8Source<'a> {
    checkpoint: &'a Checkpoint,
    /// The blocks of rows that were read last. Small segments of interleaved tensors come back to them.
    recent: Vec<Fp8Rows<'a>>,
    /// How many are kept.
    limit: usize,
}

impl<'a> Fp8Source<'a> {
    fn new(checkpoint: &'a Checkpoint, groups: &[Group<'a>]) -> Fp8Source<'a> {
        let limit = groups.iter().map(|group| group.segments.len()).max().unwrap_or(0).max(1);
        Fp8Source { checkpoint, recent: Vec::new(), limit }
    }

    /// Codes (of as many rows as the tensor has there, at most 8) and scales of the octet that starts
    /// at `row`, a multiple of 8.
    fn octet(&mut self, tensor: &'a str, row: usize) -> Result<(&[u8], &[u8]), CheckpointError> {
        let (block, octet) = (row / FP8_ROWS, row % FP8_ROWS / OCTET);
        let found = self.recent.iter().position(|rows| rows.block == block && rows.tensor == tensor);
        let index = match found {
            Some(index) => index,
            None => {
                if self.recent.len() == self.limit {
                    self.recent.remove(0);
                }
                self.recent.push(Fp8Rows::read(self.checkpoint, tensor, block)?);
                self.recent.len() - 1
            }
        };
        let rows = &self.recent[index];
        let scale_row = rows.cols.div_ceil(FP8_COLUMNS) * 4;
        let codes = &rows.codes[octet * OCTET * rows.cols..];
        Ok((&codes[..codes.len().min(OCTET * rows.cols)], &rows.scales[octet * scale_row..][..scale_row]))
    }
}

impl<'a> Fp8Rows<'a> {
    /// Rows `block * 128..` of a tensor, as [`block_fp8`] has them.
    fn read(
        checkpoint: &'a Checkpoint,
        tensor: &'a str,
        block: usize,
    ) -> Result<Fp8Rows<'a>, CheckpointError> {
        let have = checkpoint.tensor(tensor)?.rows().unwrap_or(0);
        let first = block * FP8_ROWS;
        let stored = checkpoint.rows(tensor, first..have.min(first + FP8_ROWS))?;
        let (cols, same_format) = (stored.cols, stored.format == row_format(Format::FP8_BLOCK));
        let (codes, scales) = block_fp8(checkpoint, tensor, stored, &|row| first + row, |_, _, _| {
            if same_format && block == 0 {
                // A format of the same name: what `check` has seen does not tell.
                tracing::info!(%tensor, "its rows have scales of their own: quantizing to 128 x 128 blocks");
            }
            Ok(())
        })?;
        Ok(Fp8Rows { tensor, block, codes, scales, cols })
    }
}

/// The angle is the float32 product of position and frequency, as reference implementations have it;
/// its cosine and sine are computed in double and rounded once.
fn rope_table(inv_freq: &[f32], positions: usize, factor: f32, out: &mut [u8]) {
    let (cos, sin) = out.split_at_mut(positions * inv_freq.len() * 4);
    let angles = (0..positions).flat_map(|position| inv_freq.iter().map(move |f| position as f32 * f));
    for ((angle, cos), sin) in angles.zip(cos.chunks_exact_mut(4)).zip(sin.chunks_exact_mut(4)) {
        let (s, c) = f64::from(angle).sin_cos();
        cos.copy_from_slice(&(c as f32 * factor).to_le_bytes());
        sin.copy_from_slice(&(s as f32 * factor).to_le_bytes());
    }
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
