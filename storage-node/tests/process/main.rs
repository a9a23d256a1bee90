//! `lazarette-node` as a process, with a real etcd.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod etcd_tls;
mod foreign_disk;
mod program;
