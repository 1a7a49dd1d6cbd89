//! With the real library. `cargo xtask setup nvrtc` fetches it; without it these tests fail and say so.

use super::*;
use object::{Object as _, ObjectSection as _};
use std::collections::BTreeSet;

/// What a kernel of tilec is made of: a barrier in shared memory, a bulk copy (or its forerunner), and a
/// matrix product.
const PIPE: CudaText<'static> = CudaText {
    name: "pipe.cu",
    text: r#"
typedef unsigned int u32;
typedef unsigned long long u64;

u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

extern "C" __global__ void __launch_bounds__(32) pipe(const uint4* weights, float* out, int steps) {
  __shared__ alignas(128) uint4 tile[64];
  __shared__ alignas(8) u64 full;
  const u32 lane = threadIdx.x;
  const u32 barrier = shared_address(&full);
  if (lane == 0) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier));
  __syncwarp();
  float d[4] = {0, 0, 0, 0};
  for (int step = 0; step < steps; step++) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 1024;" ::"r"(barrier) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 1024, [%2];"
                   ::"r"(shared_address(tile)), "l"(weights + step * 64), "r"(barrier) : "memory");
    }
#else
    for (int i = lane; i < 64; i += 32)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                   ::"r"(shared_address(tile + i)), "l"(weights + step * 64 + i) : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
    if (lane == 0) asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(barrier) : "memory");
#endif
    u32 done = 0;
    while (!done)
      asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                   : "=r"(done) : "r"(barrier), "r"(step & 1) : "memory");
    const uint4 a = tile[lane];
    const uint4 b = tile[32 + lane];
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
    __syncwarp();
  }
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = d[i];
}
"#,
};

/// Holds 100 values over a barrier in 64 registers.
const SPILLING: CudaText<'static> = CudaText {
    name: "spilling.cu",
    text: r#"
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x, int n) {
  float v[COUNT];
  #pragma unroll
  for (int k = 0; k < COUNT; k++) v[k] = x[k * n + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int k = 0; k < COUNT; k++) x[k * n + 1] = v[COUNT - 1 - k] * v[(k * 7) % COUNT];
}
extern "C" __global__ void small(float* x) { x[threadIdx.x] = 1; }
"#,
};

const STRICT: Budget = Budget { registers: 64, stack: 0, spills: 0 };

fn nvrtc() -> Nvrtc {
    Nvrtc::find().unwrap_or_else(|error| panic!("{error}"))
}

fn defines(list: &[(&str, &str)]) -> Options {
    let defines = list.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    Options { defines, ..Options::default() }
}

fn compile_failure(text: &CudaText<'_>, arch: Arch) -> CompileFailure {
    match nvrtc().compile(text, arch, &Options::default()) {
        Err(NvrtcError::Compile(failure)) => *failure,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_architecture_gets_code_within_its_budget() {
    let nvrtc = nvrtc();
    for arch in Arch::ALL {
        for fast in [false, true] {
            let cubin = nvrtc.compile(&PIPE, arch, &Options { fast, ..Options::default() });
            let cubin = cubin.unwrap_or_else(|error| panic!("{arch}: {error}"));
            if !fast {
                cubin.check(&[("pipe", STRICT)]).unwrap_or_else(|error| panic!("{arch}: {error}"));
            }
            assert_eq!(cubin.warnings(), Vec::<&str>::new(), "{arch}");
            let used = cubin.kernel("pipe").unwrap();
            assert!(used.registers >= 8, "{used:?}");
            // The report counts the tile and the barrier, and from Hopper on 1 KB that the system keeps.
            assert!((1032..=1032 + 1024 + 128).contains(&used.shared), "{arch}: {used:?}");
            let elf = object::File::parse(&*cubin.bytes).unwrap();
            let code = elf.section_by_name(".text.pipe").expect("code of the kernel");
            assert!(code.size() > 0 && code.size() % 16 == 0, "instructions of 16 bytes");
        }
    }
}

#[test]
fn every_kernel_of_the_code_is_reported() {
    let cubin = nvrtc().compile(&SPILLING, Arch::Sm90a, &defines(&[("COUNT", "8")])).unwrap();
    let elf = object::File::parse(&*cubin.bytes).unwrap();
    let names =
        elf.sections().filter_map(|section| Some(section.name().ok()?.strip_prefix(".text.")?.to_owned()));
    let in_code: BTreeSet<String> = names.collect();
    let reported: BTreeSet<String> = cubin.resources.iter().map(|kernel| kernel.name.clone()).collect();
    assert_eq!(in_code, reported);
    assert_eq!(reported.len(), 2);
}

#[test]
fn spills_are_refused_by_the_budget() {
    let cubin = nvrtc().compile(&SPILLING, Arch::Sm90a, &defines(&[("COUNT", "100")])).unwrap();
    let used = cubin.kernel("spilling").unwrap();
    assert!(used.spill_stores > 0 && used.spill_loads > 0 && used.stack > 0, "{used:?}");
    let error = cubin.check(&[("small", STRICT), ("spilling", STRICT)]).unwrap_err().to_string();
    assert!(error.contains("spilling uses") && error.contains("bytes of spills a thread of 0"), "{error}");
    assert!(error.contains("of stack") && !error.contains("small"), "{error}");
    cubin.check(&[("small", STRICT)]).unwrap();

    // The same text with fewer values fits, and what fits exactly passes.
    let cubin = nvrtc().compile(&SPILLING, Arch::Sm90a, &defines(&[("COUNT", "8")])).unwrap();
    let registers = cubin.kernel("spilling").unwrap().registers;
    cubin.check(&[("spilling", Budget { registers, ..STRICT })]).unwrap();
    let error = cubin.check(&[("spilling", Budget { registers: registers - 1, ..STRICT })]).unwrap_err();
    assert!(error.to_string().contains("registers"), "{error}");
    let error = cubin.check(&[("speling", STRICT)]).unwrap_err().to_string();
    assert!(error.contains("`speling`") && error.contains("spilling"), "{error}");
}

#[test]
fn errors_name_the_line() {
    let text = CudaText {
        name: "wrong.cu",
        text: "// one\nextern \"C\" __global__ void wrong(int* x) {\n  x[0] = nothing;\n}\n",
    };
    let failure = compile_failure(&text, Arch::Sm90a);
    let [diagnostic] = &failure.diagnostics[..] else { panic!("{failure}") };
    assert_eq!((diagnostic.file.as_str(), diagnostic.line), ("wrong.cu", Some(3)));
    let shown = failure.to_string();
    assert!(shown.contains("wrong.cu:3: error: identifier \"nothing\" is undefined"), "{shown}");
    assert!(shown.contains("    3 |   x[0] = nothing;") && shown.contains("sm_90a"), "{shown}");
}

#[test]
fn errors_of_the_assembler_name_the_line_of_the_text() {
    let text = CudaText {
        name: "newer.cu",
        text: "extern \"C\" __global__ void newer(int* x) {\n  x[1] = 2;\n  asm volatile(\"cp.async.bulk.commit_group;\");\n  x[0] = 1;\n}\n",
    };
    nvrtc().compile(&text, Arch::Sm90a, &Options::default()).unwrap();
    let failure = compile_failure(&text, Arch::Sm80);
    let [diagnostic] = &failure.diagnostics[..] else { panic!("{failure}") };
    assert_eq!((diagnostic.file.as_str(), diagnostic.line), ("newer.cu", Some(3)), "{failure}");
    assert!(diagnostic.source.contains("asm volatile"), "{failure}");
    assert!(diagnostic.message.contains("requires .target sm_90"), "{failure}");

    let text = CudaText {
        name: "extern.cu",
        text: "extern \"C\" int away(int);\nextern \"C\" __global__ void k(int* x) { *x = away(3); }\n",
    };
    let shown = compile_failure(&text, Arch::Sm90a).to_string();
    assert!(shown.contains("Unresolved extern function 'away'"), "{shown}");
}

#[test]
fn warnings_are_no_errors() {
    let text = CudaText {
        name: "warns.cu",
        text: "extern \"C\" __global__ void k(int* x) { int idle = 3; *x = 1; }",
    };
    let cubin = nvrtc().compile(&text, Arch::Sm90a, &Options::default()).unwrap();
    assert!(matches!(cubin.warnings()[..], [warning] if warning.contains("\"idle\"")), "{}", cubin.log);
}

#[test]
fn deep_texts_do_not_overflow_the_stack() {
    let (open, close) = ("(".repeat(3000), ")".repeat(3000));
    let text = format!("extern \"C\" __global__ void k(int* x) {{ *x = {open}1{close}; }}");
    nvrtc().compile(&CudaText { name: "deep.cu", text: &text }, Arch::Sm90a, &Options::default()).unwrap();
}

#[test]
fn a_compilation_repeats_to_the_bit() {
    let nvrtc = nvrtc();
    let options = Options { lineinfo: true, ..Options::default() };
    let first = nvrtc.compile(&PIPE, Arch::Sm90a, &options).unwrap();
    assert_eq!(nvrtc.compile(&PIPE, Arch::Sm90a, &options).unwrap(), first);
    let here = std::env::current_dir().unwrap();
    let here = here.to_str().unwrap().as_bytes();
    assert!(
        !first.bytes.windows(here.len()).any(|bytes| bytes == here),
        "the working directory is in the code"
    );
    let plain = nvrtc.compile(&PIPE, Arch::Sm90a, &Options::default()).unwrap();
    assert!(plain.bytes.len() < first.bytes.len());
    assert_eq!(plain.resources, first.resources);
}

#[test]
fn arithmetic_stays_exact() {
    // Fast arithmetic would divide by an approximate reciprocal and flush subnormal numbers.
    let text = CudaText {
        name: "exact.cu",
        text: "extern \"C\" __global__ void k(float* x) { x[0] = x[1] / x[2] + x[3] * x[4]; }",
    };
    let flags = nvrtc().flags(Arch::Sm90a, &Options::default()).unwrap();
    let outcome = nvrtc().compile_with(&text, &flags, true).unwrap();
    assert!(outcome.ptx.contains("div.rn.f32") && outcome.ptx.contains("fma.rn.f32"), "{}", outcome.ptx);
    assert!(!outcome.ptx.contains(".ftz") && !outcome.ptx.contains(".approx"), "{}", outcome.ptx);
}

#[test]
fn what_cannot_be_handed_over_is_refused() {
    let nvrtc = nvrtc();
    let text = CudaText { name: "k.cu", text: "extern \"C\" __global__ void k(int* x) { *x = A; }" };
    for (name, value) in [("", "1"), ("1A", "1"), ("A B", "1"), ("A", "1\n2"), ("A", "1\0")] {
        let error = nvrtc.compile(&text, Arch::Sm90a, &defines(&[(name, value)])).unwrap_err();
        assert!(matches!(error, NvrtcError::Input(_)), "{error}");
    }
    nvrtc.compile(&text, Arch::Sm90a, &defines(&[("A", "1 + 2")])).unwrap();
    for (name, text) in [("", "int x;"), ("a/b.cu", "int x;"), ("k.cu", "int\0 x;")] {
        let error = nvrtc.compile(&CudaText { name, text }, Arch::Sm90a, &Options::default()).unwrap_err();
        assert!(matches!(error, NvrtcError::Input(_)), "{error}");
    }
}

#[test]
fn architectures_have_names() {
    for arch in Arch::ALL {
        assert_eq!(Arch::parse(arch.name()).unwrap(), arch);
    }
    for name in ["sm_90", "90a", "", "SM_80", "host"] {
        let error = Arch::parse(name).unwrap_err().to_string();
        assert!(error.contains(&format!("`{name}`")), "{error}");
        assert!(Arch::ALL.iter().all(|arch| error.contains(arch.name())), "{error}");
    }
}

#[test]
fn a_missing_library_gives_the_remedy() {
    let error = locate::Search::default().find().err().expect("nothing to look at").to_string();
    assert!(error.contains(REMEDY), "{error}");

    // Neither is a name that the loader does not know worth a line.
    let search = locate::Search { ask_loader: true, ..locate::Search::default() };
    if let Err(error) = search.find() {
        assert!(!error.to_string().contains("No such file"), "{error}");
    }

    // One that is no library is passed over, and named.
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("libnvrtc.so.13");
    std::fs::write(&broken, b"not a library").unwrap();
    let roots = vec![folder.path().to_path_buf()];
    let search = locate::Search { roots: roots.clone(), ..locate::Search::default() };
    let error = search.find().err().expect("no library").to_string();
    assert!(error.contains(REMEDY) && error.contains(broken.to_str().unwrap()), "{error}");
    let good = nvrtc().path().parent().unwrap().to_path_buf();
    let search = locate::Search { roots: [roots, vec![good]].concat(), ..locate::Search::default() };
    assert_eq!(search.find().map(|library| library.path).unwrap(), nvrtc().path());

    // What was asked for is not replaced by something else.
    let error = Nvrtc::open(&broken).unwrap_err().to_string();
    assert!(error.contains("too short"), "the loader's own words: {error}");
    for place in [folder.path().to_path_buf(), broken, folder.path().join("nothing")] {
        let search = locate::Search {
            named: Some(place.clone()),
            roots: vec![nvrtc().path().parent().unwrap().to_path_buf()],
            ..locate::Search::default()
        };
        let error = search.find().err().expect("no library").to_string();
        assert!(error.contains(REMEDY) && error.contains(place.to_str().unwrap()), "{error}");
    }
    let error = Nvrtc::open(std::env::current_exe().unwrap().as_path()).unwrap_err().to_string();
    assert!(error.contains("cannot be used"), "{error}");
}

#[test]
fn a_library_is_opened_by_file_and_by_folder() {
    let found = nvrtc();
    let (file, folder) = (found.path(), found.path().parent().unwrap());
    for place in [file, folder] {
        let opened = Nvrtc::open(place).unwrap();
        assert_eq!((opened.path(), opened.version()), (file, found.version()));
    }
    assert!(found.version() >= Version { major: 12, minor: 8 });
}

#[test]
fn cubins_are_kept_and_damage_is_noticed() {
    let nvrtc = nvrtc();
    let folder = tempfile::tempdir().unwrap();
    let cache = CubinCache::new(folder.path().join("cubins"));
    let options = Options { fast: true, ..Options::default() };
    let compile = || cache.compile(&nvrtc, &PIPE, Arch::Sm90a, &options).unwrap();
    let first = compile();
    assert!(!first.hit);
    let second = compile();
    assert!(second.hit);
    assert_eq!(second.cubin, first.cubin);

    let path = cache.path(&nvrtc, &PIPE, Arch::Sm90a, &options).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut relabelled = whole.clone();
    relabelled[12] ^= 1;
    let longer = [&whole[..], b"x"].concat();
    for damaged in [&whole[..whole.len() / 2], &whole[..20], b"", &flipped, &relabelled, &longer] {
        std::fs::write(&path, damaged).unwrap();
        let again = compile();
        assert!(!again.hit, "{} bytes of {}", damaged.len(), whole.len());
        assert_eq!(again.cubin, first.cubin);
        assert_eq!(std::fs::read(&path).unwrap(), whole, "the file is whole again");
    }
    let left: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "no unfinished file stays");
}

#[test]
fn everything_that_matters_is_in_the_key() {
    let nvrtc = nvrtc();
    let cache = CubinCache::new("unused");
    let renamed = CudaText { name: "other.cu", ..PIPE };
    // The same bytes, cut elsewhere.
    assert!(PIPE.text.starts_with('\n'));
    let moved = CudaText { name: "pipe.cu\n", text: &PIPE.text[1..] };
    let paths = [
        cache.path(&nvrtc, &PIPE, Arch::Sm90a, &Options::default()),
        cache.path(&nvrtc, &PIPE, Arch::Sm100a, &Options::default()),
        cache.path(&nvrtc, &SPILLING, Arch::Sm90a, &Options::default()),
        cache.path(&nvrtc, &renamed, Arch::Sm90a, &Options::default()),
        cache.path(&nvrtc, &moved, Arch::Sm90a, &Options::default()),
        cache.path(&nvrtc, &PIPE, Arch::Sm90a, &Options { fast: true, ..Options::default() }),
        cache.path(&nvrtc, &PIPE, Arch::Sm90a, &Options { lineinfo: true, ..Options::default() }),
        cache.path(&nvrtc, &PIPE, Arch::Sm90a, &defines(&[("A", "1")])),
        cache.path(&nvrtc, &PIPE, Arch::Sm90a, &defines(&[("A", "2")])),
        cache.path(&nvrtc, &PIPE, Arch::Sm90a, &defines(&[("A", "1"), ("B", "2")])),
    ];
    let distinct: BTreeSet<_> = paths.into_iter().map(Result::unwrap).collect();
    assert_eq!(distinct.len(), 10);
}

#[test]
fn a_folder_that_cannot_be_written_costs_no_cubin() {
    let nvrtc = nvrtc();
    let file = tempfile::NamedTempFile::new().unwrap();
    let cache = CubinCache::new(file.path().join("below-a-file"));
    let options = defines(&[("COUNT", "4")]);
    for _ in 0..2 {
        let cached = cache.compile(&nvrtc, &SPILLING, Arch::Sm80, &options).unwrap();
        assert!(!cached.hit);
        assert_eq!(cached.cubin.resources.len(), 2);
    }
}
