//! Generating text for a person: what `run` and `chat` share.

use crate::args::{GuessArgs, ModelArgs, SamplingArgs, WeightsArgs};
use crate::text::Text;
use crate::ui::mib;
use crate::{host, session, source};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::Write;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;
use tilec_ir::cost::StageCost;
use tilec_ir::plan::Plan;
use tilec_runtime::generate::{
    Completion, DraftLimit, DraftStats, FinishReason, Generator, Request, StepTime,
};
use tilec_runtime::sampling::SamplingParams;

/// A loaded model with its tokenizer.
pub struct Writer {
    generator: Generator,
    /// How many tokens are guessed at a time, at most.
    pub limit: DraftLimit,
    /// Between text and tokens.
    pub text: Text,
}

/// A finished text.
pub struct Written {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    completion: Completion,
    figures: Figures,
    /// What became of a draft's guesses.
    draft: DraftStats,
}

impl Writer {
    /// Loads a model, compiled first if it is not.
    ///
    /// # Errors
    /// When it does not compile or load, or has no tokenizer.
    pub fn open(model: &ModelArgs, weights: &WeightsArgs, guess: &GuessArgs) -> Result<Writer> {
        let draft = &guess.draft;
        if let Some(most) = draft.draft_max.filter(|most| guess.draft_min > *most) {
            bail!("--draft-min {} is more than --draft-max {most}", guess.draft_min);
        }
        let (folder, plan) = source::plan(&model.path, &model.target)?;
        // Before the weights are packed: a model without a tokenizer is refused at once.
        let text = Text::load(&plan, weights)?;
        let engine = session::load(&folder, weights, false, !draft.no_draft)?;
        let asked = [("--draft-max", draft.draft_max), ("--draft-min", Some(guess.draft_min))];
        if let Some(most) = engine.draft_block()
            && let Some((option, asked)) = asked
                .iter()
                .find_map(|(option, asked)| Some((option, asked.filter(|n| *n as usize >= most)?)))
        {
            bail!(
                "{option} {asked}: the plan's draft guesses at most {} tokens at a time; lower it, or compile \
                 with a larger draft.dflash.block",
                most - 1
            );
        }
        let mut generator = Generator::new(engine, Some(Arc::clone(&text.tokenizer)));
        generator.set_draft_rows(draft.rows());
        generator.set_draft_min(guess.draft_min as usize);
        generator.set_draft_sample_method(guess.draft_sample_method.into());
        Ok(Writer { generator, limit: DraftLimit::default(), text })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        self.generator.engine().plan()
    }

    /// Generates behind `prompt`; with `out`, text is written there as it comes.
    ///
    /// # Errors
    /// When the prompt does not fit, a parameter is out of range, a step fails, or `out` does.
    pub fn write(
        &mut self,
        prompt: Vec<u32>,
        args: &SamplingArgs,
        mut out: Option<&mut dyn Write>,
    ) -> Result<Written> {
        let prompt_tokens = prompt.len();
        let request = Request {
            prompt,
            max_tokens: args.max_tokens.map_or(usize::MAX, |tokens| tokens as usize),
            stop_tokens: self.text.tokenizer.end_tokens().to_vec(),
            stop_strings: args.stop.clone(),
            sampling: sampling(args),
            skip_special: true,
            draft: self.limit.clone(),
        };
        let mut failed = None;
        let run = self.generator.run(std::slice::from_ref(&request), &mut |piece| {
            let Some(out) = out.as_mut() else { return ControlFlow::Continue(()) };
            match out.write_all(piece.text.as_bytes()).and_then(|()| out.flush()) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        if let Some(error) = failed {
            return Err(error).context("cannot write the text");
        }
        let figures = Figures::of(&run.steps);
        let completion = run.completions.into_iter().next().context("the request was not answered")?;
        Ok(Written { prompt_tokens, completion, figures, draft: run.draft })
    }

    /// Lines about speed and memory.
    pub fn stats(&self, written: &Written) -> String {
        let figures = &written.figures;
        let rate = |tokens: usize, time: Duration| match time.as_secs_f64() {
            seconds if tokens > 0 && seconds > 0.0 => format!("{:.1} tokens/s", tokens as f64 / seconds),
            _ => "-".to_string(),
        };
        let mut lines = format!(
            "prompt   {} tokens, {} in the cache already, {} in {:.3} s\n\
             decode   {} tokens, {} in {:.3} s ({})\n\
             first    {:.3} s to the first token\n\
             memory   {}\n",
            written.prompt_tokens,
            written.prompt_tokens.saturating_sub(figures.prompt_rows),
            rate(figures.prompt_rows, figures.prompt),
            figures.prompt.as_secs_f64(),
            written.completion.tokens.len(),
            rate(figures.decoded, figures.decode),
            figures.decode.as_secs_f64(),
            finish(written.completion.finish),
            figures.first.as_secs_f64(),
            self.generator.engine().memory(),
        );
        let draft = &written.draft;
        if let (Some(acceptance), Some(guesses)) = (draft.acceptance(), draft.mean_guesses()) {
            let share = |part: Duration| 100.0 * part.as_secs_f64() / figures.decode.as_secs_f64();
            let mut split = format!(
                "draft {:.0} %, its context {:.0} %, verify {:.0} % of decoding",
                share(draft.draft),
                share(draft.inject),
                share(draft.verify)
            );
            if !draft.launch.is_zero() {
                // What their parts take, only the GPU knows; `tilec profile` asks it.
                let [guess, context, verify] =
                    round_bytes(self.plan(), guesses, written.middle()).map(|share| 100.0 * share);
                split = format!(
                    "whole rounds in launches {:.0} %, of whose bytes draft {guess:.0} %, its context {context:.0} %, \
                     verify {verify:.0} %; rounds driven by the host: {split}",
                    share(draft.launch)
                );
            }
            let reach: Vec<String> = (1..)
                .zip(draft.reach())
                .map(|(guess, share)| format!("{guess}: {:.0} %", 100.0 * share))
                .collect();
            let total: u64 = draft.histogram.iter().sum();
            let shares: Vec<String> = (1..)
                .zip(&draft.histogram)
                .map(|(tokens, rounds)| format!("{tokens}: {:.0} %", 100.0 * *rounds as f64 / total as f64))
                .collect();
            lines.push_str(&format!(
                "draft    {acceptance:.2} tokens a round in {} rounds, {} of {} guesses right ({})\n\
                 block    {guesses:.1} guesses on average, {} of {} tokens without any\n\
                 guess    right with all before it: {}\n\
                 split    {}\n",
                draft.rounds,
                draft.right,
                draft.guesses,
                shares.join(", "),
                draft.plain,
                figures.decoded,
                if reach.is_empty() { "none".into() } else { reach.join(", ") },
                split,
            ));
        } else if draft.plain > 0 {
            lines.push_str(&format!("draft    not used: {} tokens without guesses\n", draft.plain));
        }
        if let Some(held) = host::resident() {
            lines.push_str(&format!("resident {}, at most {}\n", mib(held.now), mib(held.peak)));
        }
        lines
    }

    /// A finished text with its figures as JSON.
    pub fn json(&self, written: &Written) -> Value {
        let Written { prompt_tokens, completion, figures, .. } = written;
        let memory = self.generator.engine().memory();
        let rate = |tokens: usize, time: Duration| {
            let rate = tokens as f64 / time.as_secs_f64();
            rate.is_finite().then_some(rate)
        };
        json!({
            "model": self.plan().name,
            "text": completion.text,
            "tokens": completion.tokens,
            "finish": finish(completion.finish),
            "prompt_tokens": prompt_tokens,
            "prompt_s": figures.prompt.as_secs_f64(),
            "prompt_tokens_per_s": rate(figures.prompt_rows, figures.prompt),
            "first_token_s": figures.first.as_secs_f64(),
            "decoded_tokens": figures.decoded,
            "decode_s": figures.decode.as_secs_f64(),
            "decode_tokens_per_s": rate(figures.decoded, figures.decode),
            "draft": self.draft_json(written),
            "memory_bytes": {
                "weights": memory.weights,
                "kv": memory.kv,
                "kv_used": memory.kv_used,
                "arena": memory.arena,
                "scratch": memory.scratch,
            },
            "resident_bytes": host::resident().map(|held| json!({ "now": held.now, "peak": held.peak })),
        })
    }
}

impl Writer {
    /// What became of a draft's guesses, as JSON.
    fn draft_json(&self, written: &Written) -> Value {
        let draft = &written.draft;
        let mut json = draft_json(draft);
        if let Some(guesses) = draft.mean_guesses().filter(|_| !draft.launch.is_zero()) {
            let [guess, context, verify] = round_bytes(self.plan(), guesses, written.middle());
            json["launch_share_of_bytes"] = json!({ "draft": guess, "inject": context, "verify": verify });
        }
        json
    }
}

/// Shares of the bytes of a round with so many guesses behind `context` positions: those of the draft's block, of
/// what tells it of a round, and of the model's step.
fn round_bytes(plan: &Plan, guesses: f64, context: usize) -> [f64; 3] {
    let Some(draft) = &plan.draft else { return [0.0; 3] };
    let rows = guesses.round() as usize + 1;
    let bytes = |costs: &[StageCost], rows| -> f64 {
        costs.iter().map(|cost| cost.runs as f64 * cost.bytes(rows, context) as f64).sum()
    };
    let parts = [
        bytes(&draft.block_pass.costs, draft.block),
        bytes(&draft.inject.costs, rows),
        bytes(&plan.costs, rows),
    ];
    let total: f64 = parts.iter().sum();
    parts.map(|part| if total > 0.0 { part / total } else { 0.0 })
}

impl Written {
    /// Positions in front of the middle of what was generated.
    fn middle(&self) -> usize {
        self.prompt_tokens + self.completion.tokens.len() / 2
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.completion.text
    }

    /// Whether the text ended because there was no more room.
    pub fn cut_short(&self) -> bool {
        self.completion.finish == FinishReason::Context
    }
}

/// Times of the steps of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Figures {
    /// Rows of the prompt that were processed: those not in the cache already.
    prompt_rows: usize,
    /// Time of their steps.
    prompt: Duration,
    /// To the first token, its choice included.
    first: Duration,
    /// Tokens chosen in later steps: all but the first.
    decoded: usize,
    /// Time of these steps, choices included.
    decode: Duration,
}

impl Figures {
    /// The prompt ends with the first step that has logits.
    fn of(steps: &[StepTime]) -> Figures {
        let mut figures = Figures::default();
        let prompt_steps = steps.iter().position(|step| step.logit_rows > 0).map_or(steps.len(), |n| n + 1);
        let (prompt, decode) = steps.split_at(prompt_steps);
        for step in prompt {
            figures.prompt_rows += step.rows;
            figures.prompt += step.step;
            figures.first += step.step + step.draft + step.sampling;
        }
        for step in decode {
            figures.decoded += step.tokens;
            figures.decode += step.step + step.draft + step.sampling;
        }
        figures
    }
}

/// What became of a draft's guesses; null if nothing was guessed.
pub fn draft_json(draft: &DraftStats) -> Value {
    if draft.rounds == 0 && draft.plain == 0 {
        return Value::Null;
    }
    json!({
        "rounds": draft.rounds,
        "tokens": draft.tokens,
        "tokens_per_round": (draft.rounds > 0).then(|| draft.tokens as f64 / draft.rounds as f64),
        "acceptance": draft.acceptance(),
        "histogram": draft.histogram,
        "reach": draft.reach(),
        "guesses": draft.guesses,
        "mean_guesses": draft.mean_guesses(),
        "blocks": draft.blocks,
        "plain_tokens": draft.plain,
        "right": draft.right,
        "draft_s": draft.draft.as_secs_f64(),
        "inject_s": draft.inject.as_secs_f64(),
        "verify_s": draft.verify.as_secs_f64(),
        "launch_s": draft.launch.as_secs_f64(),
    })
}

fn sampling(args: &SamplingArgs) -> SamplingParams {
    SamplingParams { repetition_penalty: args.repeat_penalty, ..args.chance.parameters() }
}

/// Why a text ended, in a word.
fn finish(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::StopToken(_) => "end of text",
        FinishReason::StopString(_) => "stop text",
        FinishReason::Length => "length",
        FinishReason::Context => "context full",
        FinishReason::Cancelled => "cancelled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::{toy_draft, toy_plan, toy_program};

    #[test]
    fn rounds_in_launches_are_split_by_their_bytes() {
        let mut plan = toy_plan();
        assert_eq!(round_bytes(&plan, 3.0, 100), [0.0; 3]);
        let inject = toy_program(&plan, &[], &plan.costs[1..2]);
        let block = toy_program(&plan, &[], &plan.costs);
        plan.draft = Some(toy_draft(&plan, 8, [inject, block], None));
        // 7,000 bytes of weights, caches of 2 layers, and 148 bytes a row: 8 of the block, 4 of the step.
        let step = |rows: f64| 7000.0 + 2.0 * 8.0 * 100.0 + 148.0 * rows;
        let inject = 2.0 * (1000.0 + 4.0 * 10.0);
        let total = step(8.0) + step(4.0) + inject;
        let wanted = [step(8.0) / total, inject / total, step(4.0) / total];
        for (found, wanted) in round_bytes(&plan, 3.2, 100).into_iter().zip(wanted) {
            assert!((found - wanted).abs() < 1e-12, "{found} is not {wanted}");
        }
    }

    #[test]
    fn the_prompt_ends_with_the_first_logits() {
        let step = |rows, logit_rows, ms| StepTime {
            rows,
            logit_rows,
            tokens: logit_rows,
            draft: Duration::ZERO,
            step: Duration::from_millis(ms),
            sampling: Duration::from_millis(1),
        };
        let figures = Figures::of(&[step(64, 0, 10), step(6, 1, 5), step(1, 1, 2), step(1, 1, 3)]);
        assert_eq!((figures.prompt_rows, figures.decoded), (70, 2));
        assert_eq!(figures.prompt, Duration::from_millis(15));
        assert_eq!(figures.first, Duration::from_millis(17));
        assert_eq!(figures.decode, Duration::from_millis(7));
        assert_eq!(Figures::of(&[]), Figures::default());
    }
}
