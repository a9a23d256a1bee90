//! Mounts for tests, gone when the test is over, also when it failed.
#![allow(dead_code)]

use lazarette_client::Cluster;
use lazarette_client::testing::{TestCluster, VOLUME};
use lazarette_mount::Mount;
use std::path::{Path, PathBuf};

/// Detaches whatever is mounted at a folder when dropped.
pub(crate) struct Folder(pub(crate) tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        while rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH).is_ok() {}
    }
}

/// The test volume at a folder of its own.
pub(crate) struct TestMount {
    pub(crate) mount: Mount,
    folder: Folder,
}

impl TestMount {
    pub(crate) async fn new(cluster: &TestCluster) -> Self {
        let folder = Folder::new();
        let client = Cluster::connect(cluster.endpoints()).unwrap();
        let mount = Mount::new(&client, VOLUME, folder.path(), false).await.unwrap();
        Self { mount, folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().to_path_buf()
    }

    pub(crate) async fn unmount(self) {
        self.mount.unmount(false).await.unwrap();
    }
}

/// File system calls block, and must not block the runtime that serves them.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}
