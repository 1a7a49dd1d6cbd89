use super::cases::{CONTEXT, Case};
use super::compare::{deviation, finite, same_bits};
use super::prepare::prepare;
use std::collections::BTreeSet;
use tilec_codegen::compile::{self, Input};
use tilec_codegen::emit::cuda::emit;
use tilec_codegen::frontends;
use tilec_codegen::nvrtc::{Arch, CudaText, Nvrtc, Options};
use tilec_codegen::passes::{fuse, resident};
use tilec_ir::plan::WeightsFrom;

/// The kernel's text of a case.
fn text(case: &Case) -> String {
    let tensors = frontends::synthetic_tensors(&case.config, case.stored).unwrap();
    let spec = case.spec("/nowhere".into(), "sm_90a");
    let weights = WeightsFrom::Checkpoint { path: "/nowhere".into() };
    let input = Input { name: "selftest", config: &case.config, tensors: &tensors, weights, tokenizer: None };
    let graph = compile::graph(&input, &spec).unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let fused = fuse::fuse(&graph).unwrap();
    let program = resident::resident(&fused, CONTEXT);
    let program = program.unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let kernel = emit(&program, Arch::Sm90a).unwrap_or_else(|error| panic!("{}: {error}", case.name));
    kernel.text
}

#[test]
fn every_case_has_a_kernel_of_its_own() {
    let cases: Vec<Case> = (0..40).map(|number| Case::new(1, number)).collect();
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
    for number in 0..10 {
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
fn a_case_is_prepared_and_its_reference_depends_on_every_tensor() {
    let case = Case::new(1, 0);
    let folder = tempfile::tempdir().unwrap();
    let prepared = prepare(&case, folder.path(), "sm_90a").unwrap();
    assert_eq!(prepared.reference.len(), prepared.prompt.len() * case.vocab);
    finite("the reference", &prepared.reference, case.vocab).unwrap();
    assert!(prepared.plan.join("kernel.cubin").is_file());
}

#[test]
fn numbers_that_are_none_are_no_agreement() {
    let good = [1.0, -2.0, 3.0, 4.0];
    assert_eq!(deviation(&good, &good, 2).unwrap().error, 0.0);
    same_bits(&good, &good, 2).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut found = good;
        found[3] = bad;
        let text = deviation(&found, &good, 2).unwrap_err();
        assert!(text.contains("the result has") && text.contains("row 1, column 1"), "{text}");
        assert!(deviation(&good, &found, 2).unwrap_err().contains("the reference has"));
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
    let worst = deviation(&found, &wanted, 6).unwrap();
    assert_eq!(worst.row, 40);
    assert!((worst.error - 0.1).abs() < 1e-6, "{worst:?}");
    let text = same_bits(&found, &wanted, 6).unwrap_err();
    assert!(text.contains("1 of 100 rows differ, first row 40"), "{text}");
    // The other sign of zero is another bit.
    same_bits(&[0.0], &[-0.0], 1).unwrap_err();
}

#[test]
fn nothing_agrees_with_a_reference_of_zeros_or_with_nothing() {
    assert!(deviation(&[1.0, 1.0, 0.0, 0.0], &[1.0, 1.0, 0.0, 0.0], 2).unwrap_err().contains("row 1"));
    for (found, wanted, cols) in
        [(&[][..], &[][..], 2), (&[1.0][..], &[1.0, 2.0][..], 1), (&[1.0; 3][..], &[1.0; 3][..], 2)]
    {
        deviation(found, wanted, cols).unwrap_err();
        same_bits(found, wanted, cols).unwrap_err();
    }
}
