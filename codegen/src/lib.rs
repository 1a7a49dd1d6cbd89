//! The verbs of tilec.
