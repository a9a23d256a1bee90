use crate::fuse::{self, VolumeFilesystem};
use crate::joined::Joined;
use crate::mountpoint;
use lazarette_client::{Cluster, Volume, VolumeOptions};
use lazarette_fuse::{End, Session, SessionError};
use lazarette_types::{ErrorCode, VolumeId};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
    volume: Joined,
    session: Session<VolumeFilesystem>,
    target: PathBuf,
    read_only: bool,
    /// How many sessions the owner has ended.
    lost_sessions: AtomicU64,
    /// Cancelled when no other session will take the place of the present one.
    ending: CancellationToken,
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
        let volume = Volume::mount(cluster, id, options(&target))
            .await
            .map_err(|source| MountError::Volume { volume: id, source })?;
        let volume = Joined::new(volume);
        let session = match fuse::mount(volume.clone(), &target, read_only).await {
            Ok(session) => session,
            Err(error) => {
                let _ = volume.present().close().await;
                return Err(error.into());
            }
        };
        let mount = Self {
            inner: Arc::new(Inner {
                volume,
                session,
                target,
                read_only,
                lost_sessions: AtomicU64::default(),
                ending: CancellationToken::new(),
                ended: CancellationToken::new(),
            }),
        };
        tracing::info!(
            volume = id.0, folder = %mount.target().display(), session = mount.volume().session().0, "mounted"
        );
        let (inner, cluster) = (mount.inner.clone(), cluster.clone());
        tokio::spawn(async move {
            inner.ending.run_until_cancelled(inner.stay_joined(&cluster)).await;
            inner.ending.cancel();
        });
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

    /// The volume, in its present session.
    pub fn volume(&self) -> Arc<Volume> {
        self.inner.volume.present()
    }

    /// How many of its sessions the owner has ended.
    pub fn lost_sessions(&self) -> u64 {
        self.inner.lost_sessions.load(Ordering::Relaxed)
    }

    /// Whether this and the other are the same mount.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Counters of the kernel's requests.
    pub fn requests(&self) -> lazarette_fuse::statistics::Snapshot {
        self.inner.session.statistics()
    }

    /// Whether it was mounted for reading only.
    pub fn read_only(&self) -> bool {
        self.inner.read_only
    }

    /// Whether it works, or will again: mounted, and the volume has not been deleted.
    pub fn is_alive(&self) -> bool {
        !self.inner.ending.is_cancelled()
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
        let volume = self.volume();
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
    /// Joins the volume anew whenever the owner has ended the session, which it does with clients that it has
    /// not heard of for as long as a session lasts. What is open then stays in the ended session and fails: its
    /// locks may be others' since, and its unflushed writes are lost.
    async fn stay_joined(&self, cluster: &Cluster) {
        loop {
            let volume = self.volume.present();
            // Ended by us, or deleted.
            if volume.ended().await.code() != ErrorCode::SessionExpired {
                return;
            }
            self.lost_sessions.fetch_add(1, Ordering::Relaxed);
            let (id, ended) = (volume.id(), volume.session().0);
            match Volume::mount(cluster, id, options(&self.target)).await {
                Ok(volume) => {
                    let session = volume.session().0;
                    tracing::warn!(volume = id.0, folder = %self.target.display(), ended, session, "joined anew");
                    self.volume.replace(volume);
                    self.session.filesystem().joined_anew().await;
                }
                Err(error) => {
                    tracing::error!(%error, volume = id.0, folder = %self.target.display(), "cannot join anew");
                    return;
                }
            }
        }
    }

    async fn end(&self) {
        self.ending.cancel();
        let volume = self.volume.present();
        match tokio::time::timeout(CLOSE, volume.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, volume = volume.id().0, "unflushed writes are lost"),
            Err(_) => {
                tracing::error!(
                    volume = volume.id().0,
                    dirty_bytes = volume.dirty_bytes(),
                    "cannot flush within {CLOSE:?}, unflushed writes are lost"
                );
                volume.abort();
            }
        }
        if !self.ended.is_cancelled() {
            tracing::info!(volume = volume.id().0, folder = %self.target.display(), "unmounted");
        }
        self.ended.cancel();
    }
}

/// With host and folder as name.
fn options(target: &Path) -> VolumeOptions {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    VolumeOptions {
        client: format!("{host}:{}", target.display()),
        ..VolumeOptions::default()
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
