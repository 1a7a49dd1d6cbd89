//! The GPU architectures that kernels are compiled for.

use super::NvrtcError;
use std::fmt;
use std::str::FromStr;

/// A real architecture: what is compiled for it is machine code, which no driver translates any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// Ampere: A100.
    Sm80,
    /// Ada: L4, L40S, RTX 4090.
    Sm89,
    /// Hopper with its own instructions (`wgmma`, `setmaxnreg`): H100, H200.
    Sm90a,
    /// Blackwell with its own instructions (`tcgen05`): B200.
    Sm100a,
    /// Blackwell with its own instructions, without `tcgen05`: RTX 5090, RTX PRO 6000.
    Sm120a,
}

impl Arch {
    /// Every architecture, the oldest first.
    pub const ALL: [Arch; 5] = [Arch::Sm80, Arch::Sm89, Arch::Sm90a, Arch::Sm100a, Arch::Sm120a];

    /// The name that compilers and `model.yaml` use, `sm_90a` for example.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm89 => "sm_89",
            Arch::Sm90a => "sm_90a",
            Arch::Sm100a => "sm_100a",
            Arch::Sm120a => "sm_120a",
        }
    }

    /// The architecture of that name.
    ///
    /// # Errors
    /// [`NvrtcError::UnknownArch`], which lists the names there are.
    pub fn parse(name: &str) -> Result<Arch, NvrtcError> {
        let found = Arch::ALL.into_iter().find(|arch| arch.name() == name);
        found.ok_or_else(|| NvrtcError::UnknownArch { name: name.into() })
    }

    /// Ten times the compute capability: 90 for `sm_90a`. NVRTC lists what it supports by these numbers, and
    /// it is what `__CUDA_ARCH__` holds, divided by ten.
    pub fn number(self) -> u32 {
        match self {
            Arch::Sm80 => 80,
            Arch::Sm89 => 89,
            Arch::Sm90a => 90,
            Arch::Sm100a => 100,
            Arch::Sm120a => 120,
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Arch {
    type Err = NvrtcError;

    fn from_str(name: &str) -> Result<Arch, NvrtcError> {
        Arch::parse(name)
    }
}
