//! Typed access to a JSON config. A key that is `null` has no value; where transformers tells that from
//! an absent key, see [`Config::has_key`].

use super::FrontendError;
use serde_json::{Map, Value};

/// Largest size of a tensor that a config may name. No model is near it, and the bits of a matrix of
/// two such sizes still fit 64 bits.
pub const MAX_SIZE: usize = 1 << 21;

/// Longest context that a config may name.
pub const MAX_POSITIONS: usize = 1 << 24;

/// Most decoder layers that a config may name.
const MAX_LAYERS: usize = 4096;

/// A JSON object of a config, and where it is.
#[derive(Clone, Copy, Debug)]
pub struct Config<'a> {
    object: &'a Map<String, Value>,
    /// Key of the object in its parent; empty for the whole config.
    section: &'a str,
}

impl<'a> Config<'a> {
    /// The whole config.
    pub fn new(value: &'a Value) -> Result<Config<'a>, FrontendError> {
        match value.as_object() {
            Some(object) => Ok(Config { object, section: "" }),
            None => Err(FrontendError::Config {
                key: "(top)".into(),
                what: format!("a config is a JSON object, not {}", kind(value)),
            }),
        }
    }

    /// An error about a key.
    pub fn error(&self, key: &str, what: impl Into<String>) -> FrontendError {
        let key = match self.section {
            "" => key.to_string(),
            section => format!("{section}.{key}"),
        };
        FrontendError::Config { key, what: what.into() }
    }

    fn wrong(&self, key: &str, wanted: &str, value: &Value) -> FrontendError {
        let shown = match value {
            Value::Array(_) | Value::Object(_) => kind(value).to_string(),
            value => value.to_string(),
        };
        self.error(key, format!("must be {wanted}, not {shown}"))
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, `null` included: transformers' default then does not apply.
    pub fn has_key(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// Whether the key has a value.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether a value is an object: sections by layer type, say.
    pub fn is_nested(&self) -> bool {
        self.object.values().any(Value::is_object)
    }

    /// A section of the config; `None` if it is absent or empty.
    pub fn section(&self, key: &'a str) -> Result<Option<Config<'a>>, FrontendError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) if object.is_empty() => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Config { object, section: key })),
            Some(value) => Err(self.wrong(key, "an object", value)),
        }
    }

    fn bounded(&self, key: &str, max: usize) -> Result<Option<usize>, FrontendError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(0) | None => Err(self.wrong(key, "a whole number from 1 up", value)),
            Some(n) if n > max as u64 => {
                Err(self.error(key, format!("{n} is beyond the most that is supported, {max}")))
            }
            Some(n) => Ok(Some(n as usize)),
        }
    }

    /// An extent of a tensor, from 1 up.
    pub fn size(&self, key: &str) -> Result<Option<usize>, FrontendError> {
        self.bounded(key, MAX_SIZE)
    }

    /// An extent of a tensor with a default.
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize, FrontendError> {
        Ok(self.size(key)?.unwrap_or(default))
    }

    /// A number of positions, from 1 up.
    pub fn positions(&self, key: &str) -> Result<Option<usize>, FrontendError> {
        self.bounded(key, MAX_POSITIONS)
    }

    /// A number of layers, from 1 up, with a default.
    pub fn layers_or(&self, key: &str, default: usize) -> Result<usize, FrontendError> {
        Ok(self.bounded(key, MAX_LAYERS)?.unwrap_or(default))
    }

    /// A whole number from 0 up.
    pub fn count_or(&self, key: &str, default: usize) -> Result<usize, FrontendError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
                Some(count) => Ok(count),
                None => Err(self.wrong(key, "a whole number", value)),
            },
        }
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>, FrontendError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(key, "a number", value)),
            },
        }
    }

    /// A number above 0.
    pub fn positive(&self, key: &str) -> Result<Option<f64>, FrontendError> {
        match self.number(key)? {
            Some(number) if number <= 0.0 => Err(self.error(key, format!("must be above 0, not {number}"))),
            number => Ok(number),
        }
    }

    /// A number above 0 that must be there.
    pub fn positive_required(&self, key: &str) -> Result<f64, FrontendError> {
        self.positive(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// Numbers above 0 that float32 can hold.
    pub fn positives(&self, key: &str) -> Result<Option<Vec<f32>>, FrontendError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let numbers = value.as_array().and_then(|array| {
            let number =
                |value: &Value| value.as_f64().map(|x| x as f32).filter(|x| x.is_normal() && *x > 0.0);
            array.iter().map(number).collect::<Option<Vec<f32>>>()
        });
        numbers.map(Some).ok_or_else(|| self.wrong(key, "a list of numbers above 0", value))
    }

    /// Yes or no, with a default.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool, FrontendError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(value) => Err(self.wrong(key, "true or false", value)),
        }
    }

    /// A text.
    pub fn string(&self, key: &str) -> Result<Option<&'a str>, FrontendError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.wrong(key, "a text", value)),
        }
    }

    /// A list of texts.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>, FrontendError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let texts = value.as_array().and_then(|array| array.iter().map(Value::as_str).collect());
        texts.map(Some).ok_or_else(|| self.wrong(key, "a list of texts", value))
    }

    /// A list of whole numbers from 0 up.
    pub fn counts(&self, key: &str) -> Result<Option<Vec<usize>>, FrontendError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        let numbers = value.as_array().and_then(|array| array.iter().map(number).collect());
        numbers.map(Some).ok_or_else(|| self.wrong(key, "a list of whole numbers", value))
    }

    /// Whether a key has a value other than `false` and `harmless`: whether it asks for something.
    pub fn changes(&self, key: &str, harmless: Option<f64>) -> bool {
        self.get(key).is_some_and(|value| match value {
            Value::Bool(value) => *value,
            value => value.as_f64().is_none() || value.as_f64() != harmless,
        })
    }

    /// A token id, or a list of them; all below `vocab`.
    pub fn token_ids(&self, key: &str, vocab: usize) -> Result<Vec<u32>, FrontendError> {
        let one = |value: &Value| match value.as_u64() {
            Some(id) if id < vocab as u64 => Ok(id as u32),
            Some(id) => Err(self.error(key, format!("token {id} is not below vocab_size {vocab}"))),
            None => Err(self.wrong(key, "a token id or a list of them", value)),
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(one).collect(),
            Some(id) => Ok(vec![one(id)?]),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
