//! A tokenizer from the vocabulary tables of a GGUF file.

use super::bytes::{Decoding, byte_token};
use super::{Pieces, TokenKind, Tokenizer, TokenizerError, first_ids, pre};
use std::collections::HashMap;
use tokenizers::models::bpe::{BpeBuilder, Merges, Vocab};
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::utils::Sequence;
use tokenizers::{AddedToken, NormalizerWrapper};

/// The `tokenizer.ggml.*` metadata of a GGUF file, as read. Fields that the file does not have
/// stay empty or `None`.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `model`: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).
    pub model: String,
    /// `pre`: how a "gpt2" vocabulary splits words. Empty means "default".
    pub pre: String,
    /// `tokens`: the spelling of every id.
    pub tokens: Vec<String>,
    /// `token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Empty
    /// means that all are normal.
    pub token_types: Vec<i32>,
    /// `merges`: "left right", best first ("gpt2").
    pub merges: Vec<String>,
    /// `scores`: the merge that makes the token with the highest score goes first ("llama").
    pub scores: Vec<f32>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`: ends a turn.
    pub eot: Option<u32>,
    /// `unknown_token_id`.
    pub unk: Option<u32>,
    /// `padding_token_id`.
    pub pad: Option<u32>,
    /// `add_bos_token`. Where absent: as the model's family does.
    pub add_bos: Option<bool>,
    /// `add_eos_token`. Where absent: no.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`. Where absent: yes for "llama", no for "gpt2".
    pub add_space_prefix: Option<bool>,
}

/// `token_type` of the file.
mod token_type {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

pub(super) fn build(vocab: GgufVocab) -> Result<Tokenizer, TokenizerError> {
    check(&vocab)?;
    let ids = first_ids(&vocab.tokens);
    let (mut inner, decoding, add_bos) = match vocab.model.as_str() {
        "gpt2" => byte_level(&vocab, &ids)?,
        "llama" => sentence_piece(&vocab, &ids)?,
        other => return Err(TokenizerError::Model(other.to_owned())),
    };
    inner.add_tokens(added(&vocab)).map_err(TokenizerError::inner)?;

    let mut pieces = Pieces::default();
    for (id, token) in vocab.tokens.iter().enumerate() {
        match kind(&vocab, id) {
            TokenKind::Normal => pieces.push(&decoding.bytes(token), TokenKind::Normal),
            TokenKind::Unused => pieces.push(&[], TokenKind::Unused),
            kind => pieces.push(token.as_bytes(), kind),
        }
    }
    let prefix = if vocab.add_bos.unwrap_or(add_bos) {
        vec![vocab.bos.ok_or_else(|| {
            TokenizerError::table("tokenizer.ggml.bos_token_id", "missing, but a text must begin with BOS")
        })?]
    } else {
        Vec::new()
    };
    let suffix = if vocab.add_eos == Some(true) {
        vec![vocab.eos.ok_or_else(|| {
            TokenizerError::table("tokenizer.ggml.eos_token_id", "missing, but a text must end with EOS")
        })?]
    } else {
        Vec::new()
    };
    let mut tokenizer = Tokenizer {
        inner,
        pieces,
        prefix,
        suffix,
        strip_leading_space: decoding.strips_leading_space(),
        bos: None,
        eos: None,
        ends: Vec::new(),
    };
    let mut ends: Vec<u32> = vocab.eos.into_iter().chain(vocab.eot).collect();
    ends.dedup();
    tokenizer.set_special(vocab.bos, &ends);
    // EOT alone does not make an EOS.
    tokenizer.eos = vocab.eos;
    Ok(tokenizer)
}

/// Tables that must agree in length, and ids that must be inside them.
fn check(vocab: &GgufVocab) -> Result<(), TokenizerError> {
    let n = vocab.tokens.len();
    if n == 0 || u32::try_from(n).is_err() {
        return Err(TokenizerError::table("tokenizer.ggml.tokens", format!("{n} tokens")));
    }
    for (key, len) in [
        ("tokenizer.ggml.token_type", vocab.token_types.len()),
        ("tokenizer.ggml.scores", vocab.scores.len()),
    ] {
        if len != 0 && len != n {
            return Err(TokenizerError::table(key, format!("{len} entries for {n} tokens")));
        }
    }
    if let Some(i) = vocab.scores.iter().position(|score| score.is_nan()) {
        return Err(TokenizerError::table(format!("tokenizer.ggml.scores[{i}]"), "not a number"));
    }
    for (key, id) in [
        ("tokenizer.ggml.bos_token_id", vocab.bos),
        ("tokenizer.ggml.eos_token_id", vocab.eos),
        ("tokenizer.ggml.eot_token_id", vocab.eot),
        ("tokenizer.ggml.unknown_token_id", vocab.unk),
        ("tokenizer.ggml.padding_token_id", vocab.pad),
    ] {
        if let Some(id) = id.filter(|&id| id as usize >= n) {
            return Err(TokenizerError::table(key, format!("{id} is beyond the {n} tokens")));
        }
    }
    Ok(())
}

fn type_of(vocab: &GgufVocab, id: usize) -> i32 {
    vocab.token_types.get(id).copied().unwrap_or(token_type::NORMAL)
}

fn kind(vocab: &GgufVocab, id: usize) -> TokenKind {
    match type_of(vocab, id) {
        // An unknown token is a marker too: it stands for no text.
        token_type::CONTROL | token_type::UNKNOWN => TokenKind::Control,
        token_type::USER_DEFINED => TokenKind::UserDefined,
        token_type::UNUSED => TokenKind::Unused,
        _ => TokenKind::Normal,
    }
}

/// Tokens that are recognised in the text before it is split.
fn added(vocab: &GgufVocab) -> Vec<AddedToken> {
    let tokens = vocab.tokens.iter().enumerate().filter(|(_, token)| !token.is_empty());
    tokens
        .filter_map(|(id, token)| match type_of(vocab, id) {
            token_type::CONTROL => Some(AddedToken::from(token.as_str(), true)),
            token_type::USER_DEFINED => Some(AddedToken::from(token.as_str(), false).normalized(false)),
            _ => None,
        })
        .collect()
}

fn model_vocab(ids: &HashMap<&str, u32>) -> Vocab {
    ids.iter().map(|(&token, &id)| (token.to_owned(), id)).collect()
}

/// The tokenizer, how it spells bytes, and whether BOS is added where the file does not say.
type Parts = (tokenizers::Tokenizer, Decoding, bool);

fn byte_level(vocab: &GgufVocab, ids: &HashMap<&str, u32>) -> Result<Parts, TokenizerError> {
    let rule = pre::rule(if vocab.pre.is_empty() { "default" } else { &vocab.pre })?;
    let mut merges: Merges = Vec::with_capacity(vocab.merges.len());
    let mut joined = String::new();
    for (i, merge) in vocab.merges.iter().enumerate() {
        let fault = |what: String| TokenizerError::table(format!("tokenizer.ggml.merges[{i}]"), what);
        let (left, right) = merge
            .split_once(' ')
            .filter(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '))
            .ok_or_else(|| fault(format!("{merge:?} is not two tokens with a space between them")))?;
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        if let Some(absent) = [left, right, &joined].into_iter().find(|token| !ids.contains_key(token)) {
            return Err(fault(format!("{absent:?} is not in the vocabulary")));
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    let model = BpeBuilder::new()
        .vocab_and_merges(model_vocab(ids), merges)
        .ignore_merges(rule.ignore_merges)
        .build()
        .map_err(TokenizerError::inner)?;
    let mut inner = tokenizers::Tokenizer::new(model);
    if rule.nfc {
        inner.with_normalizer(Some(NFC)).map_err(TokenizerError::inner)?;
    }
    inner.with_pre_tokenizer(Some(rule.pre_tokenizer(vocab.add_space_prefix.unwrap_or(false))?));
    Ok((inner, Decoding::ByteLevel, rule.add_bos))
}

fn sentence_piece(vocab: &GgufVocab, ids: &HashMap<&str, u32>) -> Result<Parts, TokenizerError> {
    if vocab.scores.is_empty() {
        return Err(TokenizerError::table("tokenizer.ggml.scores", "missing, but they order the merges"));
    }
    let byte_fallback = (0..vocab.tokens.len())
        .any(|id| type_of(vocab, id) == token_type::BYTE && byte_token(&vocab.tokens[id]).is_some());
    let mut model = BpeBuilder::new()
        .vocab_and_merges(model_vocab(ids), merges_by_score(vocab, ids))
        .byte_fallback(byte_fallback)
        .fuse_unk(true);
    if let Some(unk) = vocab.unk {
        model = model.unk_token(vocab.tokens[unk as usize].clone());
    }
    let mut inner = tokenizers::Tokenizer::new(model.build().map_err(TokenizerError::inner)?);
    let space = vocab.add_space_prefix.unwrap_or(true);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if space {
        steps.push(Prepend::new("▁".to_owned()).into());
    }
    steps.push(Replace::new(" ", "▁").map_err(TokenizerError::inner)?.into());
    inner.with_normalizer(Some(Sequence::new(steps))).map_err(TokenizerError::inner)?;
    Ok((inner, Decoding::Metaspace { byte_fallback, strip: space }, true))
}

/// SentencePiece has no list of merges: any two neighbours merge whose joint text is a token, the
/// token with the highest score first. As a list, that is every split of every token in two
/// tokens, in order of score.
fn merges_by_score(vocab: &GgufVocab, ids: &HashMap<&str, u32>) -> Merges {
    let mergeable = |id: u32| {
        matches!(
            type_of(vocab, id as usize),
            token_type::NORMAL | token_type::USER_DEFINED | token_type::UNUSED
        )
    };
    let part = |text: &str| ids.get(text).copied().filter(|&id| mergeable(id));
    // (merged, left, right); two splits of one token are ordered by their parts' ids.
    let mut merges: Vec<(u32, u32, u32)> = Vec::new();
    for (&token, &id) in ids {
        if mergeable(id) {
            let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            merges.extend(splits.filter_map(|(left, right)| Some((id, part(left)?, part(right)?))));
        }
    }
    merges.sort_by(|a, b| {
        let score = |m: &(u32, u32, u32)| vocab.scores[m.0 as usize];
        score(b).total_cmp(&score(a)).then_with(|| (a.1, a.2, a.0).cmp(&(b.1, b.2, b.0)))
    });
    let text = |id: u32| vocab.tokens[id as usize].clone();
    merges.into_iter().map(|(_, left, right)| (text(left), text(right))).collect()
}
