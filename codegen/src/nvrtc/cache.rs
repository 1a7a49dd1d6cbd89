//! Cubins kept in a folder.
//!
//! A file is a line that names the format, a line with the SHA-256 of all that follows, a line with the
//! lengths of the log and of the cubin, the log, and the cubin.

use super::{Arch, Cubin, CudaText, Nvrtc, NvrtcError, Options};
use sha2::{Digest, Sha256};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const FORMAT: &str = "tilec-cubin 1";

/// Tells apart the unfinished files of one process.
static UNFINISHED: AtomicU64 = AtomicU64::new(0);

/// Keeps cubins in a folder. Several processes may use one folder.
#[derive(Clone, Debug)]
pub struct CubinCache {
    folder: PathBuf,
}

/// A cubin and where it came from.
#[derive(Clone, Debug)]
pub struct Cached {
    /// The machine code.
    pub cubin: Cubin,
    /// Whether it was there already.
    pub hit: bool,
}

impl CubinCache {
    /// A cache in a folder, which is made when there is something to keep.
    pub fn new(folder: impl Into<PathBuf>) -> CubinCache {
        CubinCache { folder: folder.into() }
    }

    /// The cubin of a text: from the folder, else compiled and kept. A file that is damaged is compiled again
    /// and replaced. A folder that cannot be written costs a warning, not the cubin.
    ///
    /// # Errors
    /// Those of [`Nvrtc::compile`].
    pub fn compile(
        &self,
        nvrtc: &Nvrtc,
        text: &CudaText<'_>,
        arch: Arch,
        options: &Options,
    ) -> Result<Cached, NvrtcError> {
        let path = self.path(nvrtc, text, arch, options)?;
        match fs::read(&path).map(|bytes| decode(&bytes)) {
            Ok(Some(cubin)) => return Ok(Cached { cubin, hit: true }),
            Ok(None) => tracing::warn!("{} is damaged: {} is compiled again", path.display(), text.name),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("cannot read {}: {error}", path.display()),
        }
        let cubin = nvrtc.compile(text, arch, options)?;
        if let Err(error) = write(&path, &encode(&cubin)) {
            tracing::warn!("cannot keep {} in {}: {error}", text.name, self.folder.display());
        }
        Ok(Cached { cubin, hit: false })
    }

    /// The file of a compilation. Its name follows from everything that the cubin follows from.
    ///
    /// # Errors
    /// Those of the options and the architecture.
    pub fn path(
        &self,
        nvrtc: &Nvrtc,
        text: &CudaText<'_>,
        arch: Arch,
        options: &Options,
    ) -> Result<PathBuf, NvrtcError> {
        let flags = nvrtc.flags(arch, options)?;
        let library = [nvrtc.version().to_string(), nvrtc.library.file_bytes.to_string()];
        let mut hasher = Sha256::new();
        let parts = [FORMAT, text.name, text.text].into_iter();
        for part in parts.chain(library.iter().chain(&flags).map(String::as_str)) {
            // With the length before it no part can pass for two.
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Ok(self.folder.join(format!("{}.cubin", hex(&hasher.finalize()))))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn encode(cubin: &Cubin) -> Vec<u8> {
    let mut body = format!("{} {}\n", cubin.log.len(), cubin.bytes.len()).into_bytes();
    body.extend_from_slice(cubin.log.as_bytes());
    body.extend_from_slice(&cubin.bytes);
    let mut file = format!("{FORMAT}\n{}\n", hex(&Sha256::digest(&body))).into_bytes();
    file.append(&mut body);
    file
}

/// The cubin in a file; none when the file is not whole.
fn decode(file: &[u8]) -> Option<Cubin> {
    let (format, rest) = line(file)?;
    let (digest, body) = line(rest)?;
    if format != FORMAT || digest != hex(&Sha256::digest(body)) {
        return None;
    }
    let (lengths, rest) = line(body)?;
    let (log, code) = lengths.split_once(' ')?;
    let (log, code): (usize, usize) = (log.parse().ok()?, code.parse().ok()?);
    if log.checked_add(code)? != rest.len() {
        return None;
    }
    let (log, code) = rest.split_at_checked(log)?;
    Cubin::new(code.to_vec(), std::str::from_utf8(log).ok()?).ok()
}

fn line(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    Some((std::str::from_utf8(&bytes[..end]).ok()?, &bytes[end + 1..]))
}

/// Writes a file under another name first, so that nobody ever reads a part of it.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let number = UNFINISHED.fetch_add(1, Ordering::Relaxed);
    let unfinished = folder.join(format!(".unfinished-{}-{number}", std::process::id()));
    let done = fs::write(&unfinished, bytes).and_then(|()| fs::rename(&unfinished, path));
    if done.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    done
}
