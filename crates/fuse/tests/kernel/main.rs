//! The library against the running kernel. Needs /dev/fuse, and root or fusermount3.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../examples/memfs/locks.rs"]
mod locks;
#[path = "../../examples/memfs/memory.rs"]
mod memory;
#[path = "../../examples/memfs/tree.rs"]
mod tree;

mod capabilities;
mod child;
mod handover;
mod interrupts;
mod journaled;
mod lifecycle;
mod load;
mod mounted;
mod notifications;
mod observed;
mod operations;
mod probe;
mod robustness;
mod special;
