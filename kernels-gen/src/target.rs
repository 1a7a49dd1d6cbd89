//! The processor that code is generated for, and what the kernels decide from it.

use crate::KernelError;

/// What the kernels ask about an instruction set. All of it changes speed only: the results of
/// the integer kernels are the same bits on every target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Isa {
    /// Fused multiply-add of f32 in hardware; without it, it is emulated exactly (and slowly).
    pub fma: bool,
    /// Conversions between f32 and f16 in hardware.
    pub f16c: bool,
    /// 256-bit integer vectors.
    pub avx2: bool,
    /// 512-bit vectors with 32 registers: AVX-512 F, BW, DQ and VL together.
    pub avx512: bool,
    /// `vpdpbusd` on 512-bit vectors.
    pub vnni512: bool,
    /// `vpdpbusd` on 256-bit vectors.
    pub vnni256: bool,
}

/// A processor: what LLVM is told, and the [`Isa`] that follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// LLVM target triple, such as `x86_64-unknown-linux-gnu`.
    pub triple: String,
    /// LLVM CPU name, such as `haswell` or `x86-64-v4`.
    pub cpu: String,
    /// LLVM features on top of the CPU's: `+avx2,-fma`.
    pub features: String,
    /// What the kernels decide from.
    pub isa: Isa,
}

const SSE: Isa = Isa { fma: false, f16c: false, avx2: false, avx512: false, vnni512: false, vnni256: false };
const AVX2: Isa = Isa { fma: true, f16c: true, avx2: true, ..SSE };
const AVX2_VNNI: Isa = Isa { vnni256: true, ..AVX2 };
const AVX512: Isa = Isa { avx512: true, ..AVX2 };
const AVX512_VNNI: Isa = Isa { vnni512: true, vnni256: true, ..AVX512 };

/// CPU names whose features LLVM implies without listing them.
const CPUS: &[(&[&str], Isa)] = &[
    (&["x86-64", "generic", "x86-64-v2", "nehalem", "westmere", "sandybridge", "ivybridge"], SSE),
    (&["x86-64-v3", "haswell", "broadwell", "skylake", "znver1", "znver2", "znver3"], AVX2),
    (&["alderlake", "raptorlake", "meteorlake", "arrowlake", "gracemont"], AVX2_VNNI),
    (&["x86-64-v4", "skylake-avx512"], AVX512),
    (
        &[
            "cascadelake",
            "cooperlake",
            "icelake-client",
            "icelake-server",
            "tigerlake",
            "rocketlake",
            "sapphirerapids",
            "emeraldrapids",
            "graniterapids",
            "znver4",
            "znver5",
        ],
        AVX512_VNNI,
    ),
];

impl Target {
    /// The target of this triple, CPU name and feature string (`+name` or `-name`, comma
    /// separated, on top of what the CPU has).
    ///
    /// # Errors
    /// An architecture other than x86-64 or AArch64; an x86-64 CPU that is not known and comes
    /// without features.
    pub fn parse(triple: &str, cpu: &str, features: &str) -> Result<Target, KernelError> {
        let arch = triple.split('-').next().unwrap_or_default();
        let mut isa = match arch {
            "aarch64" | "arm64" => Isa { fma: true, f16c: true, ..SSE },
            "x86_64" => match CPUS.iter().find(|(names, _)| names.contains(&cpu)) {
                Some((_, isa)) => *isa,
                None if features.is_empty() => {
                    let known: Vec<_> = CPUS.iter().flat_map(|(names, _)| *names).copied().collect();
                    return Err(KernelError::Target {
                        target: cpu.into(),
                        problem: format!("unknown CPU; give its features, or one of {}", known.join(", ")),
                    });
                }
                None => SSE,
            },
            _ => {
                return Err(KernelError::Target {
                    target: triple.into(),
                    problem: format!("no kernels for `{arch}`; x86_64 and aarch64 are supported"),
                });
            }
        };
        if arch == "x86_64" {
            isa = with_features(isa, features);
        }
        Ok(Target { triple: triple.into(), cpu: cpu.into(), features: features.into(), isa })
    }

    /// Activation rows in a register block of the integer GEMM kernels, a power of two: a block of
    /// weights is unpacked once for this many rows.
    pub fn int8_rows(&self) -> usize {
        if self.isa.avx512 { 8 } else { 4 }
    }

    /// The same for the f32 kernels, which have twice the accumulators.
    pub fn f32_rows(&self) -> usize {
        if self.isa.avx512 { 8 } else { 2 }
    }
}

/// What every processor of a class has that LLVM may use, beside what the kernels ask about.
const WITH_AVX2: &[&str] = &["+avx2", "+fma", "+f16c", "+bmi", "+bmi2", "+lzcnt", "+movbe", "+popcnt"];
const WITH_AVX512: &[&str] = &["+avx512f", "+avx512bw", "+avx512cd", "+avx512dq", "+avx512vl"];
/// What came with Ice Lake and Zen 4.
const WITH_VBMI: &[&str] =
    &["+avx512vbmi", "+avx512vbmi2", "+avx512ifma", "+avx512bitalg", "+avx512vpopcntdq", "+gfni", "+vaes"];
/// Processors with VNNI that lack those.
const WITHOUT_VBMI: &[&str] = &["cascadelake", "cooperlake"];

impl Target {
    /// The features, each with a `+`, without which code for this target may not run: those that
    /// were listed, else those of the processor that was named.
    pub fn required_features(&self) -> Vec<String> {
        let listed: Vec<String> =
            self.features.split(',').filter(|f| f.starts_with('+')).map(String::from).collect();
        if !listed.is_empty() {
            return listed;
        }
        let isa = &self.isa;
        let vbmi = isa.vnni512 && !WITHOUT_VBMI.contains(&self.cpu.as_str());
        let vnni = (isa.vnni512, &["+avx512vnni"] as &[&str]);
        let vex_vnni = (isa.vnni256 && !isa.avx512, &["+avxvnni"] as &[&str]);
        let classes = [(isa.avx2, WITH_AVX2), (isa.avx512, WITH_AVX512), vnni, (vbmi, WITH_VBMI), vex_vnni];
        let has = classes.iter().filter(|(has, _)| *has).flat_map(|(_, features)| *features);
        has.map(|feature| feature.to_string()).collect()
    }
}

fn with_features(mut isa: Isa, features: &str) -> Isa {
    // AVX-512 counts when all four parts that the kernels use are there.
    let mut parts = [isa.avx512; 4];
    let (mut vnni512, mut vnni_vex) = (isa.vnni512, isa.vnni256);
    for feature in features.split(',') {
        let (on, name) = match feature.as_bytes().first() {
            Some(b'+') => (true, &feature[1..]),
            Some(b'-') => (false, &feature[1..]),
            _ => continue,
        };
        match name {
            "fma" => isa.fma = on,
            "f16c" => isa.f16c = on,
            "avx2" => isa.avx2 = on,
            "avx512f" => parts[0] = on,
            "avx512bw" => parts[1] = on,
            "avx512dq" => parts[2] = on,
            "avx512vl" => parts[3] = on,
            "avx512vnni" => vnni512 = on,
            "avxvnni" => vnni_vex = on,
            _ => {}
        }
    }
    isa.avx512 = isa.avx2 && parts.iter().all(|p| *p);
    isa.vnni512 = isa.avx512 && vnni512;
    isa.vnni256 = isa.avx2 && (vnni_vex || isa.vnni512);
    isa
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINUX: &str = "x86_64-unknown-linux-gnu";

    #[test]
    fn named_cpus_and_features() {
        assert_eq!(Target::parse(LINUX, "haswell", "").unwrap().isa, AVX2);
        assert_eq!(Target::parse(LINUX, "znver4", "").unwrap().isa, AVX512_VNNI);
        let isa = Target::parse(LINUX, "znver4", "+avx2,-avx512vnni,-avxvnni").unwrap().isa;
        assert!(isa.avx512 && !isa.vnni512);
        let isa = Target::parse(LINUX, "znver4", "-avx512bw").unwrap().isa;
        assert!(isa.avx2 && !isa.avx512 && !isa.vnni512);
        assert_eq!(Target::parse(LINUX, "something-new", "+avx2,+fma,+f16c").unwrap().isa, AVX2);
    }

    #[test]
    fn a_named_processor_requires_its_features() {
        let required = |cpu| Target::parse(LINUX, cpu, "").unwrap().required_features();
        assert!(required("x86-64").is_empty());
        assert!(required("haswell").contains(&"+avx2".to_string()));
        assert!(!required("haswell").iter().any(|f| f.contains("512")));
        assert!(required("znver4").contains(&"+avx512vbmi".to_string()));
        assert!(!required("cascadelake").contains(&"+avx512vbmi".to_string()));
        assert!(required("alderlake").contains(&"+avxvnni".to_string()));
    }

    #[test]
    fn unknown_targets_are_named() {
        let error = Target::parse(LINUX, "z80", "").unwrap_err().to_string();
        assert!(error.contains("z80") && error.contains("haswell"), "{error}");
        let error = Target::parse("riscv64-unknown-linux-gnu", "generic", "").unwrap_err().to_string();
        assert!(error.contains("riscv64"), "{error}");
    }
}
