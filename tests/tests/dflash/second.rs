//! What the second version adds: convolutions along a block, and guesses that a selector chooses.

use super::*;
use tilec_codegen::compile::{Host, compile, graphs};
use tilec_ir::graph::Op;
use tilec_ir::graph::interp::{Interpreter, Row, WeightSource};
use tilec_runtime::checkpoint::Checkpoint;
use tilec_runtime::engine::Proposal;

const SECOND: &[&str] = &["second", "second-capped"];

/// Candidates of a guess and their scores.
type Candidates = (Vec<u32>, Vec<f32>);

/// Blocks of the reference: which, its last known token, the tokens before it, and its rows.
fn blocks(reference: &Reference) -> Vec<(String, u32, &[u32], usize)> {
    let names = reference.whole.keys().filter_map(|name| name.strip_prefix("walk."));
    let block = |name: &str| {
        let (number, rows) = name.split_once('.').unwrap();
        let (token, before) = reference.whole[&format!("block_tokens.{number}")].split_last().unwrap();
        (name.to_string(), *token, before, rows.parse().unwrap())
    };
    names.map(block).collect()
}

/// How far the scores of candidates `[guesses][k]` are from these of the reference's candidates.
fn scores_off(ours: &[Candidates], tokens: &[u32], scores: &[f64]) -> f64 {
    let k = tokens.len() / ours.len();
    let mut worst: f64 = 0.0;
    for (guess, (candidates, own)) in ours.iter().enumerate() {
        assert_eq!(candidates.len(), k);
        let theirs = &tokens[guess * k..][..k];
        for (token, score) in candidates.iter().zip(own) {
            let at = theirs.iter().position(|other| other == token);
            let off = at.map_or(f64::INFINITY, |at| (scores[guess * k + at] - f64::from(*score)).abs());
            worst = if off.is_nan() { f64::INFINITY } else { worst.max(off) };
        }
    }
    worst
}

/// What the engine says of a block's candidates behind these guesses, and its own guesses.
fn walked(
    engine: &mut Engine,
    token: u32,
    before: &[u32],
    rows: usize,
    path: &[u32],
) -> (Vec<Candidates>, Vec<Option<u32>>) {
    engine.reset(2);
    feed(engine, before, 2, 24);
    let position = before.len() as u32;
    let block = BlockInput { token, position, sequence: 2, rows, wanted: rows - 1 };
    let own = engine.guess(&[block]).unwrap();
    let mut said = Vec::new();
    let forced = engine.guess_by(&[block], &mut |_, guess, proposal| {
        let Proposal::Candidates { tokens, scores } = proposal else { panic!("no candidates") };
        said.push((tokens.to_vec(), scores.to_vec()));
        tokens.iter().position(|token| *token == path[guess])
    });
    assert!(forced.unwrap().iter().zip(path).all(|(forced, wanted)| *forced == Some(*wanted)));
    (said, own)
}

/// A draft chooses its guesses as the formulas do, each behind the one before.
#[test]
fn walks_are_those_of_the_formulas() {
    for pair in SECOND {
        let fixture = Fixture::open_pair(pair);
        let mut loaded = load(&fixture, &f32_everywhere(&fixture), 2);
        let reference = Reference::of(pair);
        let (mut worst, mut guesses, mut largest): (f64, usize, usize) = (0.0, 0, 0);
        for (name, token, before, rows) in blocks(&reference) {
            let path = &reference.whole[&format!("walk.{name}")];
            let (said, own) = walked(&mut loaded.engine, token, before, rows, path);
            let candidates = &reference.whole[&format!("candidates.{name}")];
            worst = worst.max(scores_off(&said, candidates, &reference.logits[&format!("scores.{name}")]));
            assert!(
                own.iter().zip(path).all(|(own, wanted)| *own == Some(*wanted)),
                "{pair} {name}: {own:?}"
            );
            guesses += own.len();
            // The selector has a say: candidates come with the largest logit first.
            largest += said.iter().zip(path).filter(|((tokens, _), guess)| tokens[0] == **guess).count();
        }
        println!("{pair}: scores {worst:e} off, {largest} of {guesses} guesses are the largest logits");
        assert!(worst < 1e-4, "{pair}: scores are off by {worst:e}");
        assert!(guesses >= 40 && largest + 3 < guesses, "{pair}: {largest} of {guesses}");
    }
}

/// Blocks are far from what they would be by a formula that was got wrong; `make_dflash.py` computes those.
#[test]
fn mistakes_in_the_formulas_would_show() {
    for pair in SECOND {
        let fixture = Fixture::open_pair(pair);
        let mut loaded = load(&fixture, &f32_everywhere(&fixture), 2);
        let reference = Reference::of(pair);
        let (rows, vocab) = (loaded.engine.draft_block().unwrap(), loaded.engine.plan().vocab);
        let of_last = format!("3.{rows}");
        let (_, token, before, _) =
            blocks(&reference).into_iter().find(|(name, ..)| *name == of_last).unwrap();
        let path = &reference.whole[&format!("walk.{of_last}")];
        let (said, _) = walked(&mut loaded.engine, token, before, rows, path);
        let position = before.len() as u32;
        let block = BlockInput { token, position, sequence: 2, rows, wanted: rows - 1 };
        let logits = loaded.engine.draft(&[block]).unwrap().to_vec();
        assert!(distance(&logits, &reference.logits[&format!("block.{of_last}")], vocab) < 1e-4);
        let mistakes = ["taps", "sides", "before", "leak", "late", "anchor"];
        for mistake in mistakes {
            let wrong = &reference.logits[&format!("mistake.{mistake}")];
            let far = match mistake {
                // Behind another token the candidates of the first guess are worth something else.
                "anchor" => {
                    let k = wrong.len() / (rows - 1);
                    let candidates = &reference.whole[&format!("candidates.{of_last}")];
                    scores_off(&said[..1], &candidates[..k], &wrong[..k])
                }
                _ => distance(&logits, wrong, vocab),
            };
            println!("{pair}: {mistake}: {far:.3} off");
            assert!(far > 0.03, "{pair}: {mistake} is only {far:e} off");
        }
        let found = reference.logits.keys().filter(|name| name.starts_with("mistake.")).count();
        assert_eq!(found, mistakes.len());
    }
}

/// Weights that lie otherwise than we read them: blocks are far off, and the acceptance is another.
#[test]
fn weights_that_are_taken_for_others_show() {
    type Change = fn(&str, &mut Vec<f32>);
    let kernels = |name: &str| name.ends_with("base_kernel") || name.ends_with("kernel_projection.weight");
    let mistakes: [(&str, Change); 5] = [
        ("taps of each side exchanged", |_, values| {
            let side = values.len() / 2;
            values.chunks_mut(side).for_each(|side| side.rotate_left(side.len() / 2));
        }),
        ("sides exchanged", |_, values| {
            let half = values.len() / 2;
            values.rotate_left(half);
        }),
        ("no kernel of the row's own", |name, values| {
            if name.ends_with("projection.weight") {
                values.fill(0.0);
            }
        }),
        ("sides and taps exchanged", |_, values| {
            let quarter = values.len() / 4;
            for at in 0..quarter {
                values.swap(quarter + at, 2 * quarter + at);
            }
        }),
        ("no base", |name, values| {
            if name.ends_with("base_kernel") {
                values.fill(0.0);
            }
        }),
    ];
    for pair in SECOND {
        let reference = Reference::of(pair);
        let right = acceptance_over(&Fixture::open_pair(pair), &reference).0;
        let folder = fixtures().join("dflash").join(pair);
        let target = format!("dflash/{}", tilec_tests::pair_target(pair));
        let altered_acceptance = |weights: &dyn Fn(&str, &mut Vec<f32>)| {
            let draft = altered(&folder, weights, &|_| {});
            acceptance_over(&Fixture::open(&target).with_draft(draft.path()), &reference)
        };
        for (mistake, change) in mistakes {
            let (found, mut engine) = altered_acceptance(&|name, values| {
                if kernels(name) {
                    change(name, values);
                }
            });
            let far = block_distance(&mut engine, &reference);
            println!("{pair}: {mistake}: acceptance {found:.2} in place of {right:.2}, blocks {far:.2} off");
            assert!(far > 0.05, "{pair}: {mistake}: blocks are only {far:e} off");
            assert!((found / right - 1.0).abs() > 0.003, "{pair}: {mistake}: acceptance {found}, as before");
        }
        // Tables of the selector: logits stay, guesses change.
        let (found, mut engine) = altered_acceptance(&|name, values| {
            if name.ends_with("predecessor_codebook") {
                values.fill(0.0);
            }
        });
        assert!(block_distance(&mut engine, &reference) < 1e-4);
        println!("{pair}: without the selector {found:.2} in place of {right:.2}");
        assert!(found < right * 0.997, "{pair}: the selector does not help: {found} of {right}");
    }
}

/// Bits of logits and of scores, and guesses.
type Said = (Vec<u32>, Vec<u32>, Vec<Option<u32>>);

/// Several blocks in one pass: the same bits and guesses as each alone, whatever is beside it.
#[test]
fn blocks_do_not_see_each_other() {
    for pair in SECOND {
        let fixture = Fixture::open_pair(pair);
        let mut loaded = load(&fixture, &f32_everywhere(&fixture), 2);
        let engine = &mut loaded.engine;
        let (rows, vocab) = (engine.draft_block().unwrap(), engine.plan().vocab);
        let texts: Vec<Vec<u32>> =
            (0..3u32).map(|s| (0..9 + 5 * s).map(|n| (n * 7 + 3 * s) % vocab as u32).collect()).collect();
        let blocks: Vec<BlockInput> = (0..3u32)
            .map(|sequence| {
                let (token, before) = texts[sequence as usize].split_last().unwrap();
                feed(engine, before, sequence, 24);
                // One of them is shorter, one wants less.
                let rows = rows - usize::from(sequence == 1);
                let wanted = rows - 1 - 2 * usize::from(sequence == 2);
                BlockInput { token: *token, position: before.len() as u32, sequence, rows, wanted }
            })
            .collect();
        let bits = |engine: &mut Engine, blocks: &[BlockInput]| -> Said {
            let logits = engine.draft(blocks).unwrap().iter().map(|x| x.to_bits()).collect();
            let mut said = Vec::new();
            let guesses = engine.guess_by(blocks, &mut |_, _, proposal| {
                said.extend(proposal.scores().iter().map(|x| x.to_bits()));
                proposal.best()
            });
            let guesses = guesses.unwrap();
            assert_eq!(engine.guess(blocks).unwrap(), guesses);
            (logits, said, guesses)
        };
        let alone: Vec<_> = blocks.iter().map(|block| bits(engine, &[*block])).collect();
        for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
            let together = bits(engine, &order.map(|at| blocks[at]));
            let wanted = order.map(|at| &alone[at]);
            assert!(together.0.iter().eq(wanted.iter().flat_map(|(logits, ..)| logits)), "{pair} {order:?}");
            assert!(together.1.iter().eq(wanted.iter().flat_map(|(_, said, _)| said)), "{pair} {order:?}");
            assert!(
                together.2.iter().eq(wanted.iter().flat_map(|(.., guesses)| guesses)),
                "{pair} {order:?}"
            );
        }
    }
}

/// A checkpoint's tensors by the names in a graph.
struct Weights<'a>(&'a Checkpoint);

impl WeightSource for Weights<'_> {
    fn tensor(&self, name: &str) -> Result<std::borrow::Cow<'_, [f32]>, String> {
        self.0.tensor_f32(name).map(Into::into).map_err(|error| error.to_string())
    }
}

/// What the graph means: the interpreter's block is the reference's, also the scores of its pairs.
#[test]
fn the_interpreter_runs_the_formulas() {
    for pair in SECOND {
        let fixture = Fixture::open_pair(pair);
        let spec = f32_everywhere(&fixture);
        let (target, draft) = graphs(&fixture.input(), &spec).unwrap();
        let draft = draft.unwrap();
        let weights = Weights(&fixture.checkpoint);
        let reference = Reference::of(pair);
        for (name, token, before, rows) in blocks(&reference) {
            let mut interpreter = Interpreter::new(&target, &weights).unwrap();
            let row = |position: usize, token| Row { token, position, sequence: 0 };
            let known: Vec<Row> = before.iter().enumerate().map(|(at, token)| row(at, *token)).collect();
            let mut taps = Vec::new();
            interpreter
                .step_observed(&known, &[], &mut |node, values| {
                    if node.op == Op::Taps {
                        taps = values.to_vec();
                    }
                })
                .unwrap();
            let mut inject = Interpreter::new(&draft.inject, &weights).unwrap();
            inject.set_input(&taps);
            inject.step(&known, &[]).unwrap();
            let mut block = Interpreter::new(&draft.block, &weights).unwrap();
            block.exchange_caches(&mut inject).unwrap();
            let masked: Vec<Row> = (0..rows)
                .map(|at| row(before.len() + at, if at == 0 { token } else { draft.draft.mask_token }))
                .collect();
            let wanted: Vec<usize> = (1..rows).collect();
            let (mut candidates, mut pairs) = (Vec::new(), Vec::new());
            let logits = block
                .step_observed(&masked, &wanted, &mut |node, values| match node.op {
                    Op::TopK { .. } => candidates = values.to_vec(),
                    Op::PairScores { .. } => pairs = values.to_vec(),
                    _ => {}
                })
                .unwrap();
            let vocab = target.node(target.find("logits").unwrap()).ty.cols;
            assert!(
                distance(&logits, &reference.logits[&format!("block.{name}")], vocab) < 1e-5,
                "{pair} {name}"
            );
            let k = candidates.len() / 2 / (rows - 1);
            let path = &reference.whole[&format!("walk.{name}")];
            let mut last = 0;
            let mut said = Vec::new();
            for (guess, token) in path.iter().enumerate() {
                let own: Vec<u32> = candidates[guess * 2 * k..][..2 * k]
                    .iter()
                    .step_by(2)
                    .map(|token| *token as u32)
                    .collect();
                let scores = pairs[(guess * k + last) * k..][..k].to_vec();
                last = own.iter().position(|other| other == token).unwrap();
                assert!(scores.iter().all(|score| *score <= scores[last]), "{pair} {name} {guess}");
                said.push((own, scores));
            }
            let theirs = &reference.whole[&format!("candidates.{name}")];
            let off = scores_off(&said, theirs, &reference.logits[&format!("scores.{name}")]);
            assert!(off < 1e-5, "{pair} {name}: {off:e}");
        }
    }
}

/// Every level prints; codebooks stay as they are stored, whatever the other weights become.
#[test]
fn levels_of_a_pair_of_the_second_version() {
    use tilec_codegen::compile::Level;
    let fixture = Fixture::open_pair("second");
    let mut spec = fixture.spec();
    spec.precision.weights = tilec_ir::spec::WeightFormat::Converted(tilec_ir::format::Format::Q8_0);
    let compiled = compile(&fixture.input(), &spec, &Host { threads: 2, cubins: None }).unwrap();
    for level in [Level::Graph, Level::Fused, Level::Stages] {
        let text = compiled.text(level);
        let block = text.rfind("dflash block\"").unwrap();
        let start = text[..block].rfind('\n').unwrap() + 1;
        insta::assert_snapshot!(format!("second-{}", level.name()), &text[start..]);
    }
    let selector = compiled.plan.draft.unwrap().selector.unwrap();
    assert_ne!(selector.candidates, selector.scores);
}

/// What a checkpoint of this kind lies about is refused before anything runs, by its name.
#[test]
fn lying_checkpoints_are_refused() {
    let folder = fixtures().join("dflash/second");
    let error = |weights: &dyn Fn(&str, &mut Vec<f32>), config: &dyn Fn(&mut serde_json::Value)| {
        let draft = altered(&folder, weights, config);
        let fixture = Fixture::open("dflash/target-qwen3").with_draft(draft.path());
        let host = Host { threads: 1, cubins: None };
        compile(&fixture.input(), &fixture.spec(), &host).unwrap_err().to_string()
    };
    let own = |key: &'static str, value: serde_json::Value| {
        error(&|_, _| {}, &move |config| config["dflash_config"][key] = value.clone())
    };
    for (key, value, parts) in [
        ("conv_kernel_size", 3.into(), ["conv_kernel_size", "is not 2"]),
        ("conv_group_size", 24.into(), ["conv_group_size", "does not divide hidden_size 32"]),
        ("conv_group_size", 8.into(), ["kernel_projection.weight", "implies [16, 32]"]),
        ("selector_top_k", 21.into(), ["selector_top_k", "vocabulary of 20"]),
        ("selector_rank", 8.into(), ["candidate_selector", "implies [8, 32]"]),
    ] {
        let error = own(key, value);
        for part in parts.into_iter().chain(["the draft /", "as they were published"]) {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
    }
}
