//! Mounts that are gone when their test is, however it ends.

use lazarette_fuse::abi::Opcode;
use lazarette_fuse::mount::unmount;
use lazarette_fuse::{Config, Filesystem, MountOptions, Session, Terms, Unmount};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Far more than anything here takes.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A mount point that is unmounted when dropped.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::Builder::new().prefix("fuse-test-").tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Not mounted any more is what most tests leave.
        let _ = unmount(self.path(), Unmount::Force);
    }
}

pub(crate) fn options() -> MountOptions {
    let root = rustix::process::geteuid().is_root();
    MountOptions {
        subtype: "lazarette-test".into(),
        suid: root,
        devices: root,
        ..MountOptions::default()
    }
}

pub(crate) async fn mounted_with<F: Filesystem>(filesystem: F, config: Config) -> (Place, Session<F>) {
    let place = Place::new();
    let session = Session::mount(filesystem, place.path(), options(), config)
        .await
        .expect("mounting needs /dev/fuse");
    (place, session)
}

pub(crate) async fn mounted<F: Filesystem>(filesystem: F) -> (Place, Session<F>) {
    mounted_with(
        filesystem,
        Config {
            terms: Terms::default(),
            ..Config::default()
        },
    )
    .await
}

/// Work of an application: blocks, so on a thread of its own, and ends before the deadline.
pub(crate) async fn application<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::time::timeout(DEADLINE, tokio::task::spawn_blocking(work))
        .await
        .expect("the mount answers")
        .unwrap()
}

/// Waits for a condition.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Requests of a kind so far.
pub(crate) fn count<F: Filesystem>(session: &Session<F>, opcode: Opcode) -> u64 {
    session
        .statistics()
        .operations
        .iter()
        .find(|one| one.opcode == opcode)
        .map_or(0, |one| one.requests)
}
