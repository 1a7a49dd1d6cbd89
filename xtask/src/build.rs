//! Building the `tilec` command.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};
use crate::shell;

/// Builds `tilec` in release mode and returns the path of the executable, wherever cargo was told to put it.
///
/// # Errors
/// When the build fails.
pub fn tilec() -> Result<PathBuf> {
    let mut command: Command = shell::cargo();
    command.args(["build", "--release", "--package", "tilec", "--message-format", "json-render-diagnostics"]);
    eprintln!("$ cargo build --release --package tilec");
    let build = command.stderr(Stdio::inherit()).output().context(|| "cannot start cargo")?;
    if !build.status.success() {
        return Err(Error::new("building tilec failed"));
    }
    let messages = String::from_utf8_lossy(&build.stdout);
    executable(&messages, "tilec").ok_or_else(|| Error::new("cargo built no executable called tilec"))
}

/// The path of the executable `name` in cargo's JSON messages.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut named = messages.filter(|message| message["target"]["name"] == name);
    named.find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_found_among_messages() {
        let messages = concat!(
            "not json\n",
            r#"{"reason":"compiler-artifact","target":{"name":"tilec_ir"},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"tilec"},"executable":"/t/release/tilec"}"#,
            "\n",
        );
        assert_eq!(executable(messages, "tilec"), Some(PathBuf::from("/t/release/tilec")));
        assert_eq!(executable(messages, "tilec_ir"), None);
    }
}
