//! `tilec doctor`.

use crate::args::DoctorArgs;
use crate::{ceiling, host, source, ui};
use anyhow::{Result, bail};
use serde::Serialize;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use tilec_codegen::nvrtc::{Nvrtc, NvrtcError, REMEDY};
use tilec_runtime::cuda::{self, CudaError};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Works, but something is slower or missing.
    Note,
    /// Something does not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Check {
        Check { name, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn note(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check { name, verdict: Verdict::Note, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check { name, verdict: Verdict::Fail, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Looks at the machine and the build. Fails when something that tilec needs is not there.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let checks = [
        processor(),
        features(),
        cores(),
        memory(),
        bandwidth(),
        compiler(),
        cache(),
        gpu(),
        library("CUDA driver", "libcuda.so.1", "install the NVIDIA driver"),
        nvrtc(),
    ];
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "checks": checks }))?;
    } else {
        writeln!(out, "tilec {}", env!("CARGO_PKG_VERSION"))?;
        for check in &checks {
            let mark = match check.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Note => "note",
                Verdict::Fail => "FAIL",
            };
            writeln!(out, "{mark}  {:<18}  {}", check.name, check.found)?;
            if let Some(remedy) = &check.remedy {
                writeln!(out, "{:26}-> {remedy}", "")?;
            }
        }
    }
    let failed: Vec<&str> =
        checks.iter().filter(|check| check.verdict == Verdict::Fail).map(|check| check.name).collect();
    if failed.is_empty() { Ok(()) } else { bail!("not as it should be: {}", failed.join(", ")) }
}

fn processor() -> Check {
    let arch = std::env::consts::ARCH;
    let found = format!("{} ({arch})", host::cpu_name());
    match arch {
        "x86_64" | "aarch64" => Check::ok("processor", found),
        _ => Check::fail("processor", found, "use an x86-64 or AArch64 machine"),
    }
}

fn features() -> Check {
    let features = host::cpu_features();
    if features.is_empty() {
        return Check::ok("instruction set", "the base of this architecture");
    }
    let has = |name: &str| features.iter().any(|(feature, there)| *feature == name && *there);
    let there: Vec<&str> = features.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
    let found = there.join(" ");
    if has("avx512bw") || has("avx2") {
        Check::ok("instruction set", found)
    } else {
        Check::note(
            "instruction set",
            format!("no AVX2 ({})", if found.is_empty() { "none" } else { &found }),
            "models run, several times slower; in a virtual machine, pass the host's CPU through",
        )
    }
}

fn cores() -> Check {
    let (physical, logical) = (host::physical_cores(), host::logical_cores());
    Check::ok("cores", format!("{physical} physical, {logical} logical; --threads is {physical} by default"))
}

fn memory() -> Check {
    match host::memory() {
        None => Check::note("memory", "unknown", "tilec reads /proc/meminfo"),
        Some((total, available)) => {
            let found = format!("{}, {} available", ui::mib(total), ui::mib(available));
            if available < 1 << 30 {
                Check::note("memory", found, "close other programs, or lower --ctx-size")
            } else {
                Check::ok("memory", found)
            }
        }
    }
}

fn bandwidth() -> Check {
    // A machine with little memory left is measured with less of it.
    let available = host::memory().map_or(u64::MAX, |(_, available)| available);
    let bytes = usize::try_from(available / 4).unwrap_or(usize::MAX).min(ceiling::FAR_BYTES);
    let threads = host::physical_cores();
    let rate = ceiling::read_ceiling(bytes, threads, 5);
    Check::ok("read bandwidth", format!("{:.1} GB/s with {threads} threads", rate / 1e9))
}

fn compiler() -> Check {
    #[cfg(feature = "llvm")]
    {
        Check::ok("compiler", "LLVM is part of this build")
    }
    #[cfg(not(feature = "llvm"))]
    {
        Check::note(
            "compiler",
            "for GPUs only: LLVM is not part of this build",
            "build with the default features (cargo build --release, which needs LLVM 19) to compile for the CPU",
        )
    }
}

fn cache() -> Check {
    let folder = match source::cache_folder() {
        Ok(folder) => folder,
        Err(error) => return Check::fail("plan cache", "nowhere", error.to_string()),
    };
    let plans = folder.join("plans");
    let probe = plans.join(format!(".probe.{}", std::process::id()));
    let writable = std::fs::create_dir_all(&plans).and_then(|()| std::fs::write(&probe, b""));
    let _ = std::fs::remove_file(&probe);
    match writable {
        Ok(()) => {
            let entries = std::fs::read_dir(&plans).map_or(0, |entries| {
                let visible =
                    |entry: &std::fs::DirEntry| !entry.file_name().to_string_lossy().starts_with('.');
                entries.flatten().filter(visible).count()
            });
            Check::ok("plan cache", format!("{} ({entries} plans)", plans.display()))
        }
        Err(error) => Check::fail(
            "plan cache",
            format!("{}: {error}", plans.display()),
            "set TILEC_CACHE to a folder that can be written",
        ),
    }
}

fn gpu() -> Check {
    const NAME: &str = "NVIDIA GPU";
    match cuda::devices() {
        Ok(gpus) if gpus.is_empty() => Check::note(NAME, "none", "models run on the processor"),
        Ok(gpus) => Check::ok(NAME, gpus.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")),
        Err(CudaError::NoDriver) => {
            let there = std::fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, Iterator::count);
            if there == 0 {
                return Check::note(NAME, "none", "models run on the processor");
            }
            let remedy = "install the driver's libraries, or pass them through to the container";
            Check::note(NAME, format!("{there}, but no libcuda.so.1 to use them"), remedy)
        }
        Err(error) => Check::note(NAME, error.to_string(), "models run on the processor"),
    }
}

fn library(name: &'static str, file: &str, remedy: &str) -> Check {
    match find_library(file) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::note(name, "not found", format!("only needed for GPUs: {remedy}")),
    }
}

/// Loads the compiler of CUDA text: a file of the right name may still be of no use.
fn nvrtc() -> Check {
    const NAME: &str = "NVRTC";
    match Nvrtc::find() {
        Ok(nvrtc) => Check::ok(NAME, format!("{}, {}", nvrtc.version(), nvrtc.path().display())),
        Err(NvrtcError::Missing { tried }) => {
            let found = if tried.is_empty() { "not found".into() } else { tried.join("; ") };
            Check::note(NAME, found, format!("only needed to compile for GPUs: {REMEDY}"))
        }
        // Somebody asked for this one.
        Err(NvrtcError::Unusable { path, reason }) => {
            Check::fail(NAME, format!("{}: {reason}", path.display()), REMEDY)
        }
        Err(error) => Check::fail(NAME, error.to_string(), REMEDY),
    }
}

/// Where a shared library whose name starts with `file` lies, without loading it.
fn find_library(file: &str) -> Option<PathBuf> {
    let listed = |name: &str| std::env::var_os(name).unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&listed("LD_LIBRARY_PATH")).collect();
    for home in ["CUDA_HOME", "CUDA_PATH"] {
        folders.extend(std::env::split_paths(&listed(home)).map(|home| home.join("lib64")));
    }
    let arch = std::env::consts::ARCH;
    folders
        .extend([format!("/usr/lib/{arch}-linux-gnu"), format!("/lib/{arch}-linux-gnu")].map(PathBuf::from));
    let system =
        ["/usr/lib64", "/lib64", "/usr/lib", "/usr/local/lib", "/usr/local/cuda/lib64", "/usr/lib/wsl/lib"];
    folders.extend(system.map(PathBuf::from));
    folders.iter().filter(|folder| !folder.as_os_str().is_empty()).find_map(|folder| in_folder(folder, file))
}

fn in_folder(folder: &Path, file: &str) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(file))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found.into_iter().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_with_their_version() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(in_folder(folder.path(), "libcuda.so.1"), None);
        let path = folder.path().join("libcuda.so.1.2");
        std::fs::write(&path, b"").unwrap();
        std::fs::write(folder.path().join("libcudart.so.13"), b"").unwrap();
        assert_eq!(in_folder(folder.path(), "libcuda.so.1"), Some(path));
        assert_eq!(in_folder(&folder.path().join("missing"), "libcuda.so.1"), None);
    }
}
