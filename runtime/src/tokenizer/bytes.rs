//! From the spelling of a token in a vocabulary to the bytes that it stands for.

use super::TokenizerError;
use serde_json::Value;
use std::sync::LazyLock;
use tokenizers::DecoderWrapper;

/// How a vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decoding {
    /// GPT-2: every byte is one printable character.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0x0A>` is a byte where `byte_fallback` is on.
    Metaspace {
        /// `<0xNN>` is the byte NN.
        byte_fallback: bool,
        /// Encoding put a space before the text.
        strip: bool,
    },
}

impl Decoding {
    /// Reads the decoder of a `tokenizer.json`.
    pub(super) fn of(decoder: Option<&DecoderWrapper>) -> Result<Self, TokenizerError> {
        let Some(decoder) = decoder else {
            return Err(TokenizerError::Decoder("null".into()));
        };
        // The crate keeps most fields to itself; the JSON form is its public interface.
        let json = serde_json::to_value(decoder).map_err(|e| TokenizerError::Json(e.to_string()))?;
        let mut steps = Vec::new();
        flatten(&json, &mut steps);
        let (mut byte_level, mut metaspace, mut byte_fallback, mut strip) = (false, false, false, false);
        for step in steps {
            match step["type"].as_str().unwrap_or_default() {
                "ByteLevel" => byte_level = true,
                "ByteFallback" => byte_fallback = true,
                "Fuse" => {}
                "Metaspace" if step["replacement"] == "▁" => {
                    metaspace = true;
                    strip |= step["prepend_scheme"] != "never";
                }
                "Replace" if step["pattern"]["String"] == "▁" && step["content"] == " " => metaspace = true,
                "Strip" if step["content"] == " " && step["stop"] == 0 => strip |= step["start"] != 0,
                _ => return Err(TokenizerError::Decoder(step.to_string())),
            }
        }
        match (byte_level, metaspace) {
            (true, false) if !byte_fallback && !strip => Ok(Self::ByteLevel),
            (false, true) => Ok(Self::Metaspace { byte_fallback, strip }),
            _ => Err(TokenizerError::Decoder(json.to_string())),
        }
    }

    /// Whether a whole text decodes with one leading space too many.
    pub(super) fn strips_leading_space(self) -> bool {
        matches!(self, Self::Metaspace { strip: true, .. })
    }

    /// The bytes of an ordinary token.
    pub(super) fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            // A token with a character outside of the alphabet is spelled as it is.
            Self::ByteLevel => {
                token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Self::Metaspace { byte_fallback, .. } => match byte_token(token) {
                Some(byte) if byte_fallback => vec![byte],
                _ => token.replace('▁', " ").into_bytes(),
            },
        }
    }
}

fn flatten<'a>(decoder: &'a Value, steps: &mut Vec<&'a Value>) {
    match decoder["decoders"].as_array() {
        Some(inner) if decoder["type"] == "Sequence" => inner.iter().for_each(|d| flatten(d, steps)),
        _ => steps.push(decoder),
    }
}

/// The byte of a byte token `<0xNN>`.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    // `from_str_radix` takes a sign as well.
    (hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u8::from_str_radix(hex, 16).ok())
        .flatten()
}

/// Bytes that GPT-2's alphabet writes as the character of the same number: the printable ones of
/// Latin-1 without the space and the soft hyphen. The others follow from U+0100 on, in order.
fn is_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

/// Byte of each character of the alphabet, by code point (the largest is U+0143).
static ALPHABET: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut table = [None; 0x144];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        if is_itself(byte) {
            table[byte as usize] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    table
});

fn byte_of(c: char) -> Option<u8> {
    ALPHABET.get(c as usize).copied().flatten()
}

/// The character that stands for `byte` in a byte-level vocabulary.
#[cfg(test)]
pub(super) fn char_of(byte: u8) -> char {
    let point = ALPHABET.iter().position(|&b| b == Some(byte)).expect("the alphabet holds every byte");
    char::from_u32(point as u32).expect("below the surrogates")
}
