//! The tokenizer of SmolLM2 from its GGUF file, against reference ids.
//!
//! The vocabulary is too large to keep here: set `TILEC_SMOLLM2_GGUF` to the path of
//! `SmolLM2-135M-Instruct.Q4_1.gguf` to run this. `tests/data/make_fixtures.py` made the ids.

use serde::Deserialize;
use std::path::Path;
use tilec_runtime::chat::{ChatTemplate, Message, TemplateArgs};
use tilec_runtime::checkpoint::{Checkpoint, TokenizerSource};
use tilec_runtime::stream::StreamDecoder;
use tilec_runtime::tokenizer::Tokenizer;

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    decoded: String,
    /// Decoded without special tokens.
    shown: String,
}

fn checkpoint() -> Option<Checkpoint> {
    let Ok(path) = std::env::var("TILEC_SMOLLM2_GGUF") else {
        eprintln!("skipped: TILEC_SMOLLM2_GGUF is not set");
        return None;
    };
    Some(Checkpoint::open(Path::new(&path)).unwrap())
}

#[test]
fn smollm2_tokens_are_the_references() {
    let Some(checkpoint) = checkpoint() else { return };
    let TokenizerSource::Gguf(vocab) = checkpoint.tokenizer_source() else {
        panic!("no vocabulary in the file")
    };
    let tokenizer = Tokenizer::from_gguf(vocab.as_ref().clone()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!(tokenizer.end_tokens(), [2, 0], "<|im_end|> and <|endoftext|>");

    let cases: Vec<Case> = serde_json::from_str(include_str!("data/smollm2_tokens.json")).unwrap();
    assert!(cases.len() > 20);
    for case in cases {
        let ids = tokenizer.encode(&case.text, true).unwrap();
        assert_eq!(ids, case.ids, "{:?}", case.text);
        assert_eq!(tokenizer.decode(&ids, false), case.decoded);
        assert_eq!(tokenizer.decode(&ids, true), case.shown);

        let mut stream = StreamDecoder::new(&tokenizer, true, &[] as &[&str]).unwrap();
        let mut text: String = ids.iter().map(|&id| stream.push(id).text).collect();
        text.push_str(&stream.finish().text);
        assert_eq!(text, case.shown);
    }
}

#[test]
fn smollm2_chats_begin_with_the_default_system_message() {
    let Some(checkpoint) = checkpoint() else { return };
    let source = checkpoint.chat_template().expect("the file has a chat template");
    let template = ChatTemplate::new(source, Some("<|im_start|>"), Some("<|im_end|>")).unwrap();
    let rendered = template.render(&[Message::new("user", "Hi")], true, &TemplateArgs::new()).unwrap();
    assert_eq!(
        rendered,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}
