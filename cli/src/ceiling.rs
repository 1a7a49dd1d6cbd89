//! The read ceiling: how fast the workers' threads, or all SMs of a GPU, can read memory; the floor
//! under every decoded token.

use crate::source;
use anyhow::{Context, Result};
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;
use tilec_codegen::nvrtc::Arch;
use tilec_runtime::cuda::{self, Ceiling, CeilingCode, DeviceInfo};

/// The GPU that commands use.
pub const GPU: usize = 0;

/// Passes of a GPU over its buffer.
const GPU_PASSES: usize = 21;

/// How fast the GPU reads its memory, measured with code for `arch` (`sm_90a`).
///
/// # Errors
/// When there is no GPU, no NVRTC, or the kernels fail.
pub fn gpu_read_ceiling(arch: &str) -> Result<(DeviceInfo, Ceiling)> {
    let gpus = cuda::devices()?;
    let gpu = gpus.into_iter().nth(GPU).with_context(|| {
        format!("there is no GPU number {GPU}; look at CUDA_VISIBLE_DEVICES and nvidia-smi")
    })?;
    let cubins = source::cache_folder()?.join("cubins");
    let program = tilec_codegen::ceiling::compile(Arch::parse(arch)?, gpu.shared_bytes, &cubins)?;
    let program = program.with_context(|| {
        format!("{} has {} bytes of shared memory for a block: too few", gpu.name, gpu.shared_bytes)
    })?;
    let code = CeilingCode {
        cubin: &program.cubin.bytes,
        fill: tilec_codegen::ceiling::FILL,
        read: tilec_codegen::ceiling::READ,
        threads: tilec_codegen::ceiling::THREADS,
        shared_bytes: program.kernel.shared_bytes(),
        slot_bytes: tilec_codegen::ceiling::SLOT_BYTES,
    };
    // SAFETY: compiled just now, or kept under its checksum, from these kernels.
    let ceiling = unsafe { cuda::read_ceiling(GPU, &code, GPU_PASSES) }?;
    Ok((gpu, ceiling))
}

/// A buffer that no cache holds.
pub const FAR_BYTES: usize = 512 << 20;

/// Bytes per second at which `threads` threads read `bytes` bytes in equal parts: the best of
/// `passes` passes, because whatever slows a pass down is not the memory.
///
/// Each thread makes its own part, so that a part lies in the memory beside the thread's processor.
pub fn read_ceiling(bytes: usize, threads: usize, passes: usize) -> f64 {
    let threads = threads.max(1);
    let words = (bytes / 8).div_ceil(threads).max(1);
    let line = Barrier::new(threads);
    // The readers look at the clock themselves: a timekeeper beside them would have to share their
    // processors, and start its clock late.
    let read = |thread: usize| -> Vec<(Instant, Instant)> {
        let part: Vec<u64> = (0..words as u64).map(|word| word ^ thread as u64).collect();
        let pass = |_| {
            line.wait();
            let start = Instant::now();
            black_box(sum(black_box(&part)));
            (start, Instant::now())
        };
        (0..passes).map(pass).collect()
    };
    let times: Vec<Vec<(Instant, Instant)>> = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn({
                    let read = &read;
                    move || read(thread)
                })
            })
            .collect();
        readers.into_iter().map(|reader| reader.join().expect("a reader does not panic")).collect()
    });
    // A pass lasts from its first reader's start to its last reader's end.
    let seconds = (0..passes).filter_map(|pass| {
        let start = times.iter().map(|reader| reader[pass].0).min()?;
        let end = times.iter().map(|reader| reader[pass].1).max()?;
        Some((end - start).as_secs_f64())
    });
    (words * threads * 8) as f64 / seconds.fold(f64::INFINITY, f64::min)
}

/// The sum of all words, with the widest vectors at hand.
fn sum(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { sum_avx2(words) };
    }
    sum_lanes(words)
}

/// [`sum_lanes`] compiled for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(words: &[u64]) -> u64 {
    sum_lanes(words)
}

/// Sums in independent lanes, so that reading and not the additions bounds it.
#[inline(always)]
fn sum_lanes(words: &[u64]) -> u64 {
    const LANES: usize = 32;
    let mut lanes = [0u64; LANES];
    let (blocks, rest) = words.as_chunks::<LANES>();
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(rest).fold(0, |total, word| total.wrapping_add(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_once() {
        let words: Vec<u64> = (1..=1000).collect();
        assert_eq!((sum(&words), sum_lanes(&words)), (500_500, 500_500));
        assert_eq!((sum(&words[..3]), sum(&[])), (6, 0));
    }

    #[test]
    fn the_rate_is_a_plausible_one() {
        // Slower than a disk or faster than any memory would mean that the loop was removed or the
        // bytes miscounted.
        let rate = read_ceiling(64 << 20, 2, 3);
        assert!((1e8..2e12).contains(&rate), "{rate} bytes/s");
    }
}
