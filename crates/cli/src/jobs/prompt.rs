//! From words to tokens.

use anyhow::Result;
use oxllama_format::ModelSource;
use oxllama_text::{ChatOptions, ChatTemplate, EncodeOptions, Message, TextError, Tokenizer};
use serde_json::Value;

/// Encodes prompts and conversations for one model.
pub(crate) struct Prompts<'a> {
    tokenizer: &'a Tokenizer,
    /// A model without one still continues plain prompts.
    template: Result<ChatTemplate, TextError>,
    /// Prompts are a user's messages.
    is_chat: bool,
    /// Stands before them.
    system: Option<String>,
}

impl<'a> Prompts<'a> {
    /// A `system` message implies `is_chat`.
    ///
    /// # Errors
    /// Prompts are messages, and the model has no template for them.
    pub(crate) fn new(
        tokenizer: &'a Tokenizer,
        source: &ModelSource,
        is_chat: bool,
        system: Option<String>,
    ) -> Result<Self> {
        let config = source.tokenizer_config().unwrap_or(&Value::Null);
        let mut template = ChatTemplate::from_config(config);
        let is_chat = is_chat || system.is_some();
        if is_chat {
            template = Ok(template?);
        }
        Ok(Self {
            tokenizer,
            template,
            is_chat,
            system,
        })
    }

    /// A prompt as the options want it: as it stands, or as a user's message.
    pub(crate) fn prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        if self.is_chat {
            return self.messages(vec![Message::new("user", prompt)]);
        }
        Ok(self.tokenizer.encode(prompt, EncodeOptions::PROMPT)?)
    }

    /// A conversation, with the system message before it unless it has one of its own.
    pub(crate) fn messages(&self, mut messages: Vec<Message>) -> Result<Vec<u32>> {
        let template = match &self.template {
            Ok(template) => template,
            Err(error) => anyhow::bail!("{error}"),
        };
        if let Some(system) = &self.system
            && messages.first().is_none_or(|first| first.role != "system")
        {
            messages.insert(0, Message::new("system", system.as_str()));
        }
        let options = ChatOptions {
            add_generation_prompt: true,
            ..ChatOptions::default()
        };
        let rendered = template.render(&messages, &options)?;
        Ok(self.tokenizer.encode(&rendered, EncodeOptions::CHAT)?)
    }
}
