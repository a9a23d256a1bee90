//! Replica sets of three real nodes in one process: real gRPC on loopback, through proxies that
//! can be cut, over stores in memory that outlive their nodes; and over a real etcd and real disks.

// The owner's tests have it, and their modules are private.
#[allow(clippy::duplicate_mod)]
#[path = "../../meta/owner/tests/etcd.rs"]
mod etcd;
mod faults;
mod harness;
mod healing;
mod model;
mod random;
mod scenarios;

use harness::DEADLINE;
