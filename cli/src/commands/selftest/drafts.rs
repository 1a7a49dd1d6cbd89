//! Drafts of cases: random ones, what their blocks should be, and what is checked of them.

use super::cases::{CONTEXT, Case, ROWS, Random, SEQUENCES};
use super::checks::{
    Added, Bench, Checked, DECODED, LENGTHS, Machine, Measured, SAMPLING_STREAM, Stop, choose, ended,
    largest, parameters, sequence_rows,
};
use super::compare::{deviation, same_bits};
use super::prepare::{Model, WORST};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use tilec_ir::graph::Op;
use tilec_ir::graph::interp::{Interpreter, Row, WeightSource};
use tilec_runtime::engine::{BlockInput, RoundInput, RoundOptions};
use tilec_runtime::sampling::SamplingParams;

/// A draft for the model of a case.
#[derive(Clone, Debug)]
pub struct DraftCase {
    /// Its config.json.
    pub config: Value,
    /// Its layers.
    pub layers: usize,
    /// Whether masks have an embedding of their own.
    pub mask_embedding: bool,
    /// Base of the rope of the context's keys, if it is another.
    pub context_theta: Option<usize>,
    /// Candidates of its selector, if it is of the second version.
    pub candidates: Option<usize>,
}

impl DraftCase {
    /// A draft for a model of these sizes, and what it is, for people.
    pub fn new(random: &mut Random, hidden: usize, layers: usize, vocab: usize) -> (DraftCase, String) {
        let (head_dim, v_head_dim) = random.pick(&[(16, 16), (64, 64), (48, 32), (96, 64), (128, 128)]);
        let (kv_heads, group) = (random.pick(&[1, 2, 3]), random.pick(&[1, 2, 4]));
        let heads = kv_heads * group;
        let intermediate = random.pick(&[64, 72, 200, 256]);
        let own_layers = 1 + random.below(3);
        // Layers of the target in any order.
        let mut taps: Vec<usize> = (0..layers).collect();
        (1..layers).rev().for_each(|at| taps.swap(at, random.below(at + 1)));
        taps.truncate(1 + random.below(layers));
        let window = random.pick(&[3, 5, 64, 200]);
        let kinds: Vec<bool> = (0..own_layers).map(|_| random.one_in(2)).collect();
        let types: Vec<&str> = kinds
            .iter()
            .map(|sliding| if *sliding { "sliding_attention" } else { "full_attention" })
            .collect();
        let causal = random.one_in(4);
        let (sinks, scaled, partial) = (random.one_in(2), random.one_in(2), random.one_in(2));
        let bias = random.one_in(2);
        let mut own = json!({
            "target_layer_ids": taps,
            "mask_token_id": random.below(vocab),
            "attention_sink_bias": sinks,
        });
        if scaled {
            own["attention_value_scale"] = 0.612.into();
        }
        let mut config = json!({
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": own_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "max_position_embeddings": CONTEXT,
            "vocab_size": vocab,
            "attention_bias": bias,
            // With more rows than a launch has, blocks of as many as it has.
            "block_size": random.pick(&[8, 16]),
            "sliding_window": window,
            "layer_types": types,
            "is_causal": causal,
            "dflash_config": own,
        });
        if partial {
            config["partial_rotary_factor"] = 0.5.into();
        }
        let mut draft = DraftCase {
            candidates: None,
            config,
            layers: own_layers,
            mask_embedding: random.one_in(2),
            context_theta: random.one_in(2).then_some(500),
        };
        let mut name = format!("draft {heads}/{kv_heads}x{head_dim}+{v_head_dim} L{own_layers} of {taps:?}");
        for (part, there) in [
            ("causal", causal),
            ("sinks", sinks),
            ("scaled", scaled),
            ("partial", partial),
            ("mask", draft.mask_embedding),
            ("context-rope", draft.context_theta.is_some()),
        ] {
            if there {
                name.push(' ');
                name.push_str(part);
            }
        }
        if kinds.contains(&true) {
            name.push_str(&format!(" w{window}"));
        }
        // Behind all else, so that the others stay as they were.
        if random.one_in(2) {
            let (k, rank, group) =
                (random.pick(&[1, 4, 16, 32]), random.pick(&[8, 40, 256]), random.pick(&[2, 8]));
            draft.config["architectures"] = json!(["DFlash2DraftModel"]);
            let own = &mut draft.config["dflash_config"];
            (own["conv_kernel_size"], own["conv_group_size"]) = (2.into(), group.into());
            (own["selector_top_k"], own["selector_rank"]) = (k.into(), rank.into());
            draft.candidates = Some(k);
            name.push_str(&format!(" dflash2 groups of {group}, {k} candidates by {rank}"));
        }
        (draft, name)
    }
}

/// A block, and the logits that its guesses should have.
pub struct ReferenceBlock {
    /// The block: of sequence 0.
    pub block: BlockInput,
    /// `[wanted][vocab]`.
    pub logits: Vec<f32>,
}

/// Blocks behind the beginnings of a prompt, the longest first, by the interpreter with float32 activations.
///
/// # Errors
/// When the interpreter refuses a graph or the weights.
pub fn reference(model: &Model, case: &Case, prompt: &[u32]) -> Result<Vec<ReferenceBlock>> {
    let Some(draft) = &model.draft else { return Ok(Vec::new()) };
    let (target, inject, block) =
        (model.weights(), model.weights_of(&draft.inject), model.weights_of(&draft.block));
    reference_with(model, case, prompt, [&target, &inject, &block])
}

/// The same with other weights for the three graphs.
///
/// # Errors
/// As [`reference`].
pub fn reference_with(
    model: &Model,
    case: &Case,
    prompt: &[u32],
    weights: [&dyn WeightSource; 3],
) -> Result<Vec<ReferenceBlock>> {
    let Some(draft) = &model.draft else { return Ok(Vec::new()) };
    let refused = "the interpreter refuses the draft";
    let rows: Vec<Row> =
        (0..).zip(prompt).map(|(position, token)| Row { token: *token, position, sequence: 0 }).collect();
    let mut target =
        Interpreter::new(&model.graph, weights[0]).context("the interpreter refuses the model")?;
    let mut taps = Vec::new();
    target.step_observed(&rows, &[], &mut |node, values| {
        if node.op == Op::Taps {
            taps = values.to_vec();
        }
    })?;
    let mut inject = Interpreter::new(&draft.inject, weights[1]).context(refused)?;
    let mut block = Interpreter::new(&draft.block, weights[2]).context(refused)?;
    inject.set_input(&taps);
    inject.step(&rows, &[])?;
    block.exchange_caches(&mut inject).map_err(anyhow::Error::msg)?;
    let tokens = case.tokens(BLOCK_TOKENS, 8);
    let mask = draft.draft.mask_token;
    // Blocks across the end of a chunk of 128, shorter ones, and hardly a context; each goes back.
    let places = [(prompt.len(), 8), (252, 8), (125, 6), (20, 5), (13, 8), (1, 2), (0, 8)];
    let places = places.iter().filter(|(position, _)| *position <= prompt.len());
    places
        .zip(tokens)
        .map(|((position, count), token)| {
            let count = (*count).min(draft.rows);
            let row =
                |at| Row { token: if at == 0 { token } else { mask }, position: position + at, sequence: 0 };
            let rows: Vec<Row> = (0..count).map(row).collect();
            let wanted: Vec<usize> = (1..count).collect();
            let logits = block.step(&rows, &wanted)?;
            let position = *position as u32;
            let block = BlockInput { token, position, sequence: 0, rows: count, wanted: count - 1 };
            Ok(ReferenceBlock { block, logits })
        })
        .collect()
}

/// Purpose of the random tokens that blocks begin with.
const BLOCK_TOKENS: u64 = 2;

/// Sizes of the steps that a context is made in.
const CUTS: [usize; 5] = [5, 8, 1, 17, 9];

/// Sequences that have blocks in one pass.
const TOGETHER: [usize; 4] = [0, 3, 5, 4];

impl Bench<'_> {
    /// Runs tokens of a sequence, and tells the draft of them, in steps of these sizes.
    fn feed_draft(&mut self, sequence: u32, tokens: &[u32], sizes: &[usize]) -> Result<(), Stop> {
        self.machine.reset(sequence as usize);
        let rows = sequence_rows(sequence, 0, tokens);
        let (mut rest, mut sizes) = (&rows[..], sizes.iter().cycle());
        while !rest.is_empty() {
            let (step, after) = rest.split_at(rest.len().min(*sizes.next().unwrap_or(&1)));
            self.machine.step(step, &[])?;
            self.machine.inject(&(0..step.len() as u32).collect::<Vec<_>>())?;
            rest = after;
        }
        Ok(())
    }

    /// Blocks behind the prompt and its beginnings, in the order of the reference.
    fn all_blocks(&mut self) -> Result<Vec<Vec<f32>>, Stop> {
        let prepared = self.prepared;
        let one = |block: &BlockInput, bench: &mut Self| -> Result<Vec<f32>, Stop> {
            let logits = bench.machine.draft(&[*block])?;
            super::compare::finite("a block's logits", &logits, bench.case.vocab)?;
            Ok(logits)
        };
        prepared.blocks.iter().map(|reference| one(&reference.block, self)).collect()
    }

    /// Blocks against the interpreter.
    pub(super) fn blocks(&mut self) -> Checked {
        let rows = self.prepared.blocks.iter().map(|reference| reference.block.wanted).sum();
        let prompt = &self.prepared.prompt;
        let made = self.machine.poison().map_err(Stop::from).and_then(|()| {
            self.feed_draft(0, prompt, &[prompt.len()])?;
            self.all_blocks()
        });
        self.drafted = made.map_err(ended(rows))?;
        let bound = self.prepared.draft_bound;
        let (mut squares, mut worst, mut problem) = (0.0, 0f64, None);
        for (found, reference) in self.drafted.iter().zip(&self.prepared.blocks) {
            let BlockInput { position, rows: count, .. } = reference.block;
            let off = deviation(found, &reference.logits, self.case.vocab, 0).map_err(|what| {
                ended(rows)(Stop::Wrong(format!("block of {count} rows behind {position} positions: {what}")))
            })?;
            squares += off.typical.powi(2) * reference.block.wanted as f64;
            if off.worst > worst {
                worst = off.worst;
                if worst > WORST * bound {
                    let what = format!(
                        "block of {count} rows behind {position} positions: guess {} is off by {worst:.2e} of its size",
                        off.row + 1
                    );
                    problem = Some(what);
                }
            }
        }
        let typical = (squares / rows as f64).sqrt();
        let measured = Measured { rows, error: Some(typical), worst: Some(worst), bound: Some(bound) };
        if typical > bound && problem.is_none() {
            problem = Some(format!("guesses are off by {typical:.2e} of their size"));
        }
        match problem {
            Some(what) => Err((measured, Stop::Wrong(what))),
            None => Ok(measured),
        }
    }

    /// Contexts that were made in other steps.
    pub(super) fn draft_cut(&mut self) -> Checked {
        let mut rows = 0;
        for sizes in [&CUTS[..], &[1]] {
            let check = |bench: &mut Self| -> Result<(), Stop> {
                bench.machine.poison()?;
                let prompt = &bench.prepared.prompt;
                bench.feed_draft(0, prompt, sizes)?;
                let found = bench.all_blocks()?;
                for ((found, wanted), reference) in
                    found.iter().zip(&bench.drafted).zip(&bench.prepared.blocks)
                {
                    same_bits(found, wanted, bench.case.vocab).map_err(|what| {
                        let BlockInput { rows, position, .. } = reference.block;
                        format!(
                            "steps of {sizes:?}, block of {rows} rows behind {position} positions: {what}"
                        )
                    })?;
                }
                Ok(())
            };
            rows += self.prepared.blocks.iter().map(|reference| reference.block.wanted).sum::<usize>();
            check(self).map_err(ended(rows))?;
        }
        Ok(Measured { rows, ..Measured::default() })
    }

    /// Blocks of several sequences in one call, in any order, against each alone.
    pub(super) fn draft_company(&mut self) -> Checked {
        let vocab = self.case.vocab;
        let mut rows = 0;
        let mut check = |bench: &mut Self| -> Result<(), Stop> {
            bench.machine.poison()?;
            let mut blocks = Vec::new();
            for (number, sequence) in TOGETHER.into_iter().enumerate() {
                let length = LENGTHS[sequence].min(CONTEXT - bench.prepared.draft_rows);
                let tokens = bench.case.tokens(100 + sequence as u64, length + 1);
                bench.feed_draft(sequence as u32, &tokens[..length], &[31])?;
                let rows = [2, bench.prepared.draft_rows, 3, 5][number].min(bench.prepared.draft_rows);
                blocks.push(BlockInput {
                    token: tokens[length],
                    position: length as u32,
                    sequence: sequence as u32,
                    rows,
                    wanted: rows - 1,
                });
            }
            let mut alone = Vec::new();
            for block in &blocks {
                alone.push(bench.machine.draft(&[*block])?);
            }
            for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1], [0, 2, 3, 1]] {
                let together: Vec<BlockInput> = order.iter().map(|at| blocks[*at]).collect();
                let found = bench.machine.draft(&together)?;
                rows += found.len() / vocab;
                let wanted: Vec<f32> = order.iter().flat_map(|at| &alone[*at]).copied().collect();
                same_bits(&found, &wanted, vocab).map_err(|what| {
                    format!("blocks of sequences {:?}: {what}", order.map(|at| TOGETHER[at]))
                })?;
            }
            Ok(())
        };
        check(self).map_err(ended(rows))?;
        Ok(Measured { rows, ..Measured::default() })
    }

    /// [`Bench::rounds_of`] the largest logits, then by chance.
    pub(super) fn rounds(&mut self) -> Checked {
        let greedy = self.rounds_of(&SamplingParams::greedy())?;
        let mut random = Random::new(self.case.seed, SAMPLING_STREAM + 1);
        let sampled = self.rounds_of(&parameters(&mut random, self.case.vocab))?;
        Ok(Measured { rows: greedy.rows + sampled.rows, ..greedy })
    }

    /// Rounds behind the prompt's last token: the draft's guesses, or the right ones for a while and then the
    /// draft's, are verified in one step. The tokens are those of single steps, and the context that the
    /// rounds made is that of the text in one piece.
    fn rounds_of(&mut self, params: &SamplingParams) -> Checked {
        let vocab = self.case.vocab;
        let mut rows = 0;
        let mut check = |bench: &mut Self| -> Result<(), Stop> {
            let prompt = &bench.prepared.prompt;
            let (last, before) = prompt.split_last().ok_or_else(|| Stop::Wrong("an empty prompt".into()))?;
            bench.machine.poison()?;
            bench.feed_draft(0, before, &[before.len().max(1)])?;
            let first = sequence_rows(0, before.len() as u32, &[*last]);
            let steps = bench.stepwise(&first, &[params], DECODED + bench.prepared.draft_rows)?;
            let wanted: Vec<u32> = steps.into_iter().flatten().collect();

            bench.machine.poison()?;
            bench.feed_draft(0, before, &[before.len().max(1)])?;
            let mut text = prompt.clone();
            for round in 0.. {
                let done = text.len() - prompt.len();
                if done >= DECODED {
                    break;
                }
                let position = text.len() as u32 - 1;
                let block = BlockInput {
                    token: text[text.len() - 1],
                    position,
                    sequence: 0,
                    rows: bench.prepared.draft_rows,
                    wanted: bench.prepared.draft_rows - 1,
                };
                let logits = bench.machine.draft(&[block])?;
                let mut guesses: Vec<u32> = logits.chunks_exact(vocab).map(largest).collect();
                let own = bench.machine.guess(&[block], &logits, vocab)?;
                // A selector takes one of the candidates.
                let candidates = bench.case.draft.as_ref().and_then(|draft| draft.candidates);
                let ranks = own.iter().zip(logits.chunks_exact(vocab)).map(|(token, logits)| {
                    let own = logits.get(*token as usize).copied().unwrap_or(f32::NEG_INFINITY);
                    logits.iter().filter(|logit| **logit > own).count()
                });
                let taken = match candidates {
                    Some(most) => own.len() == guesses.len() && ranks.into_iter().all(|rank| rank < most),
                    None => own == guesses,
                };
                if !taken {
                    return Err(Stop::Wrong(format!(
                        "round {round}: the kernel's own guesses are {own:?}, the largest logits {guesses:?}"
                    )));
                }
                guesses = own;
                // So that rounds of all lengths come up, however good the draft is.
                let helped = [0, 3, 1, 7, 2][round % 5].min(guesses.len());
                guesses[..helped].copy_from_slice(&wanted[done..done + helped]);
                let tokens: Vec<u32> = [block.token].into_iter().chain(guesses.iter().copied()).collect();
                let step = sequence_rows(0, position, &tokens);
                rows += step.len();
                let logits = bench.step(&step)?;
                let sampling = vec![params; step.len()];
                let chosen = choose(&step, &sampling, &logits, vocab)?;
                let own = bench.machine.step_sampled(&step, &sampling, &chosen)?;
                if own != chosen {
                    return Err(Stop::Wrong(format!(
                        "round {round}: the kernel itself chose {own:?}, of its logits {chosen:?} are chosen \
                         ({params:?})"
                    )));
                }
                let right = chosen.iter().zip(&guesses).take_while(|(chosen, guess)| chosen == guess).count();
                for (at, (found, wanted)) in chosen[..=right].iter().zip(&wanted[done..]).enumerate() {
                    if found != wanted {
                        return Err(Stop::Wrong(format!(
                            "round {round}, row {at} of {}: chose token {found} where single steps chose {wanted}",
                            step.len()
                        )));
                    }
                }
                text.extend(&chosen[..=right]);
                bench.machine.inject(&(0..=right as u32).collect::<Vec<_>>())?;
            }
            let (token, before) = text.split_last().ok_or_else(|| Stop::Wrong("an empty text".into()))?;
            let rows = bench.prepared.draft_rows;
            let position = before.len() as u32;
            let block = BlockInput { token: *token, position, sequence: 0, rows, wanted: rows - 1 };
            let found = bench.machine.draft(&[block])?;
            bench.machine.poison()?;
            let steps: Vec<usize> = before.chunks(ROWS).map(<[u32]>::len).collect();
            bench.feed_draft(0, before, &steps)?;
            let wanted = bench.machine.draft(&[block])?;
            same_bits(&found, &wanted, vocab)
                .map_err(|what| format!("a block behind rounds against one behind the whole text: {what}"))?;
            Ok(())
        };
        check(self).map_err(ended(rows))?;
        Ok(Measured { rows, ..Measured::default() })
    }
}

/// Rounds of a machine, step by step, each sequence by itself: by round, the tokens of each. Ends as a launch does.
///
/// # Errors
/// What the machine says, or parameters that nothing can be chosen by.
pub fn rounds_by_steps(
    machine: &mut dyn Machine,
    inputs: &[RoundInput],
    sampling: &[&SamplingParams],
    options: RoundOptions<'_>,
    vocab: usize,
) -> Result<Added, Stop> {
    let mut inputs = inputs.to_vec();
    let mut rounds = Vec::new();
    let due = |rounds: usize| {
        options.accept.map(|tokens| ((tokens * 1000.0).round() as usize * rounds + 500) / 1000)
    };
    for number in 0..options.rounds {
        let mut round = Vec::new();
        let mut over = false;
        for (at, RoundInput { block, left, limit }) in inputs.iter_mut().enumerate() {
            let logits = machine.draft(&[*block])?;
            let guesses = machine.guess(&[*block], &logits, vocab)?;
            let tokens: Vec<u32> = [block.token].into_iter().chain(guesses.iter().copied()).collect();
            let rows = sequence_rows(block.sequence, block.position, &tokens);
            let logits = machine.step(&rows, &(0..rows.len() as u32).collect::<Vec<_>>())?;
            let params = vec![sampling[at]; rows.len()];
            let chosen = choose(&rows, &params, &logits, vocab)?;
            let right = match due(number).zip(due(number + 1)) {
                Some((before, now)) => now.saturating_sub(before + 1).min(guesses.len()),
                None => chosen.iter().zip(&guesses).take_while(|(chosen, guess)| chosen == guess).count(),
            };
            let stop = chosen[..=right].iter().position(|token| options.stop_tokens.contains(token));
            let taken = (stop.unwrap_or(right) + 1).min(*left);
            machine.inject(&(0..taken as u32).collect::<Vec<_>>())?;
            (block.token, block.position) = (chosen[taken - 1], block.position + taken as u32);
            *left -= taken;
            over |= stop.is_some() || *left == 0 || block.position as usize + block.rows > *limit;
            round.push(chosen[..taken].to_vec());
        }
        rounds.push(round);
        if over {
            break;
        }
    }
    Ok(rounds)
}

/// Tokens that launched rounds add: as many as the draft guessed, or as they are told.
const ACCEPTED: [Option<f64>; 3] = [None, Some(2.6), Some(1.4)];

/// Rounds of some sequences, each behind its text.
struct Rounds<'a> {
    texts: Vec<Vec<u32>>,
    inputs: Vec<RoundInput>,
    sampling: Vec<&'a SamplingParams>,
}

impl Bench<'_> {
    /// Rounds in one launch against the same rounds step by step: one sequence, and as many as fit; by the largest
    /// logits and by chance; with few tokens, and with a stop token. Behind them blocks have the same bits.
    pub(super) fn launched_rounds(&mut self) -> Checked {
        let mut random = Random::new(self.case.seed, SAMPLING_STREAM + 2);
        let (chance, greedy) = (parameters(&mut random, self.case.vocab), SamplingParams::greedy());
        let (all, pass) = (self.prepared.draft_rows, self.case.pass_rows);
        let several = (pass / 2).min(TOGETHER.len());
        let mut rows = 0;
        for (number, accept) in ACCEPTED.into_iter().cycle().take(6).enumerate() {
            // Alone a whole block; in company a guess is verified, of blocks that fit one pass, or of whole ones.
            let (count, block_rows, wanted) = match number {
                1 => (several, (pass / several).min(all), 1),
                3 | 5 => (several, all, 1),
                _ => (1, all, all - 1),
            };
            let params = if number < 3 { &greedy } else { &chance };
            let texts = TOGETHER[..count].iter().map(|sequence| {
                let length = LENGTHS[*sequence].min(CONTEXT - 4 * DECODED);
                self.case.tokens(100 + *sequence as u64, length + 1)
            });
            let texts: Vec<Vec<u32>> = texts.collect();
            let input = |(sequence, text): (u32, &Vec<u32>)| {
                let (token, position) = (text[text.len() - 1], text.len() as u32 - 1);
                let block = BlockInput { token, position, sequence, rows: block_rows, wanted };
                let left = if number == 4 { 7 } else { 1000 };
                RoundInput { block, left, limit: text.len() + DECODED }
            };
            let inputs = (0..).zip(&texts).map(input).collect();
            let sampling = (0..count).map(|at| if at == 1 { &greedy } else { params }).collect();
            let rounds = Rounds { texts, inputs, sampling };
            let check = |bench: &mut Self| -> Result<usize, Stop> {
                let mut options = RoundOptions { rounds: 9, stop_tokens: &[], accept };
                let mut wanted = bench.run_rounds(&rounds, options, false)?;
                let stop: Vec<u32> = wanted.0.get(1).map(|round| round[0][0]).into_iter().collect();
                if number == 5 {
                    options.stop_tokens = &stop;
                    wanted = bench.run_rounds(&rounds, options, false)?;
                }
                let found = bench.run_rounds(&rounds, options, true)?;
                let what = || format!("{count} sequences, {block_rows} rows of a block, {accept:?} accepted");
                if wanted.0 != found.0 {
                    let what = what();
                    let (found, wanted) = (found.0, wanted.0);
                    return Err(Stop::Wrong(format!("{what}: a launch added {found:?}, steps {wanted:?}")));
                }
                same_bits(&found.1, &wanted.1, bench.case.vocab)
                    .map_err(|problem| format!("blocks behind {}: {problem}", what()))?;
                Ok(found.0.iter().flatten().map(Vec::len).sum())
            };
            rows += check(self).map_err(ended(rows))?;
        }
        Ok(Measured { rows, ..Measured::default() })
    }

    /// Runs rounds from nothing, in one launch or step by step: their tokens, and the logits of a block behind each
    /// sequence.
    fn run_rounds(
        &mut self,
        rounds: &Rounds<'_>,
        options: RoundOptions<'_>,
        launched: bool,
    ) -> Result<(Added, Vec<f32>), Stop> {
        let Rounds { texts, inputs, sampling } = rounds;
        let vocab = self.case.vocab;
        self.machine.poison()?;
        for (sequence, text) in (0..).zip(texts) {
            self.feed_draft(sequence, &text[..text.len() - 1], &[31])?;
        }
        let tokens = match launched {
            true => self.machine.rounds(inputs, sampling, options, vocab)?,
            false => rounds_by_steps(self.machine, inputs, sampling, options, vocab)?,
        };
        let mut logits = Vec::new();
        for (at, input) in inputs.iter().enumerate() {
            let own: Vec<u32> = tokens.iter().flat_map(|round| round[at].iter().copied()).collect();
            let Some(token) = own.last() else {
                return Err(Stop::Wrong("a round added no token".into()));
            };
            let position = input.block.position + own.len() as u32;
            let block = BlockInput { token: *token, position, rows: 2, wanted: 1, ..input.block };
            logits.extend(self.machine.draft(&[block])?);
        }
        Ok((tokens, logits))
    }
}

const _: () = assert!(TOGETHER.len() <= SEQUENCES);
