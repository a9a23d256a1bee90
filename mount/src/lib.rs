//! The mount daemon: volumes as folders of this machine.
//!
//! [`fuse`] translates the kernel's requests to calls of `lazarette-client`. [`Mount`] is one volume
//! at one folder, [`Daemon`] the set of them that is served on a Unix socket.

mod daemon;
mod fuse;
mod joined;
mod metrics;
mod mounted;
mod mountpoint;

pub use daemon::Daemon;
pub use mounted::{Mount, MountError};
