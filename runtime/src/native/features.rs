//! Whether this processor has what a plan's code was compiled for.

/// LLVM's name of an x86 feature, and how to ask for it.
#[cfg(target_arch = "x86_64")]
type Feature = (&'static str, fn() -> bool);

#[cfg(target_arch = "x86_64")]
macro_rules! features {
    ($($llvm:literal => $name:tt,)*) => {
        &[$(($llvm, || std::is_x86_feature_detected!($name)),)*]
    };
}

/// Everything that generated vector or bit code may use.
#[cfg(target_arch = "x86_64")]
const FEATURES: &[Feature] = features! {
    "sse" => "sse",
    "sse2" => "sse2",
    "sse3" => "sse3",
    "ssse3" => "ssse3",
    "sse4.1" => "sse4.1",
    "sse4.2" => "sse4.2",
    "sse4a" => "sse4a",
    "popcnt" => "popcnt",
    "lzcnt" => "lzcnt",
    "bmi" => "bmi1",
    "bmi2" => "bmi2",
    "adx" => "adx",
    "movbe" => "movbe",
    "aes" => "aes",
    "pclmul" => "pclmulqdq",
    "sha" => "sha",
    "gfni" => "gfni",
    "vaes" => "vaes",
    "vpclmulqdq" => "vpclmulqdq",
    "f16c" => "f16c",
    "fma" => "fma",
    "avx" => "avx",
    "avx2" => "avx2",
    "avxvnni" => "avxvnni",
    "avxvnniint8" => "avxvnniint8",
    "avxvnniint16" => "avxvnniint16",
    "avxifma" => "avxifma",
    "avxneconvert" => "avxneconvert",
    "avx512f" => "avx512f",
    "avx512bw" => "avx512bw",
    "avx512cd" => "avx512cd",
    "avx512dq" => "avx512dq",
    "avx512vl" => "avx512vl",
    "avx512ifma" => "avx512ifma",
    "avx512vbmi" => "avx512vbmi",
    "avx512vbmi2" => "avx512vbmi2",
    "avx512vnni" => "avx512vnni",
    "avx512bitalg" => "avx512bitalg",
    "avx512vpopcntdq" => "avx512vpopcntdq",
    "avx512vp2intersect" => "avx512vp2intersect",
    "avx512bf16" => "avx512bf16",
    "avx512fp16" => "avx512fp16",
};

/// The first of `features` (`+avx2`, LLVM's names) that this processor has not, without its sign.
///
/// Names outside the table are passed over: they stand for instructions that the compiler emits
/// only where it is asked to (locking, paging, prefetching). Vector extensions are the exception:
/// one that is not in the table cannot be vouched for and counts as missing.
#[cfg(target_arch = "x86_64")]
pub fn first_missing(features: &[String]) -> Option<&str> {
    let wanted = features.iter().filter_map(|feature| feature.strip_prefix('+'));
    wanted.into_iter().find(|name| match FEATURES.iter().find(|(llvm, _)| llvm == name) {
        Some((_, has)) => !has(),
        None => name.starts_with("avx"),
    })
}

/// The first of `features` that this processor has not; the baseline of other architectures has
/// everything that is generated for them.
#[cfg(not(target_arch = "x86_64"))]
pub fn first_missing(_features: &[String]) -> Option<&str> {
    None
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::first_missing;

    #[test]
    fn the_baseline_is_there_and_an_unknown_vector_extension_is_not() {
        let owned = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        assert_eq!(first_missing(&owned(&["+sse2", "+prfchw", "+64bit", "-avx999"])), None);
        assert_eq!(first_missing(&owned(&["+sse2", "+avx999"])), Some("avx999"));
        let has = std::is_x86_feature_detected!("avx2");
        assert_eq!(first_missing(&owned(&["+avx2"])).is_none(), has);
    }
}
