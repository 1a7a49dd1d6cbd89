//! Execution.

pub mod chat;
pub mod checkpoint;
pub mod conversion;
pub mod cuda;
pub mod engine;
pub mod generate;
pub mod kv;
pub mod memory;
pub mod native;
pub mod pack;
pub mod sampling;
pub mod stream;
pub mod tokenizer;
