//! This very program as another process, which plays an application or a server.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

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

/// Not a test: what such a process runs.
#[test]
#[ignore = "a role that other tests start"]
fn play() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let argument = std::env::var(ARGUMENT).unwrap();
    match role.as_str() {
        "lock" => crate::interrupts::wait_for_lock(&argument),
        "flock" => crate::interrupts::wait_for_flock(&argument),
        "read" => drop(std::fs::read(argument)),
        "serve" => crate::handover::serve_journaled(&argument),
        "turns" => crate::handover::serve_in_turns(&argument),
        "load" => crate::load::work(&argument, false),
        "load with locks" => crate::load::work(&argument, true),
        "many" => crate::robustness::many_requests(&argument),
        _ => panic!("no such role: {role}"),
    }
}
