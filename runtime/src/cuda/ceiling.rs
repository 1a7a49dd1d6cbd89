//! Measures how fast a GPU reads its memory, with kernels that the caller compiled: the floor under
//! every step.

use super::driver::{Context, DeviceMemory, Kernel, PinnedMemory, Stream};
use super::error::CudaError;
use std::time::{Duration, Instant};

/// What is read at most: 70 times the largest cache.
const MOST: u64 = 4 << 30;

/// How long a pass may take before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(10);

/// Passes before those that count: clocks rise, and the first reads find pages.
const WARM_UP: usize = 5;

/// The kernels of a measurement: see `kernels-gen/cuda/ceiling.cuh`.
#[derive(Clone, Copy, Debug)]
pub struct CeilingCode<'a> {
    /// Machine code for the GPU.
    pub cubin: &'a [u8],
    /// Kernel that writes the buffer.
    pub fill: &'a str,
    /// Kernel that reads it.
    pub read: &'a str,
    /// Threads of a block of either.
    pub threads: u32,
    /// Dynamic shared memory of the reading kernel's block, in bytes.
    pub shared_bytes: u32,
    /// Bytes that are copied at once: the buffer is a multiple of them.
    pub slot_bytes: usize,
}

/// The one argument of both kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct CeilingArgs {
    buffer: u64,
    /// `u64 [SMs][2]`: start and end on each, in nanoseconds.
    times: u64,
    /// `u32`: the sum of all words.
    sum: u64,
    slots: u32,
    /// 0, which the kernel's compiler cannot know.
    zero: u32,
}

/// How fast memory was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Ceiling {
    /// Bytes of the buffer.
    pub bytes: u64,
    /// Seconds of every pass over it, from the first SM's start to the last one's end.
    pub passes: Vec<f64>,
}

impl Ceiling {
    /// Bytes per second of the fastest pass: whatever slows a pass down is not the memory.
    pub fn best(&self) -> f64 {
        self.bytes as f64 / self.passes.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// Bytes per second of the pass in the middle.
    pub fn median(&self) -> f64 {
        let mut passes = self.passes.clone();
        passes.sort_by(f64::total_cmp);
        passes.get(passes.len() / 2).map_or(0.0, |seconds| self.bytes as f64 / seconds)
    }
}

/// Reads a buffer of 4 GiB, or of 60 % of the memory that is free if that is less, in so many passes
/// that count, and checks that all of it was read.
///
/// # Safety
/// The code is one that a compiler made of `kernels-gen/cuda/ceiling.cuh`, whole, with these names.
///
/// # Errors
/// [`CudaError`] if there is no such GPU, the kernels do not run on it, or they read something else
/// than was written.
pub unsafe fn read_ceiling(
    device: usize,
    code: &CeilingCode<'_>,
    passes: usize,
) -> Result<Ceiling, CudaError> {
    let context = Context::open(device)?;
    let stream = Stream::new(&context)?;
    // SAFETY: the caller's promise.
    let fill = unsafe { Kernel::load(&context, code.cubin, code.fill, code.threads, 0) }?;
    // SAFETY: the caller's promise.
    let read = unsafe { Kernel::load(&context, code.cubin, code.read, code.threads, code.shared_bytes) }?;
    let sms = context.info().sms;
    let slot = code.slot_bytes.max(16) as u64;
    let bytes = buffer_bytes(context.memory()?.0, slot);
    if bytes == 0 {
        let problem = "has no memory that is free".to_string();
        return Err(CudaError::Unfit { device: context.info().name.clone(), problem });
    }
    let memory = |what, bytes| DeviceMemory::new(&context, what, bytes, "the limits");
    let buffer = memory("buffer that is read", bytes as usize)?;
    // The times, then the sum.
    let sum_at = sms * 16;
    let figures_bytes = sum_at + 8;
    let figures = memory("times", figures_bytes)?;
    let host = PinnedMemory::new(&context, figures_bytes)?;
    let args = CeilingArgs {
        buffer: buffer.address(),
        times: figures.address(),
        sum: figures.address() + sum_at as u64,
        slots: (bytes / slot) as u32,
        zero: 0,
    };
    // SAFETY: the kernel takes these arguments; all memory stays until the stream is idle, or for good.
    unsafe { fill.launch(&stream, &args) }?;
    wait(&context, &stream)?;
    let expected = sum_of_words(bytes / 4);
    let mut seconds = Vec::with_capacity(passes);
    for pass in 0..WARM_UP + passes {
        // SAFETY: as above; the copy is as long as both sides, which nobody else touches.
        unsafe {
            stream.zero(figures.address(), figures_bytes)?;
            read.launch(&stream, &args)?;
            stream.copy_out(host.host().as_ptr(), figures.address(), figures_bytes)?;
        }
        wait(&context, &stream)?;
        // SAFETY: this long, initialised, on whole pages; nothing is queued any more.
        let found =
            unsafe { std::slice::from_raw_parts(host.host().as_ptr().cast::<u64>(), figures_bytes / 8) };
        let sum = found[2 * sms] as u32;
        if sum != expected {
            return Err(CudaError::Unfit {
                device: context.info().name.clone(),
                problem: format!("read words that add up to {sum}, not to {expected}"),
            });
        }
        if pass >= WARM_UP {
            seconds.push(duration(&found[..2 * sms]));
        }
    }
    Ok(Ceiling { bytes, passes: seconds })
}

/// The buffer's size with so much memory free: whole slots.
fn buffer_bytes(free: u64, slot: u64) -> u64 {
    (free / 5 * 3).min(MOST) / slot * slot
}

/// What `words` words add up to of which number `i` is `i * 2654435761`, modulo 2^32.
fn sum_of_words(words: u64) -> u32 {
    let numbers = if words.is_multiple_of(2) {
        (words / 2).wrapping_mul(words.wrapping_sub(1))
    } else {
        words.wrapping_mul(words.wrapping_sub(1) / 2)
    };
    (numbers as u32).wrapping_mul(2_654_435_761)
}

/// Seconds from the first start to the last end of `[SMs][start, end]` in nanoseconds.
fn duration(times: &[u64]) -> f64 {
    let (pairs, _) = times.as_chunks::<2>();
    let start = pairs.iter().map(|pair| pair[0]).min().unwrap_or(0);
    let end = pairs.iter().map(|pair| pair[1]).max().unwrap_or(0);
    end.saturating_sub(start).max(1) as f64 * 1e-9
}

/// Waits for what is queued.
fn wait(context: &Context, stream: &Stream) -> Result<(), CudaError> {
    let start = Instant::now();
    while !stream.idle()? {
        if start.elapsed() > PATIENCE {
            // The kernel may run for ever: nothing that it uses may be freed.
            context.abandon();
            return Err(CudaError::Unfit {
                device: context.info().name.clone(),
                problem: format!("has not read its memory in {} s", PATIENCE.as_secs()),
            });
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_words_is_what_adding_them_gives() {
        for words in [0u64, 1, 2, 3, 1000, 4097] {
            let sum = (0..words)
                .fold(0u32, |sum, word| sum.wrapping_add((word as u32).wrapping_mul(2_654_435_761)));
            assert_eq!(sum_of_words(words), sum, "{words}");
        }
    }

    #[test]
    fn the_buffer_is_whole_slots_of_what_is_free() {
        assert_eq!(buffer_bytes(80 << 30, 1 << 14), MOST);
        assert_eq!(buffer_bytes((10 << 14) + 5, 1 << 14), 6 << 14);
        assert_eq!(buffer_bytes(100, 1 << 14), 0);
    }

    #[test]
    fn a_pass_lasts_from_the_first_start_to_the_last_end() {
        assert_eq!(duration(&[1000, 3000, 900, 2500, 1100, 3900]), 3000e-9);
        let ceiling = Ceiling { bytes: 3000, passes: vec![3.0, 1.0, 2.0] };
        assert_eq!((ceiling.best(), ceiling.median()), (3000.0, 1500.0));
    }
}
