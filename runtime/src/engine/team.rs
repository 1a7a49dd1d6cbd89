//! The worker threads: persistent, handed one job at a time, asleep between jobs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for work before it sleeps. Waking a sleeping thread takes about as long,
/// so a short wait costs no more than twice the best choice, and an idle engine costs nothing.
const SPIN: Duration = Duration::from_micros(30);

/// Keeps two counters out of one cache line (and out of a pair that is fetched together).
#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

/// A job: called once by every worker with its number.
type Job<'a> = &'a (dyn Fn(usize) + Sync + 'a);

#[derive(Default)]
struct Shared {
    /// Number of the last job that was handed out.
    epoch: Line<AtomicU64>,
    /// Helpers that have not finished it.
    remaining: Line<AtomicUsize>,
    /// A pointer to the caller's [`Handout`], valid until `remaining` is 0.
    handout: Line<AtomicPtr<Handout<'static>>>,
    stop: AtomicBool,
}

/// What the caller shows the helpers; lives on its stack.
struct Handout<'a> {
    job: Job<'a>,
    caller: Thread,
    panicked: AtomicUsize,
}

/// No helper panicked.
const NOBODY: usize = usize::MAX;

/// A team of `workers` threads, of which the caller is number 0.
pub struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Numbers of the processors that the workers are pinned to, if they are.
    pins: Vec<usize>,
}

/// A worker panicked in a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Panicked(pub usize);

impl Team {
    /// Starts the helpers. With `pin`, worker `n` runs on the n-th processor that this thread may
    /// use, as far as there are enough; the calling thread is pinned when it calls [`Team::run`]
    /// for the first time.
    ///
    /// # Errors
    /// If the system has no more threads.
    pub fn new(workers: usize, pin: bool) -> std::io::Result<Team> {
        let allowed = if pin { affinity::allowed() } else { Vec::new() };
        let pins = if allowed.len() >= workers { allowed } else { Vec::new() };
        let mut team = Team { shared: Arc::default(), helpers: Vec::new(), pins };
        for worker in 1..workers {
            let shared = Arc::clone(&team.shared);
            let pin = team.pins.get(worker).copied();
            let helper = std::thread::Builder::new().name(format!("tilec-{worker}")).spawn(move || {
                if let Some(processor) = pin {
                    affinity::pin(processor);
                }
                help(&shared, worker);
            })?;
            team.helpers.push(helper);
        }
        Ok(team)
    }

    /// Runs `job(worker)` on every worker and returns when all have returned.
    ///
    /// # Errors
    /// The number of a worker that panicked; the others have finished nevertheless.
    pub fn run(&mut self, job: Job<'_>) -> Result<(), Panicked> {
        if let Some(processor) = self.pins.first().copied() {
            affinity::pin(processor);
            self.pins.clear();
        }
        let handout = Handout { job, caller: std::thread::current(), panicked: AtomicUsize::new(NOBODY) };
        let shared = &*self.shared;
        shared.remaining.0.store(self.helpers.len(), Ordering::Relaxed);
        shared.handout.0.store(ptr::from_ref(&handout).cast_mut().cast(), Ordering::Relaxed);
        // Publishes both.
        shared.epoch.0.fetch_add(1, Ordering::Release);
        for helper in &self.helpers {
            helper.thread().unpark();
        }
        handout.work(0);
        // The handout must outlive every helper's use of it.
        wait(|| shared.remaining.0.load(Ordering::Acquire) == 0);
        match handout.panicked.load(Ordering::Relaxed) {
            NOBODY => Ok(()),
            worker => Err(Panicked(worker)),
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.epoch.0.fetch_add(1, Ordering::Release);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // Helpers catch the panics of jobs, so that this cannot fail.
            let _ = helper.join();
        }
    }
}

impl Handout<'_> {
    fn work(&self, worker: usize) {
        if catch_unwind(AssertUnwindSafe(|| (self.job)(worker))).is_err() {
            let _ = self.panicked.compare_exchange(NOBODY, worker, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

fn help(shared: &Shared, worker: usize) {
    let mut done = 0;
    loop {
        wait(|| shared.epoch.0.load(Ordering::Acquire) != done);
        done += 1;
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: `Team::run` published the pointer before the epoch, and keeps what it points at
        // until `remaining` is 0, which needs this thread's decrement below.
        let handout = unsafe { &*shared.handout.0.load(Ordering::Relaxed) };
        handout.work(worker);
        let caller = handout.caller.clone();
        // From here on the handout may be gone.
        if shared.remaining.0.fetch_sub(1, Ordering::AcqRel) == 1 {
            caller.unpark();
        }
    }
}

/// Waits for `ready`, which another thread makes true before it unparks this one.
fn wait(ready: impl Fn() -> bool) {
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            break;
        }
    }
    while !ready() {
        std::thread::park();
    }
}

#[cfg(target_os = "linux")]
mod affinity {
    /// Numbers of the processors that this thread may use.
    pub fn allowed() -> Vec<usize> {
        // SAFETY: all-zero is an empty set, and the call fills no more than its size.
        let set = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
                return Vec::new();
            }
            set
        };
        // SAFETY: the numbers are inside of the set.
        (0..libc::CPU_SETSIZE as usize).filter(|n| unsafe { libc::CPU_ISSET(*n, &set) }).collect()
    }

    /// Keeps this thread on one processor. Failing to costs speed at most.
    pub fn pin(processor: usize) {
        // SAFETY: all-zero is an empty set; the number came from such a set.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(processor, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod affinity {
    pub fn allowed() -> Vec<usize> {
        Vec::new()
    }

    pub fn pin(_processor: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_runs_every_job_once() {
        for workers in [1, 2, 5] {
            let mut team = Team::new(workers, false).unwrap();
            let counts: Vec<AtomicUsize> = (0..workers).map(|_| AtomicUsize::new(0)).collect();
            for round in 1..=2000 {
                team.run(&|worker| {
                    counts[worker].fetch_add(1, Ordering::Relaxed);
                })
                .unwrap();
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == round));
                if round % 500 == 0 {
                    // Long enough that the helpers sleep.
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    #[test]
    fn a_panic_is_reported_and_the_team_goes_on() {
        let mut team = Team::new(3, true).unwrap();
        for panics in [2, 0, 1] {
            let result = team.run(&|worker| {
                if worker == panics {
                    std::panic::resume_unwind(Box::new("on purpose"));
                }
            });
            assert_eq!(result, Err(Panicked(panics)));
            assert_eq!(team.run(&|_| ()), Ok(()));
        }
    }

    #[test]
    fn idle_helpers_use_no_processor() {
        let mut team = Team::new(3, false).unwrap();
        let times: Vec<AtomicU64> = (0..3).map(|_| AtomicU64::new(0)).collect();
        let mut sample = || {
            team.run(&|worker| {
                // SAFETY: all-zero is a time, and the call fills in this one.
                let time = unsafe {
                    let mut time: libc::timespec = std::mem::zeroed();
                    libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time);
                    time
                };
                let micros = time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000;
                times[worker].store(micros, Ordering::Relaxed);
            })
            .unwrap();
            times.iter().map(|time| time.load(Ordering::Relaxed)).collect::<Vec<_>>()
        };
        let before = sample();
        std::thread::sleep(Duration::from_millis(300));
        let after = sample();
        for worker in 1..3 {
            let used = after[worker] - before[worker];
            assert!(used < 30_000, "worker {worker} used {used} µs while idle");
        }
    }
}
