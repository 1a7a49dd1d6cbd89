//! The packing: which tensors of the checkpoint lie where in the packed weights, and how.
//!
//! Part of the plan. The compiler decides it, the runtime carries it out without knowing why.

use crate::format::{PANEL, PanelLayout};
use serde::{Deserialize, Serialize};

/// Alignment of every item.
pub const PACK_ALIGN: u64 = 64;

/// One piece of the packed weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PackItem {
    /// Where it starts, in bytes.
    pub offset: u64,
    /// What it is made of.
    pub content: PackContent,
}

/// What a piece is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum PackContent {
    /// Panels of matrices of `rows` x `layout.k`, tile after tile: rows `tile_rows * t ..` of the
    /// first source, padded to whole panels of 16, then the same rows of the next source, and so on.
    /// A gated pair has two sources; its gate and up rows of a tile lie side by side. The last tile
    /// may have fewer rows.
    Panels {
        /// Layout of each panel.
        layout: PanelLayout,
        /// Names of the tensors, all `[rows, layout.k]`.
        sources: Vec<String>,
        /// Rows of each source.
        rows: usize,
        /// Rows of each source in a tile.
        tile_rows: usize,
    },
    /// A vector as f32.
    F32 {
        /// Name of the tensor.
        tensor: String,
        /// Elements.
        len: usize,
    },
    /// `cos [positions][pairs]`, then `sin [positions][pairs]`, f32, both times `attention_factor`.
    /// The angle is `position * inv_freq` rounded to f32, as the reference implementations have it.
    RopeTable {
        /// Inverse frequencies, one per pair.
        inv_freq: Vec<f32>,
        /// Positions.
        positions: usize,
        /// Factor on both.
        attention_factor: f32,
    },
}

impl PackContent {
    /// Panels in all, 0 for other contents.
    pub fn panels(&self) -> usize {
        match self {
            PackContent::Panels { sources, rows, tile_rows, .. } => {
                let whole = rows / tile_rows;
                let rest = (rows % tile_rows).div_ceil(PANEL);
                (whole * tile_rows.div_ceil(PANEL) + rest) * sources.len()
            }
            _ => 0,
        }
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> u64 {
        match self {
            PackContent::Panels { layout, .. } => self.panels() as u64 * layout.bytes() as u64,
            PackContent::F32 { len, .. } => *len as u64 * 4,
            PackContent::RopeTable { inv_freq, positions, .. } => {
                inv_freq.len() as u64 * *positions as u64 * 8
            }
        }
    }
}

/// The whole recipe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Packing {
    /// Items by rising offset.
    pub items: Vec<PackItem>,
    /// Bytes of the packed weights.
    pub bytes: u64,
}

impl Packing {
    /// Appends an item and returns its offset.
    pub fn push(&mut self, content: PackContent) -> u64 {
        let offset = self.bytes.next_multiple_of(PACK_ALIGN);
        self.bytes = offset + content.bytes();
        self.items.push(PackItem { offset, content });
        offset
    }

    /// Checks alignment, order, ends and shapes; for recipes that come from a file.
    ///
    /// # Errors
    /// In words, naming the item.
    pub fn verify(&self) -> Result<(), String> {
        let mut end = 0u64;
        for (index, item) in self.items.iter().enumerate() {
            if let PackContent::Panels { layout, sources, rows, tile_rows } = &item.content {
                // Bounds that keep every product below in range.
                let sane = |n: usize| (1..=1 << 32).contains(&n);
                if !sane(*rows) || !sane(*tile_rows) || !sane(layout.k) || sources.is_empty() {
                    return Err(format!("packing item {index}: impossible shape"));
                }
            }
            if !item.offset.is_multiple_of(PACK_ALIGN) {
                return Err(format!("packing item {index}: offset {} is not aligned", item.offset));
            }
            if item.offset < end {
                return Err(format!("packing item {index}: overlaps the one before it"));
            }
            end = item
                .offset
                .checked_add(item.content.bytes())
                .ok_or_else(|| format!("packing item {index}: ends past 2^64"))?;
        }
        if end > self.bytes {
            return Err(format!("packing: items end at {end}, past the stated {} bytes", self.bytes));
        }
        Ok(())
    }
}
