//! How the rows that a stage makes get to the next one.
//!
//! A crossing of the chip that orders memory has two parts that cost a microsecond each: an SM waits until all
//! that it wrote is where everybody sees it, and says so; and only then can the next SM see that it was said. Where
//! the next stage's consumers can tell by the words themselves whether they have been written, nobody has to wait
//! for that. A buffer whose words can be told is a *mailbox*: it is full of late words (`handoff.cuh`), which no product
//! of numbers is, until it is written, and is filled with them again when it has been read. A crossing in front
//! of a stage that checks its mailboxes is *checked*: SMs only say that they have come to the end of a stage, and
//! what says so does not wait for what they wrote.
//!
//! Looking at words costs instructions, and a look that comes too early costs another way to memory. Mostly that is less
//! than what it saves; it is more in steps of many rows (with codes more than 8 were not tried), and in attention of wide
//! heads, which has more text than any other (`ARCHITECTURE.md`).
//!
//! What a stage reads of stages further back has no such words. It is ordered as ever: every SM also releases what it
//! wrote, beside its work, and nobody begins the results of a stage before all SMs have released the stage before. So a
//! consumer may read, without a look, what was written two stages ago, and an epilogue what was written one stage ago.
//!
//! For a mailbox that is written in stage `w`, and read up to stage `r`, this means: it can be cleared in stage
//! `r + 1`, in front of its results, and whoever writes it next must be two stages behind that. The first stage of a
//! step clears all mailboxes but those that it writes itself, and the crossing behind it is none that is checked.

use crate::format::Format;
use crate::resident::{Defect, Epilogue, Experts, Gemm, Kind, ResidentProgram};
use crate::stages::{BufferElem, BufferId};

/// Rows of a step, at most, that look at words: where all products are of halves, and where some are of codes.
const WIDEST: [usize; 2] = [16, 8];

/// Columns of a key, at most, of attention that looks at words.
const WIDEST_HEAD: usize = 128;

const HALVES: [Format; 2] = [Format::BF16, Format::F16];
const FP4: [Format; 2] = [Format::MXFP4, Format::NVFP4];
const FP8: [Format; 3] = [Format::FP8_BLOCK, Format::FP8_1X128, Format::FP8_CHANNEL];

/// What a stage of the step has to do with mailboxes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handoff {
    /// Mailboxes whose words the stage looks at, since the stage before writes them. The crossing in front of it is
    /// checked if there are any.
    pub checks: Vec<BufferId>,
    /// Mailboxes that it fills with late words.
    pub clears: Vec<BufferId>,
}

impl Handoff {
    /// Whether the crossing in front of the stage is a checked one.
    pub fn checked(&self) -> bool {
        !self.checks.is_empty()
    }
}

/// Whether a stage's consumers can look at the words of all that they read of the stage before. Others read more than
/// buffers, such as the logits, or do not look.
fn looks(kind: &Kind) -> bool {
    match kind {
        Kind::Attention(_) => true,
        Kind::Gemm(gemm) => HALVES.contains(&gemm.format) || FP8.contains(&gemm.format),
        // Behind a router's stage what the rows themselves are was there before. (The second product of halves does not look:
        // with one row of Qwen3-30B-A3B in bf16 that took 1.83 ms in place of 1.79.)
        Kind::Experts(experts) => experts.route.is_some() || FP4.contains(&experts.gemm.format),
        _ => false,
    }
}

/// The buffers that a stage's consumers read, and whether they can look at their words.
fn reads(program: &ResidentProgram, kind: &Kind) -> Vec<(BufferId, bool)> {
    let halves = |id: BufferId| program.buffer(id).elem != BufferElem::F32;
    let blind = |ids: &[BufferId]| ids.iter().map(|id| (*id, false)).collect();
    match kind {
        Kind::Gemm(gemm) => {
            let mut reads = vec![(gemm.input, halves(gemm.input))];
            reads.extend(gemm.prepared.map(|prepared| (prepared.squares, true)));
            reads
        }
        Kind::Attention(attention) => {
            let mut reads = vec![(attention.input, true)];
            reads.extend(attention.router.as_ref().map(|scores| (scores.input, false)));
            reads
        }
        Kind::Experts(Experts { gemm, route, bands, .. }) => {
            // Where no router stands in front of them, the rows are as new as the scores. Those of the second product are new.
            let looks = route.as_ref().is_none_or(|route| route.unscaled.is_some());
            let squares = gemm.prepared.map(|prepared| prepared.squares);
            let mut reads: Vec<_> = [gemm.input].into_iter().chain(squares).map(|id| (id, looks)).collect();
            reads.extend(route.as_ref().map(|route| (route.scores, true)));
            // Consumers add to the rows, which nobody looks at.
            reads.extend(bands.map(|_| (gemm.output, false)));
            reads
        }
        Kind::Scores(scores) => {
            [scores.input].into_iter().chain(scores.squares).map(|id| (id, false)).collect()
        }
        Kind::Context(context) => blind(&[context.input]),
        Kind::Conv(conv) => blind(&[conv.input, conv.kernels]),
        Kind::Pairs(pairs) => blind(&[pairs.top.lists, pairs.hidden]),
        Kind::Walk { tokens, scores, .. } => blind(&[*tokens, *scores]),
        Kind::Embed { .. } | Kind::Taps { .. } | Kind::TopK(_) => Vec::new(),
    }
}

/// What a stage's consumers write in place. They do not wait until all SMs have released the stage before, which therefore
/// must not read it.
fn written_in_place(kind: &Kind) -> Option<BufferId> {
    match kind {
        Kind::Experts(Experts { gemm, bands: Some(_), .. }) => Some(gemm.output),
        _ => None,
    }
}

/// What a stage writes, and whether all of it as words that somebody may look at.
fn writes(kind: &Kind) -> Vec<(BufferId, bool)> {
    let (output, whole) = match kind {
        Kind::Embed { output, .. } | Kind::Taps { output } => (Some(*output), false),
        Kind::Scores(scores) => (Some(scores.output), true),
        Kind::Attention(attention) => (Some(attention.output), true),
        Kind::Conv(conv) => (Some(conv.output), false),
        Kind::TopK(top) => (Some(top.lists), false),
        Kind::Pairs(pairs) => (Some(pairs.scores), false),
        Kind::Context(_) | Kind::Walk { .. } => (None, false),
        Kind::Gemm(_) | Kind::Experts(_) => match kind.gemm() {
            Some(gemm) if gemm.epilogue != Epilogue::Logits => {
                (Some(gemm.output), gemm.epilogue != Epilogue::Residual)
            }
            _ => (None, false),
        },
    };
    let mut writes: Vec<_> = output.map(|output| (output, whole)).into_iter().collect();
    match kind {
        Kind::Pairs(pairs) => writes.push((pairs.tokens, false)),
        Kind::Attention(attention) => {
            writes.extend(attention.router.as_ref().map(|scores| (scores.output, false)));
        }
        Kind::Gemm(Gemm { router: Some(router), .. }) => writes.push((router.output, true)),
        _ => {}
    }
    if let Some(prepared) = kind.prepares() {
        // Those of the first stage are not, but the crossing behind it is never checked.
        writes.extend([(prepared.halves, true), (prepared.squares, true)]);
    }
    writes
}

/// When a buffer is written, and read, by number of the stage.
#[derive(Clone, Default)]
struct Uses {
    /// Each time it is written, and the last stage that reads that.
    lives: Vec<(usize, usize)>,
    /// Whether all words are written whole, and it has whole pieces of 16 bytes a row.
    whole: bool,
}

impl Uses {
    /// Whether there is always a stage that can clear it, between the last that reads and the next that writes.
    fn is_mailbox(&self) -> bool {
        let clearable = |pair: &[(usize, usize)]| pair[1].0 >= pair[0].1.max(pair[0].0 + 1) + 3;
        self.whole && self.lives.windows(2).all(clearable)
    }
}

impl ResidentProgram {
    /// Of each stage of the step, what it checks and what it clears.
    pub fn handoffs(&self) -> Vec<Handoff> {
        let sequence = self.sequence();
        let mut uses: Vec<Uses> = self
            .buffers
            .iter()
            .map(|buffer| Uses { lives: Vec::new(), whole: buffer.row_bytes().is_multiple_of(16) })
            .collect();
        for (number, (_, _, stage)) in sequence.iter().enumerate() {
            for (id, _) in reads(self, &stage.kind) {
                if let Some((_, last)) = uses[id.0 as usize].lives.last_mut() {
                    *last = number;
                }
            }
            for (id, whole) in writes(&stage.kind) {
                let of = &mut uses[id.0 as usize];
                of.whole &= whole;
                of.lives.push((number, number));
            }
        }
        let mut handoffs = vec![Handoff::default(); sequence.len()];
        let codes = |kind: &Kind| kind.gemm().is_some_and(|gemm| !HALVES.contains(&gemm.format));
        let codes = sequence.iter().any(|(_, _, stage)| codes(&stage.kind));
        if self.step_rows > WIDEST[usize::from(codes)] {
            return handoffs;
        }
        let mut checked = vec![false; self.buffers.len()];
        for (number, (_, _, stage)) in sequence.iter().enumerate().skip(2) {
            let wide = matches!(stage.kind, Kind::Attention(_)) && self.kv.qk_dim > WIDEST_HEAD;
            if wide || !looks(&stage.kind) {
                continue;
            }
            let fresh = |id: &BufferId| {
                let mut written = uses[id.0 as usize].lives.iter().map(|(written, _)| *written);
                written.rfind(|written| *written < number) == Some(number - 1)
            };
            let fresh: Vec<_> = reads(self, &stage.kind).into_iter().filter(|(id, _)| fresh(id)).collect();
            let before = reads(self, &sequence[number - 1].2.kind);
            if written_in_place(&stage.kind).is_some_and(|id| before.iter().any(|(read, _)| *read == id)) {
                continue;
            }
            if fresh.iter().all(|(id, looks)| *looks && uses[id.0 as usize].is_mailbox()) {
                handoffs[number].checks = fresh.into_iter().map(|(id, _)| id).collect();
                for id in &handoffs[number].checks {
                    checked[id.0 as usize] = true;
                }
            }
        }
        for (id, uses) in uses.iter().enumerate().filter(|(id, _)| checked[*id]) {
            let id = BufferId(u32::try_from(id).unwrap_or_default());
            if uses.lives.first().is_none_or(|(written, _)| *written > 0) {
                handoffs[0].clears.push(id);
            }
            for (written, read) in &uses.lives {
                if let Some(stage) = handoffs.get_mut(read.max(&(written + 1)) + 1) {
                    stage.clears.push(id);
                }
            }
        }
        handoffs
    }

    /// Proves that every word that a stage reads behind a checked crossing is one that it looks at, and
    /// that it was [`LATE`] before it was written; by going through two steps in a row.
    ///
    /// # Errors
    /// The first stage that would read too early.
    pub fn verify_handoffs(&self, handoffs: &[Handoff]) -> Result<(), Defect> {
        #[derive(Clone, Copy)]
        struct State {
            /// Stages since it was written, two behind a crossing that is not checked.
            written: usize,
            /// The same since it was cleared, if it has not been written since.
            cleared: Option<usize>,
            /// Stages since it was read.
            read: usize,
        }
        let sequence = self.sequence();
        let mut states =
            vec![State { written: usize::MAX, cleared: None, read: usize::MAX }; self.buffers.len()];
        // Whether what is in a mailbox was cleared before it was written.
        let mut tellable = vec![false; self.buffers.len()];
        for (number, ((name, _, stage), handoff)) in
            sequence.iter().zip(handoffs).enumerate().chain(sequence.iter().zip(handoffs).enumerate())
        {
            let fail = |what: String| Err(Defect { stage: name.clone(), what });
            // A crossing that is not checked orders everything.
            let stages = if handoff.checked() { 1 } else { 2 };
            for state in &mut states {
                state.written = state.written.saturating_add(stages);
                state.read = state.read.saturating_add(stages);
                state.cleared = state.cleared.map(|since| since + stages);
            }
            let reads = reads(self, &stage.kind);
            if handoff.checked() && (number < 2 || !looks(&stage.kind)) {
                return fail("cannot check what it reads".into());
            }
            if let Some(id) = written_in_place(&stage.kind)
                && states[id.0 as usize].read < 2
            {
                return fail(format!("writes {} while other SMs read it", self.buffer(id).name));
            }
            for (id, looks) in &reads {
                let (buffer, state) = (&self.buffer(*id).name, states[id.0 as usize]);
                if state.cleared.is_some() {
                    return fail(format!("reads {buffer}, which has been cleared"));
                }
                let looked_at = *looks && handoff.checks.contains(id) && tellable[id.0 as usize];
                if handoff.checked() && state.written == 1 && !looked_at {
                    return fail(format!("does not see whether {buffer} is written"));
                }
            }
            for id in &handoff.clears {
                // All SMs are through with the stage before; not so with this one.
                if reads.iter().any(|(read, _)| read == id) {
                    return fail(format!("clears {} while it is read", self.buffer(*id).name));
                }
                states[id.0 as usize].cleared = Some(0);
            }
            for (id, _) in writes(&stage.kind) {
                let state = &mut states[id.0 as usize];
                // Consumers see what was done two stages ago.
                if state.cleared.is_some_and(|since| since < 2) {
                    return fail(format!("writes {} while it is cleared", self.buffer(id).name));
                }
                tellable[id.0 as usize] = state.cleared.is_some();
                *state = State { written: 0, cleared: None, ..*state };
            }
            for (id, _) in &reads {
                states[id.0 as usize].read = 0;
            }
        }
        Ok(())
    }
}
