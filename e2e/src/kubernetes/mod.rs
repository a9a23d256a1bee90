//! Lazarette on the lab's Kubernetes: installed as a user would, and the main job as a story in
//! pods. Shared by `cargo xtask demo` and the tests.

mod applications;
mod cut;
mod day_two;
mod images;
mod install;
mod numbers;
mod story;

pub use applications::run_applications;
pub use cut::cut_a_machine_off;
pub use day_two::change_everything;
pub use install::{Installation, NAMESPACE};
pub use story::play;
