//! CUDA text to machine code, on any machine: NVRTC needs no GPU, no driver and no CUDA installation.
//!
//! [`Nvrtc::find`] loads the library at run time; [`Nvrtc::compile`] makes a [`Cubin`] that says what each
//! kernel uses; [`CubinCache`] keeps cubins. No flag here makes arithmetic less exact: the only liberty is
//! the fusion of a product and a sum, as everywhere in tilec.

mod arch;
mod cache;
mod cubin;
mod diagnose;
mod error;
mod library;
mod locate;
mod report;
#[cfg(test)]
mod tests;

pub use arch::Arch;
pub use cache::{Cached, CubinCache};
pub use cubin::{Budget, Cubin};
pub use diagnose::Diagnostic;
pub use error::{CompileFailure, NvrtcError, REMEDY};
pub use report::KernelResources;

use library::{Library, Outcome};
use std::ffi::{CStr, CString};
use std::fmt;
use std::path::Path;

/// The compiler recurses as deep as the text nests and dies where the stack ends: an expression of 1,000
/// parentheses overflows the 2 MB of a Rust thread. The pages are only used when they are needed.
const STACK_BYTES: usize = 256 << 20;

/// CUDA's version of a library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// 13 of 13.0.
    pub major: u32,
    /// 0 of 13.0.
    pub minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A text to compile. It has no includes: nothing but the compiler is needed.
#[derive(Clone, Copy, Debug)]
pub struct CudaText<'a> {
    /// What errors call it, `llama.cu` for example; no path.
    pub name: &'a str,
    /// CUDA C++, of the standard C++20. Functions are for the device unless they say otherwise.
    pub text: &'a str,
}

/// What may differ from one compilation to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Macros, as names and values.
    pub defines: Vec<(String, String)>,
    /// Whether the assembler hurries: for tests that only ask whether a text compiles. Code and resources
    /// are worse than those of a full compilation.
    pub fast: bool,
    /// Whether the cubin says which line each instruction comes from, for profilers. It has several times
    /// the size then; the code is the same.
    pub lineinfo: bool,
}

/// A loaded NVRTC. Clones share the library. It may be used from many threads at once.
#[derive(Clone)]
pub struct Nvrtc {
    library: Library,
}

impl fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NVRTC {} ({})", self.version(), self.path().display())
    }
}

impl Nvrtc {
    /// Loads NVRTC from the first of these places that has a usable one: `TILEC_NVRTC` (a file or a folder;
    /// when it is set, nothing else counts), the folder that `cargo xtask setup nvrtc` fills (below
    /// `TILEC_CACHE`, else `~/.cache/tilec`), `CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda*`, Python's packages
    /// of `VIRTUAL_ENV`, `CONDA_PREFIX`, `python3` and the usual prefixes, and the system's loader.
    ///
    /// # Errors
    /// [`NvrtcError::Missing`] or [`NvrtcError::Unusable`]; both say what to do.
    pub fn find() -> Result<Nvrtc, NvrtcError> {
        let library = locate::Search::of_environment().find()?;
        tracing::debug!("NVRTC {} is {}", library.version, library.path.display());
        Ok(Nvrtc { library })
    }

    /// Loads the NVRTC that lies at `path`: the file, or a folder with it (or with `nvidia/cu13/lib`, `lib64`
    /// or `lib` that has it).
    ///
    /// # Errors
    /// [`NvrtcError::Unusable`].
    pub fn open(path: &Path) -> Result<Nvrtc, NvrtcError> {
        Ok(Nvrtc { library: locate::open_named(path)? })
    }

    /// The version of CUDA that it is from.
    pub fn version(&self) -> Version {
        self.library.version
    }

    /// The file it was loaded from; empty when the system's loader found it and does not say where.
    pub fn path(&self) -> &Path {
        &self.library.path
    }

    /// Compiles a text to machine code for one architecture. The same input gives the same bytes, whatever
    /// the working directory.
    ///
    /// # Errors
    /// [`NvrtcError::Compile`] with the lines that are wrong; [`NvrtcError::UnsupportedArch`] when this NVRTC
    /// does not know the architecture; [`NvrtcError::Input`] for names and defines that cannot be.
    pub fn compile(&self, text: &CudaText<'_>, arch: Arch, options: &Options) -> Result<Cubin, NvrtcError> {
        let flags = self.flags(arch, options)?;
        let outcome = self.compile_with(text, &flags, false)?;
        if !outcome.done {
            return Err(self.failure(text, arch, options, outcome));
        }
        // An empty one is what a virtual architecture gives; it must not pass for a kernel.
        if !outcome.cubin.starts_with(b"\x7fELF") {
            return Err(NvrtcError::Call { call: "nvrtcGetCUBIN", reason: "it gave no machine code".into() });
        }
        Cubin::new(outcome.cubin, &outcome.log)
    }

    /// The command line of a compilation.
    fn flags(&self, arch: Arch, options: &Options) -> Result<Vec<String>, NvrtcError> {
        if !self.library.archs.contains(&arch.number()) {
            return Err(NvrtcError::UnsupportedArch {
                arch,
                version: self.version(),
                path: self.path().to_path_buf(),
            });
        }
        let mut flags: Vec<String> = [
            "--std=c++20",
            &format!("--gpu-architecture={arch}"),
            "--device-as-default-execution-space",
            // Said, though they are the defaults: the arithmetic does not hang on a default.
            "--fmad=true",
            "--ftz=false",
            "--prec-div=true",
            "--prec-sqrt=true",
            // Puts registers, stack and spills into the log.
            "--ptxas-options=-v",
        ]
        .map(str::to_owned)
        .into();
        if options.fast {
            flags.push("--Ofast-compile=max".into());
        }
        if options.lineinfo {
            flags.push("--generate-line-info".into());
        }
        for (name, value) in &options.defines {
            let mut letters = name.bytes();
            let first = letters.next().is_some_and(|letter| letter.is_ascii_alphabetic() || letter == b'_');
            if !first || !letters.all(|letter| letter.is_ascii_alphanumeric() || letter == b'_') {
                return Err(NvrtcError::Input(format!("`{name}` is no name for a macro")));
            }
            if value.contains(['\n', '\r']) {
                return Err(NvrtcError::Input(format!("the macro {name} has a value of more than one line")));
            }
            flags.push(format!("--define-macro={name}={value}"));
        }
        Ok(flags)
    }

    /// Runs the compiler, on a thread with the stack that it needs.
    fn compile_with(
        &self,
        text: &CudaText<'_>,
        flags: &[String],
        want_ptx: bool,
    ) -> Result<Outcome, NvrtcError> {
        if text.name.is_empty() || text.name.contains(['/', '\n', '\r']) {
            return Err(NvrtcError::Input(format!("`{}` is no name for a CUDA text", text.name)));
        }
        let c_string = |what: &str, text: &str| {
            let broken = |_| NvrtcError::Input(format!("{what} holds a zero byte"));
            CString::new(text).map_err(broken)
        };
        // A name without a folder is completed with the working directory and ends up in line tables.
        let name = c_string("the name of the text", &format!("/{}", text.name))?;
        let code = c_string(text.name, text.text)?;
        let flags = flags.iter().map(|flag| c_string("a define", flag)).collect::<Result<Vec<_>, _>>()?;
        let flags: Vec<&CStr> = flags.iter().map(CString::as_c_str).collect();
        let failed = |reason: String| NvrtcError::Call { call: "thread", reason };
        std::thread::scope(|scope| {
            let compile = || self.library.compile(&name, &code, &flags, want_ptx);
            let thread = std::thread::Builder::new().name("nvrtc".into()).stack_size(STACK_BYTES);
            let thread = thread.spawn_scoped(scope, compile).map_err(|error| failed(error.to_string()))?;
            thread.join().unwrap_or_else(|_| Err(failed("it panicked".into())))
        })
    }

    /// Finds out which lines of the text are wrong.
    fn failure(&self, text: &CudaText<'_>, arch: Arch, options: &Options, first: Outcome) -> NvrtcError {
        let mut outcome = first;
        if diagnose::is_of_assembler(&outcome.log) {
            // The assembler names lines of the PTX. With line tables the PTX names those of the text.
            let options = Options { lineinfo: true, ..options.clone() };
            let again = self.flags(arch, &options).and_then(|flags| self.compile_with(text, &flags, true));
            if let Some(again) = again.ok().filter(|again| !again.done) {
                outcome = again;
            }
        }
        NvrtcError::Compile(Box::new(CompileFailure {
            name: text.name.into(),
            arch,
            version: self.version(),
            diagnostics: diagnose::diagnostics(text, &outcome.log, &outcome.ptx),
            log: outcome.log,
        }))
    }
}
