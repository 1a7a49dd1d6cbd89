//! Reads what the compiler says about a text that it refuses.

use super::CudaText;
use std::fmt;

/// One error, with the place in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// The text, or what a `#line` of it names; empty where the compiler does not say.
    pub file: String,
    /// The line in it, counted from one.
    pub line: Option<u32>,
    /// The compiler's message, with notes on lines of their own.
    pub message: String,
    /// What stands on that line; empty where it is not known.
    pub source: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.message)?,
            None => f.write_str(&self.message)?,
        }
        match (self.line, self.source.is_empty()) {
            (Some(line), false) => write!(f, "\n{line:>5} | {}", self.source),
            _ => Ok(()),
        }
    }
}

const ASSEMBLER_LINE: &str = "ptxas application ptx input, line ";

/// Whether the log names lines of the PTX.
pub(super) fn is_of_assembler(log: &str) -> bool {
    log.contains(ASSEMBLER_LINE)
}

/// The errors in a log; the whole log as one error when it has none that is understood. `ptx` is the PTX that
/// the assembler refused, with line tables, or empty.
pub(super) fn diagnostics(text: &CudaText<'_>, log: &str, ptx: &str) -> Vec<Diagnostic> {
    let mut found: Vec<Diagnostic> = Vec::new();
    let mut lines = log.lines().peekable();
    while let Some(line) = lines.next() {
        if let Some((file, number, message)) = front_end(line) {
            let mut message = message.to_owned();
            // The message may go on, before the source and the caret below it.
            while let Some(more) = lines.next_if(|more| !more.trim().is_empty() && front_end(more).is_none())
            {
                if lines.peek().is_some_and(|next| next.trim() == "^") {
                    break;
                }
                message.push('\n');
                message.push_str(more);
            }
            found.push(Diagnostic { source: source(text, file, number), ..place(file, number, message) });
        } else if let Some((number, message)) = assembler(line) {
            let (file, line) = origin(ptx, number).unwrap_or_default();
            let mut message = format!("assembler: {message}");
            // The instruction itself, which a macro of the text may hide.
            if let Some(code) = nth_line(ptx, number) {
                message = format!("{message}\n    in `{}`", code.trim());
            }
            let source = source(text, &file, line);
            found.push(Diagnostic { source, ..place(&file, line, message) });
        } else if let Some(message) = fatal(line) {
            found.push(place("", 0, message.into()));
        }
    }
    if found.is_empty() {
        found.push(place("", 0, log.trim().into()));
    }
    found
}

/// Line 0 stands for an unknown one.
fn place(file: &str, line: u32, message: String) -> Diagnostic {
    let file = file.rsplit('/').next().unwrap_or(file).to_owned();
    Diagnostic { file, line: (line > 0).then_some(line), message, source: String::new() }
}

/// `/name.cu(12): error: message`: the file, the line and the message with its severity. Warnings are not
/// errors and are left out.
fn front_end(line: &str) -> Option<(&str, u32, &str)> {
    const SEVERITIES: [&str; 4] = ["error", "catastrophic error", "internal error", "command-line error"];
    let mut rest = 0;
    // A file name may hold the same signs.
    while let Some(at) = line[rest..].find("): ") {
        let at = rest + at;
        let message = &line[at + 3..];
        if SEVERITIES.iter().any(|severity| message.starts_with(severity)) {
            let (file, number) = line[..at].rsplit_once('(')?;
            return Some((file, number.parse().ok()?, message));
        }
        rest = at + 3;
    }
    None
}

/// `ptxas application ptx input, line 31; error   : message`: the line of the PTX and the message.
fn assembler(line: &str) -> Option<(u32, &str)> {
    let (number, rest) = line.strip_prefix(ASSEMBLER_LINE)?.split_once(';')?;
    let (severity, message) = rest.split_once(':')?;
    match severity.trim() {
        "error" | "fatal" => Some((number.parse().ok()?, message.trim())),
        _ => None,
    }
}

/// An error without a place: of the assembler, or of the options.
fn fatal(line: &str) -> Option<&str> {
    let of_assembler = line.starts_with("ptxas fatal") && !line.contains("aborted due to errors");
    (of_assembler || line.starts_with("nvrtc: error")).then_some(line)
}

fn nth_line(text: &str, number: u32) -> Option<&str> {
    let index = usize::try_from(number).ok()?.checked_sub(1)?;
    text.lines().nth(index)
}

/// The line of the text, when the file is the text.
fn source(text: &CudaText<'_>, file: &str, number: u32) -> String {
    // The text is handed over as `/name`.
    let own = file.strip_prefix('/').unwrap_or(file) == text.name;
    nth_line(text.text, number).filter(|_| own).map_or(String::new(), |line| line.trim_end().into())
}

/// The file and line that a line of the PTX comes from, by the nearest `.loc` before it.
fn origin(ptx: &str, number: u32) -> Option<(String, u32)> {
    let index = usize::try_from(number).ok()?;
    let before: Vec<&str> = ptx.lines().take(index).collect();
    let mut words = before.iter().rev().find_map(|line| line.trim().strip_prefix(".loc"))?.split_whitespace();
    let (file, line) = (words.next()?, words.next()?.parse().ok()?);
    let named = ptx.lines().find_map(|line| {
        let (index, name) = line.trim().strip_prefix(".file")?.trim().split_once(char::is_whitespace)?;
        (index == file).then(|| name.trim())
    })?;
    // `"/name.cu"`, in some versions with a time and a size behind.
    Some((named.split('"').nth(1)?.to_owned(), line))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: CudaText<'static> = CudaText { name: "k (b).cu", text: "one\n  two = nothing;\nthree\n" };

    #[test]
    fn errors_of_the_front_end() {
        // As NVRTC 13.0 wrote it, with another name of the text.
        let log = "\
/k (b).cu(1): warning #174-D: expression has no effect
  one
  ^

Remark: The warnings can be suppressed with \"-diag-suppress <warning-number>\"

/k (b).cu(2): error: no instance of function template \"f\" matches the argument list
            argument types are: (int, int)
    two = nothing;
          ^
/k (b).cu(3): note #3322-D: number of parameters does not match the call
  three
  ^

other.cuh(7): error: identifier \"A\" is undefined
  extern \"C\" __global__ void k(int*x){ *x = A; }
                                            ^

/k (b).cu(3): catastrophic error: #error directive: one two
  three
   ^

2 errors detected in the compilation of \"/k (b).cu\".
";
        let found = diagnostics(&TEXT, log, "");
        assert_eq!(found.len(), 3, "{found:#?}");
        assert_eq!((found[0].file.as_str(), found[0].line), ("k (b).cu", Some(2)));
        assert!(found[0].message.contains("matches the argument list\n"), "{}", found[0].message);
        assert!(found[0].message.ends_with("(int, int)"), "{}", found[0].message);
        assert!(found[0].to_string().ends_with("\n    2 |   two = nothing;"), "{}", found[0]);
        assert_eq!((found[1].file.as_str(), found[1].line), ("other.cuh", Some(7)));
        assert_eq!(found[1].source, "", "the line of another file is not that of the text");
        assert_eq!(found[2].line, Some(3));
    }

    #[test]
    fn errors_of_the_assembler_name_the_text() {
        let ptx = "\
.visible .entry bad()
{
\t.loc\t1 1 3
\tmov.u32 \t%r1, 2;
\t.loc\t1 2 3, function_name $L__info_string0, inlined_at 1 9 5
\tcp.async.bulk.commit_group;
\t.loc\t1 3 1
\tret;
}
\t.file\t1 \"/k (b).cu\"
";
        let log = "\
ptxas application ptx input, line 6; error   : Feature 'cp.async.bulk' requires .target sm_90 or higher
ptxas fatal   : Ptx assembly aborted due to errors
";
        assert!(is_of_assembler(log));
        let found = diagnostics(&TEXT, log, ptx);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!((found[0].line, found[0].source.as_str()), (Some(2), "  two = nothing;"));
        assert!(found[0].message.contains("`cp.async.bulk.commit_group;`"), "{}", found[0].message);
        // Without the PTX the message is still there.
        let blind = diagnostics(&TEXT, log, "");
        assert_eq!(blind[0].line, None);
        assert!(blind[0].to_string().contains("requires .target sm_90"), "{}", blind[0]);
    }

    #[test]
    fn errors_without_a_place() {
        for log in [
            "ptxas fatal   : Unresolved extern function 'u'\n",
            "nvrtc: error: invalid value for --gpu-architecture (-arch)\n",
            "something nobody knows\n",
        ] {
            let found = diagnostics(&TEXT, log, "");
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].to_string(), log.trim());
        }
    }
}
