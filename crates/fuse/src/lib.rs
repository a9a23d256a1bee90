#![doc = include_str!("../README.md")]

pub mod abi;
pub mod attributes;
mod buffer;
mod device;
pub mod directory;
mod dispatch;
mod errno;
mod filesystem;
pub mod handover;
pub mod header;
pub mod mount;
pub mod negotiation;
mod notify;
pub mod operation;
mod reader;
mod request;
mod session;
pub mod statistics;
mod wake;
pub mod wire;

pub use attributes::{Attr, Attributes, Entry, Kind, Opened, Statfs, Statx, Timestamp};
pub use buffer::ReplyBuffer;
pub use directory::{Listed, Listing};
pub use errno::{Errno, Result};
pub use filesystem::{Data, Filesystem, IoctlReply};
pub use handover::Connection;
pub use mount::{MountOptions, Unmount};
pub use negotiation::{Parameters, Terms};
pub use notify::Notifier;
pub use request::{InterruptPolicy, Request, RequestSnapshot};
pub use session::{Config, Drained, End, Session, SessionError};
