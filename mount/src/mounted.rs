use crate::fuse::{self, VolumeFilesystem};
use crate::mountpoint;
use lazarette_client::{Cluster, Volume, VolumeOptions};
use lazarette_fuse::{End, Session, SessionError};
use lazarette_types::VolumeId;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Time that a volume which is no longer mounted has to end its session.
const CLOSE: Duration = Duration::from_secs(20);

/// A volume cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The cluster refused, or the volume could not be flushed.
    #[error("volume {volume}: {source}")]
    Volume {
        /// The volume's id.
        volume: VolumeId,
        /// Why.
        source: lazarette_client::Error,
    },
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It could not be mounted, or the kernel's FUSE lacks something.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Files of the mount are in use.
    #[error("{0} is in use; close its files or unmount with force")]
    Busy(PathBuf),
    /// Something of ours is mounted there already.
    #[error("something is mounted at {0} already; unmount it first")]
    Occupied(PathBuf),
    /// Not an absolute path.
    #[error("target {0} is not an absolute path")]
    Relative(PathBuf),
}

/// One volume at one folder.
#[derive(Clone)]
pub struct Mount {
    inner: Arc<Inner>,
}

struct Inner {
    volume: Volume,
    session: Session<VolumeFilesystem>,
    target: PathBuf,
    read_only: bool,
    /// Cancelled when the kernel has ended the connection and the session is closed.
    ended: CancellationToken,
}

impl Mount {
    /// Mounts a volume at a folder that exists. A dead mount that another daemon left there is
    /// detached first. Must be root, in a tokio runtime.
    pub async fn new(cluster: &Cluster, id: VolumeId, target: &Path, read_only: bool) -> Result<Self, MountError> {
        if !target.is_absolute() {
            return Err(MountError::Relative(target.to_path_buf()));
        }
        let folder = target.to_path_buf();
        let target = blocking(move || {
            mountpoint::clear_dead(&folder)?;
            let folder = folder.canonicalize()?;
            let occupied = mountpoint::is_mounted(&folder)?;
            Ok((folder, occupied))
        })
        .await?;
        let target = match target {
            (target, false) => target,
            (target, true) => return Err(MountError::Occupied(target)),
        };
        let options = VolumeOptions {
            client: client_name(&target),
            ..VolumeOptions::default()
        };
        let volume = Volume::mount(cluster, id, options)
            .await
            .map_err(|source| MountError::Volume { volume: id, source })?;
        let session = match fuse::mount(volume.clone(), &target, read_only).await {
            Ok(session) => session,
            Err(error) => {
                let _ = volume.close().await;
                return Err(error.into());
            }
        };
        let mount = Self {
            inner: Arc::new(Inner {
                volume,
                session,
                target,
                read_only,
                ended: CancellationToken::new(),
            }),
        };
        tracing::info!(
            volume = id.0, folder = %mount.target().display(), session = mount.inner.volume.session().0, "mounted"
        );
        let inner = mount.inner.clone();
        tokio::spawn(async move {
            match inner.session.ended().await {
                End::Unmounted => {}
                end => tracing::error!(?end, folder = %inner.target.display(), "the FUSE session failed"),
            }
            // A session that failed leaves a dead mount; one that ended normally, nothing.
            let folder = inner.target.clone();
            let _ = blocking(move || mountpoint::clear_dead(&folder)).await;
            inner.end().await;
        });
        Ok(mount)
    }

    /// The folder.
    pub fn target(&self) -> &Path {
        &self.inner.target
    }

    /// The volume's session.
    pub fn volume(&self) -> &Volume {
        &self.inner.volume
    }

    /// Counters of the kernel's requests.
    pub fn requests(&self) -> lazarette_fuse::statistics::Snapshot {
        self.inner.session.statistics()
    }

    /// Whether it was mounted for reading only.
    pub fn read_only(&self) -> bool {
        self.inner.read_only
    }

    /// Whether it works: mounted, and its session has not been ended by the owner.
    pub fn is_alive(&self) -> bool {
        !self.inner.ended.is_cancelled() && self.inner.volume.check().is_ok()
    }

    /// Resolves when it is unmounted, by whomever, and its session is closed.
    pub async fn ended(&self) {
        self.inner.ended.cancelled().await;
    }

    /// Flushes and unmounts; returns when the session is closed. With `force`, detaches at once,
    /// whatever is in use or cannot be flushed; the session then ends when the last user is gone.
    pub async fn unmount(&self, force: bool) -> Result<(), MountError> {
        if self.inner.ended.is_cancelled() {
            return Ok(());
        }
        if !force {
            self.flush().await?;
        }
        let target = self.inner.target.clone();
        match blocking(move || mountpoint::unmount(&target, force)).await {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                return Err(MountError::Busy(self.inner.target.clone()));
            }
            Err(error) => return Err(error.into()),
        }
        if force {
            let _ = tokio::time::timeout(Duration::from_secs(1), self.ended()).await;
        } else {
            self.ended().await;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), MountError> {
        let volume = &self.inner.volume;
        volume.flush_all().await.map_err(|source| MountError::Volume {
            volume: volume.id(),
            source,
        })
    }

    /// For the end of the daemon: flushes and unmounts, detaching what is in use; the session is
    /// closed in any case.
    pub async fn shut_down(&self) {
        match self.unmount(false).await {
            Ok(()) => return,
            Err(error) => tracing::warn!(%error, folder = %self.inner.target.display(), "detaching"),
        }
        if let Err(error) = self.unmount(true).await {
            tracing::error!(%error, folder = %self.inner.target.display(), "cannot detach");
        }
        self.inner.end().await;
    }
}

impl Inner {
    async fn end(&self) {
        match tokio::time::timeout(CLOSE, self.volume.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, volume = self.volume.id().0, "unflushed writes are lost"),
            Err(_) => {
                tracing::error!(
                    volume = self.volume.id().0,
                    dirty_bytes = self.volume.dirty_bytes(),
                    "cannot flush within {CLOSE:?}, unflushed writes are lost"
                );
                self.volume.abort();
            }
        }
        if !self.ended.is_cancelled() {
            tracing::info!(volume = self.volume.id().0, folder = %self.target.display(), "unmounted");
        }
        self.ended.cancel();
    }
}

/// Host and folder.
fn client_name(target: &Path) -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{host}:{}", target.display())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
