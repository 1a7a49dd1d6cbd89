//! The tilec command.
fn main() {}
