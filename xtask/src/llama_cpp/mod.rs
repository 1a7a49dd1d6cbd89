//! llama.cpp as a reference: its library, and a worker process that measures and generates with it.

pub mod library;
pub mod worker;
