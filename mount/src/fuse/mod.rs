//! A volume as a FUSE file system.

mod convert;
mod filesystem;
mod handles;

use crate::joined::Joined;
use crate::mountpoint::TYPE;
pub(crate) use filesystem::VolumeFilesystem;
use lazarette_fuse::abi::Capabilities;
use lazarette_fuse::{Config, MountOptions, Notifier, Session, SessionError, Terms};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Tells the kernel to forget what it caches.
#[derive(Clone, Default)]
struct Invalidator(Arc<OnceLock<Notifier>>);

impl Invalidator {
    async fn send(&self, ino: u64, offset: i64) {
        // Set right after the session has begun: there is nothing to forget before.
        let Some(notifier) = self.0.get() else { return };
        if let Err(error) = notifier.inval_inode(ino, offset, 0).await {
            tracing::warn!(%error, ino, "cannot invalidate the kernel's cache");
        }
    }

    /// Forget the inode's attributes.
    async fn attributes(&self, ino: u64) {
        self.send(ino, -1).await;
    }

    /// Forget the inode's attributes and data.
    async fn all(&self, ino: u64) {
        self.send(ino, 0).await;
    }
}

/// Mounts the volume at a folder and serves it.
pub(crate) async fn mount(
    volume: Joined,
    target: &Path,
    read_only: bool,
) -> Result<Session<VolumeFilesystem>, SessionError> {
    let defaults = Terms::default();
    let terms = Terms {
        wanted: defaults.wanted
            | Capabilities::CACHE_SYMLINKS
            // Without it the kernel asks for security.capability before every write.
            | Capabilities::HANDLE_KILLPRIV_V2
            // Shared mappings of files that are open to append.
            | Capabilities::DIRECT_IO_ALLOW_MMAP,
        required: Capabilities::POSIX_LOCKS | Capabilities::FLOCK_LOCKS | Capabilities::AUTO_INVAL_DATA,
        ..defaults
    };
    let options = MountOptions {
        source: format!("lazarette:{}", volume.present().id()),
        subtype: TYPE.trim_start_matches("fuse.").into(),
        allow_other: true,
        read_only,
        suid: true,
        max_read: Some(terms.max_write),
        ..MountOptions::default()
    };
    let config = Config {
        terms,
        // Handlers wait for the network at once, which frees their reader.
        readers: 2,
        histograms: true,
        ..Config::default()
    };
    let invalidator = Invalidator::default();
    let filesystem = VolumeFilesystem::new(volume, invalidator.clone());
    let session = Session::mount(filesystem, target, options, config).await?;
    let _ = invalidator.0.set(session.notifier());
    Ok(session)
}
