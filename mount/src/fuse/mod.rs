//! The FUSE server: the only place that knows which one is used.
//!
//! Requests are read by one thread for each mount and each handed to a task of its own, so a slow
//! one delays no other. The server in use cannot pass interrupts on; [`crate::caller`] stands in
//! for what waits longest, locks.

mod adapter;
mod convert;
mod handles;

use adapter::Adapter;
use fuser::{INodeNo, Session, SessionACL};
use lazarette_client::Volume;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use tokio::sync::oneshot;

/// Tells the kernel to forget what it caches. Never called on the thread that reads requests: the
/// kernel may have to wait for replies before it can drop pages.
#[derive(Clone, Default)]
struct Invalidator(Arc<OnceLock<fuser::Notifier>>);

impl Invalidator {
    async fn send(&self, ino: u64, offset: i64) {
        let notifier = self.0.clone();
        let task = tokio::task::spawn_blocking(move || match notifier.get() {
            Some(notifier) => notifier.inval_inode(INodeNo(ino), offset, 0),
            None => Ok(()),
        });
        if let Ok(Err(error)) = task.await {
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

/// Serves a mounted connection. The receiver resolves when the kernel has ended it: unmounted and
/// no longer in use.
pub(crate) fn serve(device: OwnedFd, volume: Volume) -> io::Result<oneshot::Receiver<io::Result<()>>> {
    let invalidator = Invalidator::default();
    let adapter = Adapter::new(volume, invalidator.clone());
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(1);
    let session = Session::from_fd(adapter, device, SessionACL::All, config)?;
    let _ = invalidator.0.set(session.notifier());
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new().name("fuse".into()).spawn(move || {
        let _ = sender.send(session.run());
    })?;
    Ok(receiver)
}
