//! What every command prints with: tables for people, JSON for programs.

use std::error::Error;
use std::path::Path;

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, presets};

/// A command's result: whether everything it checked passed.
pub type Outcome = Result<bool, Box<dyn Error>>;

/// Width that tables keep to, where their contents allow it.
const WIDTH: u16 = 100;

/// A table with a header; columns from `first_number` on are right-aligned.
pub fn table(header: &[&str], first_number: usize, rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    // No line between rows: it would double the table's height.
    table.load_style(presets::UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none()));
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(WIDTH).set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 1));
        if i >= first_number {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Writes a file, and names it where that fails.
pub fn write(path: &Path, contents: impl AsRef<[u8]>) -> Result<(), String> {
    std::fs::write(path, contents).map_err(|e| format!("{}: {e}", path.display()))
}

/// Prints one JSON document.
pub fn json(value: &serde_json::Value) -> Result<(), serde_json::Error> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// A number in as few characters as its size needs.
pub fn short(x: f64) -> String {
    match x {
        0.0 => "0".into(),
        x if x.abs() < 0.001 => format!("{x:.1e}"),
        x if x.abs() < 10.0 => format!("{x:.3}"),
        x if x.abs() < 1000.0 => format!("{x:.1}"),
        x => format!("{x:.0}"),
    }
}
