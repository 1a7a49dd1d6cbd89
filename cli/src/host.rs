//! What the machine says about itself: cores, memory, and how much of it this process holds.

use std::collections::BTreeSet;
use std::path::Path;

/// Physical cores that this process may use, at least 1. Two threads of a core share its vector
/// units, so that a worker on each gains nothing.
pub fn physical_cores() -> usize {
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    cores_in(Path::new("/sys/devices/system/cpu")).map_or(usable, |cores| cores.min(usable)).max(1)
}

/// Threads of the processor that this process may use, at least 1.
pub fn logical_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Distinct (package, core) pairs of a folder like `/sys/devices/system/cpu`.
fn cores_in(folder: &Path) -> Option<usize> {
    let mut cores = BTreeSet::new();
    for entry in std::fs::read_dir(folder).ok()?.flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu"));
        if !number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
            continue;
        }
        let id = |key: &str| {
            let text = std::fs::read_to_string(entry.path().join("topology").join(key)).ok()?;
            text.trim().parse::<i64>().ok()
        };
        // A core that is switched off has no topology.
        if let (Some(package), Some(core)) = (id("physical_package_id"), id("core_id")) {
            cores.insert((package, core));
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

/// The processor's name, or its architecture where the system does not tell.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, name)| name.trim().to_string())
}

/// Processor features that the kernels ask for, and whether they are there.
pub fn cpu_features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        vec![
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("f16c", is_x86_feature_detected!("f16c")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512dq", is_x86_feature_detected!("avx512dq")),
            ("avx512vl", is_x86_feature_detected!("avx512vl")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
            ("avxvnni", is_x86_feature_detected!("avxvnni")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ]
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        Vec::new()
    }
}

/// Total and available memory in bytes.
pub fn memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    Some((kib_of(&text, "MemTotal:")?, kib_of(&text, "MemAvailable:")?))
}

/// Memory that this process holds, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Resident {
    /// Now.
    pub now: u64,
    /// The most so far, or since [`reset_peak`].
    pub peak: u64,
}

/// What this process holds; `None` where the system does not tell.
pub fn resident() -> Option<Resident> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    Some(Resident { now: kib_of(&text, "VmRSS:")?, peak: kib_of(&text, "VmHWM:")? })
}

/// Lets [`Resident::peak`] start again from what is held now. Where the system refuses, the peak
/// stays that of the whole process.
pub fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The number of bytes in a line such as `VmRSS:   1234 kB`.
fn kib_of(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_a_core_count_once() {
        let folder = tempfile::tempdir().unwrap();
        for (cpu, package, core) in [(0, 0, 0), (1, 0, 1), (2, 0, 0), (3, 1, 0)] {
            let topology = folder.path().join(format!("cpu{cpu}/topology"));
            std::fs::create_dir_all(&topology).unwrap();
            std::fs::write(topology.join("physical_package_id"), format!("{package}\n")).unwrap();
            std::fs::write(topology.join("core_id"), format!("{core}\n")).unwrap();
        }
        std::fs::create_dir_all(folder.path().join("cpufreq")).unwrap();
        std::fs::create_dir_all(folder.path().join("cpu4")).unwrap();
        assert_eq!(cores_in(folder.path()), Some(3));
        assert_eq!(cores_in(&folder.path().join("cpufreq")), None);
        assert!(physical_cores() >= 1 && physical_cores() <= logical_cores());
    }

    #[test]
    fn sizes_are_read_from_status_files() {
        let text = "Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t    12 kB\n";
        assert_eq!(kib_of(text, "VmHWM:"), Some(2 << 20));
        assert_eq!(kib_of(text, "VmRSS:"), Some(12 << 10));
        assert_eq!(kib_of(text, "VmSwap:"), None);
        let held = resident().unwrap();
        assert!(held.now > 0 && held.peak >= held.now);
    }
}
