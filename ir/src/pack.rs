//! The recipe by which a plan's weights are packed: which rows of which tensors go where, in which
//! layout. The runtime executes it against a checkpoint; nothing here reads weights.

use crate::format::{Format, PANEL, PanelLayout};
use crate::launch::OCTET;
use crate::octet::{apart_scales, octet_bytes};
use serde::{Deserialize, Serialize};

/// Alignment of every item, in bytes: a cache line, and a 512-bit vector.
pub const PACK_ALIGN: u64 = 64;

/// What one rank of several holds: of every `of` rows or columns the `len` from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Share {
    /// Before the first.
    pub start: usize,
    /// How many.
    pub len: usize,
    /// Of how many.
    pub of: usize,
}

impl Share {
    /// Number in the whole of what is number `index` of the share, with all shares counted through; `None`
    /// if that overflows or the share is empty.
    pub fn index(&self, index: usize) -> Option<usize> {
        let before = index.checked_div(self.len)?.checked_mul(self.of)?;
        before.checked_add(index % self.len)?.checked_add(self.start)
    }

    /// Where it ends, in the whole.
    pub const fn end(&self) -> usize {
        self.start + self.len
    }

    /// Whether it is everything.
    pub const fn is_whole(&self) -> bool {
        self.start == 0 && self.len == self.of
    }

    /// Whether it has something, and lies inside of the whole.
    fn is_sound(&self) -> bool {
        self.len > 0 && self.start.checked_add(self.len).is_some_and(|end| end <= self.of)
    }
}

/// Rows of one stored tensor that become features of consecutive panels or octets.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RowSegment {
    /// Name of the tensor, as the checkpoint's `tensors()` spells it.
    pub tensor: String,
    /// First row.
    pub row_start: usize,
    /// Number of rows; the last panel or octet is padded with zero features if it is not filled.
    pub rows: usize,
    /// Columns of the tensor that are taken, as many as the item has; all if there is no such entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Share>,
}

impl RowSegment {
    /// Rows of all columns.
    pub fn new(tensor: impl Into<String>, row_start: usize, rows: usize) -> RowSegment {
        RowSegment { tensor: tensor.into(), row_start, rows, columns: None }
    }

    /// Panels that the rows fill.
    pub const fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Octets that the rows fill.
    pub const fn octets(&self) -> usize {
        self.rows.div_ceil(OCTET)
    }
}

/// Rows of a stored tensor, or of one an expert: row `i` is the tensor's row
/// `start + i / block * stride + i % block`. Rows of all experts in one tensor are counted through. With a
/// share of rows, `i` is first that share's row of the whole expert.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RowView {
    /// Name of the tensor; [`crate::graph::EXPERT`] stands for the number if there is one an expert.
    pub tensor: String,
    /// Rows before the first.
    pub start: usize,
    /// Rows that lie together.
    pub block: usize,
    /// Rows from one block to the next.
    pub stride: usize,
    /// Rows of each expert that are taken; all if there is no such entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<Share>,
    /// Columns of the tensor that are taken, as many as the item has; all if there is no such entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Share>,
}

impl RowView {
    /// A view of all rows of a tensor.
    pub fn whole(tensor: impl Into<String>) -> RowView {
        RowView { tensor: tensor.into(), start: 0, block: 1, stride: 1, rows: None, columns: None }
    }

    /// The tensor's row that is row `row` of the view; `None` if that overflows.
    pub fn row(&self, row: usize) -> Option<usize> {
        let row = self.rows.map_or(Some(row), |share| share.index(row))?;
        (row / self.block).checked_mul(self.stride)?.checked_add(row % self.block)?.checked_add(self.start)
    }
}

/// Columns that share a scale of block FP8.
pub const FP8_COLUMNS: usize = 128;

/// Formats that octets hold.
pub const OCTET_FORMATS: [Format; 7] = [
    Format::F16,
    Format::BF16,
    Format::MXFP4,
    Format::NVFP4,
    Format::FP8_BLOCK,
    Format::FP8_1X128,
    Format::FP8_CHANNEL,
];

/// Features that each expert has in [`PackContent::RouterOctets`].
pub const SCORE_FEATURES: usize = 2;

const fn block_fp8() -> Format {
    Format::FP8_BLOCK
}

fn is_block_fp8(format: &Format) -> bool {
    *format == Format::FP8_BLOCK
}

/// What one item of the packed weights holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PackContent {
    /// Consecutive panels of 16 features each.
    Panels {
        /// Layout of every panel.
        layout: PanelLayout,
        /// Where the features come from, each segment padded up to whole panels.
        segments: Vec<RowSegment>,
        /// Segments whose panels alternate. 1: one segment after the other. 2: panel 0 of segment 0,
        /// panel 0 of segment 1, panel 1 of segment 0, ... (gate and up). Segments are taken in
        /// groups of this many, and those of a group have equally many panels.
        interleave: usize,
        /// Panels in all: the sum over the segments.
        panels: usize,
    },
    /// Consecutive octets of 8 features each, for the tensor cores: see [`crate::octet`]. K and the last
    /// octet of a segment are padded with zeros.
    Octets {
        /// Format of the codes, one of [`OCTET_FORMATS`]; some scales lie apart, see [`crate::octet::apart_scales`].
        format: Format,
        /// Columns of every feature.
        k: usize,
        /// Where the features come from, each segment padded up to whole octets.
        segments: Vec<RowSegment>,
        /// Segments whose octets alternate, as `interleave` of panels.
        interleave: usize,
        /// Octets in all: the sum over the segments.
        octets: usize,
    },
    /// Scales for the features of an [`PackContent::Octets`] item that lie apart, in its order: of block FP8
    /// `f32 [octets][k / 128]` (the 8 features of an octet lie in one block of 128 rows), of fp8_channel and NVFP4
    /// (whose tensor's scale it is) `f32 [octets][8]`.
    OctetScales {
        /// Format of the octets; block FP8 if there is no such entry.
        #[serde(default = "block_fp8", skip_serializing_if = "is_block_fp8")]
        format: Format,
        /// Columns of every feature.
        k: usize,
        /// As in the octets.
        segments: Vec<RowSegment>,
        /// As in the octets.
        interleave: usize,
        /// As in the octets.
        octets: usize,
    },
    /// Panels of all experts, one expert behind the other. Those of an expert are the panels of its
    /// sources, alternating as in [`PackContent::Panels`].
    ExpertPanels {
        /// Layout of every panel.
        layout: PanelLayout,
        /// How many there are.
        experts: usize,
        /// Features that each source has of each expert.
        rows: usize,
        /// Where the features come from: one, or gate and up.
        sources: Vec<RowView>,
    },
    /// Octets of all experts, one expert behind the other. Those of an expert are the octets of its
    /// sources, alternating as in [`PackContent::Octets`]; in bands, if there are several octets in one.
    ExpertOctets {
        /// Format of the codes, as of [`PackContent::Octets`].
        format: Format,
        /// Columns of every feature.
        k: usize,
        /// How many experts there are.
        experts: usize,
        /// Features that each source has of each expert.
        rows: usize,
        /// Where the features come from: one, or gate and up.
        sources: Vec<RowView>,
        /// Octets of a band, whose first blocks lie side by side, and then their second ones
        /// ([`crate::octet::band_place`]); 1 where octets lie one behind the other.
        #[serde(default = "no_bands", skip_serializing_if = "is_no_bands")]
        band: usize,
    },
    /// Scales for the features of an [`PackContent::ExpertOctets`] item that lie apart, in its order, as
    /// [`PackContent::OctetScales`]. Blocks of 128 rows of block FP8 are counted in the rows of an expert's source.
    ExpertScales {
        /// Format of the octets.
        format: Format,
        /// Columns of every feature.
        k: usize,
        /// As in the octets.
        experts: usize,
        /// As in the octets.
        rows: usize,
        /// As in the octets.
        sources: Vec<RowView>,
    },
    /// Octets of bfloat16 by which the product behind attention also makes a router's scores of what it adds to its
    /// rows. But for the norm's divisor a score is `s[e] = sum_i router[e][i] * gain[i] * x[i]`, and
    /// `x = old + product * a`: its second part is `C * a` with `C[e][j] = sum_i router[e][i] * gain[i] *
    /// product[i][j]`. Rounded to bfloat16 once, a score would be too coarse to choose experts by, so every row of C
    /// is two features whose sum is nearly as good as float32: feature `2e` is `high = bf16(C[e])`, feature `2e + 1`
    /// is `bf16(C[e] - high)`. An octet has four experts.
    RouterOctets {
        /// Columns of every feature: those of the product.
        k: usize,
        /// How many experts there are, a multiple of 4.
        experts: usize,
        /// Rows of the product, and columns of the router.
        hidden: usize,
        /// The router, `f32 [experts][hidden]`: [`PackContent::F32`] or [`PackContent::Elements`].
        router: Box<PackContent>,
        /// The gain of the norm before the router, `f32 [hidden]`: [`PackContent::F32`].
        gain: Box<PackContent>,
        /// The product's rows, one segment behind the other, without padding between them.
        product: Vec<RowSegment>,
    },
    /// Elements of a tensor as float32: element `i` is the tensor's element
    /// `start + i / block * stride + i % block`. With a share, `i` is first that share's element.
    Elements {
        /// Name of the tensor.
        tensor: String,
        /// Elements.
        len: usize,
        /// Elements of the tensor before the first.
        start: usize,
        /// Elements that lie together.
        block: usize,
        /// Elements from one block to the next.
        stride: usize,
        /// Elements of each vector that are taken; all if there is no such entry.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        share: Option<Share>,
    },
    /// A tensor's elements as float32, in row-major order.
    F32 {
        /// Name of the tensor.
        tensor: String,
        /// Elements.
        len: usize,
    },
    /// Rotary tables: a plane of cosines `[positions][inv_freq.len()]`, then a plane of sines of the
    /// same shape, as float32, both multiplied by `attention_factor`.
    RopeTable {
        /// Radians per position, one for every pair of dimensions.
        inv_freq: Vec<f32>,
        /// Positions from 0.
        positions: usize,
        /// Scale of the tables (1 but for YaRN and its kin).
        attention_factor: f32,
    },
}

/// [`PackContent::ExpertOctets`] whose octets lie one behind the other.
const fn no_bands() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_no_bands(band: &usize) -> bool {
    *band == 1
}

impl PackContent {
    /// Bytes of the content without padding, or `None` if that overflows.
    pub fn bytes(&self) -> Option<u64> {
        let bytes = match self {
            PackContent::Panels { layout, panels, .. } => {
                // The layout's own arithmetic is unchecked: bound its operand first.
                if layout.k > 1 << 40 {
                    return None;
                }
                layout.bytes().checked_mul(*panels)?
            }
            PackContent::Octets { format, k, octets, .. } => {
                octet_bytes(*format, *k)?.checked_mul(*octets)?
            }
            PackContent::ExpertOctets { format, k, experts, rows, sources, .. } => {
                let octets = rows.div_ceil(OCTET).checked_mul(sources.len())?.checked_mul(*experts)?;
                octet_bytes(*format, *k)?.checked_mul(octets)?
            }
            PackContent::RouterOctets { k, experts, .. } => {
                let octets = experts.checked_mul(SCORE_FEATURES)?.div_ceil(OCTET);
                octet_bytes(Format::BF16, *k)?.checked_mul(octets)?
            }
            PackContent::OctetScales { format, k, octets, .. } => {
                apart_scales(*format, *k).checked_mul(4)?.checked_mul(*octets)?
            }
            PackContent::ExpertScales { format, k, experts, rows, sources } => {
                let octets = rows.div_ceil(OCTET).checked_mul(sources.len())?.checked_mul(*experts)?;
                apart_scales(*format, *k).checked_mul(4)?.checked_mul(octets)?
            }
            PackContent::ExpertPanels { layout, experts, rows, sources } => {
                if layout.k > 1 << 40 {
                    return None;
                }
                let panels = rows.div_ceil(PANEL).checked_mul(sources.len())?.checked_mul(*experts)?;
                layout.bytes().checked_mul(panels)?
            }
            PackContent::F32 { len, .. } | PackContent::Elements { len, .. } => len.checked_mul(4)?,
            PackContent::RopeTable { inv_freq, positions, .. } => {
                inv_freq.len().checked_mul(*positions)?.checked_mul(8)?
            }
        };
        u64::try_from(bytes).ok()
    }
}

/// One item of the packed weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PackItem {
    /// Where it starts, in bytes: a multiple of [`PACK_ALIGN`].
    pub offset: u64,
    /// What it holds.
    pub content: PackContent,
}

/// The recipe of all packed weights of a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Packing {
    /// The items. Their order does not matter; gaps between them are zero.
    pub items: Vec<PackItem>,
    /// Size of the packed weights.
    pub bytes: u64,
}

/// Why a recipe cannot be executed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackingError {
    /// An item does not start on a cache line.
    #[error("packing item {item} starts at byte {offset}, which is no multiple of {PACK_ALIGN}")]
    Misaligned {
        /// Index of the item.
        item: usize,
        /// Its offset.
        offset: u64,
    },
    /// An item's size or end exceeds 64 bits.
    #[error("packing item {item} is too large: its size in bytes overflows")]
    Overflow {
        /// Index of the item.
        item: usize,
    },
    /// An item ends past the end of the packed weights.
    #[error("packing item {item} ends at byte {end}, past the packed weights' {bytes} bytes")]
    PastEnd {
        /// Index of the item.
        item: usize,
        /// Where it ends.
        end: u64,
        /// Size of the packed weights.
        bytes: u64,
    },
    /// Two items share bytes.
    #[error("packing items {first} and {second} overlap at byte {offset}")]
    Overlap {
        /// The item that starts first.
        first: usize,
        /// The other.
        second: usize,
        /// Where the second starts.
        offset: u64,
    },
    /// An item of panels, octets or scales contradicts itself.
    #[error("packing item {item}: {problem}")]
    Content {
        /// Index of the item.
        item: usize,
        /// What is wrong.
        problem: String,
    },
}

impl Packing {
    /// Checks that every item is aligned, lies inside [`Packing::bytes`], shares no byte with another
    /// and, for panels, octets and their scales, that the segments add up and that the format is one
    /// which the layout can hold; for a router's octets, that router, gain and product fit each other.
    pub fn verify(&self) -> Result<(), PackingError> {
        let mut spans = Vec::with_capacity(self.items.len());
        for (item, PackItem { offset, content }) in self.items.iter().enumerate() {
            if !offset.is_multiple_of(PACK_ALIGN) {
                return Err(PackingError::Misaligned { item, offset: *offset });
            }
            verify_content(content).map_err(|problem| PackingError::Content { item, problem })?;
            let end = content
                .bytes()
                .and_then(|bytes| offset.checked_add(bytes))
                .ok_or(PackingError::Overflow { item })?;
            if end > self.bytes {
                return Err(PackingError::PastEnd { item, end, bytes: self.bytes });
            }
            spans.push((*offset, end, item));
        }
        spans.sort_unstable();
        for pair in spans.windows(2) {
            let ((_, end, first), (offset, _, second)) = (pair[0], pair[1]);
            if offset < end {
                return Err(PackingError::Overlap { first, second, offset });
            }
        }
        Ok(())
    }
}

fn verify_content(content: &PackContent) -> Result<(), String> {
    match content {
        PackContent::Panels { layout, segments, interleave, panels } => {
            if layout.k == 0 || *layout != PanelLayout::new(layout.format, layout.k) {
                return Err("the layout is not one that PanelLayout::new makes".into());
            }
            verify_columns(segments, layout.k)?;
            verify_segments(segments, *interleave, *panels, "panels", RowSegment::panels)
        }
        PackContent::Octets { format, k, segments, interleave, octets } => {
            verify_octet_format(*format)?;
            verify_octets(*format, *k, segments)?;
            verify_segments(segments, *interleave, *octets, "octets", RowSegment::octets)
        }
        PackContent::OctetScales { format, k, segments, interleave, octets } => {
            verify_scales(*format)?;
            verify_octets(*format, *k, segments)?;
            verify_segments(segments, *interleave, *octets, "octets", RowSegment::octets)
        }
        PackContent::ExpertPanels { layout, experts, rows, sources } => {
            if layout.k == 0 || *layout != PanelLayout::new(layout.format, layout.k) {
                return Err("the layout is not one that PanelLayout::new makes".into());
            }
            verify_experts(*experts, *rows, layout.k, sources)
        }
        PackContent::ExpertOctets { format, k, experts, rows, sources, band } => {
            verify_octet_format(*format)?;
            let octets = rows.div_ceil(OCTET).checked_mul(sources.len());
            if *band == 0 || octets.is_none_or(|octets| !octets.is_multiple_of(*band)) {
                return Err(format!("{rows} rows are no bands of {band} octets"));
            }
            verify_expert_octets(*format, *k, sources)?;
            verify_experts(*experts, *rows, *k, sources)
        }
        PackContent::ExpertScales { format, k, experts, rows, sources } => {
            verify_scales(*format)?;
            verify_expert_octets(*format, *k, sources)?;
            verify_experts(*experts, *rows, *k, sources)
        }
        PackContent::RouterOctets { k, experts, hidden, router, gain, product } => {
            verify_router(*experts, *hidden, router, gain)?;
            verify_octets(Format::BF16, *k, product)?;
            verify_segments(product, 1, *hidden, "rows", |segment| segment.rows)
        }
        PackContent::Elements { tensor, len, start, block, stride, share } => {
            let (start, block, stride) = (*start, *block, *stride);
            let view = RowView { start, block, stride, rows: *share, ..RowView::whole(tensor) };
            let sound = block > 0 && stride >= block && *len > 0 && share.is_none_or(|s| s.is_sound());
            if !sound || view.row(len - 1).is_none() {
                return Err(format!("{len} elements of {tensor} cannot lie as {view:?}"));
            }
            Ok(())
        }
        PackContent::F32 { .. } | PackContent::RopeTable { .. } => Ok(()),
    }
}

/// What a router's octets want beyond a sound product.
fn verify_router(
    experts: usize,
    hidden: usize,
    router: &PackContent,
    gain: &PackContent,
) -> Result<(), String> {
    if experts == 0 || !experts.is_multiple_of(OCTET / SCORE_FEATURES) || hidden == 0 {
        return Err(format!("octets of the scores of {experts} experts, from rows of {hidden}"));
    }
    let weights = experts.checked_mul(hidden).ok_or("the number of the router's weights overflows")?;
    match router {
        PackContent::F32 { len, .. } | PackContent::Elements { len, .. } if *len == weights => {}
        _ => return Err(format!("the router is no {weights} elements in float32: {router:?}")),
    }
    match gain {
        PackContent::F32 { len, .. } if *len == hidden => {}
        _ => return Err(format!("the gain before the router is no vector of {hidden}: {gain:?}")),
    }
    verify_content(router)
}

/// What rows of experts want of their views.
fn verify_experts(experts: usize, rows: usize, k: usize, sources: &[RowView]) -> Result<(), String> {
    if experts == 0 || rows == 0 || sources.is_empty() {
        return Err(format!("{rows} rows of {experts} experts from {} sources", sources.len()));
    }
    let last = experts.checked_mul(rows).map(|rows| rows - 1);
    let of = |share: Option<Share>, len: usize| share.is_none_or(|s| s.is_sound() && s.len == len);
    let bad = sources.iter().find(|view| {
        view.block == 0
            || view.stride < view.block
            || !of(view.rows, rows)
            || !of(view.columns, k)
            || last.and_then(|row| view.row(row)).is_none()
    });
    bad.map_or(Ok(()), |view| Err(format!("rows of {} cannot lie as {view:?}", view.tensor)))
}

/// Shares of columns are as wide as the item.
fn verify_columns(segments: &[RowSegment], k: usize) -> Result<(), String> {
    let bad = |s: &&RowSegment| s.columns.is_some_and(|share| !share.is_sound() || share.len != k);
    segments.iter().find(bad).map_or(Ok(()), |segment| {
        Err(format!("{:?} of the columns of {} are no {k}", segment.columns, segment.tensor))
    })
}

fn verify_octet_format(format: Format) -> Result<(), String> {
    if OCTET_FORMATS.contains(&format) {
        return Ok(());
    }
    let names: Vec<String> = OCTET_FORMATS.iter().map(Format::to_string).collect();
    Err(format!("octets hold {}, not {format}", names.join(", ")))
}

fn verify_scales(format: Format) -> Result<(), String> {
    verify_octet_format(format)?;
    match apart_scales(format, FP8_COLUMNS) {
        0 => Err(format!("octets of {format} have no scales that lie apart")),
        _ => Ok(()),
    }
}

/// Columns that share a scale and must not be torn.
fn scale_columns(format: Format) -> usize {
    if format.block == Format::WHOLE_ROW { 1 } else { format.block.max(1) }
}

fn torn(tensor: &str, share: Share, format: Format) -> String {
    format!("the columns of {tensor} start inside of {} that share scales: {share:?}", scale_columns(format))
}

/// What octets of experts want beyond sound views: columns that begin where those do that share scales and, where
/// blocks of 128 rows share some, rows that begin with an octet.
fn verify_expert_octets(format: Format, k: usize, sources: &[RowView]) -> Result<(), String> {
    if k == 0 {
        return Err("octets of no columns".into());
    }
    for RowView { tensor, rows, columns, .. } in sources {
        if let Some(share) = columns.filter(|share| !share.start.is_multiple_of(scale_columns(format))) {
            return Err(torn(tensor, share, format));
        }
        let crooked = |share: &Share| format.block_rows > 1 && !share.start.is_multiple_of(OCTET);
        if let Some(share) = rows.filter(crooked) {
            return Err(crooked_octet(tensor, share.start));
        }
    }
    Ok(())
}

fn crooked_octet(tensor: &str, row: usize) -> String {
    format!(
        "row {row} of {tensor} starts an octet of fp8, but is no multiple of {OCTET}: the octet would have two \
         scales"
    )
}

/// What octets want beyond sound segments: columns and, where columns share scales, shares that begin with some;
/// where blocks of 128 rows share scales, octets that lie in one block each.
fn verify_octets(format: Format, k: usize, segments: &[RowSegment]) -> Result<(), String> {
    if k == 0 {
        return Err("octets of no columns".into());
    }
    verify_columns(segments, k)?;
    for segment in segments {
        if let Some(share) = segment.columns.filter(|c| !c.start.is_multiple_of(scale_columns(format))) {
            return Err(torn(&segment.tensor, share, format));
        }
    }
    let crooked = segments.iter().find(|s| format.block_rows > 1 && !s.row_start.is_multiple_of(OCTET));
    crooked.map_or(Ok(()), |segment| Err(crooked_octet(&segment.tensor, segment.row_start)))
}

fn verify_segments(
    segments: &[RowSegment],
    interleave: usize,
    expected: usize,
    units: &str,
    count: impl Fn(&RowSegment) -> usize,
) -> Result<(), String> {
    if interleave == 0 || !segments.len().is_multiple_of(interleave) {
        return Err(format!("{} segments do not split into groups of {interleave}", segments.len()));
    }
    if let Some(group) = segments.chunks(interleave).find(|g| g.iter().any(|s| count(s) != count(&g[0]))) {
        return Err(format!(
            "the segments interleaved with {} have unequal numbers of {units}",
            group[0].tensor
        ));
    }
    let mut sum = 0usize;
    for segment in segments {
        if segment.row_start.checked_add(segment.rows).is_none() {
            return Err(format!("the rows of {} overflow", segment.tensor));
        }
        sum = sum.checked_add(count(segment)).ok_or_else(|| format!("the number of {units} overflows"))?;
    }
    if sum != expected {
        return Err(format!("the segments fill {sum} {units}, the item says {expected}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    fn segments(rows: &[usize]) -> Vec<RowSegment> {
        let segment = |(i, &rows)| RowSegment::new(format!("t{i}"), 0, rows);
        rows.iter().enumerate().map(segment).collect()
    }

    fn panels(offset: u64, rows: &[usize], interleave: usize, panels: usize) -> PackItem {
        let segments = segments(rows);
        let layout = PanelLayout::new(Format::MXFP4, 64);
        PackItem { offset, content: PackContent::Panels { layout, segments, interleave, panels } }
    }

    fn vector(offset: u64, len: usize) -> PackItem {
        PackItem { offset, content: PackContent::F32 { tensor: "v".into(), len } }
    }

    fn check(items: Vec<PackItem>, bytes: u64) -> Result<(), PackingError> {
        Packing { items, bytes }.verify()
    }

    #[test]
    fn a_sound_recipe_passes_in_any_order_and_round_trips() {
        let size = PanelLayout::new(Format::MXFP4, 64).bytes() as u64;
        let items = vec![vector(size * 4, 10), panels(0, &[32, 17], 2, 4)];
        let packing = Packing { items, bytes: size * 4 + 64 };
        packing.verify().unwrap();
        let text = serde_json::to_string(&packing).unwrap();
        assert_eq!(serde_json::from_str::<Packing>(&text).unwrap(), packing);
    }

    #[test]
    fn every_defect_is_refused() {
        use PackingError::*;
        assert_eq!(check(vec![vector(4, 1)], 64), Err(Misaligned { item: 0, offset: 4 }));
        assert_eq!(check(vec![vector(64, 1)], 64), Err(PastEnd { item: 0, end: 68, bytes: 64 }));
        assert_eq!(check(vec![vector(0, usize::MAX)], 64), Err(Overflow { item: 0 }));
        assert_eq!(check(vec![vector(u64::MAX - 63, 32)], 64), Err(Overflow { item: 0 }));
        let overlap = check(vec![vector(64, 1), vector(0, 17)], 128);
        assert_eq!(overlap, Err(Overlap { first: 1, second: 0, offset: 64 }));
        for (rows, interleave, count) in
            [(&[16, 16][..], 1, 3), (&[16, 32], 2, 3), (&[16], 2, 1), (&[16], 0, 1), (&[usize::MAX; 2], 1, 2)]
        {
            let result = check(vec![panels(0, rows, interleave, count)], 1 << 40);
            assert!(matches!(result, Err(Content { item: 0, .. })), "{rows:?} {interleave}: {result:?}");
        }
    }

    /// Names of the formats that octets hold.
    const HELD: [&str; 7] = ["f16", "bf16", "mxfp4", "nvfp4", "fp8", "fp8_1x128", "fp8_channel"];

    fn octets(format: Format, k: usize, segments: Vec<RowSegment>, interleave: usize) -> PackContent {
        let octets = segments.iter().map(RowSegment::octets).sum();
        PackContent::Octets { format, k, segments, interleave, octets }
    }

    fn octet_scales(k: usize, segments: Vec<RowSegment>, interleave: usize) -> PackContent {
        let octets = segments.iter().map(RowSegment::octets).sum();
        PackContent::OctetScales { format: Format::FP8_BLOCK, k, segments, interleave, octets }
    }

    #[test]
    fn octets_have_the_bytes_of_their_blocks() {
        // (format, columns, blocks of 64 bytes a feature)
        for (format, k, blocks) in [
            (Format::F16, 1, 1),
            (Format::BF16, 32, 1),
            (Format::BF16, 33, 2),
            (Format::BF16, 576, 18),
            (Format::FP8_BLOCK, 64, 1),
            (Format::FP8_BLOCK, 65, 2),
            (Format::FP8_BLOCK, 576, 9),
        ] {
            assert_eq!(crate::octet::octet_blocks(format, k), blocks, "{format} {k}");
            // 1 + 2 octets.
            let content = octets(format, k, segments(&[8, 9]), 1);
            assert_eq!(content.bytes(), Some(3 * 512 * blocks as u64), "{format} {k}");
        }
        for (k, scales) in [(1, 1), (128, 1), (129, 2), (576, 5)] {
            assert_eq!(octet_scales(k, segments(&[8, 9]), 1).bytes(), Some(3 * 4 * scales), "{k}");
        }
    }

    #[test]
    fn sound_octets_pass_and_round_trip() {
        let codes = octets(Format::FP8_BLOCK, 576, segments(&[16, 9, 8, 1]), 2);
        let scales = octet_scales(576, segments(&[16, 9, 8, 1]), 2);
        let halves = octets(Format::F16, 1, vec![RowSegment::new("t", 3, 7)], 1);
        let mut packing = Packing::default();
        for content in [codes, scales, halves] {
            let offset = packing.bytes;
            packing.bytes = (offset + content.bytes().unwrap()).next_multiple_of(PACK_ALIGN);
            packing.items.push(PackItem { offset, content });
        }
        packing.verify().unwrap();
        let text = serde_json::to_string(&packing).unwrap();
        assert_eq!(serde_json::from_str::<Packing>(&text).unwrap(), packing);
    }

    #[test]
    fn octets_of_experts_that_contradict_themselves_are_refused() {
        let view = RowView::whole("up.{}");
        let octets = |format, k, experts, rows, sources| {
            let content = PackContent::ExpertOctets { format, k, experts, rows, sources, band: 1 };
            check(vec![PackItem { offset: 0, content }], 1 << 40)
        };
        for (name, format) in Format::NAMED {
            let result = octets(*format, 64, 3, 8, vec![view.clone()]);
            assert_eq!(result.is_ok(), HELD.contains(name), "{name}: {result:?}");
            let content = PackContent::ExpertScales {
                format: *format,
                k: 64,
                experts: 3,
                rows: 8,
                sources: vec![view.clone()],
            };
            let result = check(vec![PackItem { offset: 0, content }], 1 << 40);
            assert_eq!(result.is_ok(), ["fp8", "fp8_channel", "nvfp4"].contains(name), "{name}: {result:?}");
        }
        let share = |start| Some(Share { start, len: 64, of: 512 });
        let torn = RowView { columns: share(136), ..view.clone() };
        assert!(octets(Format::FP8_BLOCK, 64, 3, 8, vec![torn.clone()]).is_err());
        assert!(octets(Format::NVFP4, 64, 3, 8, vec![torn.clone()]).is_err());
        assert!(octets(Format::FP8_CHANNEL, 64, 3, 8, vec![torn]).is_ok());
        let rows = Some(Share { start: 12, len: 8, of: 32 });
        let crooked = RowView { rows, ..view.clone() };
        assert!(octets(Format::FP8_BLOCK, 64, 3, 8, vec![crooked.clone()]).is_err());
        assert!(octets(Format::FP8_1X128, 64, 3, 8, vec![crooked]).is_ok());
        let crooked = RowView { block: 0, ..view.clone() };
        let vast = RowView { stride: usize::MAX, ..view.clone() };
        for (k, experts, rows, sources) in [
            (0, 3, 8, vec![view.clone()]),
            (64, 0, 8, vec![view.clone()]),
            (64, 3, 0, vec![view.clone()]),
            (64, 3, 8, Vec::new()),
            (64, 3, 8, vec![view.clone(), crooked]),
            (64, 3, 8, vec![vast]),
            (64, usize::MAX, 8, vec![view.clone()]),
        ] {
            assert!(octets(Format::BF16, k, experts, rows, sources).is_err(), "{k} {experts} {rows}");
        }
        // 2 sources of 3 experts, each two octets of one block of 544 bytes.
        let content = PackContent::ExpertOctets {
            format: Format::MXFP4,
            k: 100,
            experts: 3,
            rows: 9,
            sources: vec![view.clone(), view],
            band: 1,
        };
        assert_eq!(content.bytes(), Some(2 * 3 * 2 * 544));
    }

    #[test]
    fn octets_that_contradict_themselves_are_refused() {
        let refused = |content: PackContent, words: &str| {
            let error = check(vec![PackItem { offset: 0, content }], 1 << 40).unwrap_err();
            assert!(matches!(error, PackingError::Content { item: 0, .. }), "{error}");
            assert!(error.to_string().contains(words), "no {words:?} in {error}");
        };
        for (name, format) in Format::NAMED {
            let content = octets(*format, 64, segments(&[8]), 1);
            match HELD.contains(name) {
                true => check(vec![PackItem { offset: 0, content }], 1 << 40).unwrap(),
                false => refused(content, "not "),
            }
        }
        // Codes alone are not a format that a checkpoint can be converted to.
        let bare = Format { block: 0, scale: None, ..Format::FP8_BLOCK };
        refused(octets(bare, 64, segments(&[8]), 1), "octets hold f16, bf16, mxfp4, nvfp4, fp8");
        let none = PackContent::OctetScales {
            format: Format::FP8_1X128,
            k: 64,
            segments: segments(&[8]),
            interleave: 1,
            octets: 1,
        };
        refused(none, "fp8_1x128 have no scales that lie apart");

        let both = |k: usize, rows: &[usize], interleave: usize, count: Option<usize>, words: &str| {
            let mut contents = [
                octets(Format::BF16, k, segments(rows), interleave),
                octet_scales(k, segments(rows), interleave),
            ];
            for content in &mut contents {
                if let (
                    PackContent::Octets { octets, .. } | PackContent::OctetScales { octets, .. },
                    Some(count),
                ) = (content, count)
                {
                    *octets = count;
                }
            }
            for content in contents {
                refused(content, words);
            }
        };
        both(0, &[8], 1, None, "no columns");
        both(64, &[8, 9], 1, Some(2), "fill 3 octets, the item says 2");
        both(64, &[8, 9], 2, None, "unequal numbers of octets");
        both(64, &[8], 2, None, "groups of 2");
        both(64, &[8], 0, None, "groups of 0");

        let from = |row_start| vec![RowSegment::new("q", row_start, 8)];
        refused(octets(Format::FP8_BLOCK, 64, from(12), 1), "row 12 of q starts an octet of fp8");
        refused(octet_scales(64, from(12), 1), "no multiple of 8");
        refused(octets(Format::BF16, 64, from(usize::MAX - 7), 1), "the rows of q overflow");
        check(vec![PackItem { offset: 0, content: octets(Format::BF16, 64, from(12), 1) }], 1024).unwrap();

        let vast = octets(Format::BF16, usize::MAX, segments(&[8]), 1);
        let error = check(vec![PackItem { offset: 0, content: vast }], u64::MAX);
        assert_eq!(error, Err(PackingError::Overflow { item: 0 }));
        let vast = octet_scales(usize::MAX, segments(&[usize::MAX]), 1);
        let error = check(vec![PackItem { offset: 0, content: vast }], u64::MAX);
        assert_eq!(error, Err(PackingError::Overflow { item: 0 }));
    }

    fn router_octets(experts: usize, hidden: usize, product: Vec<RowSegment>) -> PackContent {
        let vector = |tensor: &str, len| Box::new(PackContent::F32 { tensor: tensor.into(), len });
        let router = vector("router", experts.wrapping_mul(hidden));
        PackContent::RouterOctets { k: 40, experts, hidden, router, gain: vector("gain", hidden), product }
    }

    /// Sound octets of a router of 8 experts, but for what `change` does to columns, router, gain and product.
    fn changed(
        change: impl FnOnce(&mut usize, &mut PackContent, &mut PackContent, &mut RowSegment),
    ) -> PackContent {
        let mut content = router_octets(8, 12, segments(&[12]));
        if let PackContent::RouterOctets { k, router, gain, product, .. } = &mut content {
            change(k, router, gain, &mut product[0]);
        }
        content
    }

    fn check_one(content: PackContent) -> Result<(), PackingError> {
        check(vec![PackItem { offset: 0, content }], 1 << 40)
    }

    #[test]
    fn sound_octets_of_a_router_pass_and_round_trip() {
        let columns = Some(Share { start: 40, len: 40, of: 120 });
        let product = vec![RowSegment { columns, ..RowSegment::new("o", 8, 9) }, RowSegment::new("p", 0, 3)];
        let mut content = router_octets(12, 12, product);
        // 3 octets of 2 blocks.
        assert_eq!(content.bytes(), Some(3 * 2 * 512));
        if let PackContent::RouterOctets { router, .. } = &mut content {
            let tensor = "all".to_string();
            **router =
                PackContent::Elements { tensor, len: 144, start: 5, block: 12, stride: 20, share: None };
        }
        check_one(content.clone()).unwrap();
        let text = serde_json::to_string(&content).unwrap();
        assert!(text.starts_with(r#"{"router_octets":"#), "{text}");
        assert_eq!(serde_json::from_str::<PackContent>(&text).unwrap(), content);
    }

    #[test]
    fn octets_of_a_router_that_contradict_themselves_are_refused() {
        let refused = |content: PackContent, words: &str| {
            let error = check_one(content).unwrap_err();
            assert!(matches!(error, PackingError::Content { item: 0, .. }), "{error}");
            assert!(error.to_string().contains(words), "no {words:?} in {error}");
        };
        check_one(router_octets(8, 12, segments(&[12]))).unwrap();
        for experts in [0, 1, 6] {
            refused(router_octets(experts, 12, segments(&[12])), &format!("scores of {experts} experts"));
        }
        refused(router_octets(8, 0, Vec::new()), "from rows of 0");
        for rows in [&[][..], &[11], &[12, 1]] {
            refused(router_octets(8, 12, segments(rows)), "rows, the item says 12");
        }
        refused(router_octets(8, 12, segments(&[usize::MAX, 13])), "the number of rows overflows");
        refused(router_octets(8, 12, vec![RowSegment::new("o", usize::MAX - 3, 12)]), "rows of o overflow");
        let half = 1 << (usize::BITS - 1);
        refused(router_octets(8, half, segments(&[half])), "the router's weights overflows");

        let table = || PackContent::RopeTable { inv_freq: vec![1.0], positions: 48, attention_factor: 1.0 };
        let elements = |len, block| PackContent::Elements {
            tensor: "all".into(),
            len,
            start: 0,
            block,
            stride: 12,
            share: None,
        };
        let short = |len| PackContent::F32 { tensor: "short".into(), len };
        let with_router = |own| changed(|_, router, _, _| *router = own);
        let with_gain = |own| changed(|_, _, gain, _| *gain = own);
        check_one(with_router(elements(96, 12))).unwrap();
        refused(with_router(elements(96, 0)), "cannot lie");
        for own in [short(95), elements(97, 12), table(), router_octets(8, 12, segments(&[12]))] {
            refused(with_router(own), "the router is no 96 elements");
        }
        for own in [short(11), elements(12, 12), table()] {
            refused(with_gain(own), "is no vector of 12");
        }
        refused(changed(|k, _, _, _| *k = 0), "no columns");
        for (start, len) in [(0, 39), (41, 40)] {
            let columns = Some(Share { start, len, of: 80 });
            refused(changed(|_, _, _, o| o.columns = columns), "of the columns of t0 are no 40");
        }
        let error = check_one(changed(|k, _, _, _| *k = usize::MAX));
        assert_eq!(error, Err(PackingError::Overflow { item: 0 }));
        let vast = PackContent::RouterOctets {
            k: 1,
            experts: usize::MAX - 3,
            hidden: 1,
            router: Box::new(short(usize::MAX - 3)),
            gain: Box::new(short(1)),
            product: segments(&[1]),
        };
        assert_eq!(check_one(vast), Err(PackingError::Overflow { item: 0 }));
    }
}
