use super::cases::{CASES, CONTEXT, Case, EXPERTS, LONG_ROWS, MIMO, NARROW_HEADS, Random, SEQUENCES, SHARES};
use super::checks::{After, Machine, PROMPT, run};
use super::compare::{Deviation, deviation, finite, same_bits};
use super::prepare::{KernelWeights, Model, Prepared, WORST, bound, prepare, reference};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::PathBuf;
use tilec_codegen::compile::{self, Input};
use tilec_codegen::emit::cuda::emit;
use tilec_codegen::frontends;
use tilec_codegen::nvrtc::{Arch, CudaText, Nvrtc, Options};
use tilec_codegen::passes::{fuse, resident};
use tilec_ir::graph::interp::{Interpreter, Row, WeightSource};
use tilec_ir::plan::WeightsFrom;
use tilec_runtime::cuda::DeviceInfo;
use tilec_runtime::engine::{RowInput, StepError};

/// The kernel's text of a case.
fn text(case: &Case) -> String {
    let tensors = frontends::synthetic_tensors(&case.config, case.stored).unwrap();
    let spec = case.spec("/nowhere".into(), "sm_90a");
    let weights = WeightsFrom::Checkpoint { path: "/nowhere".into() };
    let input = Input {
        name: "selftest",
        config: &case.config,
        tensors: &tensors,
        weights,
        tokenizer: None,
        draft: None,
    };
    let graph = compile::graph(&input, &spec).unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let fused = fuse::fuse(&graph).unwrap();
    let program = resident::resident(&fused, CONTEXT);
    let program = program.unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let kernel = emit(&program, Arch::Sm90a).unwrap_or_else(|error| panic!("{}: {error}", case.name));
    kernel.text
}

#[test]
fn every_case_has_a_kernel_of_its_own() {
    let cases: Vec<Case> = (0..CASES).map(|number| Case::new(1, number)).collect();
    let texts: BTreeSet<String> = cases.iter().map(text).collect();
    assert_eq!(texts.len(), cases.len());
    let again = Case::new(1, 7);
    assert_eq!((&again.name, again.seed, text(&again)), (&cases[7].name, cases[7].seed, text(&cases[7])));
    assert_ne!(Case::new(2, 7).name, cases[7].name);
}

#[test]
fn the_kernels_assemble() {
    // `cargo xtask setup nvrtc` fetches it.
    let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}"));
    let mut problems = Vec::new();
    for number in (0..10)
        .chain([NARROW_HEADS, LONG_ROWS])
        .chain(MIMO)
        .chain([EXPERTS.start, EXPERTS.end - 1])
        .chain(SHARES)
    {
        let case = Case::new(1, number);
        let text = text(&case);
        let options = Options { fast: true, ..Options::default() };
        let result = nvrtc.compile(&CudaText { name: "selftest.cu", text: &text }, Arch::Sm90a, &options);
        match result {
            Ok(_) => println!("{}", case.name),
            Err(error) => problems.push(format!("{}: {error}", case.name)),
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
    /// A tensor that is left out: zero.
    without: Option<&'a str>,
}

impl WeightSource for Noisy<'_> {
    fn tensor(&self, name: &str) -> Result<Cow<'_, [f32]>, String> {
        let mut values = self.weights.tensor(name)?.into_owned();
        if self.without == Some(name) {
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
    let all = MIMO.chain(0..40).chain(EXPERTS).chain(SHARES).map(|number| Case::new(1, number));
    all.filter(|case| case.products < 1_500_000 || case.fp4_experts)
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
fn every_tensor_has_an_effect_beyond_the_bound() {
    // Of experts, one tensor alone may not be chosen.
    let shares = SHARES.map(|number| Case::new(1, number)).filter(|case| !case.fp4_experts);
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
    /// Stop tokens are not looked for.
    Deaf,
    /// A broken launch runs one step more.
    Late,
    /// A launch leaves the sequence one position short.
    Short,
}

/// The interpreter as a machine, with a fault.
struct Fake<'a> {
    interpreter: Interpreter<'a>,
    vocab: usize,
    fault: Fault,
    lengths: [usize; SEQUENCES],
    poisoned: bool,
    steps: usize,
}

impl Fake<'_> {
    fn greedy(&mut self, rows: &[RowInput]) -> Vec<u32> {
        let wanted: Vec<u32> = (0..rows.len() as u32).collect();
        let logits = Machine::step(self, rows, &wanted).unwrap();
        let best = |row: &[f32]| {
            row.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i))).unwrap().0
        };
        logits.chunks_exact(self.vocab).map(|row| best(row) as u32).collect()
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
        let mut logits = self.interpreter.step(&interpreted, &wanted).unwrap();
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
                Fault::Place if row == 7 && rows.len() == 8 => bit(logits),
                Fault::Poison if self.poisoned => bit(logits),
                Fault::Race if self.steps > 700 => bit(logits),
                _ => {}
            }
        }
        Ok(logits)
    }

    fn decode(
        &mut self,
        rows: &[RowInput],
        steps: usize,
        stop_tokens: &[u32],
        on_token: &mut dyn FnMut(usize, usize, u32) -> ControlFlow<()>,
    ) -> Result<usize, StepError> {
        let mut rows = rows.to_vec();
        let (mut done, mut over) = (0, false);
        while done < steps && !over {
            let mut tokens = self.greedy(&rows);
            if self.fault == Fault::Token && done == 9 && rows.len() > 1 {
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
    }

    fn length(&self, sequence: usize) -> usize {
        self.lengths[sequence]
    }

    fn poison(&mut self) -> Result<(), StepError> {
        self.poisoned = true;
        (0..SEQUENCES).for_each(|sequence| self.reset(sequence));
        Ok(())
    }
}

#[test]
fn every_fault_fails_the_checks_that_look_for_it_and_no_other() {
    const POISONED: &str = "prompt on poisoned memory, same bits";
    const BY_ROW: &str = "prompt row by row, same bits";
    const ODD: &str = "prompt in odd steps, same bits";
    const COMPANY: &str = "in company at any place, same bits";
    const DECODE: &str = "decoding in one launch, same tokens";
    const STOPS: &str = "stop tokens and breaks";
    const REPEATS: &str = "repeats, same bits";
    let case = (0..1000).map(|number| Case::new(3, number)).min_by_key(|case| case.products).unwrap();
    println!("{}, {} products", case.name, case.products);
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&case, folder.path(), "sm_90a").unwrap();
    let prompt = model.prompt(&case);
    let wanted = reference(&model.graph, &model.weights(), &prompt).unwrap();
    let prepared = Prepared { plan: PathBuf::new(), prompt, reference: wanted, bound: bound(&case) };
    for (fault, expected) in [
        (Fault::None, vec![]),
        (Fault::Position, vec![PROMPT]),
        (Fault::NotANumber, vec![PROMPT]),
        (Fault::Company, vec![COMPANY]),
        (Fault::Place, vec![ODD, COMPANY]),
        (Fault::Poison, vec![POISONED, BY_ROW, ODD]),
        (Fault::Race, vec![REPEATS]),
        (Fault::Token, vec![DECODE, STOPS]),
        (Fault::Deaf, vec![STOPS]),
        (Fault::Late, vec![STOPS]),
        (Fault::Short, vec![DECODE, STOPS, REPEATS]),
    ] {
        let weights = model.weights();
        let interpreter = Interpreter::new(&model.graph, &weights).unwrap();
        let (vocab, lengths) = (case.vocab, [0; SEQUENCES]);
        let mut fake = Fake { interpreter, vocab, fault, lengths, poisoned: false, steps: 0 };
        let mut outcomes = Vec::new();
        assert_eq!(run(&case, &prepared, &mut fake, 3, &mut outcomes), After::GoOn);
        let failed: Vec<&str> =
            outcomes.iter().filter(|outcome| outcome.problem.is_some()).map(|outcome| outcome.what).collect();
        println!("{fault:?}: {} steps", fake.steps);
        assert_eq!(failed, expected, "{fault:?}: {outcomes:#?}");
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
