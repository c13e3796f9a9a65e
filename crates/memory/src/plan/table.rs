//! Plans and their absence as text.

use std::fmt;

use super::infeasible::Infeasible;
use super::{DevicePlan, HostPlan, LimitedBy, Plan, Policy};
use crate::device::GpuSplit;

impl fmt::Display for Policy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fill => formatter.write_str("fill"),
            Self::Balanced => formatter.write_str("balanced"),
            Self::GpuSplit(GpuSplit(entries)) => {
                let entries: Vec<String> = entries.iter().map(ToString::to_string).collect();
                write!(formatter, "split of {}", entries.join(", "))
            }
        }
    }
}

impl fmt::Display for LimitedBy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Available => "available",
            Self::Cap => "cap",
            Self::GpuSplit => "split",
            Self::Excluded => "excluded",
        })
    }
}

/// Writes rows as columns two blanks apart; the first `left_aligned` columns are names,
/// the others numbers. Every row has as many cells as the first.
fn write_columns(
    formatter: &mut fmt::Formatter<'_>,
    rows: &[Vec<String>],
    left_aligned: usize,
) -> fmt::Result {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            if column > 0 {
                line.push_str("  ");
            }
            if column < left_aligned {
                line.push_str(&format!("{cell:<width$}"));
            } else {
                line.push_str(&format!("{cell:>width$}"));
            }
        }
        writeln!(formatter, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Where a plan's table has the recorded steps.
const RECORDINGS_COLUMN: usize = 5;

fn cells<const N: usize>(cells: [&dyn fmt::Display; N]) -> Vec<String> {
    cells.iter().map(ToString::to_string).collect()
}

/// `"embedding, layers 0-15, head"`.
fn parts(device: &DevicePlan, host: Option<&HostPlan>) -> String {
    let mut parts = Vec::new();
    if device.holds_embedding && host.is_none() {
        parts.push("embedding".to_owned());
    }
    match device.layers.len() {
        0 => {}
        1 => parts.push(format!("layer {}", device.layers.start)),
        _ => parts.push(format!(
            "layers {}-{}",
            device.layers.start,
            device.layers.end - 1
        )),
    }
    if device.holds_head {
        parts.push("head".to_owned());
    }
    parts.join(", ")
}

impl fmt::Display for Plan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![cells([
            &"device",
            &"parts",
            &"weights",
            &"kv cache",
            &"workspace",
            &"recordings",
            &"total",
            &"remaining",
        ])];
        for device in &self.devices {
            rows.push(cells([
                &device.device,
                &parts(device, self.host.as_ref()),
                &device.weights,
                &device.kv_cache,
                &device.workspace,
                &device.recordings,
                &device.total,
                &device.remaining,
            ]));
        }
        if self.devices.len() > 1 {
            let totals = &self.totals;
            rows.push(cells([
                &"all",
                &"",
                &totals.weights,
                &totals.kv_cache,
                &totals.workspace,
                &totals.recordings,
                &totals.total,
                &"",
            ]));
        }
        if self.totals.recordings.is_zero() {
            // Only GPUs record steps.
            for row in &mut rows {
                row.remove(RECORDINGS_COLUMN);
            }
        }
        write_columns(formatter, &rows, 2)?;
        if let Some(host) = &self.host {
            writeln!(
                formatter,
                "{} of {} hold the embedding, which is read in place",
                host.embedding, host.device
            )?;
        }
        if !self.unused.is_empty() {
            let unused: Vec<String> = self.unused.iter().map(ToString::to_string).collect();
            writeln!(formatter, "not used: {}", unused.join(", "))?;
        }
        let Self {
            context_tokens,
            cache_tokens,
            batch,
            chunk_tokens,
            cache,
            page_tokens,
            max_context_tokens,
            ..
        } = self;
        write!(
            formatter,
            "context {context_tokens} tokens, batch {batch}, chunk {chunk_tokens} tokens, cache \
             {cache}"
        )?;
        let pages = cache_tokens / page_tokens;
        if pages != context_tokens.div_ceil(*page_tokens).saturating_mul(*batch) {
            write!(formatter, " of {cache_tokens} tokens for all sequences")?;
        }
        writeln!(formatter)?;
        write!(
            formatter,
            "longest context that fits: {max_context_tokens} tokens"
        )?;
        if *max_context_tokens == self.model_max_context_tokens {
            write!(formatter, " (the model's maximum)")?;
        } else if max_context_tokens == cache_tokens {
            write!(formatter, " (the whole cache)")?;
        }
        Ok(())
    }
}

impl fmt::Display for Infeasible {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let asked = &self.asked;
        let context = match asked.context_tokens {
            Some(tokens) => format!("a context of {tokens} tokens"),
            None => "any context".to_owned(),
        };
        let pool = asked
            .cache_tokens
            .map_or_else(String::new, |tokens| format!(" of {tokens} tokens"));
        writeln!(
            formatter,
            "model {} does not fit with {context}, batch {}, chunk {} tokens, cache {}{pool}, \
             policy {}",
            self.model, asked.batch, asked.chunk_tokens, asked.cache, asked.policy
        )?;
        writeln!(formatter, "what stands in the way: {}", self.binding)?;
        let mut rows = vec![cells([
            &"device",
            &"limit",
            &"set by",
            &"placed",
            &"needed",
            &"short by",
        ])];
        for device in &self.devices {
            rows.push(cells([
                &device.device,
                &device.limit,
                &device.limited_by,
                &device.placed,
                &device.needed,
                &device.short_by,
            ]));
        }
        write_columns(formatter, &rows, 1)?;
        write!(
            formatter,
            "(placed: when filled in order; needed: if this device alone were to make room)"
        )?;
        if !self.nearest.is_empty() {
            write!(formatter, "\nwhat would fit:")?;
        }
        for alternative in &self.nearest {
            let changes: Vec<String> = alternative
                .changes
                .iter()
                .map(ToString::to_string)
                .collect();
            write!(formatter, "\n  {}", changes.join(", "))?;
            let asked_for_any = asked.context_tokens.is_none();
            if asked_for_any {
                let tokens = alternative.plan.context_tokens;
                write!(formatter, ": then a context of {tokens} tokens")?;
            }
        }
        Ok(())
    }
}
