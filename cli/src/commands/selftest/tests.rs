use super::cases::{
    BANDS, CASES, CONTEXT, Case, DRAFTS, EXPERTS, LONG_ROWS, MIMO, NARROW_HEADS, Random, SCALED, SEQUENCES,
    SHARES, WIDE_HEADS,
};
use super::checks::{Added, After, BLOCKS, Machine, PROMPT, choose, run};
use super::compare::{Deviation, deviation, finite, same_bits};
use super::drafts;
use super::prepare::{KernelWeights, Model, Prepared, WORST, bound, draft_bound, prepare, reference};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::PathBuf;
use tilec_codegen::compile::{self, DraftInput, Input};
use tilec_codegen::emit::cuda::emit;
use tilec_codegen::frontends;
use tilec_codegen::nvrtc::{Arch, CudaText, Nvrtc, Options};
use tilec_codegen::passes::packer::Packer;
use tilec_codegen::passes::{fuse, resident};
use tilec_ir::format::Format;
use tilec_ir::graph::interp::{Interpreter, Row, WeightSource};
use tilec_ir::graph::{EXPERT, Op};
use tilec_ir::plan::WeightsFrom;
use tilec_ir::tensor::TensorInfo;
use tilec_runtime::cuda::DeviceInfo;
use tilec_runtime::engine::{BlockInput, RoundInput, RoundOptions, RowInput, StepError};
use tilec_runtime::sampling::SamplingParams;

/// The texts of a case's kernels: the model's, then those of its draft.
fn text(case: &Case) -> Vec<String> {
    let tensors = frontends::synthetic_tensors(&case.config, case.stored).unwrap();
    let spec = case.spec("/nowhere".into(), "sm_90a");
    let weights = || WeightsFrom::Checkpoint { path: "/nowhere".into() };
    let draft = case.draft.as_ref().map(|draft| {
        let info = |(name, shape): (String, Vec<usize>)| {
            let format = if shape.len() == 1 { Format::F32 } else { case.stored };
            (name, TensorInfo { shape, format })
        };
        let tensors: std::collections::BTreeMap<_, _> =
            case.draft_tensors(draft).unwrap().into_iter().map(info).collect();
        (draft, tensors)
    });
    let input = Input {
        name: "selftest",
        config: &case.config,
        tensors: &tensors,
        weights: weights(),
        tokenizer: None,
        draft: draft.as_ref().map(|(draft, tensors)| DraftInput {
            config: &draft.config,
            tensors,
            weights: weights(),
        }),
    };
    let graphs = compile::graphs(&input, &spec);
    let (graph, draft) = graphs.unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let mut packer = Packer::new(resident::WEIGHT_ALIGN);
    let of_draft = draft.iter().flat_map(|draft| [&draft.inject, &draft.block]);
    [&graph]
        .into_iter()
        .chain(of_draft)
        .map(|graph| {
            let program = resident::resident_with(&fuse::fuse(graph).unwrap(), CONTEXT, &mut packer);
            let program = program.unwrap_or_else(|error| panic!("{}: {error}", case.name));
            let kernel = emit(&program, Arch::Sm90a).unwrap_or_else(|error| panic!("{}: {error}", case.name));
            kernel.text
        })
        .collect()
}

#[test]
fn every_case_has_a_kernel_of_its_own() {
    let cases: Vec<Case> = (0..CASES).map(|number| Case::new(1, number)).collect();
    let texts: BTreeSet<String> = cases.iter().flat_map(text).collect();
    assert_eq!(texts.len(), cases.len() + 2 * DRAFTS.len());
    let again = Case::new(1, 7);
    assert_eq!((&again.name, again.seed, text(&again)), (&cases[7].name, cases[7].seed, text(&cases[7])));
    assert_ne!(Case::new(2, 7).name, cases[7].name);
}

#[test]
fn the_kernels_assemble() {
    // `cargo xtask setup nvrtc` fetches it.
    let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}"));
    let mut problems = Vec::new();
    let some = [NARROW_HEADS, LONG_ROWS, EXPERTS.start, EXPERTS.end - 1];
    for number in (0..10)
        .chain(some)
        .chain(MIMO)
        .chain(SHARES)
        .chain(DRAFTS)
        .chain(SCALED)
        .chain(WIDE_HEADS)
        .chain(BANDS)
    {
        let case = Case::new(1, number);
        for text in text(&case) {
            let options = Options { fast: true, ..Options::default() };
            let result = nvrtc.compile(&CudaText { name: "selftest.cu", text: &text }, Arch::Sm90a, &options);
            match result {
                Ok(_) => println!("{}", case.name),
                Err(error) => problems.push(format!("{}: {error}", case.name)),
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_with_a_remedy() {
    let text = super::find_gpu(99).unwrap_err().to_string();
    assert!(text.contains("libcuda.so.1") || text.contains("the driver shows"), "{text}");
}

#[test]
fn a_gpu_gets_the_newest_code_that_it_runs() {
    let arch = |capability| {
        super::arch_for(&DeviceInfo {
            number: 0,
            name: "GPU".into(),
            sms: 1,
            capability,
            memory: 0,
            shared_bytes: 0,
            cooperative: true,
            memory_rate: None,
            driver: (13, 0),
        })
    };
    for (capability, wanted) in
        [((8, 0), Arch::Sm80), ((8, 6), Arch::Sm80), ((8, 9), Arch::Sm89), ((9, 0), Arch::Sm90a)]
    {
        assert_eq!(arch(capability).unwrap(), wanted);
    }
    let text = arch((7, 5)).unwrap_err().to_string();
    assert!(text.contains("sm_75") && text.contains("sm_90a"), "{text}");
}

#[test]
fn a_case_is_prepared() {
    let case = Case::new(1, 0);
    let folder = tempfile::tempdir().unwrap();
    let prepared = prepare(&case, folder.path(), "sm_90a").unwrap();
    assert_eq!(prepared.reference.len(), prepared.prompt.len() * case.vocab);
    finite("the reference", &prepared.reference, case.vocab).unwrap();
    assert!(prepared.plan.join("kernel.cubin").is_file() && prepared.bound > 1e-4);
}

/// Weights with errors of the size that rounded inputs of products make: an input's error goes through a
/// product as an error of the weights does.
struct Noisy<'a> {
    weights: KernelWeights<'a>,
    /// Of matrices, relative.
    deviation: f32,
    /// A tensor that is left out, of every expert where it is an expert's: zero.
    without: Option<&'a str>,
}

impl Noisy<'_> {
    fn is_left_out(&self, name: &str) -> bool {
        self.without.is_some_and(|without| match without.split_once(EXPERT) {
            Some((front, back)) => name.starts_with(front) && name.ends_with(back),
            None => name == without,
        })
    }
}

impl WeightSource for Noisy<'_> {
    fn tensor(&self, name: &str) -> Result<Cow<'_, [f32]>, String> {
        let mut values = self.weights.tensor(name)?.into_owned();
        if self.is_left_out(name) {
            values.fill(0.0);
        }
        let mut random = Random::new(7, name.bytes().map(u64::from).sum());
        if !name.contains("norm") && !name.contains("bias") {
            values.iter_mut().for_each(|value| *value *= 1.0 + self.deviation * random.normal());
        }
        Ok(values.into())
    }
}

/// Cases that the interpreter runs quickly, of all kinds of weights.
fn light_cases() -> impl Iterator<Item = Case> {
    let all = MIMO.chain(0..40).chain(EXPERTS).chain(SHARES).chain(SCALED).chain(WIDE_HEADS);
    let all = all.map(|number| Case::new(1, number));
    all.filter(|case| case.products < 1_500_000 || case.fp4_experts || case.scaled.is_some())
}

#[test]
fn the_bound_leaves_room_for_rounding_and_not_much_more() {
    for case in light_cases() {
        let folder = tempfile::tempdir().unwrap();
        let model = Model::new(&case, folder.path(), "sm_90a").unwrap();
        let prompt = &model.prompt(&case);
        let wanted = reference(&model.graph, &model.weights(), prompt).unwrap();
        // The root of the mean square of a rounding's relative error is 0.76 of what `bound` takes.
        let deviation = 0.76 * if case.multiplies_bf16() { 2f32.powi(-9) } else { 2f32.powi(-12) };
        let noisy = Noisy { weights: model.weights(), deviation, without: None };
        let found = reference(&model.graph, &noisy, prompt).unwrap();
        let error =
            super::compare::deviation(&found, &wanted, case.vocab, case.undecided(prompt.len())).unwrap();
        let bound = bound(&case);
        let (typical, worst) = (error.typical / bound, error.worst / bound);
        println!("{typical:.2} {worst:.2} {bound:.1e} {}", case.name);
        assert!((0.1..0.67).contains(&typical) && worst < 0.67 * WORST, "{}: {error:?}", case.name);
    }
}

#[test]
fn the_bound_of_blocks_leaves_room_for_rounding_and_not_much_more() {
    let cases = (1..8).flat_map(|seed| DRAFTS.map(move |number| Case::new(seed, number)));
    let cases = cases.filter(|case| case.products < 1_200_000);
    let mut compared = 0;
    for case in cases {
        let folder = tempfile::tempdir().unwrap();
        let model = Model::new(&case, folder.path(), "sm_90a").unwrap();
        let prompt = &model.prompt(&case)[..30];
        let wanted = drafts::reference(&model, &case, prompt).unwrap();
        let draft = model.draft.as_ref().unwrap();
        let deviation = if case.multiplies_bf16() { 2f32.powi(-9) } else { 2f32.powi(-12) };
        let noisy = [&model.graph, &draft.inject, &draft.block].map(|graph| Noisy {
            weights: model.weights_of(graph),
            deviation,
            without: None,
        });
        let found = drafts::reference_with(&model, &case, prompt, [&noisy[0], &noisy[1], &noisy[2]]).unwrap();
        let (found, wanted): (Vec<f32>, Vec<f32>) =
            found.iter().zip(&wanted).flat_map(|(a, b)| a.logits.iter().zip(&b.logits)).unzip();
        let error = super::compare::deviation(&found, &wanted, case.vocab, 0).unwrap();
        let bound = draft_bound(&case);
        let (typical, worst) = (error.typical / bound, error.worst / bound);
        println!("{typical:.2} {worst:.2} {bound:.1e} {}", case.name);
        assert!((0.1..0.75).contains(&typical) && worst < 0.75 * WORST, "{}: {error:?}", case.name);
        compared += 1;
    }
    assert!(compared > 5);
}

#[test]
fn every_tensor_has_an_effect_beyond_the_bound() {
    let shares = SHARES.map(|number| Case::new(1, number));
    for case in light_cases().take(MIMO.len() + 3).chain(shares) {
        let folder = tempfile::tempdir().unwrap();
        let model = Model::new(&case, folder.path(), "sm_90a").unwrap();
        let prompt = &model.prompt(&case)[..30];
        let wanted = reference(&model.graph, &model.weights(), prompt).unwrap();
        for name in model.graph.weights.iter().map(|(own, weight)| weight.tensor(own)) {
            let noisy = Noisy { weights: model.weights(), deviation: 0.0, without: Some(name) };
            // A model without its head has no logits at all.
            let error = match reference(&model.graph, &noisy, prompt) {
                Ok(found) => {
                    super::compare::deviation(&found, &wanted, case.vocab, 0).map_or(1.0, |d| d.typical)
                }
                Err(error) => panic!("{error}"),
            };
            assert!(error > 2.0 * bound(&case), "{} without {name}: {error:e}", case.name);
        }
    }
}

/// What is wrong with a [`Fake`].
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Logits of one position are a tenth too large.
    Position,
    /// A row is not a number.
    NotANumber,
    /// The lowest bit of rows in company.
    Company,
    /// The lowest bit of the last row of a pass.
    Place,
    /// The lowest bit after poisoning.
    Poison,
    /// The lowest bit, in the last repeat.
    Race,
    /// A token in the middle of a launch.
    Token,
    /// A token in the middle of a launch that samples.
    Chance,
    /// Stop tokens are not looked for.
    Deaf,
    /// A broken launch runs one step more.
    Late,
    /// A launch leaves the sequence one position short.
    Short,
    /// The draft is told of the next row's taps.
    Tap,
    /// The taps of the first row of a step of 17 rows are too large in some columns.
    Cut,
    /// The lowest bit of a draft's guess in company.
    Block,
    /// The draft is told of all rows of a step as they were, of which a wrong guess was one.
    Commit,
    /// A token of a launch of rounds.
    Round,
}

/// A draft of a [`Fake`].
struct FakeDraft<'a> {
    inject: Interpreter<'a>,
    block: Interpreter<'a>,
    mask: u32,
    block_rows: usize,
    /// Taps of the last step, and its rows.
    taps: Vec<f32>,
    rows: Vec<RowInput>,
}

/// The interpreter as a machine, with a fault.
struct Fake<'a> {
    interpreter: Interpreter<'a>,
    vocab: usize,
    fault: Fault,
    lengths: [usize; SEQUENCES],
    poisoned: bool,
    steps: usize,
    draft: Option<FakeDraft<'a>>,
}

impl Fake<'_> {
    fn chosen(&mut self, rows: &[RowInput], sampling: &[&SamplingParams]) -> Vec<u32> {
        let wanted: Vec<u32> = (0..rows.len() as u32).collect();
        let logits = Machine::step(self, rows, &wanted).unwrap();
        choose(rows, sampling, &logits, self.vocab).unwrap()
    }
}

impl Machine for Fake<'_> {
    fn step(&mut self, rows: &[RowInput], logit_rows: &[u32]) -> Result<Vec<f32>, StepError> {
        self.steps += 1;
        let interpreted: Vec<Row> = rows
            .iter()
            .map(|row| Row { token: row.token, position: row.position as usize, sequence: row.sequence })
            .collect();
        let wanted: Vec<usize> = logit_rows.iter().map(|row| *row as usize).collect();
        let mut taps = Vec::new();
        let mut observe = |node: &tilec_ir::graph::Node, values: &[f32]| {
            if node.op == Op::Taps {
                taps = values.to_vec();
            }
        };
        let mut logits = self.interpreter.step_observed(&interpreted, &wanted, &mut observe).unwrap();
        if let Some(draft) = &mut self.draft {
            let cols = taps.len() / rows.len();
            if self.fault == Fault::Cut && rows.len() == 17 {
                taps[..cols / 2].iter_mut().for_each(|value| *value *= 1.1);
            }
            (draft.taps, draft.rows) = (taps, rows.to_vec());
        }
        for row in rows {
            self.lengths[row.sequence as usize] = row.position as usize + 1;
        }
        for (logits, row) in logits.chunks_exact_mut(self.vocab).zip(wanted) {
            let bit = |logits: &mut [f32]| logits[3] = f32::from_bits(logits[3].to_bits() ^ 1);
            match self.fault {
                Fault::Position if rows[row].position == 13 => logits.iter_mut().for_each(|x| *x *= 1.1),
                Fault::NotANumber if rows[row].position == 13 => logits[5] = f32::NAN,
                Fault::Company if rows.iter().any(|other| other.sequence != rows[row].sequence) => {
                    bit(logits)
                }
                Fault::Place if row == 7 && [8, 16].contains(&rows.len()) => bit(logits),
                Fault::Poison if self.poisoned => bit(logits),
                Fault::Race if self.steps > 892 => bit(logits),
                _ => {}
            }
        }
        Ok(logits)
    }

    fn decode(
        &mut self,
        rows: &[RowInput],
        sampling: &[&SamplingParams],
        steps: usize,
        stop_tokens: &[u32],
        on_token: &mut dyn FnMut(usize, usize, u32) -> ControlFlow<()>,
    ) -> Result<usize, StepError> {
        let mut rows = rows.to_vec();
        let (mut done, mut over) = (0, false);
        while done < steps && !over {
            let mut tokens = self.chosen(&rows, sampling);
            if self.fault == Fault::Chance && done == 9 && !sampling.is_empty() {
                tokens[0] = (tokens[0] + 1) % self.vocab as u32;
            }
            if self.fault == Fault::Token && sampling.is_empty() && done == 9 && rows.len() > 1 {
                tokens[1] = (tokens[1] + 1) % self.vocab as u32;
            }
            for (row, token) in tokens.iter().enumerate() {
                over |= on_token(done, row, *token).is_break() && self.fault != Fault::Late;
                over |= stop_tokens.contains(token) && self.fault != Fault::Deaf;
            }
            for (row, token) in rows.iter_mut().zip(tokens) {
                (row.token, row.position) = (token, row.position + 1);
            }
            done += 1;
        }
        if self.fault == Fault::Short {
            self.lengths[rows[0].sequence as usize] -= 1;
        }
        Ok(done)
    }

    fn reset(&mut self, sequence: usize) {
        self.lengths[sequence] = 0;
        self.interpreter.truncate(sequence as u32, 0);
        if let Some(draft) = &mut self.draft {
            draft.inject.truncate(sequence as u32, 0);
        }
    }

    fn length(&self, sequence: usize) -> usize {
        self.lengths[sequence]
    }

    fn poison(&mut self) -> Result<(), StepError> {
        self.poisoned = true;
        (0..SEQUENCES).for_each(|sequence| self.reset(sequence));
        Ok(())
    }

    fn inject(&mut self, rows: &[u32]) -> Result<(), StepError> {
        let draft = self.draft.as_mut().unwrap();
        let cols = draft.taps.len() / draft.rows.len();
        let mut chosen: Vec<Row> = Vec::new();
        let mut taps = Vec::new();
        for number in rows {
            let row = draft.rows[*number as usize];
            chosen.push(Row { token: 0, position: row.position as usize, sequence: row.sequence });
            let next = self.fault == Fault::Tap
                || self.fault == Fault::Commit && rows.len() == 2 && draft.rows.len() == draft.block_rows;
            let from = (*number as usize + usize::from(next)).min(draft.rows.len() - 1);
            taps.extend(&draft.taps[from * cols..][..cols]);
        }
        draft.inject.set_input(&taps);
        draft.inject.step(&chosen, &[]).unwrap();
        Ok(())
    }

    fn draft(&mut self, blocks: &[BlockInput]) -> Result<Vec<f32>, StepError> {
        let draft = self.draft.as_mut().unwrap();
        let (mut rows, mut wanted) = (Vec::new(), Vec::new());
        for block in blocks {
            wanted.extend(rows.len() + 1..rows.len() + 1 + block.wanted);
            rows.extend((0..block.rows).map(|at| Row {
                token: if at == 0 { block.token } else { draft.mask },
                position: block.position as usize + at,
                sequence: block.sequence,
            }));
        }
        draft.block.exchange_caches(&mut draft.inject).unwrap();
        let mut logits = draft.block.step(&rows, &wanted).unwrap();
        draft.inject.exchange_caches(&mut draft.block).unwrap();
        if self.fault == Fault::Block && blocks.len() > 1 {
            logits[3] = f32::from_bits(logits[3].to_bits() ^ 1);
        }
        Ok(logits)
    }

    fn rounds(
        &mut self,
        inputs: &[RoundInput],
        sampling: &[&SamplingParams],
        options: RoundOptions<'_>,
        vocab: usize,
    ) -> Result<Added, StepError> {
        let mut rounds = drafts::rounds_by_steps(self, inputs, sampling, options, vocab).unwrap();
        if self.fault == Fault::Round {
            rounds[1][0][0] ^= 1;
        }
        Ok(rounds)
    }
}

/// Runs all checks on a machine with a fault; those that fail.
fn failed_checks(case: &Case, model: &Model, prepared: &Prepared, fault: Fault) -> Vec<&'static str> {
    let weights = model.weights();
    let interpreter = Interpreter::new(&model.graph, &weights).unwrap();
    let graphs = model.draft.as_ref();
    let of_draft = graphs.map(|draft| [model.weights_of(&draft.inject), model.weights_of(&draft.block)]);
    let draft = graphs.zip(of_draft.as_ref()).map(|(draft, [inject, block])| FakeDraft {
        inject: Interpreter::new(&draft.inject, inject).unwrap(),
        block: Interpreter::new(&draft.block, block).unwrap(),
        mask: draft.draft.mask_token,
        block_rows: draft.rows,
        taps: Vec::new(),
        rows: Vec::new(),
    });
    let (vocab, lengths) = (case.vocab, [0; SEQUENCES]);
    let mut fake = Fake { interpreter, vocab, fault, lengths, poisoned: false, steps: 0, draft };
    let mut outcomes = Vec::new();
    assert_eq!(run(case, prepared, &mut fake, 3, &mut outcomes), After::GoOn);
    println!("{fault:?}: {} steps", fake.steps);
    for outcome in &outcomes {
        if let Some(problem) = &outcome.problem {
            println!("  {}: {problem}", outcome.what);
        }
    }
    outcomes.iter().filter(|outcome| outcome.problem.is_some()).map(|outcome| outcome.what).collect()
}

#[test]
fn every_fault_of_a_draft_fails_the_check_that_looks_for_it() {
    let all = (0..200).map(|number| Case::new(number as u64, DRAFTS.start + number % DRAFTS.len()));
    let case = all.min_by_key(|case| case.products).unwrap();
    println!("{}, {} products", case.name, case.products);
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&case, folder.path(), "sm_90a").unwrap();
    let prompt = model.prompt(&case)[..140].to_vec();
    let wanted = reference(&model.graph, &model.weights(), &prompt).unwrap();
    let blocks = drafts::reference(&model, &case, &prompt).unwrap();
    assert!(blocks.len() >= 5 && blocks.iter().any(|block| block.block.position == 125));
    let prepared = Prepared {
        plan: PathBuf::new(),
        prompt,
        reference: wanted,
        bound: bound(&case),
        blocks,
        draft_rows: model.draft.as_ref().unwrap().rows,
        draft_bound: draft_bound(&case),
    };
    for (fault, expected) in [
        (Fault::None, vec![]),
        (Fault::Tap, vec![BLOCKS]),
        (Fault::Cut, vec!["context in odd steps, same blocks"]),
        (Fault::Block, vec!["blocks in company, same bits"]),
        (Fault::Commit, vec!["rounds, same tokens and same context"]),
        (Fault::Round, vec!["rounds in one launch, same tokens"]),
    ] {
        assert_eq!(failed_checks(&case, &model, &prepared, fault), expected, "{fault:?}");
    }
}

#[test]
fn every_fault_fails_the_checks_that_look_for_it_and_no_other() {
    const POISONED: &str = "prompt on poisoned memory, same bits";
    const BY_ROW: &str = "prompt row by row, same bits";
    const ODD: &str = "prompt in odd steps, same bits";
    const COMPANY: &str = "in company at any place, same bits";
    const DECODE: &str = "decoding in one launch, same tokens";
    const SAMPLING: &str = "sampling in one launch, same tokens";
    const STOPS: &str = "stop tokens and breaks";
    const REPEATS: &str = "repeats, same bits";
    let case = (0..1000).map(|number| Case::new(3, number)).min_by_key(|case| case.products).unwrap();
    println!("{}, {} products", case.name, case.products);
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&case, folder.path(), "sm_90a").unwrap();
    let prompt = model.prompt(&case);
    let wanted = reference(&model.graph, &model.weights(), &prompt).unwrap();
    let prepared = Prepared {
        plan: PathBuf::new(),
        prompt,
        reference: wanted,
        bound: bound(&case),
        blocks: Vec::new(),
        draft_rows: 0,
        draft_bound: 0.0,
    };
    for (fault, expected) in [
        (Fault::None, vec![]),
        (Fault::Position, vec![PROMPT]),
        (Fault::NotANumber, vec![PROMPT]),
        (Fault::Company, vec![COMPANY]),
        (Fault::Place, vec![ODD, COMPANY]),
        (Fault::Poison, vec![POISONED, BY_ROW, ODD]),
        (Fault::Race, vec![REPEATS]),
        (Fault::Token, vec![DECODE, STOPS]),
        (Fault::Chance, vec![SAMPLING]),
        (Fault::Deaf, vec![STOPS]),
        (Fault::Late, vec![STOPS]),
        (Fault::Short, vec![DECODE, SAMPLING, STOPS, REPEATS]),
    ] {
        assert_eq!(failed_checks(&case, &model, &prepared, fault), expected, "{fault:?}");
    }
}

#[test]
fn numbers_that_are_none_are_no_agreement() {
    let good = [1.0, -2.0, 3.0, 4.0];
    assert_eq!(deviation(&good, &good, 2, 0).unwrap(), Deviation { typical: 0.0, worst: 0.0, row: 0 });
    same_bits(&good, &good, 2).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut found = good;
        found[3] = bad;
        let text = deviation(&found, &good, 2, 0).unwrap_err();
        assert!(text.contains("the result has") && text.contains("row 1, column 1"), "{text}");
        assert!(deviation(&good, &found, 2, 0).unwrap_err().contains("the reference has"));
        // Also where both have it.
        same_bits(&found, &found, 2).unwrap_err();
        finite("x", &found, 2).unwrap_err();
    }
}

#[test]
fn one_wrong_row_is_found_among_many() {
    let wanted: Vec<f32> = (0..600).map(|i| ((i * 37 % 101) as f32 - 50.0) / 10.0).collect();
    let mut found = wanted.clone();
    for x in &mut found[40 * 6..41 * 6] {
        *x *= 1.1;
    }
    let worst = deviation(&found, &wanted, 6, 0).unwrap();
    assert_eq!(worst.row, 40);
    assert!((worst.worst - 0.1).abs() < 1e-6 && (worst.typical - 0.01).abs() < 1e-7, "{worst:?}");
    let text = same_bits(&found, &wanted, 6).unwrap_err();
    assert!(text.contains("1 of 100 rows differ, first row 40"), "{text}");
    // The other sign of zero is another bit.
    same_bits(&[0.0], &[-0.0], 1).unwrap_err();
}

#[test]
fn nothing_agrees_with_a_reference_of_zeros_or_with_nothing() {
    assert!(deviation(&[1.0, 1.0, 0.0, 0.0], &[1.0, 1.0, 0.0, 0.0], 2, 0).unwrap_err().contains("row 1"));
    for (found, wanted, cols) in
        [(&[][..], &[][..], 2), (&[1.0][..], &[1.0, 2.0][..], 1), (&[1.0; 3][..], &[1.0; 3][..], 2)]
    {
        deviation(found, wanted, cols, 0).unwrap_err();
        same_bits(found, wanted, cols).unwrap_err();
    }
}
