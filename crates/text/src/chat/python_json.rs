//! JSON as Python's `json.dumps` writes it, which is what models have seen in training: a space
//! after `,` and `:`, no HTML escapes, Python's form of floats.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Value as JinjaValue};
use minijinja::{Error, ErrorKind};
use serde_json::Value;

/// The keyword arguments of transformers' `tojson` filter.
struct Layout {
    ensure_ascii: bool,
    /// What one level is indented by; `None` is all on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(
    value: &JinjaValue,
    ensure_ascii: Option<bool>,
    arguments: Kwargs,
) -> Result<String, Error> {
    let indent = match arguments.get::<Option<JinjaValue>>("indent")? {
        Some(indent) if indent.is_none() => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(indent.as_usize().unwrap_or(0).min(64)),
        }),
        None => None,
    };
    let separators = arguments.get::<Option<Vec<String>>>("separators")?;
    let [item_separator, key_separator] = match separators {
        Some(pair) => <[String; 2]>::try_from(pair).map_err(|_| {
            Error::new(
                ErrorKind::InvalidOperation,
                "separators must be a pair of strings",
            )
        })?,
        None if indent.is_some() => [",".to_owned(), ": ".to_owned()],
        None => [", ".to_owned(), ": ".to_owned()],
    };
    let ensure_ascii = match arguments.get::<Option<bool>>("ensure_ascii")? {
        Some(given) => given,
        None => ensure_ascii.unwrap_or(false),
    };
    let sort_keys = arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    arguments.assert_all_used()?;
    let layout = Layout {
        ensure_ascii,
        indent,
        item_separator,
        key_separator,
        sort_keys,
    };
    let json = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, format!("tojson: {error}")))?;
    let mut out = String::new();
    layout.write(&json, 0, &mut out);
    Ok(out)
}

impl Layout {
    fn write(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::Null => out.push_str("null"),
            Value::Bool(truth) => out.push_str(if *truth { "true" } else { "false" }),
            Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(float) => write_float(float, out),
                None => out.push_str(&number.to_string()),
            },
            Value::String(text) => self.write_string(text, out),
            Value::Array(items) if items.is_empty() => out.push_str("[]"),
            Value::Array(items) => {
                out.push('[');
                for (position, item) in items.iter().enumerate() {
                    self.begin_item(position, depth + 1, out);
                    self.write(item, depth + 1, out);
                }
                self.begin_line(depth, out);
                out.push(']');
            }
            Value::Object(fields) if fields.is_empty() => out.push_str("{}"),
            Value::Object(fields) => {
                let mut fields: Vec<(&String, &Value)> = fields.iter().collect();
                if self.sort_keys {
                    fields.sort_by_key(|field| field.0);
                }
                out.push('{');
                for (position, (name, field)) in fields.into_iter().enumerate() {
                    self.begin_item(position, depth + 1, out);
                    self.write_string(name, out);
                    out.push_str(&self.key_separator);
                    self.write(field, depth + 1, out);
                }
                self.begin_line(depth, out);
                out.push('}');
            }
        }
    }

    fn begin_item(&self, position: usize, depth: usize, out: &mut String) {
        if position > 0 {
            out.push_str(&self.item_separator);
        }
        self.begin_line(depth, out);
    }

    fn begin_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }

    fn write_string(&self, text: &str, out: &mut String) {
        out.push('"');
        for character in text.chars() {
            match character {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..='\u{1f}' => write_escape(u32::from(character), out),
                _ if self.ensure_ascii && !(' '..='~').contains(&character) => {
                    let mut utf16 = [0; 2];
                    for unit in character.encode_utf16(&mut utf16) {
                        write_escape(u32::from(*unit), out);
                    }
                }
                _ => out.push(character),
            }
        }
        out.push('"');
    }
}

fn write_escape(unit: u32, out: &mut String) {
    // Writing to a string cannot fail.
    let _ = write!(out, "\\u{unit:04x}");
}

/// Python's `repr` of a float: the shortest digits that read back the same, with an exponent below
/// 1e-4 and from 1e16.
fn write_float(float: f64, out: &mut String) {
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = float.to_string();
        out.push_str(&plain);
        if !plain.contains('.') {
            out.push_str(".0");
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(out, "{digits}e{sign}{:02}", exponent.abs());
    }
}
