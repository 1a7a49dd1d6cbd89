//! Reads the assembler's report: what each kernel uses.

use super::NvrtcError;

/// What a kernel uses, in its own code and in that of functions which are not inlined into it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelResources {
    /// The kernel, by its name in the cubin (mangled unless it is `extern "C"`).
    pub name: String,
    /// 32-bit registers per thread.
    pub registers: u32,
    /// Bytes of stack per thread, calls included. A local array that is indexed at run time lies there, and
    /// so do spilled registers.
    pub stack: u32,
    /// Bytes per thread of instructions that store registers on the stack.
    pub spill_stores: u32,
    /// Bytes per thread of instructions that load them again.
    pub spill_loads: u32,
    /// Bytes of static shared memory per block; what a launch adds is not in it.
    pub shared: u32,
}

/// What a line begins with that tells nothing about a kernel, or is read into [`KernelResources`].
const ROUTINE: [&str; 7] = [
    "Compiling entry function",
    "Function properties for",
    "Used ",
    "Compile time",
    "0 bytes gmem",
    "Overriding",
    "Loading ",
];

/// The resources of every kernel, in the order of the log.
///
/// # Errors
/// [`NvrtcError::Report`] when a kernel's figures are missing or are no numbers.
pub(super) fn kernels(log: &str) -> Result<Vec<KernelResources>, NvrtcError> {
    let mut kernels: Vec<Partial> = Vec::new();
    // Whether the figures that follow are those of a function. Its report stands behind that of the kernel
    // that it was compiled for; a function of two kernels is there twice.
    let mut in_function = false;
    for line in log.lines().filter(|line| line.starts_with("ptxas") || line.starts_with(' ')) {
        let fault = |reason| NvrtcError::Report { reason, line: line.trim().into() };
        let said = said(line);
        if let Some(rest) = said.strip_prefix("Compiling entry function '") {
            let (name, _) = rest.split_once('\'').ok_or_else(|| fault("a quoted name"))?;
            let resources = KernelResources { name: name.into(), ..KernelResources::default() };
            kernels.push(Partial { resources, frame: false, registers: false });
            in_function = false;
        } else if let Some(name) = said.strip_prefix("Function properties for ") {
            let kernel = kernels.last().ok_or_else(|| fault("a kernel before it"))?;
            in_function = kernel.frame || kernel.resources.name != name.trim().trim_matches('\'');
        } else if said.contains(" bytes stack frame") {
            let kernel = kernels.last_mut().ok_or_else(|| fault("a kernel before it"))?;
            let figure = |what| figure(said, what).ok_or_else(|| fault("a number of bytes"));
            let (stack, stores, loads) = (
                figure(" bytes stack frame")?,
                figure(" bytes spill stores")?,
                figure(" bytes spill loads")?,
            );
            let resources = &mut kernel.resources;
            // Of calls the report has the sum, below, with the kernel's registers.
            resources.stack = resources.stack.max(stack);
            let add = |sum: &mut u32, more| {
                *sum = sum.checked_add(more).ok_or_else(|| fault("a smaller number"))?;
                Ok(())
            };
            add(&mut resources.spill_stores, stores)?;
            add(&mut resources.spill_loads, loads)?;
            kernel.frame |= !in_function;
        } else if said.starts_with("Used ") && !in_function {
            let kernel = kernels.last_mut().ok_or_else(|| fault("a kernel before it"))?;
            let registers = figure(said, " registers").ok_or_else(|| fault("a number of registers"))?;
            // What is zero is not listed.
            let optional = |what| if said.contains(what) { figure(said, what).ok_or(()) } else { Ok(0) };
            let bytes = |what| optional(what).map_err(|()| fault("a number of bytes"));
            let resources = &mut kernel.resources;
            resources.registers = registers;
            resources.shared = bytes(" bytes smem")?;
            resources.stack = resources.stack.max(bytes(" bytes cumulative stack size")?);
            kernel.registers = true;
        }
    }
    if let Some(kernel) = kernels.iter().find(|kernel| !kernel.frame || !kernel.registers) {
        let line = kernel.resources.name.clone();
        return Err(NvrtcError::Report { reason: "figures for every kernel", line });
    }
    Ok(kernels.into_iter().map(|kernel| kernel.resources).collect())
}

/// A kernel whose report is not complete yet.
struct Partial {
    resources: KernelResources,
    frame: bool,
    registers: bool,
}

/// What a line says behind `ptxas info    : `. Some versions put only blanks before the frame.
fn said(line: &str) -> &str {
    match line.strip_prefix("ptxas") {
        Some(rest) => {
            let rest = rest.trim_start();
            let rest = rest.strip_prefix("info").map_or(rest, str::trim_start);
            rest.trim_start_matches([':', '.']).trim()
        }
        None => line.trim(),
    }
}

/// The number before `what`: 32 of `Used 32 registers` for ` registers`.
fn figure(line: &str, what: &str) -> Option<u32> {
    let (before, _) = line.split_once(what)?;
    before.rsplit(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

/// A log without what differs from run to run (the times) and blank lines.
pub(super) fn lasting(log: &str) -> String {
    let kept = log.lines().filter(|line| !line.trim().is_empty() && !said(line).starts_with("Compile time"));
    kept.flat_map(|line| [line, "\n"]).collect()
}

/// What the compiler says beyond the resources: warnings of the front end, and the assembler's remarks
/// (among them that it serialises tensor-core instructions, which costs more than a spill).
pub(super) fn warnings(log: &str) -> Vec<&str> {
    let remark = |line: &&str| {
        let routine = ROUTINE.iter().any(|known| said(line).starts_with(known));
        let of_assembler = line.starts_with("ptxas") && !routine && !line.contains(" bytes stack frame");
        // Sizes of other memory begin with a number.
        let size = said(line).starts_with(|letter: char| letter.is_ascii_digit()) && line.contains(" bytes ");
        (of_assembler && !size) || line.contains("): warning")
    };
    log.lines().filter(remark).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As NVRTC 13.0 wrote it for sm_90a: `b` and `a` call a function of their own copy that spills.
    const CALLS: &str = "\
k.cu(13): warning #177-D: variable \"unused\" was declared but never referenced
  int unused = 3;
      ^

Remark: The warnings can be suppressed with \"-diag-suppress <warning-number>\"

ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'd' for 'sm_90a'
ptxas info    : Function properties for d
ptxas         .     1744 bytes stack frame, 1636 bytes spill stores, 2032 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 1744 bytes cumulative stack size
ptxas info    : Compile time = 104.449 ms
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
ptxas         .     16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 3920 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 1139.730 ms
ptxas info    : Function properties for _Z5innerPfi
ptxas         .     0 bytes stack frame, 5404 bytes spill stores, 6692 bytes spill loads
ptxas info    : Compiling entry function '_Z4tmplILi3EEvPi' for 'sm_90a'
ptxas info    : Function properties for _Z4tmplILi3EEvPi
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 1144.209 ms
";

    fn used(name: &str, figures: [u32; 5]) -> KernelResources {
        let [registers, stack, spill_stores, spill_loads, shared] = figures;
        KernelResources { name: name.into(), registers, stack, spill_stores, spill_loads, shared }
    }

    #[test]
    fn resources_of_kernels_and_of_what_they_call() {
        let expected = [
            used("d", [64, 1744, 1636, 2032, 0]),
            used("b", [255, 3920, 5404, 6692, 256]),
            used("_Z4tmplILi3EEvPi", [10, 0, 0, 0, 0]),
        ];
        assert_eq!(kernels(CALLS).unwrap(), expected);
        assert_eq!(kernels(&lasting(CALLS)).unwrap(), expected, "nothing that counts is left out");
        assert!(!lasting(CALLS).contains(" ms"));
    }

    #[test]
    fn the_layout_of_older_versions() {
        // Figures are made up.
        let log = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 24 registers, 1024 bytes smem, 544 bytes cmem[0]
";
        assert_eq!(kernels(log).unwrap(), [used("k", [24, 8, 4, 2, 1024])]);
        assert_eq!(warnings(log), Vec::<&str>::new());
    }

    #[test]
    fn damaged_reports_are_refused() {
        for (from, to) in [
            ("1636 bytes spill", "many bytes spill"),
            ("Used 64 registers", "Used registers"),
            ("ptxas info    : Used 64 registers, used 1 barriers, 1744 bytes cumulative stack size\n", ""),
            ("1636 bytes spill stores", "99999999999 bytes spill stores"),
            (
                "5404 bytes spill stores",
                "4294967295 bytes spill stores, 0 bytes spill loads\n 7 bytes stack frame, 1 bytes spill stores",
            ),
            ("ptxas info    : Compiling entry function 'd' for 'sm_90a'\n", ""),
        ] {
            let log = CALLS.replace(from, to);
            assert_ne!(log, CALLS);
            let error = kernels(&log).unwrap_err();
            assert!(matches!(error, NvrtcError::Report { .. }), "{from}: {error}");
        }
    }

    #[test]
    fn remarks_are_told_from_routine() {
        assert_eq!(warnings(CALLS).len(), 1, "{:?}", warnings(CALLS));
        let log = "\
ptxas info    : (C7517) warpgroup.wait is injected in around line 39 by compiler to allow use of registers
ptxas info    : 0 bytes gmem, 40 bytes cmem[4]
ptxas warning : Stack size for entry function 'k' cannot be statically determined
";
        let found = warnings(log);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("C7517") && found[1].contains("Stack size"));
    }
}
