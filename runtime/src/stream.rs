//! Text as it is generated: tokens in, text out that is safe to show.
//!
//! Two things are held back: the bytes of a character that is not complete yet, and text that may
//! turn out to be the beginning of a stop string. Everything comes out in the end, so what a
//! stream emits is what decoding all tokens at once gives, up to the stop string.

use crate::tokenizer::{TokenKind, Tokenizer};
use std::ops::Deref;

/// Bytes in, complete characters out.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    /// The beginning of a character: at most three bytes.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Appends to `out` the text that `bytes` complete. Bytes that cannot become a character,
    /// whatever follows, are U+FFFD, as in [`String::from_utf8_lossy`].
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        loop {
            let error = match str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => error,
            };
            let (valid, after) = rest.split_at(error.valid_up_to());
            out.push_str(str::from_utf8(valid).unwrap_or_default());
            match error.error_len() {
                Some(len) => {
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[len..];
                }
                None => {
                    rest = after;
                    break;
                }
            }
        }
        let done = self.pending.len() - rest.len();
        self.pending.drain(..done);
    }

    /// Ends the text: an incomplete character is U+FFFD now.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&self.pending));
        self.pending.clear();
    }
}

/// A stop string is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stop string {index} is empty, which would stop before the first character")]
pub struct EmptyStop {
    /// Its place in the list.
    pub index: usize,
}

/// What a stream emits for one token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Emit {
    /// Text to show; often empty.
    pub text: String,
    /// The stop string that ended the text: its place in the list. It is not part of the text,
    /// and nothing comes after it.
    pub stop: Option<usize>,
}

/// Cuts a text at the first stop string.
///
/// That is the one that is complete first, and among those that end together the longest. It does
/// not depend on how the text is cut into pieces.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The longest end of the text so far that may begin a stop string.
    held: String,
    stopped: Option<usize>,
}

impl StopStrings {
    /// None of `stops` may be empty; there may be none.
    pub fn new(stops: &[impl AsRef<str>]) -> Result<Self, EmptyStop> {
        let stops: Vec<String> = stops.iter().map(|s| s.as_ref().to_owned()).collect();
        match stops.iter().position(String::is_empty) {
            Some(index) => Err(EmptyStop { index }),
            None => Ok(Self { stops, held: String::new(), stopped: None }),
        }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> Emit {
        if self.stopped.is_some() {
            return Emit { text: String::new(), stop: self.stopped };
        }
        self.held.push_str(text);
        let found = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        if let Some((_, start, index)) = found.min() {
            self.stopped = Some(index);
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return Emit { text, stop: self.stopped };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - keep);
        Emit { text: std::mem::replace(&mut self.held, held), stop: None }
    }

    /// Ends the text: what was held back comes out.
    pub fn finish(&mut self) -> Emit {
        Emit { text: std::mem::take(&mut self.held), stop: self.stopped }
    }
}

/// Length of the longest end of `text` that begins `stop` and is not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(at, _)| at).rev();
    lengths.into_iter().find(|&len| text.ends_with(&stop[..len])).unwrap_or(0)
}

/// Tokens in, text out, for one sequence that is being generated.
///
/// The text continues a prompt, so a leading space stays. `T` is a shared tokenizer: a reference
/// or an `Arc`.
#[derive(Clone, Debug)]
pub struct StreamDecoder<T> {
    tokenizer: T,
    skip_special: bool,
    utf8: Utf8Stream,
    stops: StopStrings,
}

impl<T: Deref<Target = Tokenizer>> StreamDecoder<T> {
    /// `skip_special` leaves control tokens out of the text.
    pub fn new(tokenizer: T, skip_special: bool, stops: &[impl AsRef<str>]) -> Result<Self, EmptyStop> {
        Ok(Self { tokenizer, skip_special, utf8: Utf8Stream::default(), stops: StopStrings::new(stops)? })
    }

    /// Takes the next token.
    pub fn push(&mut self, token: u32) -> Emit {
        let mut text = String::new();
        if !(self.skip_special && self.tokenizer.kind(token) == TokenKind::Control) {
            self.utf8.push(self.tokenizer.token_bytes(token), &mut text);
        }
        self.stops.push(&text)
    }

    /// Ends the text: what was held back comes out.
    pub fn finish(&mut self) -> Emit {
        let mut text = String::new();
        self.utf8.finish(&mut text);
        let mut last = self.stops.push(&text);
        if last.stop.is_none() {
            last.text.push_str(&self.stops.finish().text);
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `bytes` in pieces of the given lengths, round and round.
    fn pieces<'a>(mut bytes: &'a [u8], lengths: &[usize]) -> Vec<&'a [u8]> {
        let mut out = Vec::new();
        for &len in lengths.iter().cycle() {
            if bytes.is_empty() {
                break;
            }
            let (piece, rest) = bytes.split_at(len.clamp(1, bytes.len()));
            out.push(piece);
            bytes = rest;
        }
        out
    }

    fn utf8(bytes: &[u8], lengths: &[usize]) -> Vec<String> {
        let mut stream = Utf8Stream::default();
        let mut emitted = Vec::new();
        for piece in pieces(bytes, lengths) {
            let mut out = String::new();
            stream.push(piece, &mut out);
            emitted.push(out);
        }
        let mut out = String::new();
        stream.finish(&mut out);
        emitted.push(out);
        emitted
    }

    /// Character by character: the plainest way to say what a stop is.
    fn cut<'a>(text: &'a str, stops: &[String]) -> (&'a str, Option<usize>) {
        for end in text.char_indices().map(|(at, c)| at + c.len_utf8()) {
            let hits = stops.iter().enumerate().filter(|(_, stop)| text[..end].ends_with(stop.as_str()));
            // The longest, and the first of equal ones.
            if let Some((i, stop)) = hits.min_by_key(|(_, stop)| std::cmp::Reverse(stop.len())) {
                return (&text[..end - stop.len()], Some(i));
            }
        }
        (text, None)
    }

    #[test]
    fn a_character_waits_for_its_last_byte() {
        assert_eq!(utf8("a😀é".as_bytes(), &[1]), ["a", "", "", "", "😀", "", "é", ""]);
        assert_eq!(utf8(&"😀".as_bytes()[..3], &[1]), ["", "", "", "\u{fffd}"]);
        // An impossible continuation does not wait.
        assert_eq!(utf8(b"\xf0\x9fab", &[2, 1]), ["", "\u{fffd}a", "b", ""]);
    }

    #[test]
    fn stop_strings_are_held_back_and_cut() {
        let mut s = StopStrings::new(&["</s>", "User:"]).unwrap();
        assert_eq!(s.push("hello <"), Emit { text: "hello ".into(), stop: None });
        assert_eq!(s.push("b> </"), Emit { text: "<b> ".into(), stop: None });
        assert_eq!(s.push("s"), Emit { text: "".into(), stop: None });
        assert_eq!(s.push("> more"), Emit { text: "".into(), stop: Some(0) });
        assert_eq!(s.push("more"), Emit { text: "".into(), stop: Some(0) });
        assert_eq!(s.finish(), Emit { text: "".into(), stop: Some(0) });

        let mut s = StopStrings::new(&["abc"]).unwrap();
        assert_eq!(s.push("xab").text, "x");
        assert_eq!(s.finish(), Emit { text: "ab".into(), stop: None });
        assert_eq!(StopStrings::new(&["a", ""]).unwrap_err(), EmptyStop { index: 1 });
    }

    proptest! {
        #[test]
        fn utf8_is_what_lossy_decoding_gives(
            bytes in prop_oneof![
                ".{0,40}".prop_map(String::into_bytes),
                prop::collection::vec(any::<u8>(), 0..60),
            ],
            lengths in prop::collection::vec(1usize..6, 1..5),
        ) {
            let emitted = utf8(&bytes, &lengths);
            prop_assert_eq!(emitted.concat(), String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn valid_text_never_shows_a_replacement(
            text in "[a-zé汉😀👩‍👧 ]{0,40}",
            lengths in prop::collection::vec(1usize..6, 1..5),
        ) {
            for part in utf8(text.as_bytes(), &lengths) {
                prop_assert!(!part.contains(char::REPLACEMENT_CHARACTER));
            }
        }

        #[test]
        fn a_stop_does_not_depend_on_the_pieces(
            text in "[abé]{0,30}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            lengths in prop::collection::vec(1usize..4, 1..4),
        ) {
            let mut stream = StopStrings::new(&stops).unwrap();
            let mut utf8 = Utf8Stream::default();
            let (mut shown, mut stop) = (String::new(), None);
            for piece in pieces(text.as_bytes(), &lengths) {
                let mut part = String::new();
                utf8.push(piece, &mut part);
                let emit = stream.push(&part);
                shown.push_str(&emit.text);
                stop = emit.stop;
                // What is shown never has to be taken back.
                prop_assert!(cut(&text, &stops).0.starts_with(&shown));
            }
            shown.push_str(&stream.finish().text);
            let (want, want_stop) = cut(&text, &stops);
            prop_assert_eq!(shown, want);
            prop_assert_eq!(stop, want_stop);
        }
    }
}
