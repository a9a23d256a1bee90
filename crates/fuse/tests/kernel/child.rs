//! This very program as another process, which plays an application or a server.

use rustix::fs::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use tokio::runtime::Runtime;

const ROLE: &str = "LAZARETTE_FUSE_TEST_ROLE";
const ARGUMENT: &str = "LAZARETTE_FUSE_TEST_ARGUMENT";

/// Kills and reaps its process when dropped.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a process in a role of [`play`].
pub(crate) fn start(role: &str, argument: &str, stdin: Option<OwnedFd>) -> Process {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child::play", "--ignored", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env(ARGUMENT, argument)
        .stdin(stdin.map_or_else(Stdio::null, Stdio::from))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    Process(child)
}

/// For a process, which is not one of tests.
pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// User and group without any rights.
pub(crate) const NOBODY: u32 = 65_534;

/// Takes all rights from this thread and those that it starts.
pub(crate) fn become_nobody(groups: &[u32]) {
    let groups: Vec<_> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    set_thread_groups(&groups).unwrap();
    set_thread_res_gid(group, group, group).unwrap();
    set_thread_res_uid(user, user, user).unwrap();
}

/// Not a test: what such a process runs.
#[test]
#[ignore = "a role that other tests start"]
fn play() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let argument = std::env::var(ARGUMENT).unwrap();
    match role.as_str() {
        "lock" => crate::interrupts::wait_for_lock(&argument),
        "flock" => crate::interrupts::wait_for_flock(&argument),
        "read as nobody" => crate::capabilities::read_as_nobody(&argument),
        "create in group" => crate::capabilities::create_in_group(&argument),
        "mount as nobody" => crate::lifecycle::mount_as_nobody(&argument),
        "trace" => crate::observed::trace(&argument),
        "read" => drop(std::fs::read(argument)),
        "serve" => crate::handover::serve_journaled(&argument),
        "turns" => crate::handover::serve_in_turns(&argument),
        "load" => crate::load::work(&argument, false),
        "load with locks" => crate::load::work(&argument, true),
        "serve many" => crate::robustness::serve_many(&argument),
        "many" => crate::robustness::many_requests(&argument),
        _ => panic!("no such role: {role}"),
    }
}
