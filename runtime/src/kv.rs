//! The KV cache: which pages belong to which sequence, and its memory on the host.

use crate::memory::{MemoryError, Region};
use tilec_ir::abi::{KvLayout, KvType};
use tilec_ir::plan::Plan;

/// The limits that the size of the cache comes from.
pub(crate) const KV_LIMITS: &str = "limits.sequences or limits.context";

/// All pages of a plan are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the KV cache is full: all {pages} pages are in use, sequence {sequence} needs {wanted} more")]
pub struct OutOfPages {
    /// Pages in all.
    pub pages: usize,
    /// Who asked.
    pub sequence: usize,
    /// How many pages it lacked.
    pub wanted: usize,
}

/// Which pages of the cache belong to which sequence, and the page table that the native code reads.
#[derive(Debug)]
pub struct PageTable {
    page_tokens: usize,
    pages: usize,
    /// Pages that are free. The last is given out first, so that few pages are ever touched.
    free: Vec<u32>,
    /// Whether a page was given out before and holds old keys and values.
    used: Vec<bool>,
    /// `[sequences][pages_per_sequence]`; entries that are not held are 0, which is a valid page.
    table: Vec<u32>,
    pages_per_sequence: usize,
    /// Pages that each sequence holds: the first entries of its row.
    held: Vec<usize>,
    version: u64,
}

impl PageTable {
    /// An empty table of a plan with `pages` pages (at most what all its sequences can use).
    pub fn new(plan: &Plan, pages: usize) -> PageTable {
        let pages = pages.clamp(1, plan.kv_pages());
        let sequences = plan.limits.sequences;
        let pages_per_sequence = plan.limits.pages_per_sequence(&plan.kv);
        PageTable {
            page_tokens: plan.kv.page_tokens,
            pages,
            free: (0..pages as u32).rev().collect(),
            used: vec![false; pages],
            table: vec![0; sequences * pages_per_sequence],
            pages_per_sequence,
            held: vec![0; sequences],
            version: 1,
        }
    }

    /// Gives `sequence` the pages for its first `positions` positions. Pages that it has stay. Numbers
    /// of pages that held other keys and values before are added to `stale`: the caller zeroes them.
    ///
    /// # Errors
    /// [`OutOfPages`]; nothing changes then.
    ///
    /// # Panics
    /// If the sequence or the positions are past the plan's limits, which callers check.
    pub fn reserve(
        &mut self,
        sequence: usize,
        positions: usize,
        stale: &mut Vec<u32>,
    ) -> Result<(), OutOfPages> {
        let wanted = positions.div_ceil(self.page_tokens);
        assert!(wanted <= self.pages_per_sequence, "callers check positions against the context");
        let held = self.held[sequence];
        let missing = wanted.saturating_sub(held);
        if missing > self.free.len() {
            return Err(OutOfPages { pages: self.pages, sequence, wanted: missing - self.free.len() });
        }
        for entry in held..wanted {
            let page = self.free.pop().expect("counted above");
            // Memory is zero at first.
            if std::mem::replace(&mut self.used[page as usize], true) {
                stale.push(page);
            }
            self.table[sequence * self.pages_per_sequence + entry] = page;
            self.version += 1;
        }
        self.held[sequence] = held.max(wanted);
        Ok(())
    }

    /// Takes all pages of `sequence` back.
    pub fn release(&mut self, sequence: usize) {
        self.trim(sequence, 0);
    }

    /// Takes the pages of `sequence` back that its first `positions` positions do not need.
    pub fn trim(&mut self, sequence: usize, positions: usize) {
        let kept = positions.div_ceil(self.page_tokens).min(self.held[sequence]);
        let row = &mut self.table[sequence * self.pages_per_sequence..][kept..self.held[sequence]];
        if !row.is_empty() {
            self.free.extend(row.iter().rev());
            row.fill(0);
            self.held[sequence] = kept;
            self.version += 1;
        }
    }

    /// Pages in all.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Pages that `sequence` holds.
    pub fn held_pages(&self, sequence: usize) -> usize {
        self.held[sequence]
    }

    /// The page table, `[sequences][pages_per_sequence]`.
    pub fn table(&self) -> &[u32] {
        &self.table
    }

    /// A number, never 0, that changes whenever the table does.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Entries of the page table per sequence.
    pub fn pages_per_sequence(&self) -> usize {
        self.pages_per_sequence
    }
}

/// The memory of the cache on the host, laid out as [`KvLayout`] says.
#[derive(Debug)]
pub struct KvMemory {
    layout: KvLayout,
    region: Region,
    pages: usize,
}

impl KvMemory {
    /// Zeroed memory of `pages` pages.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn new(layout: KvLayout, pages: usize) -> Result<KvMemory, MemoryError> {
        let region = Region::zeroed("KV cache", layout.total_bytes(pages), KV_LIMITS)?;
        Ok(KvMemory { layout, region, pages })
    }

    /// Zeroes a page in every layer: lanes past the context are multiplied by an exact zero, and
    /// what another sequence left there must not become `NaN` by that.
    pub fn clear(&mut self, page: u32) {
        let bytes = self.layout.kv_heads * self.layout.block_bytes();
        for layer in 0..self.layout.layers {
            let offset = self.layout.block_offset(self.pages, layer, page as usize, 0);
            self.region.as_mut_slice()[offset..offset + bytes].fill(0);
        }
    }

    /// Fills a page in every layer with numbers that no token made, from -1 to 1.
    pub fn fill(&mut self, page: u32) {
        let bytes = self.layout.kv_heads * self.layout.block_bytes();
        for layer in 0..self.layout.layers {
            let offset = self.layout.block_offset(self.pages, layer, page as usize, 0);
            fill_random(self.layout.kv_type, &mut self.region.as_mut_slice()[offset..offset + bytes]);
        }
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> usize {
        self.region.len()
    }

    /// The memory.
    pub fn region(&mut self) -> &mut Region {
        &mut self.region
    }
}

/// Fills `bytes` with elements of a type, from -1 to 1, without a pattern; the same ones every time.
pub(crate) fn fill_random(kv_type: KvType, bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    for element in bytes.chunks_exact_mut(kv_type.bytes()) {
        match kv_type {
            KvType::F32 => element.copy_from_slice(&next().to_ne_bytes()),
            KvType::F16 => element.copy_from_slice(&half::f16::from_f32(next()).to_ne_bytes()),
            KvType::Bf16 => element.copy_from_slice(&half::bf16::from_f32(next()).to_ne_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::toy_plan;

    fn plan() -> Plan {
        let mut plan = toy_plan(1);
        (plan.limits.sequences, plan.limits.context) = (3, 64);
        plan
    }

    #[test]
    fn pages_grow_with_the_sequence_and_are_shared_by_none() {
        let mut table = PageTable::new(&plan(), usize::MAX);
        let mut stale = Vec::new();
        assert_eq!((table.pages(), table.pages_per_sequence()), (12, 4));
        for (sequence, positions) in [(0, 1), (1, 33), (0, 16), (0, 17)] {
            table.reserve(sequence, positions, &mut stale).unwrap();
        }
        assert_eq!(table.free_pages(), 12 - 5);
        let entries = table.table();
        let mut held = [&entries[0..2], &entries[4..7]].concat();
        held.sort();
        held.dedup();
        assert_eq!(held.len(), 5, "{entries:?}");
        let version = table.version();
        table.reserve(1, 1, &mut stale).unwrap();
        assert_eq!(table.free_pages(), 12 - 5, "a shorter reservation gives nothing back");
        assert_eq!((table.version(), stale.len()), (version, 0));
        table.trim(1, 17);
        assert_eq!((table.free_pages(), table.held_pages(1)), (12 - 4, 2));
        assert_ne!(table.version(), version);
        assert_eq!(table.table()[6], 0);
        table.trim(1, 64);
        assert_eq!(table.held_pages(1), 2, "a longer one takes nothing");
    }

    #[test]
    fn a_page_that_comes_back_is_zero_again_and_others_are_not_touched() {
        let plan = plan();
        let mut table = PageTable::new(&plan, 2);
        let mut memory = KvMemory::new(plan.kv, 2).unwrap();
        let mut stale = Vec::new();
        table.reserve(0, 16, &mut stale).unwrap();
        table.reserve(1, 16, &mut stale).unwrap();
        assert!(stale.is_empty());
        memory.region().as_mut_slice().fill(0xff);
        let page = table.table()[0];
        table.release(0);
        table.reserve(2, 1, &mut stale).unwrap();
        assert_eq!((table.table()[2 * 4], stale.as_slice()), (page, &[page][..]));
        memory.clear(page);
        let layout = plan.kv;
        for layer in 0..layout.layers {
            for other in 0..2 {
                let offset = layout.block_offset(2, layer, other, 0);
                let bytes = &memory.region().as_slice()[offset..][..layout.kv_heads * layout.block_bytes()];
                let expected = if other == page as usize { 0 } else { 0xff };
                assert!(bytes.iter().all(|byte| *byte == expected), "layer {layer}, page {other}");
            }
        }
    }

    #[test]
    fn a_page_that_is_filled_has_numbers_and_others_are_not_touched() {
        let mut memory = KvMemory::new(plan().kv, 3).unwrap();
        memory.fill(1);
        let layout = plan().kv;
        for layer in 0..layout.layers {
            for page in 0..3 {
                let offset = layout.block_offset(3, layer, page, 0);
                let bytes = &memory.region().as_slice()[offset..][..layout.kv_heads * layout.block_bytes()];
                let nothing = bytes.iter().all(|byte| *byte == 0);
                assert_eq!(nothing, page != 1, "layer {layer}, page {page}");
            }
        }
        for kv_type in [KvType::F32, KvType::F16, KvType::Bf16] {
            let mut bytes = vec![0; 4000 * kv_type.bytes()];
            fill_random(kv_type, &mut bytes);
            let values: Vec<f32> = match kv_type {
                KvType::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_ne_bytes(*b)).collect(),
                KvType::F16 => {
                    bytes.as_chunks().0.iter().map(|b| half::f16::from_ne_bytes(*b).to_f32()).collect()
                }
                KvType::Bf16 => {
                    bytes.as_chunks().0.iter().map(|b| half::bf16::from_ne_bytes(*b).to_f32()).collect()
                }
            };
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            assert!(
                values.iter().all(|value| value.abs() <= 1.0) && mean.abs() < 0.05,
                "{kv_type:?}: {mean}"
            );
        }
    }

    #[test]
    fn a_full_cache_refuses_and_changes_nothing() {
        let mut table = PageTable::new(&plan(), 2);
        let mut stale = Vec::new();
        table.reserve(0, 16, &mut stale).unwrap();
        let error = table.reserve(1, 48, &mut stale);
        assert_eq!(error, Err(OutOfPages { pages: 2, sequence: 1, wanted: 2 }));
        assert_eq!(table.free_pages(), 1);
        table.release(0);
        table.release(0);
        assert_eq!(table.free_pages(), 2);
        table.reserve(1, 32, &mut stale).unwrap();
    }
}
