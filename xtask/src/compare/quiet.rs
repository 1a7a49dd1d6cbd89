//! How much of the machine's processors other programs took while a measurement ran.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// Clock ticks of the machine and of this program's finished children, since they started.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ticks {
    busy: u64,
    idle: u64,
    children: u64,
}

/// A stretch of time being watched.
pub struct Watch(Option<Ticks>);

impl Watch {
    /// Starts watching.
    pub fn start() -> Self {
        Self(Ticks::now())
    }

    /// The part of all processor time since the start, 0 to 1, that went to neither idling nor this program's children;
    /// 0 where the system does not tell.
    pub fn other_work(&self) -> f64 {
        self.0.zip(Ticks::now()).map_or(0.0, |(before, after)| before.other_work_until(&after))
    }
}

/// Waits until other programs took no more than `most` of the processors for a second, or until `patience` ends.
pub fn wait(most: f64, patience: Duration) {
    let start = Instant::now();
    loop {
        let watch = Watch::start();
        thread::sleep(Duration::from_secs(1));
        if watch.other_work() <= most || start.elapsed() >= patience {
            return;
        }
    }
}

impl Ticks {
    fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?, &fs::read_to_string("/proc/self/stat").ok()?)
    }

    /// Reads the first line of `/proc/stat` (user, nice, system, idle, iowait, irq, softirq, steal, ...) and the
    /// children's user and system time, the 16th and 17th fields of `/proc/self/stat`.
    fn parse(machine: &str, this: &str) -> Option<Self> {
        let ticks: Vec<u64> =
            machine.lines().next()?.split_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
        // user and nice already hold the guest times that follow steal.
        let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = ticks[..] else { return None };
        // The second field, the program's name, may hold spaces and parentheses; the rest may not.
        let fields: Vec<&str> = this.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |at: usize| fields.get(at - 3)?.parse::<u64>().ok();
        Some(Self {
            busy: user + nice + system + irq + softirq + steal,
            idle: idle + iowait,
            children: field(16)? + field(17)?,
        })
    }

    fn other_work_until(&self, after: &Self) -> f64 {
        let busy = after.busy.saturating_sub(self.busy);
        let all = busy + after.idle.saturating_sub(self.idle);
        let other = busy.saturating_sub(after.children.saturating_sub(self.children));
        other as f64 / all.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: (&str, &str) = (
        "cpu  100 0 50 800 10 5 5 0 0 0\ncpu0 1 2\n",
        "7 (a (b) c) S 1 1 1 0 -1 4 1 2 3 4 10 20 30 40 20 0 1",
    );
    const AFTER: (&str, &str) =
        ("cpu  160 0 60 820 10 5 5 10 0 0\n", "7 (a (b) c) S 1 1 1 0 -1 4 1 2 3 4 10 20 80 50 20 0 1");

    #[test]
    fn other_work_is_what_neither_children_nor_idling_took() {
        let [before, after] = [BEFORE, AFTER].map(|(machine, this)| Ticks::parse(machine, this).unwrap());
        assert_eq!(before, Ticks { busy: 160, idle: 810, children: 70 });
        // Of 100 ticks 80 were busy, 60 of them for the children.
        assert!((before.other_work_until(&after) - 0.2).abs() < 1e-12);
        assert_eq!(before.other_work_until(&before), 0.0);
    }

    #[test]
    fn other_formats_are_not_guessed_at() {
        assert_eq!(Ticks::parse("cpu 1 2 3", BEFORE.1), None);
        assert_eq!(Ticks::parse(BEFORE.0, "7 (a) S 1"), None);
        assert_eq!(Ticks::parse("", ""), None);
    }
}
