//! Replica sets of three real nodes in one process: real gRPC on loopback, through proxies that
//! can be cut, over stores in memory that outlive their nodes; and over a real etcd and real disks.

#[path = "../../meta/owner/tests/etcd.rs"]
mod etcd;
mod faults;
mod harness;
mod model;
mod random;
mod scenarios;

use harness::DEADLINE;
