use super::bytes::char_of;
use super::*;
use crate::stream::StreamDecoder;
use proptest::prelude::*;
use serde_json::json;

/// A byte-level spelling of text.
fn spell(text: &str) -> String {
    text.bytes().map(char_of).collect()
}

/// Three markers, every byte, and a few merges: ids 0 to 2, 3 to 258, 259 onwards.
fn small() -> GgufVocab {
    let mut tokens: Vec<String> = ["<|end|>", "<|start|>", "[[word]]"].map(String::from).into();
    let mut token_types = vec![3, 3, 4];
    tokens.extend((0..=u8::MAX).map(|b| char_of(b).to_string()));
    let mut merges = Vec::new();
    for (left, right) in
        [("h", "e"), (" ", "t"), (" t", "he"), ("i", "n"), ("é", ""), ("l", "l"), ("he", "ll")]
    {
        // é is two bytes: their merge is the character.
        let (left, right) = match right {
            "" => (char_of(left.as_bytes()[0]).to_string(), char_of(left.as_bytes()[1]).to_string()),
            _ => (spell(left), spell(right)),
        };
        merges.push(format!("{left} {right}"));
        tokens.push(left + &right);
    }
    token_types.resize(tokens.len(), 1);
    GgufVocab {
        model: "gpt2".into(),
        pre: "smollm".into(),
        tokens,
        token_types,
        merges,
        bos: Some(1),
        eos: Some(0),
        ..Default::default()
    }
}

fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text, false).unwrap();
    ids.iter().map(|&id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()).collect()
}

#[test]
fn merges_apply_best_first_within_words() {
    let t = Tokenizer::from_gguf(small()).unwrap();
    assert_eq!(pieces(&t, "hell the in"), ["hell", " the", " ", "in"]);
    // " t" + "he" comes before "he" + "ll", as in the table.
    assert_eq!(pieces(&t, " thell"), [" the", "ll"]);
    // A word ends before a digit, so the space is on its own.
    assert_eq!(pieces(&t, "é 12"), ["é", " ", "1", "2"]);
    assert_eq!(t.id("Ġthe"), Some(261));
    assert_eq!(t.token(261).as_deref(), Some("Ġthe"));
    assert_eq!(t.vocab_size(), 3 + 256 + 7);
}

#[test]
fn special_tokens_are_found_in_text() {
    let t = Tokenizer::from_gguf(small()).unwrap();
    assert_eq!(pieces(&t, "<|start|>he[[word]]in<|end|>"), ["<|start|>", "he", "[[word]]", "in", "<|end|>"]);
    assert_eq!(t.encode("<|start|>", false).unwrap(), [1]);
    assert_eq!(t.kind(1), TokenKind::Control);
    assert_eq!(t.kind(2), TokenKind::UserDefined);
    assert_eq!(t.kind(9999), TokenKind::Unused);
    let ids = t.encode("<|start|>he[[word]]<|end|>", false).unwrap();
    assert_eq!(t.decode(&ids, true), "he[[word]]");
    assert_eq!(t.decode(&ids, false), "<|start|>he[[word]]<|end|>");
    // Half a marker is text.
    assert_eq!(t.decode(&t.encode("<|start|", false).unwrap(), true), "<|start|");
}

#[test]
fn bos_and_eos_are_added_where_the_file_says_so() {
    let t = Tokenizer::from_gguf(small()).unwrap();
    assert_eq!(t.encode("he", true).unwrap(), t.encode("he", false).unwrap());
    let both = GgufVocab { add_bos: Some(true), add_eos: Some(true), ..small() };
    let t = Tokenizer::from_gguf(both).unwrap();
    assert_eq!(t.encode("he", true).unwrap(), [1, 259, 0]);
    assert_eq!(t.encode("", true).unwrap(), [1, 0]);
    assert_eq!(t.encode("he", false).unwrap(), [259]);
    assert_eq!((t.bos(), t.eos()), (Some(1), Some(0)));
}

#[test]
fn end_tokens_are_eos_eot_and_the_known_markers() {
    let t = Tokenizer::from_gguf(GgufVocab { eos: Some(1), eot: Some(2), ..small() }).unwrap();
    assert_eq!(t.end_tokens(), [1, 2, 0]);
    // With gpt-oss's markers, `<|end|>` ends a message only.
    let mut vocab = small();
    vocab.tokens[2] = "<|call|>".into();
    vocab.tokens[1] = "<|return|>".into();
    vocab.token_types[2] = 3;
    let t = Tokenizer::from_gguf(GgufVocab { eos: Some(1), ..vocab }).unwrap();
    assert_eq!(t.end_tokens(), [1, 2]);
}

#[test]
fn ids_beyond_the_vocabulary_are_no_text() {
    let t = Tokenizer::from_gguf(small()).unwrap();
    assert_eq!(t.decode(&[259, 100_000, u32::MAX, 262], false), "hein");
    assert_eq!(t.token_bytes(u32::MAX), b"");
}

#[test]
fn broken_tables_are_refused() {
    let message = |vocab: GgufVocab| Tokenizer::from_gguf(vocab).unwrap_err().to_string();
    let mut v = small();
    v.merges[3] = "i n g".into();
    assert!(message(v).contains("tokenizer.ggml.merges[3]"));
    let mut v = small();
    v.merges[1] = "h q".into();
    assert!(message(v).contains("tokenizer.ggml.merges[1]: \"hq\" is not in the vocabulary"));
    let mut v = small();
    v.token_types.pop();
    assert!(message(v).contains("tokenizer.ggml.token_type: 265 entries for 266 tokens"));
    assert!(message(GgufVocab { bos: Some(266), ..small() }).contains("tokenizer.ggml.bos_token_id"));
    assert!(
        message(GgufVocab { bos: None, add_bos: Some(true), ..small() }).contains("bos_token_id: missing")
    );
    assert!(message(GgufVocab { model: "bert".into(), ..small() }).contains("\"bert\" is not supported"));
    assert!(message(GgufVocab { pre: "klingon".into(), ..small() }).contains("smollm"));
    assert!(message(GgufVocab { model: "llama".into(), ..small() }).contains("tokenizer.ggml.scores"));
    assert!(message(GgufVocab::default()).contains("0 tokens"));
}

#[test]
fn a_text_twice_in_the_table_means_the_first() {
    let mut v = small();
    v.tokens.push("he".into());
    v.token_types.push(1);
    let t = Tokenizer::from_gguf(v).unwrap();
    assert_eq!(t.encode("he", false).unwrap(), [259]);
    assert_eq!(t.token_bytes(266), b"he");
}

/// The same vocabulary as a `tokenizer.json`.
fn small_json(decoder: serde_json::Value) -> serde_json::Value {
    let v = small();
    let vocab: serde_json::Map<_, _> =
        (0u32..).zip(&v.tokens).map(|(id, t)| (t.clone(), json!(id))).collect();
    let added: Vec<_> = (0..3)
        .map(|id| {
            json!({"id": id, "content": v.tokens[id], "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": id != 2})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]}}},
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": v.merges}
    })
}

fn from_json(json: &serde_json::Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_json(json.to_string().as_bytes())
}

#[test]
fn tokenizer_json_and_gguf_agree() {
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let mut a = from_json(&small_json(byte_level)).unwrap();
    let b = Tokenizer::from_gguf(small()).unwrap();
    assert_eq!(a.vocab_size(), b.vocab_size());
    // Truncation in the file is not for us; the post-processor is.
    assert_eq!(a.encode("hehehe", true).unwrap(), [1, 259, 259, 259]);
    for text in ["the hell in é 😀 12", "<|start|>he[[word]] \n\n x<|end|>", "  \u{1680}\u{a0} a's 'S"] {
        let ids = a.encode(text, false).unwrap();
        assert_eq!(ids, b.encode(text, false).unwrap(), "{text:?}");
        for skip in [false, true] {
            assert_eq!(a.decode(&ids, skip), b.decode(&ids, skip));
            assert_eq!(a.decode(&ids, skip), a.inner.decode(&ids, skip).unwrap(), "as the crate decodes");
        }
    }
    assert_eq!((a.bos(), a.eos(), a.end_tokens()), (None, None, [0].as_slice()));
    a.set_special(Some(1), &[2, 0]);
    assert_eq!((a.bos(), a.eos(), a.end_tokens()), (Some(1), Some(2), [2, 0].as_slice()));
}

#[test]
fn tokenizer_json_that_cannot_be_decoded_is_refused() {
    for decoder in [json!(null), json!({"type": "WordPiece", "prefix": "##", "cleanup": true})] {
        let error = from_json(&small_json(decoder)).unwrap_err();
        assert!(matches!(error, TokenizerError::Decoder(_)), "{error}");
    }
    assert!(matches!(Tokenizer::from_json(b"{"), Err(TokenizerError::Json(_))));
    let mut json = small_json(json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true}));
    json["model"]["vocab"]["far"] = json!(4_000_000_000u32);
    let error = from_json(&json).unwrap_err().to_string();
    assert!(error.contains("\"far\""), "{error}");
}

#[test]
fn decoders_of_sentence_piece_files() {
    let with = |decoder: serde_json::Value| {
        let mut json = small_json(decoder);
        json["model"]["vocab"]["▁in"] = json!(266);
        json["model"]["vocab"]["<0xC3>"] = json!(267);
        from_json(&json).unwrap()
    };
    let llama = with(json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}));
    assert_eq!(llama.token_bytes(266), b" in");
    assert_eq!(llama.token_bytes(267), [0xc3]);
    assert_eq!(llama.decode(&[266, 266], false), "in in");
    let t5 = with(json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true}));
    assert_eq!(t5.decode(&[266, 266], false), " in in");
    assert_eq!(t5.token_bytes(267), b"<0xC3>");
}

/// A SentencePiece vocabulary: markers, bytes, single characters, and pieces with scores.
fn spm() -> GgufVocab {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    let mut token_types = vec![2, 3, 3];
    tokens.extend((0..=u8::MAX).map(|b| format!("<0x{b:02X}>")));
    token_types.resize(tokens.len(), 6);
    let mut scores = vec![0.0; tokens.len()];
    for (piece, score) in [
        ("▁", -20.0),
        ("a", -21.0),
        ("b", -22.0),
        ("c", -23.0),
        ("ab", -3.0),
        ("bc", -2.0),
        ("▁a", -4.0),
        ("abc", -1.0),
        ("▁ab", -1.5),
        ("ca", -6.0),
        ("▁▁", -5.0),
        ("aa", -7.0),
    ] {
        tokens.push(piece.into());
        scores.push(score);
        token_types.push(1);
    }
    GgufVocab {
        model: "llama".into(),
        tokens,
        token_types,
        scores,
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        ..Default::default()
    }
}

/// SentencePiece BPE in its plainest form: merge the neighbours that make the best piece, the
/// leftmost ones among equals, until none make one.
fn spm_reference(vocab: &GgufVocab, text: &str) -> Vec<String> {
    let ids = first_ids(&vocab.tokens);
    let mut parts: Vec<String> = format!(" {text}").replace(' ', "▁").chars().map(String::from).collect();
    loop {
        let candidates = (1..parts.len()).filter_map(|i| {
            let id = *ids.get(format!("{}{}", parts[i - 1], parts[i]).as_str())?;
            Some((i, vocab.scores[id as usize]))
        });
        let best = candidates.reduce(|best, next| if next.1 > best.1 { next } else { best });
        let Some((i, _)) = best else { return parts };
        let right = parts.remove(i);
        parts[i - 1].push_str(&right);
    }
}

#[test]
fn sentence_piece_bytes_and_spaces() {
    let t = Tokenizer::from_gguf(spm()).unwrap();
    let tokens = |text: &str, special| {
        t.encode(text, special).unwrap().iter().map(|&id| t.token(id).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(tokens("abc", true), ["<s>", "▁", "abc"]);
    assert_eq!(tokens("é", false), ["▁", "<0xC3>", "<0xA9>"]);
    // A text begins anew after a marker.
    assert_eq!(tokens("a</s>a", false), ["▁a", "</s>", "▁a"]);
    for text in ["abc é a", " a", "", "b<0xC3>"] {
        assert_eq!(t.decode(&t.encode(text, true).unwrap(), true), text);
    }
    assert_eq!(t.token_bytes(t.id("▁ab").unwrap()), b" ab");
    let bare = Tokenizer::from_gguf(GgufVocab { add_space_prefix: Some(false), ..spm() }).unwrap();
    assert_eq!(bare.decode(&bare.encode(" a", false).unwrap(), false), " a");
    assert_eq!(bare.token(bare.encode("abc", false).unwrap()[0]).as_deref(), Some("abc"));
}

proptest! {
    #[test]
    fn sentence_piece_merges_by_score(text in "[abc ]{1,24}") {
        let vocab = spm();
        let t = Tokenizer::from_gguf(vocab.clone()).unwrap();
        let ids = t.encode(&text, false).unwrap();
        let tokens: Vec<_> = ids.iter().map(|&id| t.token(id).unwrap()).collect();
        prop_assert_eq!(tokens, spm_reference(&vocab, &text));
        prop_assert_eq!(t.decode(&ids, true), text);
    }

    #[test]
    fn any_text_survives(text in prop_oneof![".{0,60}", "[a-z the\\n\\t0-9é汉😀]{0,60}"]) {
        // SentencePiece spells a space so, and cannot tell the two apart.
        let text = text.replace('▁', "_");
        for vocab in [small(), spm()] {
            let t = Tokenizer::from_gguf(vocab).unwrap();
            let ids = t.encode(&text, false).unwrap();
            prop_assert_eq!(t.decode(&ids, false), text.clone());
            let mut stream = StreamDecoder::new(&t, false, &[] as &[&str]).unwrap();
            let mut streamed: String = ids.iter().map(|&id| stream.push(id).text).collect();
            streamed.push_str(&stream.finish().text);
            prop_assert_eq!(streamed.strip_prefix(if t.strip_leading_space { " " } else { "" }).unwrap_or(""), text.clone());
        }
    }
}

#[test]
fn a_stream_skips_markers_and_stops() {
    let t = Tokenizer::from_gguf(small()).unwrap();
    let mut ids = t.encode("é<|start|> the", false).unwrap();
    ids.extend(t.encode(" hell no", false).unwrap());
    let mut stream = StreamDecoder::new(&t, true, &["e h", "zz"]).unwrap();
    let mut text = String::new();
    let mut stop = None;
    for id in ids {
        let emit = stream.push(id);
        text.push_str(&emit.text);
        stop = stop.or(emit.stop);
    }
    assert_eq!((text.as_str(), stop), ("é th", Some(0)));
}
