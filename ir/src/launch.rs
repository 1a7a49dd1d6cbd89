//! What the runtime hands to the resident kernel of a CUDA plan: one structure a launch, by value,
//! and the layouts of the memory behind its addresses. Version [`LAUNCH_VERSION`] is part of every
//! such plan.

/// Raised whenever [`LaunchArgs`] or a layout behind it changes.
pub const LAUNCH_VERSION: u32 = 16;

/// Name of the kernel: `__global__ void tilec_resident(const __grid_constant__ LaunchArgs args)`.
pub const KERNEL: &str = "tilec_resident";

/// Bytes of a slot of the ring; a sixteenth more where weights are MXFP4, whose blocks are longer.
pub const SLOT_BYTES: usize = 16 << 10;

/// Rows of a slice of a step: the columns of one tensor-core tile. A kernel's step has one, two or four slices
/// ([`ResidentProgram::step_rows`](crate::resident::ResidentProgram::step_rows)); the runtime runs longer steps as
/// several.
pub const SLICE_ROWS: usize = 8;

/// Rows that a step of any kernel has at most, and that what host and kernel share has room for.
pub const LAUNCH_ROWS: usize = 32;

/// Output features that one tile of streamed weights makes: the rows of an octet.
pub const OCTET: usize = 8;

/// Bytes of one block of an octet: 8 features times 64 bytes of consecutive columns, the piece that
/// a warp loads with one 16-byte access a lane.
pub const OCTET_BLOCK: usize = 512;

/// Stop tokens that a launch can be given.
pub const STOP_TOKENS: usize = 8;

/// Bytes of the synchronization memory: the counters that SMs meet at. Zeroed before every launch.
pub const SYNC_BYTES: usize = 384 + 3 * LAUNCH_ROWS * 8;

/// Words of the record that a stuck wait leaves: see [`StallRecord`].
pub const STALL_WORDS: usize = 8;

/// Times of a stage on an SM: when it began to wait, when it could start, when its work was
/// published, in nanoseconds of the GPU's global timer.
pub const TRACE_FIELDS: usize = 3;

/// Arguments of one launch. All addresses are of device memory or of mapped host memory and valid
/// until the kernel ends; `weights`, `kv` and `arena` are aligned to 256 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LaunchArgs {
    /// The packed weights, at the offsets that the plan's packing gives.
    pub weights: u64,
    /// The KV cache: `[layer][page][kv head]` blocks, in each the keys `[page_tokens][qk_dim]`, then
    /// the values `[page_tokens][v_pad]`; 16 positions of either in the order that a warp loads them in
    /// (`key_at`, `value_at` in `kernels-gen/cuda`). A page has blocks for the most KV heads that a layer has; those
    /// that a layer lacks stay unused. Pages start zeroed.
    pub kv: u64,
    /// The activation buffers, at the offsets that the plan's buffers give.
    pub arena: u64,
    /// [`SYNC_BYTES`] of counters, zeroed.
    pub sync: u64,
    /// `f32 [logit rows][vocab]`.
    pub logits: u64,
    /// `u32 [rows]`: token id of each row; of a program that begins with taps, the number of their row.
    pub tokens: u64,
    /// `u32 [rows]`: position of each row in its sequence. Rows of a sequence are adjacent and
    /// ascending.
    pub positions: u64,
    /// `u32 [rows]`: page-table row of each row.
    pub sequences: u64,
    /// `u32 [logit_rows]`: the rows whose logits are wanted, ascending.
    pub logit_index: u64,
    /// `u32 [sequences][pages_per_sequence]` page numbers.
    pub page_table: u64,
    /// Mapped host memory: `u32 [`[`STALL_WORDS`]`]`, zero until a wait gives up.
    pub stall: u64,
    /// Mapped host memory: `u32 [steps][`[`LAUNCH_ROWS`]`]`, the tokens that were chosen, plus one;
    /// zero until they are there. Null with `steps` of 1 if nobody wants them. Of rounds [`ROUND_WORDS`] each.
    pub chosen: u64,
    /// Mapped host memory: one `u32`; the launch ends after the step in which it turns non-zero.
    pub halt: u64,
    /// `u64 [SMs][stages of a step][`[`TRACE_FIELDS`]`]` of the last step, or null.
    pub trace: u64,
    /// Mapped host memory: `u32 [`[`EXPERT_COUNTS`]`]`, to which the launch adds, over all steps and layers, the experts
    /// that any row chose, those that were foreseen, and those of these that no row chose. Null if nobody wants to know.
    pub experts: u64,
    /// What layers leave for a draft, `f32 [rows][taps][columns]`: the rows of this launch, where a step
    /// writes them; all rows of the last step, where a draft reads them. Unused without a draft.
    pub taps: u64,
    /// [`SampleRow`] `[logit_rows]`: how each row's token is chosen; null if all are the largest logits.
    pub sampling: u64,
    /// `[`[`SAMPLE_ROW_BYTES`]`]` for each row of the step, where SMs add up what they find when tokens are
    /// chosen by chance. Nothing need lie there. Aligned to 256 bytes; unused if `sampling` is null.
    pub choices: u64,
    /// The KV cache of a draft, of the layout of [`LaunchArgs::kv`], for the round's kernel alone, as what follows.
    pub draft_kv: u64,
    /// The activation buffers of a draft's block, aligned to 256 bytes.
    pub block_arena: u64,
    /// Those of what makes a draft's context, aligned to 256 bytes.
    pub inject_arena: u64,
    /// [`RoundSequence`] `[round_sequences]`. The round's kernel takes its rows from there, and reads none of
    /// `tokens`, `positions`, `sequences` and `logit_index`.
    pub round: u64,
    /// Nanoseconds after which a wait gives up.
    pub patience_ns: u64,
    /// Rows, from 1 to those of the kernel's step.
    pub rows: u32,
    /// Rows whose logits are wanted, 0 to `rows`.
    pub logit_rows: u32,
    /// Entries of the page table per sequence.
    pub pages_per_sequence: u32,
    /// Pages of the KV cache in all.
    pub kv_pages: u32,
    /// Steps to run, at least 1. Each step after the first decodes the tokens that the one before
    /// chose (as `sampling` says, or the largest logit, the lowest id among equals), one position on; more
    /// than 1 needs `logit_rows == rows`, and pages for all positions. Of the round's kernel, rounds.
    pub steps: u32,
    /// Used entries of `stop_tokens`.
    pub stop_count: u32,
    /// The launch ends after the step in which any row chose one of these.
    pub stop_tokens: [u32; STOP_TOKENS],
    /// Bytes of weights that an SM has on their way at the same time ahead of its consumers, about: enough for the
    /// bandwidth, and no more, since all other accesses queue up behind them.
    pub in_flight: u32,
    /// 0, which the compiler cannot know: what is combined with it makes one access wait for another.
    pub zero: u32,
    /// How experts are chosen: 0 as the model does; else at random, all with the same weight: 1 for every
    /// row by itself, 1 + n with n thousandths of a row's experts the same for all rows.
    pub routing: u32,
    /// Start of the random numbers of a `routing` that is not the model's.
    pub routing_seed: u32,
    /// Sequences that take part in rounds.
    pub round_sequences: u32,
    /// Passes of the draft that their blocks take, as many in each as fit into the kernel's step, in their order; no
    /// block is cut. `rows` and `logit_rows` are those of the model's step: the last token and the guesses of each
    /// sequence.
    pub block_passes: u32,
    /// For measurements: a thousand times the tokens that a round adds on average, whatever was guessed. 0 takes
    /// the guesses that are right.
    pub accept: u32,
    /// Bytes of experts' first products that a step's rows foresee in each layer before they choose, about, and at least one
    /// expert of each row: what memory brings until the choice is made. 0 foresees nothing, nor does a `routing` by chance.
    pub foresee: u32,
}

/// Words of [`LaunchArgs::experts`].
pub const EXPERT_COUNTS: usize = 3;

/// A sequence of a launch of rounds, at most half as many as the kernel's step has rows. In each round a block behind the last token guesses, a step of the model
/// has a row for that token and for each guess that is verified, and the tokens that it chooses are added up to
/// the first guess that was not chosen. All rows of the model's step become the draft's context; those of wrong
/// guesses lie behind its end, where the next block writes over them.
///
/// The launch ends behind the round in which a sequence chose a stop token or had all tokens that it may have, or
/// behind which the next round of a sequence has no room.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundSequence {
    /// The last token, which the model has not processed.
    pub token: u32,
    /// Its position, and the length of the draft's context.
    pub position: u32,
    /// Row of the page table.
    pub sequence: u32,
    /// Guesses that are verified: from 1 to one less than `rows`.
    pub guesses: u32,
    /// Rows of a block: from 2 on.
    pub rows: u32,
    /// Tokens that may still be added, at least 1.
    pub left: u32,
    /// Positions that have pages; the first round fits.
    pub limit: u32,
    /// Number of its first row in the model's step: rows of sequences lie side by side, without a gap.
    pub first_row: u32,
}

impl RoundSequence {
    /// As it lies in memory.
    pub const fn words(&self) -> [u32; ROUND_SEQUENCE_WORDS] {
        let RoundSequence { token, position, sequence, guesses, rows, left, limit, first_row } = *self;
        [token, position, sequence, guesses, rows, left, limit, first_row]
    }
}

/// Words of a [`RoundSequence`].
pub const ROUND_SEQUENCE_WORDS: usize = 8;

/// Words of [`LaunchArgs::chosen`] for each round: a [`RoundResult`] of each sequence, then the tokens plus one, from
/// the sequence's `first_row` on. All are zero until they are there, in any order.
pub const ROUND_WORDS: usize = 2 * LAUNCH_ROWS;

/// What a round brought a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundResult {
    /// Tokens that were added, at least 1.
    pub tokens: usize,
    /// Guesses that are among them.
    pub right: usize,
}

impl RoundResult {
    /// As a word that is not zero.
    pub const fn word(&self) -> u32 {
        self.tokens as u32 | (self.right as u32) << 8
    }

    /// From a word that is not zero.
    pub const fn of(word: u32) -> RoundResult {
        RoundResult { tokens: (word & 0xff) as usize, right: (word >> 8 & 0xff) as usize }
    }
}

/// How a row's token is chosen by chance: what sampling parameters come to in numbers, the same for host and
/// kernel, which come to the same token (`runtime/src/sampling/draw.rs`, `kernels-gen/cuda/sample.cuh`).
///
/// A token whose logit is `x` has the distance `d = (best - x) * scale`, rounded to float32 after each
/// operation, where `best` is the largest logit, and the weight 2^-d in units of 2^-[`WEIGHT_BITS`]; beyond
/// [`REACH`] it has none and counts for nothing. Tokens rank by logit, the largest first, then by id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SampleRow {
    /// log2(e) / temperature, above 0; 0 takes the largest logit, and nothing else matters.
    pub scale: f32,
    /// The largest distance that `min_p` lets through, from 0 to [`REACH`].
    pub reach: f32,
    /// Tokens that are kept, by rank; 0 keeps all.
    pub top_k: u32,
    /// 0.
    pub reserved: u32,
    /// 2^64 times the share of all weights that is kept, by rank; 0 keeps all.
    pub top_p: u64,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl SampleRow {
    /// As it lies in memory.
    pub const fn words(&self) -> [u32; SAMPLE_WORDS] {
        let SampleRow { scale, reach, top_k, reserved, top_p, seed } = *self;
        let (p, s) = (top_p, seed);
        let wide = [p as u32, (p >> 32) as u32, s as u32, (s >> 32) as u32];
        [scale.to_bits(), reach.to_bits(), top_k, reserved, wide[0], wide[1], wide[2], wide[3]]
    }
}

/// Words of a [`SampleRow`].
pub const SAMPLE_WORDS: usize = 8;

/// Bytes that a row takes of [`LaunchArgs::choices`]: five tables of 256 sums and counts, two lists of 512 ranks.
pub const SAMPLE_ROW_BYTES: usize = 5 * 3200 + 2 * 4096;

/// The largest distance of a token that has a weight, in powers of two of its probability.
pub const REACH: f32 = 40.0;

/// Logarithm of the best token's weight to base 2. Weights of 2^23 tokens add up in 64 bits.
pub const WEIGHT_BITS: u32 = 40;

/// In place of a chosen token: a logit of the row is NaN or +infinity. The launch ends with that step.
pub const BROKEN_LOGITS: u32 = 0xffff_fffe;

/// In place of a chosen token: all logits of the row are -infinity. The launch ends with that step.
pub const NO_LOGITS: u32 = 0xffff_fffd;

/// What a wait that gave up leaves in [`LaunchArgs::stall`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StallRecord {
    /// 1 once the record is whole.
    pub code: u32,
    /// Number of the stage in the step.
    pub stage: u32,
    /// The SM (block) that waited.
    pub sm: u32,
    /// Who waited: see [`StallRecord::role_name`].
    pub role: u32,
    /// What it saw.
    pub seen: u32,
    /// What it waited for.
    pub expected: u32,
    /// Step of the launch.
    pub step: u32,
    /// Unused.
    pub reserved: u32,
}

impl StallRecord {
    /// The waiting part of the kernel, for people.
    pub const fn role_name(&self) -> &'static str {
        match self.role {
            1 => "the loader, for a free slot of the ring",
            2 => "a consumer, for weights",
            3 => "a consumer, for the stage's inputs",
            4 => "a consumer, for room for its sums",
            5 => "the control warp, for the consumers",
            6 => "the control warp, for the other SMs",
            7 => "the loader, for the choice of experts",
            8 => "the control warp, for the choice of experts",
            9 => "the control warp, for what other SMs wrote",
            10 => "the loader, for the step's rows",
            11 => "the control warp, for the loader to end what it streams",
            12 => "the loader, for the experts that are foreseen",
            13 => "a consumer, for the experts that are foreseen",
            _ => "an unknown part",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_have_no_holes() {
        // The kernel's structure is written by hand to the same layout.
        assert_eq!(std::mem::size_of::<LaunchArgs>(), 23 * 8 + 14 * 4 + STOP_TOKENS * 4);
        assert_eq!(std::mem::size_of::<SampleRow>(), SAMPLE_WORDS * 4);
        assert_eq!(std::mem::size_of::<RoundSequence>(), ROUND_SEQUENCE_WORDS * 4);
        assert_eq!(std::mem::size_of::<StallRecord>(), STALL_WORDS * 4);
    }
}
