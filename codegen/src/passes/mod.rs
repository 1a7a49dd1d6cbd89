//! The passes, one a file: each takes a level to the next, or to itself.

pub mod fuse;
mod inject;
pub mod packer;
pub mod precision;
mod prepare;
pub mod resident;
mod router;
pub mod schedule;
mod selector;
pub mod shard;
pub mod tile;
