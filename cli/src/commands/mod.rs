//! The subcommands, one a file.

pub mod bench;
pub mod chat;
pub mod compile;
pub mod doctor;
pub mod inspect;
pub mod logits;
pub mod profile;
pub mod run;
pub mod selftest;
