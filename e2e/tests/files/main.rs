//! Every file operation on mounts of the local cluster: test programs for POSIX file systems, what several
//! clients do to the same files, quota, locks, applications.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod applications;
#[path = "../support/ext4.rs"]
mod ext4;
mod locks;
mod shared;
mod sizes;
mod suites;
#[path = "../support/mod.rs"]
mod support;

use lazarette_e2e::story::Mounts;
use std::process::{Command, Output};
use support::Cluster;

/// A cluster and a volume that is mounted so many times.
async fn mounted(volume: &str, clients: usize) -> (Cluster, Mounts) {
    let cluster = Cluster::up().await;
    let mounts = Mounts::new(&cluster.inner, volume, clients).await.unwrap();
    (cluster, mounts)
}

/// A number that says how much is done: a soak sets more.
fn operations(default: u64) -> u64 {
    match std::env::var("FILES_TEST_OPERATIONS") {
        Ok(number) => number.parse().unwrap(),
        Err(_) => default,
    }
}

/// Runs a program to its end.
fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

/// What a program prints that must succeed.
fn printed(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
