//! What several runs of `oxllama bench --json` measured, as one table: a column a model.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result};
use serde_json::Value;

/// What a row of the table says, in the table's order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Row {
    Decode { sequences: u64 },
    Depth { cache: String, tokens: u64 },
    Prefill { tokens: u64 },
    LoadFiles,
    LoadRandom,
    OpenDevices,
    ReadBandwidth,
    Arithmetic,
}

impl Row {
    fn title(&self) -> String {
        match self {
            Self::Decode { sequences } => format!("decode, batch {sequences}, tokens/s"),
            Self::Depth { cache, tokens } => {
                format!("batch 1 up to context {}, {cache} pages", grouped(*tokens))
            }
            Self::Prefill { tokens } => format!("prefill {}", grouped(*tokens)),
            Self::LoadFiles => "load from files, without the context, s".to_owned(),
            Self::LoadRandom => "load (weights are made on the host), s".to_owned(),
            Self::OpenDevices => "creating the context, s".to_owned(),
            Self::ReadBandwidth => "memory reads, GB/s".to_owned(),
            Self::Arithmetic => "products, Tflop/s".to_owned(),
        }
    }

    /// Whether less is better.
    fn is_time(&self) -> bool {
        matches!(self, Self::LoadFiles | Self::LoadRandom | Self::OpenDevices)
    }
}

/// A measured value, and its share of what the machine allows where there is one.
#[derive(Debug, Clone, Copy)]
struct Cell {
    value: f64,
    share: Option<f64>,
}

/// The best of everything measured.
#[derive(Debug, Default)]
struct Table {
    /// Devices and models in the order in which they come.
    devices: Vec<String>,
    models: Vec<String>,
    cells: BTreeMap<(Row, String), Cell>,
}

/// The table of the reports in `files`.
pub(crate) fn of_files(files: &[String]) -> Result<String> {
    let mut table = Table::default();
    for file in files {
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
        let report: Value =
            serde_json::from_str(&text).with_context(|| format!("{file} is no report"))?;
        table
            .add(&report)
            .with_context(|| format!("{file} is no report of oxllama bench"))?;
    }
    Ok(table.to_markdown())
}

impl Table {
    fn add(&mut self, report: &Value) -> Result<()> {
        let text = |key: &str| {
            let value = report[key].as_str().with_context(|| format!("no {key}"));
            value.map(str::to_owned)
        };
        let (mut model, device, cache) = (text("model")?, text("device")?, text("cache")?);
        if let Some(devices @ 2..) = report["devices"].as_u64() {
            model += &format!(" on {devices} GPUs");
        }
        for (list, name) in [(&mut self.devices, &device), (&mut self.models, &model)] {
            if !list.contains(name) {
                list.push(name.clone());
            }
        }
        let number = |key: &str| {
            let value = report[key].as_f64();
            value.with_context(|| format!("no {key}"))
        };
        let plain = |value| Cell { value, share: None };
        self.note(Row::OpenDevices, &model, plain(number("open_s")?));
        let load = plain(number("load_s")?);
        if report["synthetic"] != true {
            // Such a run is there for its load.
            self.note(Row::LoadFiles, &model, load);
            return Ok(());
        }
        self.note(Row::LoadRandom, &model, load);
        let bandwidth = plain(number("read_bandwidth_gb_per_s")?);
        self.note(Row::ReadBandwidth, &model, bandwidth);
        if let Some(rate) = report["arithmetic_tflops"].as_f64() {
            self.note(Row::Arithmetic, &model, plain(rate));
        }
        let short_context = report["decode"][0]["context_tokens"].as_u64();
        for decode in list(report, "decode")? {
            let (sequences, tokens) = (decode["sequences"].as_u64(), &decode["context_tokens"]);
            let (sequences, tokens) = sequences
                .zip(tokens.as_u64())
                .context("no sequences or context_tokens")?;
            // What is measured again beside the formats of a cache is not shown again.
            let is_deep = sequences == 1 && Some(tokens) != short_context;
            let row = if is_deep {
                let cache = cache.clone();
                Row::Depth { cache, tokens }
            } else if cache == "f16" {
                Row::Decode { sequences }
            } else {
                continue;
            };
            self.note(row, &model, cell(decode)?);
        }
        for prefill in list(report, "prefill")? {
            let tokens = prefill["tokens"].as_u64().context("no tokens")?;
            if cache == "f16" {
                self.note(Row::Prefill { tokens }, &model, cell(prefill)?);
            }
        }
        Ok(())
    }

    /// Keeps the better of two values.
    fn note(&mut self, row: Row, model: &str, cell: Cell) {
        let is_time = row.is_time();
        let best = self.cells.entry((row, model.to_owned())).or_insert(cell);
        if (cell.value < best.value) == is_time {
            *best = cell;
        }
    }

    fn to_markdown(&self) -> String {
        let mut text = format!("On {}:\n\n|", self.devices.join(", "));
        for model in &self.models {
            let _ = write!(text, " | {model}");
        }
        text += " |\n| ---";
        text += &" | --:".repeat(self.models.len());
        text += " |\n";
        let mut rows: Vec<&Row> = self.cells.keys().map(|(row, _)| row).collect();
        rows.dedup();
        for row in rows {
            text += "| ";
            text += &row.title();
            for model in &self.models {
                let cell = self.cells.get(&(row.clone(), model.clone()));
                let _ = write!(text, " | {}", cell.map_or(String::new(), Cell::to_string));
            }
            text += " |\n";
        }
        text += "\nIn brackets the share of what memory (decode) or arithmetic (prefill) allow.";
        text
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.value < 100.0 {
            write!(formatter, "{:.2}", self.value)?;
        } else {
            formatter.write_str(&grouped(self.value.round() as u64))?;
        }
        match self.share {
            Some(share) => write!(formatter, " ({:.0}%)", 100.0 * share),
            None => Ok(()),
        }
    }
}

fn list<'a>(report: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    report[key].as_array().with_context(|| format!("no {key}"))
}

/// Tokens a second with their share.
fn cell(measured: &Value) -> Result<Cell> {
    let value = measured["tokens_per_s"].as_f64();
    Ok(Cell {
        value: value.context("no tokens_per_s")?,
        share: measured["share"].as_f64(),
    })
}

/// A number with commas between thousands.
fn grouped(number: u64) -> String {
    if number < 1000 {
        return number.to_string();
    }
    format!("{},{:03}", grouped(number / 1000), number % 1000)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A report with the given cache and decode rates of one sequence, short and deep.
    fn report(model: &str, cache: &str, [short, deep]: [f64; 2], load_s: f64) -> Value {
        let decode = |sequences: u64, tokens: u64, rate: f64| {
            json!({
                "sequences": sequences, "context_tokens": tokens, "tokens_per_s": rate,
                "share": 0.5,
            })
        };
        json!({
            "model": model, "device": "a GPU", "cache": cache, "synthetic": true,
            "open_s": 0.3, "load_s": load_s, "read_bandwidth_gb_per_s": 3100.4,
            "arithmetic_tflops": null,
            "decode": [decode(1, 137, short), decode(256, 73, 8.0 * short), decode(1, 8192, deep)],
            "prefill": [{"tokens": 2048, "tokens_per_s": 1_234_567.8, "share": null}],
        })
    }

    #[test]
    fn the_best_of_each_run_stands_in_its_models_column() {
        let mut table = Table::default();
        table
            .add(&report("one", "f16", [1000.4, 500.0], 0.5))
            .unwrap();
        table
            .add(&report("one", "q4", [2000.0, 600.0], 0.75))
            .unwrap();
        table.add(&report("two", "f16", [10.0, 5.0], 2.0)).unwrap();
        for load_s in [1.5, 1.25] {
            let mut files = report("two", "f16", [99.0, 99.0], load_s);
            files["synthetic"] = json!(false);
            table.add(&files).unwrap();
        }
        let expected = "\
On a GPU:

| | one | two |
| --- | --: | --: |
| decode, batch 1, tokens/s | 1,000 (50%) | 10.00 (50%) |
| decode, batch 256, tokens/s | 8,003 (50%) | 80.00 (50%) |
| batch 1 up to context 8,192, f16 pages | 500 (50%) | 5.00 (50%) |
| batch 1 up to context 8,192, q4 pages | 600 (50%) |  |
| prefill 2,048 | 1,234,568 | 1,234,568 |
| load from files, without the context, s |  | 1.25 |
| load (weights are made on the host), s | 0.50 | 2.00 |
| creating the context, s | 0.30 | 0.30 |
| memory reads, GB/s | 3,100 | 3,100 |

In brackets the share of what memory (decode) or arithmetic (prefill) allow.";
        assert_eq!(table.to_markdown(), expected);
    }

    #[test]
    fn what_is_no_report_is_refused() {
        let error = Table::default().add(&json!({"model": "one"})).unwrap_err();
        assert!(error.to_string().contains("device"), "{error}");
    }
}
