//! Chat templates: the Jinja programs that models ship to turn a conversation into a prompt.
//!
//! They are written for Python's jinja2 as transformers sets it up, so that set-up is reproduced:
//! `trim_blocks` and `lstrip_blocks`, loop controls, Python's string and dictionary methods,
//! `raise_exception`, `strftime_now`, a `tojson` that writes what Python's `json.dumps` writes, and
//! `{% generation %}` marks, which only matter for training.

mod dates;
mod python_json;

use std::error::Error as _;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value as JinjaValue};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::TextError;
use crate::special::token_text;
use crate::tokenizer_file::panic_message;

/// Interpreter instructions that any template may use, and further ones a message: real templates
/// take about a hundred a message.
const INSTRUCTIONS: u64 = 500_000;
const INSTRUCTIONS_PER_MESSAGE: u64 = 5_000;
/// The rendered text may have this many bytes, and this many times the bytes given.
const OUTPUT_BYTES: usize = 1 << 20;
const OUTPUT_TIMES_INPUT: usize = 16;
/// Real templates have at most some ten thousand bytes.
const SOURCE_BYTES: usize = 64 << 10;
/// The longest `{{ … }}` or `{% … %}`, not counting string literals: chains of some operators
/// compile in quadratic time.
const TAG_BYTES: usize = 4 << 10;
/// Expressions nested as deep as the source allows are compiled, and values nested as deep as the
/// instructions allow are dropped, recursively: a frame or two a level. Address space only: pages
/// are taken when they are touched.
const STACK_BYTES: usize = 256 << 20;
const TEMPLATE_NAME: &str = "chat_template";
const TOOL_TEMPLATE_NAME: &str = "tool_use";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or whatever else the template knows.
    pub role: String,
    /// What was said.
    #[serde(default)]
    pub content: MessageContent,
    /// Further fields, such as `tool_calls`, `name` or `tool_call_id`.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message of plain text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: MessageContent::Text(content.into()),
            extra: Map::new(),
        }
    }
}

/// The content of a message.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(untagged)]
pub enum MessageContent {
    /// Plain text.
    Text(String),
    /// A list of parts such as `{"type": "text", "text": …}`; not every template takes them.
    Parts(Vec<Value>),
    /// None, as in an assistant's message that only calls tools.
    #[default]
    None,
}

/// What a template is told besides the messages.
#[derive(Debug, Clone, Default)]
pub struct ChatOptions<'a> {
    /// End with the mark that begins the assistant's turn.
    pub add_generation_prompt: bool,
    /// The BOS token's name, if the model has one.
    pub bos_token: Option<&'a str>,
    /// The EOS token's name, if the model has one.
    pub eos_token: Option<&'a str>,
    /// Tools as JSON schemas, in the list shape of the `OpenAI` interface.
    pub tools: Option<Value>,
    /// Further variables, such as `enable_thinking` or `documents`.
    pub extra: Map<String, Value>,
    /// The time that `strftime_now` shows, in seconds since 1970 UTC; now if not given.
    pub unix_time_s: Option<i64>,
}

/// A model's chat template, parsed.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source_bytes: usize,
    /// `bos_token` and `eos_token` of tokenizer_config.json.
    tokens: [(&'static str, Option<String>); 2],
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ChatTemplate")
            .field("source_bytes", &self.source_bytes)
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// The template of tokenizer_config.json: a string, or a list of named templates of which
    /// `default` is used, and `tool_use`, if there is one, when tools are given.
    ///
    /// # Errors
    /// [`TextError::NoChatTemplate`] if there is none, another one if it cannot be parsed.
    pub fn from_config(tokenizer_config: &Value) -> Result<Self, TextError> {
        let template = tokenizer_config
            .get("chat_template")
            .unwrap_or(&Value::Null);
        let mut chat_template = match template {
            Value::Null => return Err(TextError::NoChatTemplate),
            Value::String(source) => Self::from_source(source)?,
            Value::Array(named) => Self::from_named(named)?,
            other => {
                let found = kind_of(other).to_owned();
                return Err(TextError::ChatTemplateShape { found });
            }
        };
        for (field, token) in &mut chat_template.tokens {
            *token = tokenizer_config
                .get(*field)
                .and_then(token_text)
                .map(str::to_owned);
        }
        Ok(chat_template)
    }

    /// A template given by itself, as in a file chat_template.jinja.
    ///
    /// # Errors
    /// If it cannot be parsed.
    pub fn from_source(source: &str) -> Result<Self, TextError> {
        let mut template = Self {
            environment: environment()?,
            source_bytes: 0,
            tokens: [("bos_token", None), ("eos_token", None)],
        };
        template.add(TEMPLATE_NAME, source)?;
        Ok(template)
    }

    fn from_named(named: &[Value]) -> Result<Self, TextError> {
        let source_of = |name: &str| {
            let is_named = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some(name);
            named.iter().find(is_named)?.get("template")?.as_str()
        };
        let source = source_of("default").ok_or_else(|| TextError::ChatTemplateShape {
            found: format!(
                "a list of {} without a template named \"default\"",
                named.len()
            ),
        })?;
        let mut template = Self::from_source(source)?;
        if let Some(source) = source_of(TOOL_TEMPLATE_NAME) {
            template.add(TOOL_TEMPLATE_NAME, source)?;
        }
        Ok(template)
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<(), TextError> {
        for (part, bytes, limit) in [
            ("it", source.len(), SOURCE_BYTES),
            ("an expression in it", longest_tag_bytes(source), TAG_BYTES),
        ] {
            if bytes > limit {
                return Err(TextError::ChatTemplateSyntax {
                    detail: format!("{part} has {bytes} bytes, at most {limit} are read"),
                });
            }
        }
        let source = generation_marks_as_conditions(source);
        self.source_bytes += source.len();
        let environment = &mut self.environment;
        on_deep_stack(|| {
            environment
                .add_template_owned(name, source)
                .map_err(|error| error.to_string())
        })
        .map_err(|detail| TextError::ChatTemplateSyntax { detail })
    }

    /// Renders a conversation. `bos_token` and `eos_token` that the options leave out are those of
    /// the tokenizer_config.json the template came from.
    ///
    /// Encode the result with [`crate::EncodeOptions::CHAT`]: the template writes the special
    /// tokens itself.
    ///
    /// # Errors
    /// If the template refuses the messages (many refuse a system message, or two turns of one
    /// role in a row), fails, does not end, or writes without end.
    pub fn render(
        &self,
        messages: &[Message],
        options: &ChatOptions<'_>,
    ) -> Result<String, TextError> {
        let failed = |detail: String| TextError::ChatTemplateFailed { detail };
        let variables = self
            .variables(messages, options)
            .map_err(|error| failed(error.to_string()))?;
        let input_bytes = self.source_bytes + json_bytes(&variables);
        let instructions =
            INSTRUCTIONS.saturating_add(INSTRUCTIONS_PER_MESSAGE * messages.len() as u64);
        let job = RenderJob {
            environment: &self.environment,
            use_tools_template: options.tools.is_some(),
            variables,
            unix_time_s: options.unix_time_s,
            instructions,
            input_bytes,
        };
        on_deep_stack(|| Ok(job.render())).unwrap_or_else(|detail| Err(failed(detail)))
    }

    fn variables(
        &self,
        messages: &[Message],
        options: &ChatOptions<'_>,
    ) -> Result<Map<String, Value>, serde_json::Error> {
        let mut variables = Map::new();
        variables.insert("messages".to_owned(), serde_json::to_value(messages)?);
        variables.insert(
            "tools".to_owned(),
            options.tools.clone().unwrap_or(Value::Null),
        );
        variables.insert("documents".to_owned(), Value::Null);
        variables.insert(
            "add_generation_prompt".to_owned(),
            options.add_generation_prompt.into(),
        );
        let given = [options.bos_token, options.eos_token];
        for ((name, from_config), given) in self.tokens.iter().zip(given) {
            if let Some(token) = given.or(from_config.as_deref()) {
                variables.insert((*name).to_owned(), token.into());
            }
        }
        variables.extend(
            options
                .extra
                .iter()
                .map(|(name, value)| (name.clone(), value.clone())),
        );
        Ok(variables)
    }
}

/// Runs the interpreter on a thread whose stack is deep enough for what a template can nest, and
/// turns a panic into its message.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("chat-template".to_owned())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || catch_unwind(AssertUnwindSafe(work)))
            .map_err(|error| format!("no thread to run it on: {error}"))?
            .join()
            .and_then(|result| result)
            .unwrap_or_else(|panic| Err(panic_message(&*panic)))
    })
}

/// Everything that the rendering thread needs.
struct RenderJob<'a> {
    environment: &'a Environment<'static>,
    use_tools_template: bool,
    variables: Map<String, Value>,
    unix_time_s: Option<i64>,
    instructions: u64,
    input_bytes: usize,
}

impl RenderJob<'_> {
    fn render(&self) -> Result<String, TextError> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(self.instructions));
        let unix_time_s = self.unix_time_s;
        environment.add_function("strftime_now", move |format: &str| {
            let seconds = unix_time_s.unwrap_or_else(dates::unix_time_now_s);
            dates::strftime(format, seconds)
                .map_err(|detail| minijinja::Error::new(ErrorKind::InvalidOperation, detail))
        });
        let limit_bytes =
            OUTPUT_BYTES.saturating_add(self.input_bytes.saturating_mul(OUTPUT_TIMES_INPUT));
        let mut output = LimitedOutput {
            bytes: Vec::new(),
            limit_bytes,
            exceeded: false,
        };
        let rendered = environment
            .get_template(TOOL_TEMPLATE_NAME)
            .ok()
            .filter(|_| self.use_tools_template)
            .map_or_else(|| environment.get_template(TEMPLATE_NAME), Ok)
            .and_then(|template| {
                let variables: JinjaValue = serde_json::from_value(Value::Object(
                    self.variables.clone(),
                ))
                .map_err(|error| {
                    minijinja::Error::new(ErrorKind::BadSerialization, error.to_string())
                })?;
                template
                    .render_captured_to(variables, &mut output)
                    .map(drop)
            });
        if output.exceeded {
            return Err(TextError::ChatTemplateTooLong {
                limit_bytes,
                input_bytes: self.input_bytes,
            });
        }
        rendered.map_err(|error| self.describe(&error))?;
        String::from_utf8(output.bytes).map_err(|error| TextError::ChatTemplateFailed {
            detail: error.to_string(),
        })
    }

    fn describe(&self, error: &minijinja::Error) -> TextError {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(current) = cause {
            if let Some(raised) = current.downcast_ref::<Raised>() {
                return TextError::ChatTemplateRaised {
                    message: raised.0.clone(),
                };
            }
            let kind = current
                .downcast_ref::<minijinja::Error>()
                .map(minijinja::Error::kind);
            if kind == Some(ErrorKind::OutOfFuel) {
                return TextError::ChatTemplateEndless {
                    instructions: self.instructions,
                };
            }
            cause = current.source();
        }
        let mut detail = error.to_string();
        let mut cause = error.source();
        while let Some(current) = cause {
            detail = format!("{detail}: {current}");
            cause = current.source();
        }
        TextError::ChatTemplateFailed { detail }
    }
}

/// A call of `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// Collects the output and refuses it beyond a limit.
struct LimitedOutput {
    bytes: Vec<u8>,
    limit_bytes: usize,
    exceeded: bool,
}

impl io::Write for &mut LimitedOutput {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + piece.len() > self.limit_bytes {
            self.exceeded = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Jinja as transformers sets it up.
fn environment() -> Result<Environment<'static>, TextError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|error| TextError::ChatTemplateSyntax {
            detail: error.to_string(),
        })?;
    environment.set_syntax(syntax);
    environment.set_debug(false);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python_json::tojson);
    environment.add_function("raise_exception", |message: String| -> Result<(), _> {
        Err(
            minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception")
                .with_source(Raised(message)),
        )
    });
    Ok(environment)
}

/// Turns `{% generation %}` … `{% endgeneration %}`, which only transformers' own Jinja extension
/// knows, into a condition that always holds; whitespace control then works as it would there.
fn generation_marks_as_conditions(source: &str) -> String {
    let mut rewritten = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open + 2);
        rewritten.push_str(before);
        rest = tag;
        let Some(close) = tag.find("%}") else { break };
        let inside = &tag[..close];
        let word = inside
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+'])
            .trim();
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        rewritten.push_str(&inside.replace(word, &format!(" {replacement} ")));
        rest = &tag[close..];
    }
    rewritten.push_str(rest);
    rewritten
}

/// Bytes of the longest `{{ … }}` or `{% … %}`, without the string literals in it.
fn longest_tag_bytes(source: &str) -> usize {
    let mut longest = 0;
    let mut rest = source.as_bytes();
    while let Some(open) = rest
        .windows(2)
        .position(|pair| matches!(pair, b"{{" | b"{%" | b"{#"))
    {
        let is_comment = rest[open + 1] == b'#';
        rest = &rest[open + 2..];
        let mut quote = None;
        let mut bytes = 0;
        let mut place = 0;
        while place < rest.len() {
            let byte = rest[place];
            let pair = (byte, rest.get(place + 1).copied());
            match (quote, pair) {
                (Some(_), (b'\\', _)) => place += 1,
                (Some(open), _) if byte == open => quote = None,
                (Some(_), _) => {}
                (None, (b'#', Some(b'}'))) if is_comment => break,
                (None, (b'}' | b'%', Some(b'}'))) if !is_comment => break,
                (None, (b'"' | b'\'', _)) if !is_comment => quote = Some(byte),
                (None, _) => bytes += 1,
            }
            place += 1;
        }
        if !is_comment {
            longest = longest.max(bytes);
        }
        rest = &rest[place.min(rest.len())..];
    }
    longest
}

fn json_bytes(variables: &Map<String, Value>) -> usize {
    /// Counts bytes and keeps none.
    struct Counter(usize);
    impl io::Write for Counter {
        fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
            self.0 += piece.len();
            Ok(piece.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut counter = Counter(0);
    // Writing a JSON value to a sink that takes everything cannot fail.
    serde_json::to_writer(&mut counter, variables).map_or(0, |()| counter.0)
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
