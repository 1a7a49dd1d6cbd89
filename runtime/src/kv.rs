//! The KV cache: its memory, and which pages belong to which sequence.

use crate::memory::{MemoryError, Region};
use tilec_ir::abi::KvLayout;
use tilec_ir::plan::Plan;

const LIMITS: &str = "limits.sequences or limits.context";

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

/// The cache of all sequences, and the page table that the native code reads.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    memory: Region,
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
}

impl KvCache {
    /// An empty cache of a plan with `pages` pages (at most what all its sequences can use).
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn new(plan: &Plan, pages: usize) -> Result<KvCache, MemoryError> {
        let pages = pages.clamp(1, plan.kv_pages());
        let sequences = plan.limits.sequences;
        let pages_per_sequence = plan.limits.pages_per_sequence(&plan.kv);
        Ok(KvCache {
            layout: plan.kv,
            memory: Region::zeroed("KV cache", plan.kv.total_bytes(pages), LIMITS)?,
            pages,
            free: (0..pages as u32).rev().collect(),
            used: vec![false; pages],
            table: vec![0; sequences * pages_per_sequence],
            pages_per_sequence,
            held: vec![0; sequences],
        })
    }

    /// Gives `sequence` the pages for its first `positions` positions. Pages that it has stay.
    ///
    /// # Errors
    /// [`OutOfPages`]; nothing changes then.
    ///
    /// # Panics
    /// If the sequence or the positions are past the plan's limits, which callers check.
    pub fn reserve(&mut self, sequence: usize, positions: usize) -> Result<(), OutOfPages> {
        let wanted = positions.div_ceil(self.layout.page_tokens);
        assert!(wanted <= self.pages_per_sequence, "callers check positions against the context");
        let held = self.held[sequence];
        let missing = wanted.saturating_sub(held);
        if missing > self.free.len() {
            return Err(OutOfPages { pages: self.pages, sequence, wanted: missing - self.free.len() });
        }
        for entry in held..wanted {
            let page = self.free.pop().expect("counted above");
            // The system's pages are zero at first.
            if std::mem::replace(&mut self.used[page as usize], true) {
                self.clear(page as usize);
            }
            self.table[sequence * self.pages_per_sequence + entry] = page;
        }
        self.held[sequence] = held.max(wanted);
        Ok(())
    }

    /// Takes all pages of `sequence` back.
    pub fn release(&mut self, sequence: usize) {
        let row = &mut self.table[sequence * self.pages_per_sequence..][..self.held[sequence]];
        self.free.extend(row.iter().rev());
        row.fill(0);
        self.held[sequence] = 0;
    }

    /// Zeroes a page in every layer: lanes past the context are multiplied by an exact zero, and
    /// what another sequence left there must not become `NaN` by that.
    fn clear(&mut self, page: usize) {
        let bytes = self.layout.kv_heads * self.layout.block_bytes();
        for layer in 0..self.layout.layers {
            let offset = self.layout.block_offset(self.pages, layer, page, 0);
            self.memory.as_mut_slice()[offset..offset + bytes].fill(0);
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

    /// Bytes of all pages.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// The page table, `[sequences][pages_per_sequence]`.
    pub fn table(&self) -> &[u32] {
        &self.table
    }

    /// Entries of the page table per sequence.
    pub fn pages_per_sequence(&self) -> usize {
        self.pages_per_sequence
    }

    /// The memory, laid out as [`KvLayout`] says.
    pub fn memory(&mut self) -> &mut Region {
        &mut self.memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::toy_plan;

    fn cache(pages: usize) -> KvCache {
        let mut plan = toy_plan(1);
        (plan.limits.sequences, plan.limits.context) = (3, 64);
        KvCache::new(&plan, pages).unwrap()
    }

    #[test]
    fn pages_grow_with_the_sequence_and_are_shared_by_none() {
        let mut cache = cache(usize::MAX);
        assert_eq!((cache.pages(), cache.pages_per_sequence()), (12, 4));
        cache.reserve(0, 1).unwrap();
        cache.reserve(1, 33).unwrap();
        cache.reserve(0, 16).unwrap();
        cache.reserve(0, 17).unwrap();
        assert_eq!(cache.free_pages(), 12 - 5);
        let table = cache.table();
        let mut held = [&table[0..2], &table[4..7]].concat();
        held.sort();
        held.dedup();
        assert_eq!(held.len(), 5, "{table:?}");
        cache.reserve(1, 1).unwrap();
        assert_eq!(cache.free_pages(), 12 - 5, "a shorter reservation gives nothing back");
    }

    #[test]
    fn a_page_that_comes_back_is_zero_again_and_others_are_not_touched() {
        let mut cache = cache(2);
        cache.reserve(0, 16).unwrap();
        cache.reserve(1, 16).unwrap();
        cache.memory().as_mut_slice().fill(0xff);
        let page = cache.table()[0] as usize;
        cache.release(0);
        cache.reserve(2, 1).unwrap();
        assert_eq!(cache.table()[2 * 4] as usize, page);
        let layout = cache.layout;
        for layer in 0..layout.layers {
            for other in 0..2 {
                let offset = layout.block_offset(2, layer, other, 0);
                let bytes = &cache.memory().as_slice()[offset..][..layout.kv_heads * layout.block_bytes()];
                let expected = if other == page { 0 } else { 0xff };
                assert!(bytes.iter().all(|byte| *byte == expected), "layer {layer}, page {other}");
            }
        }
    }

    #[test]
    fn a_full_cache_refuses_and_changes_nothing() {
        let mut cache = cache(2);
        cache.reserve(0, 16).unwrap();
        assert_eq!(cache.reserve(1, 48), Err(OutOfPages { pages: 2, sequence: 1, wanted: 2 }));
        assert_eq!(cache.free_pages(), 1);
        cache.release(0);
        cache.release(0);
        assert_eq!(cache.free_pages(), 2);
        cache.reserve(1, 32).unwrap();
    }
}
