//! The Kubernetes lab of Lazarette and the machinery that its end-to-end tests share.
//!
//! * [`tools`], [`debian`] and [`posix`] provide the programs that the lab and the tests are made of;
//! * [`process`] runs them as background daemons that survive the command that started them;
//! * [`lab`] joins them to a real multi-node Kubernetes on one machine;
//! * [`applications`] are what people do on their volumes;
//! * [`image`] builds container images without a container engine.

pub mod applications;
pub mod build;
pub mod cgroup;
pub mod command;
pub mod debian;
pub mod faults;
pub mod image;
pub mod kubernetes;
pub mod lab;
pub mod local;
pub mod posix;
pub mod process;
pub mod story;
pub mod tools;
pub mod verifier;
mod wait;

pub use wait::{Deadline, wait_for};

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
