//! Tokenizer, chat templates, stop strings and streaming detokenisation.
