//! The kernels that measure how fast a GPU reads memory, as machine code.

use crate::nvrtc::{Arch, Cubin, CubinCache, CudaText, Nvrtc, NvrtcError, Options};
use std::path::Path;
use tilec_kernels_gen::cuda::CeilingKernel;

/// Name of the kernel that writes a buffer.
pub const FILL: &str = CeilingKernel::FILL;

/// Name of the kernel that reads it.
pub const READ: &str = CeilingKernel::READ;

/// Threads of a block of either.
pub const THREADS: u32 = CeilingKernel::THREADS;

/// Bytes that it copies at once.
pub const SLOT_BYTES: usize = tilec_kernels_gen::cuda::SLOT_BYTES;

/// Machine code that measures a GPU's read ceiling, and what launching it takes.
#[derive(Clone, Debug)]
pub struct CeilingProgram {
    /// The machine code.
    pub cubin: Cubin,
    /// Shared memory of its kernels.
    pub kernel: CeilingKernel,
}

/// Whether an architecture has bulk copies into shared memory.
fn bulk_copies(arch: Arch) -> bool {
    arch.number() >= 90
}

/// Compiles them for a GPU on which a block may have `shared_bytes` of shared memory; cubins are kept in
/// the folder `cubins`. `None` if that is too little memory for a ring.
///
/// # Errors
/// [`NvrtcError`]: most likely NVRTC is missing.
pub fn compile(arch: Arch, shared_bytes: usize, cubins: &Path) -> Result<Option<CeilingProgram>, NvrtcError> {
    let Some(kernel) = CeilingKernel::new(bulk_copies(arch), shared_bytes) else { return Ok(None) };
    let nvrtc = Nvrtc::find()?;
    let text = kernel.text();
    let text = CudaText { name: "ceiling.cu", text: &text };
    let cubin = CubinCache::new(cubins).compile(&nvrtc, &text, arch, &Options::default())?.cubin;
    Ok(Some(CeilingProgram { cubin, kernel }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvrtc::Budget;

    #[test]
    fn the_kernels_compile_for_every_architecture_and_spill_nothing() {
        let nvrtc = Nvrtc::find().unwrap();
        for arch in Arch::ALL {
            let kernel = CeilingKernel::new(bulk_copies(arch), 99 << 10).unwrap();
            let text = kernel.text();
            let text = CudaText { name: "ceiling.cu", text: &text };
            // Not in a hurry: the resources are to be those that count.
            let cubin = nvrtc
                .compile(&text, arch, &Options::default())
                .unwrap_or_else(|error| panic!("{arch}: {error}"));
            // 65536 registers for the threads of a block.
            let budget = Budget { registers: 65536 / CeilingKernel::THREADS, stack: 0, spills: 0 };
            cubin.check(&[(CeilingKernel::READ, budget), (CeilingKernel::FILL, budget)]).unwrap();
            // The headers have constants that only the resident kernel uses.
            let serious = |warning: &&&str| !warning.contains("never referenced");
            assert_eq!(cubin.warnings().iter().find(serious), None, "{arch}");
        }
    }
}
