//! How a byte-level vocabulary splits text into words before it merges: one rule per value of
//! `tokenizer.ggml.pre`. Merges never cross a word, so a wrong rule gives wrong tokens.

use super::TokenizerError;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior::Isolated;

/// GPT-2: contractions, words, numbers and punctuation, each with the space before it.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Llama 3: up to three digits, newlines end punctuation.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 2 and 3: as Llama 3, one digit at a time.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 3.5: combining marks belong to words.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GPT-4o and gpt-oss: words split where lower case turns to upper.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Mistral's Tekken: as GPT-4o without contractions, one digit at a time.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// DeepSeek V3, after digits by three and runs of Chinese and Japanese.
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// The splitting rule of one pre-tokenizer.
#[derive(Debug)]
pub(super) struct Rule {
    /// Values of `tokenizer.ggml.pre` that mean this rule.
    names: &'static [&'static str],
    /// Applied one after another, each to the pieces that the one before left.
    splits: &'static [&'static str],
    /// Text is put in Unicode NFC first.
    pub(super) nfc: bool,
    /// A word that is a token is that token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// What `add_bos_token` is where the file does not say.
    pub(super) add_bos: bool,
}

const PLAIN: Rule = Rule { names: &[], splits: &[], nfc: false, ignore_merges: false, add_bos: false };

const RULES: &[Rule] = &[
    Rule {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        splits: &[r"\p{N}", GPT2],
        ..PLAIN
    },
    Rule { names: &["gpt-2", "gpt2", "olmo", "mpt", "phi-2"], splits: &[GPT2], ..PLAIN },
    Rule {
        names: &["default"],
        splits: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ..PLAIN
    },
    Rule { names: &["qwen2"], splits: &[QWEN2], nfc: true, ..PLAIN },
    Rule { names: &["qwen35"], splits: &[QWEN35], nfc: true, ..PLAIN },
    Rule { names: &["deepseek-r1-qwen", "stablelm2"], splits: &[QWEN2], ..PLAIN },
    Rule {
        names: &["llama-bpe", "llama3", "llama-v3"],
        splits: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Rule { names: &["dbrx", "smaug-bpe"], splits: &[LLAMA3], ..PLAIN },
    Rule { names: &["gpt-4o", "llama4"], splits: &[GPT4O], ..PLAIN },
    Rule { names: &["tekken"], splits: &[TEKKEN], ignore_merges: true, add_bos: true, ..PLAIN },
    Rule {
        names: &["deepseek-v3"],
        splits: &[r"\p{N}{1,3}", "[一-龥\u{3040}-ゟ゠-ヿ]+", DEEPSEEK_V3],
        ..PLAIN
    },
];

/// The rule that `tokenizer.ggml.pre` names.
pub(super) fn rule(pre: &str) -> Result<&'static Rule, TokenizerError> {
    RULES.iter().find(|rule| rule.names.contains(&pre)).ok_or_else(|| {
        let mut known: Vec<_> = RULES.iter().flat_map(|rule| rule.names).copied().collect();
        known.sort_unstable();
        TokenizerError::Pre { pre: pre.to_owned(), known: known.join(", ") }
    })
}

impl Rule {
    /// The rule as a pre-tokenizer that ends in the byte alphabet.
    pub(super) fn pre_tokenizer(&self, add_prefix_space: bool) -> Result<Sequence, TokenizerError> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::with_capacity(self.splits.len() + 1);
        for split in self.splits {
            let split = Split::new(SplitPattern::Regex((*split).to_owned()), Isolated, false)
                .map_err(TokenizerError::inner)?;
            steps.push(split.into());
        }
        steps.push(ByteLevel::new(add_prefix_space, true, false).into());
        Ok(Sequence::new(steps))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn words(pre: &str, text: &str) -> Vec<String> {
        let mut split = PreTokenizedString::from(text);
        rule(pre).unwrap().pre_tokenizer(false).unwrap().pre_tokenize(&mut split).unwrap();
        split
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .iter()
            .map(|(_, (start, end), _)| text[*start..*end].to_owned())
            .collect()
    }

    #[test]
    fn every_rule_compiles_and_loses_nothing() {
        let text = "It's 12345 o'CLOCK,\r\n\n  \tfoo_bar(x)  HelloWorld 汉字かな ÉCOLE 3½ 👩‍👧 !!\n ";
        for rule in RULES {
            for name in rule.names {
                assert_eq!(words(name, text).concat(), text, "{name}");
            }
        }
    }

    #[test]
    fn digits_follow_the_family() {
        assert_eq!(words("smollm", "a 1234"), ["a", " ", "1", "2", "3", "4"]);
        assert_eq!(words("gpt-2", "a 1234"), ["a", " 1234"]);
        assert_eq!(words("qwen2", "a 1234"), ["a", " ", "1", "2", "3", "4"]);
        assert_eq!(words("llama-bpe", "a 1234"), ["a", " ", "123", "4"]);
        assert_eq!(words("gpt-4o", "a 1234"), ["a", " ", "123", "4"]);
        assert_eq!(words("default", "a 1234"), ["a", " ", "123", "4"]);
    }

    #[test]
    fn case_and_contractions_follow_the_family() {
        assert_eq!(words("gpt-4o", "HelloWorld's"), ["Hello", "World's"]);
        assert_eq!(words("tekken", "HelloWorld's"), ["Hello", "World", "'s"]);
        assert_eq!(words("qwen2", "HelloWorld'S"), ["HelloWorld", "'S"]);
        assert_eq!(words("smollm", "HelloWorld'S"), ["HelloWorld", "'", "S"]);
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = rule("klingon").unwrap_err().to_string();
        assert!(error.contains("klingon") && error.contains("smollm") && error.contains("qwen2"), "{error}");
    }

    #[test]
    fn no_name_has_two_rules() {
        let mut names: Vec<_> = RULES.iter().flat_map(|rule| rule.names).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
