//! What the tests and the demo do on a mounted volume. Everything here is plain POSIX: it passes
//! on any local file system, and says what was lost or torn where it does not.

mod append;
mod bench_phase;
mod latency;
mod steady;
mod tree;
pub mod verifier;

pub use append::{Appended, append, check_appended};
pub use bench_phase::{Phase, Timed, Work};
pub use latency::Latencies;
pub use steady::{Report, steady, verify};
pub use tree::{copy_tree, hash_tree};
