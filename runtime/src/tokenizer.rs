//! Text to token ids and back.
//!
//! A [`Tokenizer`] comes from a Hugging Face `tokenizer.json` ([`Tokenizer::from_json`]) or from
//! the vocabulary tables of a GGUF file ([`Tokenizer::from_gguf`]). Encoding is the work of the
//! `tokenizers` crate. Decoding is done here, from a table that holds the bytes of every token,
//! so that [`Tokenizer::decode`] and the streaming decoder
//! (`crate::stream`) can never disagree about a character that spans tokens.

mod bytes;
mod gguf;
mod pre;
#[cfg(test)]
mod tests;

pub use gguf::GgufVocab;

use std::collections::HashMap;

/// What went wrong with a tokenizer, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// `tokenizer.json` cannot be parsed.
    #[error("tokenizer.json: {0}")]
    Json(String),
    /// `tokenizer.json` turns tokens into text in a way that this runtime has no byte table for.
    #[error(
        "tokenizer.json: the decoder {0} is not supported; supported are ByteLevel, Metaspace, and \
         Replace with ByteFallback"
    )]
    Decoder(String),
    /// The GGUF tokenizer model is not one of the known ones.
    #[error("tokenizer.ggml.model = \"{0}\" is not supported; supported are \"gpt2\" and \"llama\"")]
    Model(String),
    /// The GGUF pre-tokenizer is not one of the known ones.
    #[error(
        "tokenizer.ggml.pre = \"{pre}\" is not known, and a wrong split gives wrong tokens; known are {known}. \
         If the checkpoint has a tokenizer.json, use that instead"
    )]
    Pre {
        /// The value in the file.
        pre: String,
        /// The known values, comma-separated.
        known: String,
    },
    /// A GGUF vocabulary table contradicts itself or another.
    #[error("{key}: {what}")]
    Table {
        /// The metadata key, with an index where one entry is at fault.
        key: String,
        /// What is wrong with it.
        what: String,
    },
    /// The `tokenizers` crate refused to build or to encode.
    #[error("tokenizer: {0}")]
    Inner(String),
}

impl TokenizerError {
    fn table(key: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Table { key: key.into(), what: what.into() }
    }

    fn inner(error: tokenizers::Error) -> Self {
        Self::Inner(error.to_string())
    }
}

/// What kind of token an id stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of ordinary text.
    Normal,
    /// A marker with a meaning to the model (`<|im_end|>`); [`Tokenizer::decode`] can skip it.
    Control,
    /// Text that was added to the vocabulary as a whole and is never split.
    UserDefined,
    /// No token has this id (padding rows of the embedding, or a hole in the table).
    Unused,
}

/// A vocabulary with its rules for splitting text.
///
/// Cheap to share behind an `Arc`; encoding takes `&self` and may run on many threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Pieces,
    /// Ids put before the text by `encode(_, true)`; empty where `inner` does so itself.
    prefix: Vec<u32>,
    /// Ids put behind the text by `encode(_, true)`.
    suffix: Vec<u32>,
    /// Encoding puts a space before the text, so decoding takes one away.
    strip_leading_space: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    ends: Vec<u32>,
}

/// The bytes and the kind of every token: one flat buffer, since a vocabulary has 50k to 260k.
#[derive(Default)]
struct Pieces {
    bytes: Vec<u8>,
    /// End of each token's bytes; it starts where the token before it ends.
    ends: Vec<usize>,
    kinds: Vec<TokenKind>,
}

impl Pieces {
    fn push(&mut self, bytes: &[u8], kind: TokenKind) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.kinds.push(kind);
    }

    fn bytes(&self, id: u32) -> Option<&[u8]> {
        let i = id as usize;
        let end = *self.ends.get(i)?;
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        Some(&self.bytes[start..end])
    }

    fn kind(&self, id: u32) -> TokenKind {
        self.kinds.get(id as usize).copied().unwrap_or(TokenKind::Unused)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("ends", &self.ends)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json`.
    ///
    /// The file does not say which tokens begin and end a text: see [`Tokenizer::set_special`].
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let mut inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|e| TokenizerError::Json(e.to_string()))?;
        // Truncation and padding in the file are settings of somebody's training run.
        inner.with_truncation(None).map_err(TokenizerError::inner)?;
        inner.with_padding(None);
        let decoding = bytes::Decoding::of(inner.get_decoder())?;
        let added = inner.get_added_tokens_decoder();
        let vocab = inner.get_vocab(true);
        // Ids in the file are not bounded by its size: a table up to the largest id must be.
        let limit = vocab.len().saturating_mul(2).saturating_add(1 << 16);
        let mut texts: Vec<Option<&str>> = Vec::new();
        for (text, &id) in &vocab {
            let id = id as usize;
            if id >= limit {
                return Err(TokenizerError::Json(format!(
                    "token {text:?} has id {id}, far beyond the {} tokens of the vocabulary",
                    vocab.len()
                )));
            }
            if texts.len() <= id {
                texts.resize(id + 1, None);
            }
            texts[id] = Some(text);
        }
        let mut pieces = Pieces::default();
        for (id, text) in (0u32..).zip(&texts) {
            match (added.get(&id), text) {
                (Some(token), _) if token.special => {
                    pieces.push(token.content.as_bytes(), TokenKind::Control);
                }
                (Some(token), _) => pieces.push(token.content.as_bytes(), TokenKind::UserDefined),
                (None, Some(text)) => pieces.push(&decoding.bytes(text), TokenKind::Normal),
                (None, None) => pieces.push(&[], TokenKind::Unused),
            }
        }
        let mut tokenizer = Self {
            inner,
            pieces,
            prefix: Vec::new(),
            suffix: Vec::new(),
            strip_leading_space: decoding.strips_leading_space(),
            bos: None,
            eos: None,
            ends: Vec::new(),
        };
        tokenizer.set_special(None, &[]);
        Ok(tokenizer)
    }

    /// Builds a tokenizer from the `tokenizer.ggml.*` tables of a GGUF file.
    pub fn from_gguf(vocab: GgufVocab) -> Result<Self, TokenizerError> {
        gguf::build(vocab)
    }

    /// Says which token begins a text and which end one (`generation_config.json` of a Hugging
    /// Face checkpoint may name several). Control tokens that end a turn by convention, such as
    /// `<|im_end|>`, are always among [`Tokenizer::end_tokens`].
    pub fn set_special(&mut self, bos: Option<u32>, eos: &[u32]) {
        self.bos = bos;
        self.eos = eos.first().copied();
        self.ends = eos.to_vec();
        // Where these exist (gpt-oss), `<|end|>` ends a message and another message follows.
        let messages = self.control("<|return|>").is_some() && self.control("<|call|>").is_some();
        for name in TURN_ENDS {
            match self.control(name) {
                Some(_) if messages && *name == "<|end|>" => {}
                Some(id) if !self.ends.contains(&id) => self.ends.push(id),
                _ => {}
            }
        }
    }

    fn control(&self, token: &str) -> Option<u32> {
        self.id(token).filter(|&id| self.kind(id) == TokenKind::Control)
    }

    /// Token ids of `text`. Special tokens that are spelled out in the text become their ids.
    /// `add_special` adds what the model expects around a text (usually BOS); a rendered chat
    /// template has that already, so pass `false` for it.
    ///
    /// Bytes that the vocabulary has no token for are left out, as the model's own tokenizer
    /// does (SmolLM2 lacks some that begin rare characters beyond the basic plane).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(TokenizerError::inner)?;
        let ids = encoding.get_ids();
        if !add_special || (self.prefix.is_empty() && self.suffix.is_empty()) {
            return Ok(ids.to_vec());
        }
        Ok([&self.prefix, ids, &self.suffix].concat())
    }

    /// The text of whole sequences of `ids`. Bytes that are not UTF-8 become U+FFFD, and ids
    /// beyond the vocabulary (a model's padding rows) are nothing. `skip_special` leaves control
    /// tokens out. For text as it is generated, use `crate::stream::StreamDecoder`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut out = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if !(skip_special && self.kind(id) == TokenKind::Control) {
                out.extend_from_slice(self.token_bytes(id));
            }
        }
        let text = if self.strip_leading_space { out.strip_prefix(b" ").unwrap_or(&out) } else { &out };
        String::from_utf8_lossy(text).into_owned()
    }

    /// The bytes that a token stands for: not always valid UTF-8, and empty for an unused id.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.pieces.bytes(id).unwrap_or_default()
    }

    /// What kind of token `id` is.
    pub fn kind(&self, id: u32) -> TokenKind {
        self.pieces.kind(id)
    }

    /// One more than the largest id of the vocabulary. The model's head may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.pieces.kinds.len()
    }

    /// The id of a token, written as the vocabulary writes it (`Ġthe`, `<|im_end|>`).
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as the vocabulary writes it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Every token after which generation should stop.
    pub fn end_tokens(&self) -> &[u32] {
        &self.ends
    }
}

/// Control tokens that end a turn or a text in the model families that are known.
const TURN_ENDS: &[&str] = &[
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "</s>",
];

/// First id of every text; GGUF tables may hold a text twice, and the first one is meant.
fn first_ids(tokens: &[String]) -> HashMap<&str, u32> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in (0u32..).zip(tokens) {
        ids.entry(token.as_str()).or_insert(id);
    }
    ids
}
