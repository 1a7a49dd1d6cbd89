//! Memory: zeroed regions for the engine's buffers, and what the process occupies.

use memmap2::{MmapMut, MmapOptions};
use std::fmt;

/// Why a buffer cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size does not fit into the address space.
    #[error("the size of the {what} overflows: lower {lower} in model.yaml and compile again")]
    Overflow {
        /// What needs it.
        what: &'static str,
        /// Limits that make it smaller.
        lower: &'static str,
    },
    /// The system has not that much.
    #[error(
        "no memory for the {what}: it needs {}: {source}; lower {lower} in model.yaml and compile again, or free memory",
        Size(*.bytes as u64)
    )]
    Refused {
        /// What needs it.
        what: &'static str,
        /// How much.
        bytes: usize,
        /// Limits that make it smaller.
        lower: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A number of bytes in words: `1.50 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        write!(f, "{value:.2} {}", UNITS[unit])
    }
}

/// Zeroed memory on page boundaries. It occupies nothing until it is touched.
#[derive(Debug)]
pub struct Region {
    map: MmapMut,
    bytes: usize,
}

impl Region {
    /// `bytes` zeros for `what`; `lower` names the limits that the size comes from.
    ///
    /// # Errors
    /// [`MemoryError`]; a size of `None` is one that overflowed.
    pub fn zeroed(
        what: &'static str,
        bytes: Option<usize>,
        lower: &'static str,
    ) -> Result<Region, MemoryError> {
        let bytes = bytes
            .filter(|bytes| *bytes <= isize::MAX as usize)
            .ok_or(MemoryError::Overflow { what, lower })?;
        // An empty mapping is an error of the system's.
        let map = MmapOptions::new().len(bytes.max(1)).map_anon();
        let map = map.map_err(|source| MemoryError::Refused { what, bytes, lower, source })?;
        Ok(Region { map, bytes })
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Its start, on a page boundary.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Its bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.map[..self.bytes]
    }

    /// Its bytes.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.map[..self.bytes]
    }
}

/// What an engine's memory is for, in bytes. Reserved, not necessarily touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breakdown {
    /// Packed weights.
    pub weights: u64,
    /// KV cache with all its pages.
    pub kv: u64,
    /// KV cache in pages that sequences hold now.
    pub kv_used: u64,
    /// Activation buffers.
    pub arena: u64,
    /// Private scratch of all workers.
    pub scratch: u64,
    /// Native code and its tables.
    pub code: u64,
}

impl fmt::Display for Breakdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "weights {}, KV cache {} ({} in use), activations {}, scratch {}, code {}",
            Size(self.weights),
            Size(self.kv),
            Size(self.kv_used),
            Size(self.arena),
            Size(self.scratch),
            Size(self.code)
        )
    }
}

/// Bytes of this process that are in memory now, mapped files included; `None` where the system does
/// not say.
pub fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(page_size() as u64)
}

/// Bytes of a page of memory.
pub fn page_size() -> usize {
    // SAFETY: a question without side effects.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_zero_aligned_and_refuse_what_cannot_be() {
        let mut region = Region::zeroed("test", Some(10_000), "nothing").unwrap();
        assert_eq!(region.as_mut_ptr() as usize % 64, 0);
        assert_eq!(region.as_slice(), vec![0; 10_000]);
        assert!(Region::zeroed("test", Some(0), "nothing").unwrap().is_empty());
        for bytes in [None, Some(isize::MAX as usize - 4096)] {
            let error = Region::zeroed("KV cache", bytes, "limits.context").unwrap_err().to_string();
            assert!(error.contains("KV cache") && error.contains("lower limits.context"), "{error}");
        }
    }

    #[test]
    fn touched_memory_is_resident() {
        let before = resident_bytes().unwrap();
        let mut region = Region::zeroed("test", Some(64 << 20), "nothing").unwrap();
        region.as_mut_slice().fill(1);
        // Other tests may free memory at the same time: half of it is proof enough.
        assert!(resident_bytes().unwrap() > before + (32 << 20));
    }

    #[test]
    fn sizes_read_well() {
        let text = |bytes| Size(bytes).to_string();
        assert_eq!(
            [text(1023), text(1536), text(3 << 30), text(u64::MAX)].join(" "),
            "1023 B 1.50 KiB 3.00 GiB 16777216.00 TiB"
        );
    }
}
