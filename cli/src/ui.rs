//! What people see: tables and sizes on stdout, notes and progress bars on stderr.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::sync::atomic::{AtomicBool, Ordering};

static QUIET: AtomicBool = AtomicBool::new(false);

/// Leaves notes and progress bars out from now on.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// A line on stderr that says what is going on, unless `--quiet` was given.
pub fn note(line: impl AsRef<str>) {
    if !QUIET.load(Ordering::Relaxed) {
        eprintln!("{}", line.as_ref());
    }
}

/// A progress bar of `total` bytes. It draws nothing where stderr is no terminal.
pub fn byte_progress(what: &'static str, total: u64) -> ProgressBar {
    bar(what, total, "{msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}")
}

/// A progress bar of `total` steps. It draws nothing where stderr is no terminal.
pub fn step_progress(what: &'static str, total: u64) -> ProgressBar {
    bar(what, total, "{msg} [{bar:30}] {pos} of {len}")
}

fn bar(what: &'static str, total: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), draw_target());
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.with_style(style.progress_chars("=> ")).with_message(what)
}

fn draw_target() -> ProgressDrawTarget {
    if QUIET.load(Ordering::Relaxed) { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() }
}

/// How a column of a [`Table`] is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table of text cells, printed in columns or as Markdown.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these column heads.
    pub fn new(columns: &[(&str, Align)]) -> Table {
        let columns = columns.iter().map(|(name, align)| (name.to_string(), *align)).collect();
        Table { columns, rows: Vec::new() }
    }

    /// Adds a row. Cells beyond the columns are left out, missing ones are empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut row: Vec<String> = cells.into_iter().take(self.columns.len()).collect();
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
    }

    fn widths(&self) -> Vec<usize> {
        let width = |(number, (name, _)): (usize, &(String, Align))| {
            let cells = self.rows.iter().map(|row| row[number].chars().count());
            cells.chain([name.chars().count()]).max().unwrap_or(0)
        };
        self.columns.iter().enumerate().map(width).collect()
    }

    fn cells(&self, cells: &[String], widths: &[usize]) -> Vec<String> {
        let pad = |((cell, width), (_, align)): ((&String, &usize), &(String, Align))| match align {
            Align::Left => format!("{cell:<width$}"),
            Align::Right => format!("{cell:>width$}"),
        };
        cells.iter().zip(widths).zip(&self.columns).map(pad).collect()
    }

    fn heads(&self) -> Vec<String> {
        self.columns.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Columns with two spaces between them.
    pub fn text(&self) -> String {
        let widths = self.widths();
        let mut out = String::new();
        for row in std::iter::once(&self.heads()).chain(&self.rows) {
            out.push_str(self.cells(row, &widths).join("  ").trim_end());
            out.push('\n');
        }
        out
    }

    /// A Markdown table.
    pub fn markdown(&self) -> String {
        let widths = self.widths();
        let rule: Vec<String> = widths
            .iter()
            .zip(&self.columns)
            .map(|(width, (_, align))| match align {
                Align::Left => "-".repeat(*width),
                Align::Right => format!("{}:", "-".repeat(width.saturating_sub(1).max(1))),
            })
            .collect();
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let mut out = line(self.cells(&self.heads(), &widths));
        out.push_str(&line(rule));
        for row in &self.rows {
            out.push_str(&line(self.cells(row, &widths)));
        }
        out
    }
}

/// Bytes in binary units, as memory is counted: `97.66 MiB`.
pub fn mib(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

/// A count in decimal units, as parameters are counted: `134.52 M`.
pub fn count(value: u64) -> String {
    match value {
        0..1_000_000 => value.to_string(),
        1_000_000..1_000_000_000 => format!("{:.2} M", value as f64 / 1e6),
        _ => format!("{:.2} B", value as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&[("name", Align::Left), ("µs", Align::Right)]);
        table.row(["qkv".to_string(), "12.5".to_string()]);
        table.row(["attention".to_string()]);
        table
    }

    #[test]
    fn columns_are_aligned_and_lines_have_no_tail() {
        assert_eq!(table().text(), "name         µs\nqkv        12.5\nattention\n");
    }

    #[test]
    fn markdown_says_how_numbers_are_set() {
        let expected =
            "| name      |   µs |\n| --------- | ---: |\n| qkv       | 12.5 |\n| attention |      |\n";
        assert_eq!(table().markdown(), expected);
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(
            [mib(0), mib(1023), mib(1536), mib(u64::MAX)],
            ["0 B", "1023 B", "1.50 KiB", "16777216.00 TiB"]
        );
        assert_eq!(
            [count(999_999), count(134_515_008), count(8_030_000_000)],
            ["999999", "134.52 M", "8.03 B"]
        );
    }
}
