//! Command-line options, `--name value`, without a parser crate.

use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The arguments after the task's name. Options are taken out one by one; what is left is an error.
pub struct Args(Vec<String>);

impl Args {
    /// Wraps the arguments that follow a task's name.
    pub fn new(args: impl IntoIterator<Item = String>) -> Self {
        Self(args.into_iter().collect())
    }

    /// Takes the flag `name`; true when it was given.
    pub fn flag(&mut self, name: &str) -> bool {
        let found = self.0.iter().position(|arg| arg == name);
        found.map(|at| self.0.remove(at)).is_some()
    }

    /// Takes the value of the option `name`, given as `--name value` or `--name=value`.
    ///
    /// # Errors
    /// When the value is missing.
    pub fn text(&mut self, name: &str) -> Result<Option<String>> {
        let prefix = format!("{name}=");
        if let Some(at) = self.0.iter().position(|arg| arg.starts_with(&prefix)) {
            return Ok(Some(self.0.remove(at).split_off(prefix.len())));
        }
        let Some(at) = self.0.iter().position(|arg| arg == name) else { return Ok(None) };
        if at + 1 >= self.0.len() {
            return Err(Error::new(format!("{name} needs a value")));
        }
        self.0.remove(at);
        Ok(Some(self.0.remove(at)))
    }

    /// Takes the path given with the option `name`.
    ///
    /// # Errors
    /// When the value is missing.
    pub fn path(&mut self, name: &str) -> Result<Option<PathBuf>> {
        Ok(self.text(name)?.map(PathBuf::from))
    }

    /// Takes the number given with the option `name`, or `default`; it has to be at least `least`.
    ///
    /// # Errors
    /// When the value is missing, no number, or below `least`.
    pub fn number<T>(&mut self, name: &str, default: T, least: T) -> Result<T>
    where
        T: FromStr + PartialOrd + std::fmt::Display,
    {
        let Some(text) = self.text(name)? else { return Ok(default) };
        match text.parse::<T>() {
            Ok(value) if value >= least => Ok(value),
            _ => Err(Error::new(format!("{name} takes a number of at least {least}, not `{text}`"))),
        }
    }

    /// Takes the arguments that are not options.
    pub fn positional(&mut self) -> Vec<String> {
        let (names, rest) = self.0.drain(..).partition(|arg| !arg.starts_with('-'));
        self.0 = rest;
        names
    }

    /// Fails when an argument was not taken.
    ///
    /// # Errors
    /// Names the first argument left.
    pub fn finish(self) -> Result<()> {
        match self.0.first() {
            None => Ok(()),
            Some(arg) => Err(Error::new(format!("unknown argument `{arg}`; `cargo xtask help` lists them"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Args {
        Args::new(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_in_both_spellings() {
        let mut given = args("--threads 3 name --model=a=b.gguf --text");
        assert_eq!(given.number("--threads", 2usize, 1).unwrap(), 3);
        assert_eq!(given.text("--model").unwrap().as_deref(), Some("a=b.gguf"));
        assert!(given.flag("--text"));
        assert!(!given.flag("--text"));
        assert_eq!(given.number("--repeats", 5usize, 5).unwrap(), 5);
        assert_eq!(given.positional(), ["name"]);
        given.finish().unwrap();
    }

    #[test]
    fn bad_options_are_named() {
        for (line, expected) in
            [("--threads", "--threads needs a value"), ("--threads x", "`x`"), ("--threads 0", "`0`")]
        {
            let error = args(line).number("--threads", 2usize, 1).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(args("--thread 2").finish().unwrap_err().to_string().contains("--thread"));
    }
}
