//! Running other programs and timing the parts of a task.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};

/// The root of the workspace.
pub fn workspace_root() -> PathBuf {
    // Cargo sets the variable for `cargo xtask`; the built-in value serves a binary started by hand.
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let manifest = PathBuf::from(manifest);
    manifest.parent().map(Path::to_path_buf).unwrap_or(manifest)
}

/// The cargo that started this task, in the workspace root.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace_root());
    command
}

/// The command as a reader would type it.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program());
    let mut line = name.to_string_lossy().into_owned();
    for arg in command.get_args() {
        let arg = arg.to_string_lossy();
        line.push(' ');
        if arg.is_empty() || arg.contains(char::is_whitespace) {
            line.push_str(&format!("'{arg}'"));
        } else {
            line.push_str(&arg);
        }
    }
    line
}

/// Runs the command with its output going straight to the terminal.
///
/// # Errors
/// When it cannot be started or ends with a failure.
pub fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", shown(command));
    let status = command.status().context(|| format!("cannot start `{}`", shown(command)))?;
    if status.success() { Ok(()) } else { Err(Error::new(format!("`{}` failed: {status}", shown(command)))) }
}

/// Runs the command and returns its standard output; its standard error goes to the terminal.
///
/// # Errors
/// When it cannot be started, ends with a failure, or prints something that is not UTF-8.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context(|| format!("cannot start `{}`", shown(command)))?;
    if !output.status.success() {
        return Err(Error::new(format!("`{}` failed: {}", shown(command), output.status)));
    }
    String::from_utf8(output.stdout)
        .context(|| format!("`{}` printed something other than UTF-8", shown(command)))
}

/// Whether the program starts and succeeds with these arguments; its output is dropped.
pub fn works(program: impl AsRef<OsStr>, args: &[&str]) -> bool {
    let quiet = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    quiet.is_ok_and(|status| status.success())
}

/// Names and times the parts of a task as they run.
#[derive(Default)]
pub struct Parts {
    done: Vec<(String, Duration)>,
}

impl Parts {
    /// Runs one part, printing its name before and its time after.
    ///
    /// # Errors
    /// Those of the part itself.
    pub fn run<T>(&mut self, name: &str, part: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("\n==> {name}");
        let start = Instant::now();
        let value = part()?;
        let took = start.elapsed();
        eprintln!("    {name}: {:.1} s", took.as_secs_f64());
        self.done.push((name.to_owned(), took));
        Ok(value)
    }

    /// The time of every part and their sum, one line each.
    pub fn table(&self) -> String {
        let total: Duration = self.done.iter().map(|(_, took)| *took).sum();
        let rows = self.done.iter().map(|(name, took)| (name.as_str(), *took)).chain([("total", total)]);
        rows.map(|(name, took)| format!("{name:<28} {:>8.1} s\n", took.as_secs_f64())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_name_the_command() {
        let error = output(Command::new("sh").args(["-c", "exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c 'exit 3'") && error.contains('3'), "{error}");
        let error = run(&mut Command::new("no-such-program-at-all")).unwrap_err().to_string();
        assert!(error.contains("no-such-program-at-all"), "{error}");
    }

    #[test]
    fn output_is_captured() {
        assert_eq!(output(Command::new("sh").args(["-c", "printf 'a b'"])).unwrap(), "a b");
        assert!(works("sh", &["-c", "true"]));
        assert!(!works("sh", &["-c", "false"]));
    }

    #[test]
    fn parts_stop_at_the_first_failure() {
        let mut parts = Parts::default();
        assert_eq!(parts.run("good", || Ok(7)).unwrap(), 7);
        assert!(parts.run("bad", || Err::<(), _>(Error::new("no"))).is_err());
        let table = parts.table();
        assert!(table.contains("good") && table.contains("total") && !table.contains("bad"), "{table}");
    }
}
