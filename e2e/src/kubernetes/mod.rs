//! Lazarette on the lab's Kubernetes: installed as a user would, and the main job as a story in
//! pods. Shared by `cargo xtask demo` and the tests.

mod images;
mod install;
mod numbers;
mod story;

pub use install::{Installation, NAMESPACE};
pub use story::play;
