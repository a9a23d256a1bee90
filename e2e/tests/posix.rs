//! The examples of the FUSE session layer under test programs for POSIX file systems.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/ext4.rs"]
mod ext4;

use ext4::{Disk, compare};
use lazarette_e2e::posix::{self, Programs};
use lazarette_e2e::process::{Daemon, stop};
use lazarette_e2e::{Deadline, build, wait_for};
use rustix::mount::{UnmountFlags, unmount};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);
/// The same each time: a failure can be looked into.
const SEED: u64 = 4;
const OPERATIONS: u64 = 20_000;

/// An example that is mounted.
struct Example {
    name: &'static str,
    state: PathBuf,
    mountpoint: PathBuf,
}

impl Example {
    /// Builds it, optimised, and mounts it below `dir`; `arguments` come before the mount point.
    async fn mount(name: &'static str, dir: &Path, arguments: &[&Path]) -> Self {
        let program = build::example("lazarette-fuse", name).await.unwrap();
        let (state, mountpoint) = (dir.to_owned(), dir.join(name));
        fs::create_dir(&mountpoint).unwrap();
        let example = Self {
            name,
            state,
            mountpoint,
        };
        let before = fs::metadata(&example.mountpoint).unwrap().dev();
        Daemon::new(name, dir, program)
            .args(arguments)
            .arg(&example.mountpoint)
            .start()
            .await
            .unwrap();
        let log = lazarette_e2e::process::log_path(dir, name);
        let deadline = Deadline::after(LIMIT).every(Duration::from_millis(10)).logs(log);
        wait_for(deadline, format!("{name} to be mounted"), || async {
            Ok((fs::metadata(&example.mountpoint)?.dev() != before).then_some(()))
        })
        .await
        .unwrap();
        example
    }

    async fn unmount(self) {
        unmount(&self.mountpoint, UnmountFlags::empty()).unwrap();
        stop(&self.state, self.name, LIMIT).await.unwrap();
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        // Its process ends with the mount.
        let _ = unmount(&self.mountpoint, UnmountFlags::FORCE | UnmountFlags::DETACH);
    }
}

fn place() -> TempDir {
    // Short: see `Programs::pjdfstest`.
    tempfile::Builder::new().prefix("lz-").tempdir_in("/var/tmp").unwrap()
}

#[tokio::test]
async fn both_examples_pass_what_ext4_passes() {
    let programs = posix::ensure().await.unwrap();
    let dir = place();
    let disk = Disk::ext4(dir.path()).await;
    let ext4 = programs.pjdfstest(&disk.0, dir.path()).await.unwrap();
    let passthrough = Example::mount("passthrough", dir.path(), &[&disk.0]).await;
    let memfs = Example::mount("memfs", dir.path(), &[]).await;
    for example in [passthrough, memfs] {
        let ours = programs.pjdfstest(&example.mountpoint, dir.path()).await.unwrap();
        compare(example.name, &ours, &ext4);
        example.unmount().await;
    }
}

/// How many; `cargo xtask soak` wants more.
fn operations() -> u64 {
    match std::env::var("POSIX_TEST_OPERATIONS") {
        Ok(number) => number.parse().unwrap(),
        Err(_) => OPERATIONS,
    }
}

async fn exercise(programs: &Programs, dir: &Path, example: Example) {
    let file = example.mountpoint.join("exercised");
    let run = programs.fsx(&file, dir, SEED, operations()).await;
    if let Err(error) = run {
        panic!("{}: {error:#}", example.name);
    }
    example.unmount().await;
}

#[tokio::test]
async fn files_in_memory_hold_what_is_written() {
    let programs = posix::ensure().await.unwrap();
    let dir = place();
    let example = Example::mount("memfs", dir.path(), &[]).await;
    exercise(&programs, dir.path(), example).await;
}

#[tokio::test]
async fn files_shown_elsewhere_hold_what_is_written() {
    let programs = posix::ensure().await.unwrap();
    let dir = place();
    let disk = Disk::ext4(dir.path()).await;
    let example = Example::mount("passthrough", dir.path(), &[&disk.0]).await;
    exercise(&programs, dir.path(), example).await;
}
