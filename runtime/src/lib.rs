//! Execution.

pub mod chat;
pub mod checkpoint;
pub mod pack;
pub mod sampling;
pub mod stream;
pub mod tokenizer;
