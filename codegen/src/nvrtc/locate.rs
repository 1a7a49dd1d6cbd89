//! Where NVRTC may lie.

use super::library::Library;
use super::{NvrtcError, Version};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Folders that hold the library, below the places where people put CUDA.
const BELOW: [&str; 5] = ["", "nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "lib64", "lib"];

/// Names that the system's loader is asked for, the best first.
const LOADER_NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so", "libnvrtc.so.12"];

/// The places to look at, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Search {
    /// A file or folder that was named: if it is set, nothing else counts.
    pub(super) named: Option<PathBuf>,
    /// Roots: the library lies in one or in a folder of [`BELOW`] it.
    pub(super) roots: Vec<PathBuf>,
    /// Whether `python3` is asked where its packages are, after the roots.
    pub(super) ask_python: bool,
    /// Roots after those of Python.
    pub(super) last_roots: Vec<PathBuf>,
    /// Whether the system's loader is asked in the end.
    pub(super) ask_loader: bool,
}

impl Search {
    /// What this machine and its environment suggest.
    pub(super) fn of_environment() -> Search {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = set("HOME");
        let mut roots = Vec::new();
        // `cargo xtask setup nvrtc` fills it.
        let cache = set("TILEC_CACHE").or_else(|| home.as_ref().map(|home| home.join(".cache/tilec")));
        roots.extend(cache.map(|cache| cache.join("nvrtc-13.0")));
        roots.extend(["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(set));
        roots.extend(newest_first("/usr/local", "cuda"));
        for environment in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(set) {
            roots.extend(packages_below(&environment));
        }
        let user = home.map(|home| home.join(".local"));
        let prefixes = ["/usr/local", "/usr", "/opt/conda"].map(PathBuf::from);
        Search {
            named: set("TILEC_NVRTC"),
            roots,
            ask_python: true,
            last_roots: user.into_iter().chain(prefixes).flat_map(|prefix| packages_below(&prefix)).collect(),
            ask_loader: true,
        }
    }

    /// Opens the first library that can be used.
    pub(super) fn find(&self) -> Result<Library, NvrtcError> {
        if let Some(named) = &self.named {
            return open_named(named);
        }
        let mut tried = Vec::new();
        let mut attempt = |file: &Path| match Library::open(file) {
            Ok(library) => Some(library),
            Err(reason) => {
                tried.push(format!("{}: {reason}", file.display()));
                None
            }
        };
        // Python is started only when the roots before it had nothing.
        let python = std::iter::once_with(|| if self.ask_python { python_packages() } else { Vec::new() });
        let roots = self.roots.iter().cloned().chain(python.flatten()).chain(self.last_roots.iter().cloned());
        if let Some(library) = roots.flat_map(|root| library_below(&root)).find_map(|file| attempt(&file)) {
            return Ok(library);
        }
        let names: &[&str] = if self.ask_loader { &LOADER_NAMES } else { &[] };
        let by_loader = names.iter().find_map(|name| attempt(Path::new(name)));
        // That the loader knows no such name is the rule, and not worth a line.
        tried.retain(|line| !LOADER_NAMES.iter().any(|name| line.contains(&format!(" {name}: cannot open"))));
        by_loader.ok_or(NvrtcError::Missing { tried })
    }
}

/// Opens the library that a file is, or that lies in or below a folder.
///
/// # Errors
/// [`NvrtcError::Unusable`].
pub(super) fn open_named(named: &Path) -> Result<Library, NvrtcError> {
    let unusable = |reason: String| NvrtcError::Unusable { path: named.to_path_buf(), reason };
    // An absolute path is never taken for a name that the loader should search for.
    let whole = std::path::absolute(named).map_err(|error| unusable(error.to_string()))?;
    let file = if whole.is_dir() {
        let found = library_below(&whole);
        found.ok_or_else(|| unusable("the folder holds no libnvrtc.so".into()))?
    } else if whole.exists() {
        whole
    } else {
        return Err(unusable("there is no such file or folder".into()));
    };
    Library::open(&file).map_err(unusable)
}

/// The library in a folder or in one of those below it where packages put it.
fn library_below(root: &Path) -> Option<PathBuf> {
    BELOW.iter().find_map(|below| library_in(&root.join(below)))
}

/// The newest `libnvrtc.so*` of a folder.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let names = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.file_name());
    let versioned = names.filter_map(|name| {
        let rest = name.to_str()?.strip_prefix("libnvrtc.so")?;
        // Of `libnvrtc.so.13` and the longer names of the same file the shortest is taken.
        let version = if rest.is_empty() { None } else { Some(numbers(rest.strip_prefix('.')?)?) };
        Some((version.as_ref().map(|version| version[0]), std::cmp::Reverse(rest.len()), name.clone()))
    });
    versioned.max().map(|(_, _, name)| folder.join(name))
}

/// The numbers of `13.0.88`; none when it is something else.
fn numbers(text: &str) -> Option<Vec<u32>> {
    text.split('.').map(|part| part.parse().ok()).collect()
}

/// Folders of `parent` whose names begin with `prefix`: the plain name first, then the highest version.
fn newest_first(parent: impl AsRef<Path>, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(&parent) else { return Vec::new() };
    let mut found: Vec<(Option<Version>, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let rest = name.to_str()?.strip_prefix(prefix)?.trim_start_matches('-');
            let version = numbers(rest)
                .map(|parts| Version { major: parts[0], minor: parts.get(1).copied().unwrap_or(0) });
            (rest.is_empty() || version.is_some()).then(|| (version, entry.path()))
        })
        .collect();
    found.sort_by(|(a, _), (b, _)| b.is_none().cmp(&a.is_none()).then(b.cmp(a)));
    found.into_iter().map(|(_, path)| path).collect()
}

/// The folders of Python packages below an installation prefix.
fn packages_below(prefix: &Path) -> Vec<PathBuf> {
    let pythons = newest_first(prefix.join("lib"), "python");
    pythons
        .iter()
        .flat_map(|python| ["site-packages", "dist-packages"].map(|packages| python.join(packages)))
        .filter(|packages| packages.join("nvidia").is_dir())
        .collect()
}

/// The folders of packages that `python3` itself names.
fn python_packages() -> Vec<PathBuf> {
    let mut python = Command::new("python3");
    python.args(["-c", "import sys; print('\\n'.join(sys.path))"]);
    let output = python.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let Ok(output) = output else { return Vec::new() };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // The working directory, which is the first, is no place for packages.
    text.lines().filter(|line| line.starts_with('/')).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_library_of_a_folder_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        assert_eq!(library_below(root), None);
        let lib = root.join("nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).unwrap();
        for (name, expected) in [
            ("libnvrtc.alt.so.13", None),
            ("libnvrtc-builtins.so.13.0", None),
            ("libnvrtc_static.a", None),
            ("libnvrtc.so", Some("libnvrtc.so")),
            ("libnvrtc.so.9.2", Some("libnvrtc.so.9.2")),
            ("libnvrtc.so.12", Some("libnvrtc.so.12")),
            ("libnvrtc.so.13.0.88", Some("libnvrtc.so.13.0.88")),
            ("libnvrtc.so.13", Some("libnvrtc.so.13")),
        ] {
            std::fs::write(lib.join(name), b"").unwrap();
            assert_eq!(library_below(root), expected.map(|name| lib.join(name)), "{name}");
        }
    }

    #[test]
    fn folders_are_ordered_by_version() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["cuda-12.9", "cuda-13.0", "cuda", "cuda-9.2", "cudnn", "cuda-samples"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let found = newest_first(folder.path(), "cuda");
        let names: Vec<_> = found.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["cuda", "cuda-13.0", "cuda-12.9", "cuda-9.2"]);
    }

    #[test]
    fn packages_of_a_virtual_environment_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let packages = folder.path().join("lib/python3.11/site-packages");
        std::fs::create_dir_all(&packages).unwrap();
        assert_eq!(packages_below(folder.path()), Vec::<PathBuf>::new());
        std::fs::create_dir(packages.join("nvidia")).unwrap();
        assert_eq!(packages_below(folder.path()), [packages]);
    }
}
