//! What the commands print: one locked standard output, tables and JSON.
//!
//! A reader that closes the pipe early (`| head`) is no failure: the error of the
//! write is carried up as any other and [`super::failure`] ends quietly on it.

use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::units::MIB;

/// Transfers from this size on show a progress bar, on a terminal.
const BAR_FROM: u64 = 64 * MIB;

/// Standard output, locked and buffered; flushed by [`Output::done`].
pub(super) struct Output {
    stdout: BufWriter<StdoutLock<'static>>,
}

impl Output {
    pub(super) fn new() -> Self {
        let stdout = BufWriter::new(io::stdout().lock());
        Output { stdout }
    }

    /// One line of text.
    pub(super) fn line(&mut self, text: impl std::fmt::Display) -> io::Result<()> {
        writeln!(self.stdout, "{text}")
    }

    /// One JSON value, over several lines.
    pub(super) fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut self.stdout, value)?;
        writeln!(self.stdout)
    }

    /// One JSON value on one line, flushed: for streams of them.
    pub(super) fn json_line(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.stdout, value)?;
        writeln!(self.stdout)?;
        self.stdout.flush()
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stdout.write_all(bytes)
    }

    pub(super) fn table(&mut self, table: &Table) -> io::Result<()> {
        for line in table.lines() {
            writeln!(self.stdout, "{}", line.trim_end())?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()
    }

    /// Writes out what is buffered.
    pub(super) fn done(mut self) -> io::Result<()> {
        self.stdout.flush()
    }
}

/// How the cells of a column stand.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    /// Numbers.
    Right,
}

/// A table without lines and colours: columns two spaces apart, one row per line
/// unless standard output is a terminal that is too narrow.
pub(super) fn table<const N: usize>(columns: [(&str, Align); N]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    if io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    } else {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    table.set_header(columns.map(|(name, _)| name));
    for (column, (_, align)) in table.column_iter_mut().zip(columns) {
        column.set_padding((0, 2));
        if align == Align::Right {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// `1234567` as `1 234 567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// A size to be read, not to be computed with: `1.50 GiB`, `824 B`.
pub(super) fn about(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.995 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.2} {}", UNITS[unit])
}

/// The bar of a transfer of `len` bytes, none for a short one.
pub(super) fn progress(len: u64) -> ProgressBar {
    // Standard error; indicatif draws nothing where that is no terminal.
    if len < BAR_FROM {
        return ProgressBar::hidden();
    }
    let style = "{bar:40} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}";
    let bar = ProgressBar::new(len);
    match ProgressStyle::with_template(style) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_three() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1 000"),
            (1_234_567, "1 234 567"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn sizes_to_be_read() {
        assert_eq!(about(0), "0 B");
        assert_eq!(about(1023), "1023 B");
        assert_eq!(about(1536), "1.50 KiB");
        assert_eq!(about((1 << 20) - 1), "1.00 MiB");
        assert_eq!(about(u64::MAX), "16384.00 PiB");
    }

    #[test]
    fn numbers_stand_on_the_right_and_nothing_is_coloured() {
        let mut table = table([("NAME", Align::Left), ("SIZE", Align::Right)]);
        table.add_row(["a", "1"]);
        table.add_row(["long-name", "1024"]);
        let text: Vec<String> = table.lines().map(|l| l.trim_end().to_owned()).collect();
        assert_eq!(
            text,
            ["NAME       SIZE", "a             1", "long-name  1024"]
        );
    }
}
