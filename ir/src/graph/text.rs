//! The text form of a graph: printed in topological order, read back by [`parse`].
//!
//! ```text
//! graph "tiny" {
//!   weight "embed" [64, 32] q8_0              # stored and read in this format
//!   weight "head"  [64, 32] bf16 as mxfp4     # stored in one, read in another
//!   weight "v"     [16, 32] bf16 of "qkv" start=512 block=512 stride=1024   # part of a tensor
//!   weight "experts.{}.up" [4, 8, 32] mxfp4   # one tensor an expert
//!   weight "o" [32, 8] bf16 slice start=[0,8] of=[32,16]   # what one rank holds of a matrix
//!   rope "default" dims=8 theta=10000.0 scaling={"type":"none"}
//!   cache 0 kv_heads=1 qk_dim=8 v_dim=8 kv_type="f16"
//!
//!   %x = embed() weight="embed" : f32[rows, 32]
//!   layer 0 {
//!     %norm = rms_norm(%x) weight="norm" eps=1e-5 : f32[rows, 32]
//!   }
//! }
//! ```
//!
//! Attributes are `key=value` with values in JSON; for an operator they are the fields of its [`Op`].
//! A value whose name has other characters than `[A-Za-z0-9_.-]` is quoted: `%"a name"`. A format
//! without a name is a JSON object. The type behind the colon may be left out; written, it must be the
//! one that the operator's shape rule gives. `#` starts a comment that ends with the line.

use super::{Cache, Dim, Elem, Graph, NodeId, Op, RopeSpec, Type, View, Weight};
use crate::format::Format;
use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use std::collections::HashMap;
use std::fmt;

/// Longest weight name that the table of weights is aligned for.
const ALIGNED_NAME: usize = 64;

impl fmt::Display for Graph {
    /// The text form. Two equal graphs print the same; a graph with a cycle, which has no topological
    /// order, prints in id order and says so.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "graph {} {{", json(&self.name)?)?;
        let width = self.weights.keys().map(|name| name.len() + 2).max().unwrap_or(0).min(ALIGNED_NAME);
        for (name, weight) in &self.weights {
            write!(f, "  weight {:width$} {:?} {}", json(name)?, weight.shape, format_name(&weight.stored)?)?;
            if weight.format != weight.stored {
                write!(f, " as {}", format_name(&weight.format)?)?;
            }
            if let Some(view) = &weight.view {
                write!(f, " of {}{}", json(&view.tensor)?, attributes(view)?)?;
            }
            if let Some(slice) = &weight.slice {
                write!(f, " slice{}", attributes(slice)?)?;
            }
            writeln!(f)?;
        }
        for (name, rope) in &self.ropes {
            writeln!(f, "  rope {}{}", json(name)?, attributes(rope)?)?;
        }
        for (number, cache) in self.caches.iter().enumerate() {
            writeln!(f, "  cache {number}{}", attributes(cache)?)?;
        }
        if !self.is_empty() {
            writeln!(f)?;
        }
        let order = self.topological().or_else(|cycle| {
            writeln!(f, "  # not in order: {}", cycle.to_string().replace('\n', " "))?;
            Ok(self.ids())
        })?;
        let mut open = None;
        for id in order {
            let layer = self.node(id).layer;
            if layer != open {
                if open.is_some() {
                    writeln!(f, "  }}")?;
                }
                if let Some(layer) = layer {
                    writeln!(f, "  layer {layer} {{")?;
                }
                open = layer;
            }
            f.write_str(if layer.is_some() { "    " } else { "  " })?;
            self.write_node(f, id)?;
        }
        if open.is_some() {
            writeln!(f, "  }}")?;
        }
        f.write_str("}\n")
    }
}

impl Graph {
    fn write_node(&self, f: &mut fmt::Formatter<'_>, id: NodeId) -> fmt::Result {
        let node = self.node(id);
        write!(f, "{} = {}(", value_name(&node.name)?, node.op.name())?;
        for (number, operand) in self.operands(id).into_iter().enumerate() {
            write!(f, "{}{}", if number > 0 { ", " } else { "" }, value_name(&self.node(operand).name)?)?;
        }
        writeln!(f, "){} : {}", attributes(&node.op)?, node.ty)
    }
}

fn json(value: &impl Serialize) -> Result<String, fmt::Error> {
    serde_json::to_string(value).map_err(|_| fmt::Error)
}

fn format_name(format: &Format) -> Result<String, fmt::Error> {
    format.name().map_or_else(|| json(format), |name| Ok(name.to_string()))
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')
}

fn value_name(name: &str) -> Result<String, fmt::Error> {
    if !name.is_empty() && name.chars().all(is_name_char) {
        return Ok(format!("%{name}"));
    }
    Ok(format!("%{}", json(&name)?))
}

/// ` key=value` of each field, in the order of the fields; the tag of an operator is left out.
fn attributes(value: &impl Serialize) -> Result<String, fmt::Error> {
    let object = json(value)?;
    let fields = fields_of(&object).ok_or(fmt::Error)?;
    let fields = fields.iter().filter(|(key, _)| *key != "op");
    Ok(fields.map(|(key, value)| format!(" {key}={value}")).collect())
}

/// The fields of a JSON object as text, so that numbers keep the digits they were printed with (a
/// `serde_json::Value` would widen float32 to float64). Keys are names of Rust fields: no escapes.
fn fields_of(object: &str) -> Option<Vec<(&str, &str)>> {
    let mut rest = object.strip_prefix('{')?;
    let mut fields = Vec::new();
    while !rest.starts_with('}') {
        let (key, after) = rest.strip_prefix('"')?.split_once("\":")?;
        let end = json_end(after).ok()?;
        fields.push((key, &after[..end]));
        rest = after[end..].strip_prefix(',').unwrap_or(&after[end..]);
    }
    Some(fields)
}

/// Bytes of the JSON value that `text` starts with.
fn json_end(text: &str) -> serde_json::Result<usize> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<IgnoredAny>();
    match values.next() {
        Some(result) => result.map(|_| values.byte_offset()),
        None => serde_json::from_str::<IgnoredAny>("").map(|_| 0),
    }
}

/// Why a text is no graph, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {what}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What was expected, or what does not hold.
    pub what: String,
}

/// Reads the text form. What it says of types is checked; the graph as a whole is not: see
/// [`super::verify`].
///
/// # Errors
/// The first place that is not as the module's documentation says, or that breaks a shape rule.
pub fn parse(text: &str) -> Result<Graph, ParseError> {
    let mut parser = Parser { text, at: 0, graph: Graph::default(), values: HashMap::new() };
    parser.graph()?;
    Ok(parser.graph)
}

struct Parser<'t> {
    text: &'t str,
    /// Byte that is read next.
    at: usize,
    graph: Graph,
    values: HashMap<String, NodeId>,
}

type Parsed<T> = Result<T, ParseError>;

impl<'t> Parser<'t> {
    fn graph(&mut self) -> Parsed<()> {
        self.keyword("graph")?;
        self.graph.name = self.string("the graph's name")?;
        self.punctuation("{")?;
        while !self.take("}") {
            if self.peeks("%") {
                self.node(None)?;
                continue;
            }
            let start = self.at;
            match self.word() {
                "weight" => self.weight()?,
                "rope" => self.rope()?,
                "cache" => self.cache()?,
                "layer" => self.layer()?,
                _ => {
                    let what = "`weight`, `rope`, `cache`, `layer`, a `%value` or `}`";
                    return Err(self.expected(start, what));
                }
            }
        }
        self.skip_blank();
        if self.at < self.text.len() {
            return Err(self.expected(self.at, "the end of the text"));
        }
        Ok(())
    }

    fn weight(&mut self) -> Parsed<()> {
        let start = self.skip_blank();
        let name = self.string("the weight's name")?;
        self.punctuation("[")?;
        let mut shape = vec![self.number("an extent")?];
        while self.take(",") {
            shape.push(self.number("an extent")?);
        }
        if !self.take("]") {
            return Err(self.expected(self.at, "`,` or `]`"));
        }
        let stored = self.format()?;
        let before = self.skip_blank();
        let format = match self.word() {
            "as" => self.format()?,
            _ => {
                self.at = before;
                stored
            }
        };
        let before = self.skip_blank();
        let view = match self.word() {
            "of" => {
                let tensor = self.string("the stored tensor's name")?;
                Some(View { tensor, ..self.attributes("view", None, before)? })
            }
            _ => {
                self.at = before;
                None
            }
        };
        let before = self.skip_blank();
        let slice = match self.word() {
            "slice" => Some(self.attributes("slice", None, before)?),
            _ => {
                self.at = before;
                None
            }
        };
        let weight = Weight { shape, stored, format, view, slice };
        let known = self.graph.weights.insert(name.clone(), weight);
        self.only_once(known.is_none(), start, "weight", &name)
    }

    fn rope(&mut self) -> Parsed<()> {
        let start = self.skip_blank();
        let name = self.string("the rope's name")?;
        let rope: RopeSpec = self.attributes("rope", None, start)?;
        rope.check().map_err(|what| self.error(start, format!("rope {name:?}: {what}")))?;
        let known = self.graph.ropes.insert(name.clone(), rope);
        self.only_once(known.is_none(), start, "rope", &name)
    }

    fn cache(&mut self) -> Parsed<()> {
        let start = self.skip_blank();
        let number = self.number("the cache's number")?;
        if number != self.graph.caches.len() {
            let what = format!("cache {}: caches are numbered from 0 without gaps", self.graph.caches.len());
            return Err(self.expected(start, &what));
        }
        let cache: Cache = self.attributes("cache", None, start)?;
        self.graph.caches.push(cache);
        Ok(())
    }

    fn layer(&mut self) -> Parsed<()> {
        let layer = self.number("the layer's number")?;
        self.punctuation("{")?;
        while !self.take("}") {
            if !self.peeks("%") {
                return Err(self.expected(self.at, "a `%value` or `}`"));
            }
            self.node(Some(layer))?;
        }
        Ok(())
    }

    /// `%name = op(%operand, ...) key=value ... : type`
    fn node(&mut self, layer: Option<usize>) -> Parsed<()> {
        let start = self.skip_blank();
        let name = self.value_name()?;
        self.punctuation("=")?;
        let op_start = self.skip_blank();
        let op_name = self.word();
        if op_name.is_empty() {
            return Err(self.expected(op_start, "an operator"));
        }
        self.punctuation("(")?;
        let mut operands = Vec::new();
        if !self.take(")") {
            loop {
                let operand_start = self.skip_blank();
                let operand = self.value_name()?;
                let id = self.values.get(&operand).copied();
                operands.push(id.ok_or_else(|| {
                    self.error(operand_start, format!("%{operand} is not the name of a value above"))
                })?);
                if !self.take(",") {
                    break;
                }
            }
            if !self.take(")") {
                return Err(self.expected(self.at, "`,` or `)`"));
            }
        }
        let op: Op = self.attributes(op_name, Some(op_name), op_start)?;
        let added = self.graph.add(name.as_str(), layer, op, &operands);
        let id = added.map_err(|error| self.error(start, format!("%{name}: {}", error.what)))?;
        self.values.insert(name, id);
        if self.take(":") {
            let type_start = self.skip_blank();
            let written = self.type_()?;
            let inferred = self.graph.node(id).ty;
            if written != inferred {
                return Err(self.error(type_start, format!("expected {inferred}, not {written}")));
            }
        }
        Ok(())
    }

    fn value_name(&mut self) -> Parsed<String> {
        let start = self.skip_blank();
        self.punctuation("%")?;
        if self.text[self.at..].starts_with('"') {
            return self.string("the value's name");
        }
        match self.word_here() {
            "" => Err(self.expected(start, "a name behind `%`")),
            name => Ok(name.to_string()),
        }
    }

    fn type_(&mut self) -> Parsed<Type> {
        let start = self.skip_blank();
        let elem = match self.word() {
            "f32" => Elem::F32,
            "q8" => Elem::Q8,
            "routes" => Elem::Routes,
            "kv" => return Ok(Type { elem: Elem::Kv, rows: Dim::Rows, cols: 0 }),
            _ => {
                return Err(self.expected(
                    start,
                    "a type: `f32[rows, cols]`, `q8[rows, cols]`, `routes[rows, n]` or `kv`",
                ));
            }
        };
        self.punctuation("[")?;
        let rows_start = self.skip_blank();
        let rows = match self.word() {
            "rows" => Dim::Rows,
            "logit_rows" => Dim::LogitRows,
            _ => {
                self.at = rows_start;
                Dim::Const(self.number("`rows`, `logit_rows` or a number")?)
            }
        };
        self.punctuation(",")?;
        let cols = self.number("the number of columns")?;
        self.punctuation("]")?;
        Ok(Type { elem, rows, cols })
    }

    fn format(&mut self) -> Parsed<Format> {
        let start = self.skip_blank();
        if self.peeks("{") {
            let (value, _) = self.json_value()?;
            return serde_json::from_str(value).map_err(|error| self.error(start, plain(&error)));
        }
        let named = Format::by_name(self.word());
        named.ok_or_else(|| {
            let names: Vec<&str> = Format::NAMED.iter().map(|(name, _)| *name).collect();
            self.expected(start, &format!("a format: {}", names.join(", ")))
        })
    }

    /// ` key=value` until something else comes, as the fields of a `T`. `tag` is what its `op` says.
    fn attributes<T>(&mut self, noun: &str, tag: Option<&str>, start: usize) -> Parsed<T>
    where
        T: Serialize + DeserializeOwned,
    {
        let mut object = String::from("{");
        if let Some(tag) = tag {
            object.push_str(&format!("\"op\":\"{tag}\""));
        }
        let mut keys: Vec<(usize, &str)> = Vec::new();
        loop {
            let before = self.skip_blank();
            let key = self.word();
            if key.is_empty() || !self.take("=") {
                self.at = before;
                break;
            }
            if key == "op" || keys.iter().any(|(_, known)| *known == key) {
                return Err(self.error(before, format!("attribute `{key}` is given twice")));
            }
            let (value, _) = self.json_value()?;
            let comma = if object.len() > 1 { "," } else { "" };
            object.push_str(&format!("{comma}\"{key}\":{value}"));
            keys.push((before, key));
        }
        object.push('}');
        let parsed: T = serde_json::from_str(&object)
            .map_err(|error| self.error(start, format!("{noun}: {}", plain(&error))))?;
        // Unknown keys are ignored by the derives; those that come back are the known ones.
        let again = json(&parsed).unwrap_or_default();
        let known = fields_of(&again).unwrap_or_default();
        for (place, key) in keys {
            if !known.iter().any(|(name, _)| *name == key) {
                return Err(self.error(place, format!("{noun} has no attribute `{key}` of this value")));
            }
        }
        Ok(parsed)
    }

    /// The text of a JSON value and where it starts.
    fn json_value(&mut self) -> Parsed<(&'t str, usize)> {
        let start = self.skip_blank();
        let rest = &self.text[start..];
        match json_end(rest) {
            Ok(end) => {
                self.at = start + end;
                Ok((&rest[..end], start))
            }
            // Something is never closed: where it was opened says more than the end of the text.
            Err(error) if error.is_eof() => {
                Err(self.expected(start, &format!("a JSON value ({})", plain(&error))))
            }
            Err(error) => {
                // The reader counts lines and columns from 1, the latter in bytes.
                let skipped: usize =
                    rest.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
                let mut place = (start + skipped + error.column().saturating_sub(1)).min(self.text.len());
                while !self.text.is_char_boundary(place) {
                    place -= 1;
                }
                Err(self.expected(place, &format!("a JSON value ({})", plain(&error))))
            }
        }
    }

    fn string(&mut self, what: &str) -> Parsed<String> {
        let start = self.skip_blank();
        if !self.peeks("\"") {
            return Err(self.expected(start, &format!("{what} in quotes")));
        }
        let (value, start) = self.json_value()?;
        serde_json::from_str(value).map_err(|error| self.error(start, plain(&error)))
    }

    fn number(&mut self, what: &str) -> Parsed<usize> {
        let start = self.skip_blank();
        let word = self.word();
        match word.parse() {
            Ok(number) if word.bytes().all(|byte| byte.is_ascii_digit()) => Ok(number),
            _ => Err(self.expected(start, &format!("{what}, a whole number"))),
        }
    }

    fn keyword(&mut self, keyword: &str) -> Parsed<()> {
        let start = self.skip_blank();
        if self.word() == keyword { Ok(()) } else { Err(self.expected(start, &format!("`{keyword}`"))) }
    }

    fn punctuation(&mut self, mark: &str) -> Parsed<()> {
        if self.take(mark) { Ok(()) } else { Err(self.expected(self.at, &format!("`{mark}`"))) }
    }

    fn take(&mut self, mark: &str) -> bool {
        let found = self.peeks(mark);
        if found {
            self.at += mark.len();
        }
        found
    }

    fn peeks(&mut self, mark: &str) -> bool {
        self.skip_blank();
        self.text[self.at..].starts_with(mark)
    }

    /// The word that comes next, empty if none does.
    fn word(&mut self) -> &'t str {
        self.skip_blank();
        self.word_here()
    }

    fn word_here(&mut self) -> &'t str {
        let rest = &self.text[self.at..];
        let end = rest.find(|c| !is_name_char(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// Steps over blanks and comments; returns where it stands then.
    fn skip_blank(&mut self) -> usize {
        loop {
            let rest = &self.text[self.at..];
            let trimmed = rest.trim_start();
            self.at += rest.len() - trimmed.len();
            if !trimmed.starts_with('#') {
                return self.at;
            }
            self.at += trimmed.find('\n').unwrap_or(trimmed.len());
        }
    }

    fn only_once(&self, first: bool, start: usize, noun: &str, name: &str) -> Parsed<()> {
        if first { Ok(()) } else { Err(self.error(start, format!("{noun} {name:?} is declared twice"))) }
    }

    fn expected(&self, place: usize, what: &str) -> ParseError {
        let found = match self.text[place..].split_whitespace().next() {
            Some(found) if !self.text[place..].starts_with(char::is_whitespace) => {
                format!("`{}`", found.chars().take(24).collect::<String>())
            }
            Some(_) => "a blank".to_string(),
            None => "the end".to_string(),
        };
        self.error(place, format!("expected {what}, found {found}"))
    }

    fn error(&self, place: usize, what: String) -> ParseError {
        let before = &self.text[..place];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        ParseError { line, column: before[line_start..].chars().count() + 1, what }
    }
}

/// What a JSON error says, without the place, which is not one in our text.
fn plain(error: &serde_json::Error) -> String {
    let message = error.to_string();
    message.split(" at line ").next().unwrap_or(&message).to_string()
}
