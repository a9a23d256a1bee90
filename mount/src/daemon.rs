use crate::{Mount, MountError};
use lazarette_client::{Cluster, ClusterOptions};
use lazarette_proto::mount::mount_server::{Mount as MountService, MountServer};
use lazarette_proto::mount::{
    ListMountsRequest, ListMountsResponse, MountInfo, MountVolumeRequest, MountVolumeResponse, UnmountVolumeRequest,
    UnmountVolumeResponse,
};
use lazarette_types::VolumeId;
use std::collections::HashMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tonic::{Code, Request, Response, Status};

/// How long to look for a storage node that knows a volume before the call fails (and is tried
/// again by its caller).
const FIND: Duration = Duration::from_secs(20);
/// How long to wait for the volume's owner at mounting.
const MOUNT: Duration = Duration::from_secs(60);
/// How long the end of the daemon may take.
const SHUT_DOWN: Duration = Duration::from_secs(25);

/// The volumes that this process has mounted, by folder. Cheap to clone.
#[derive(Clone, Default)]
pub struct Daemon {
    mounts: Arc<Mutex<HashMap<PathBuf, Mount>>>,
    /// Calls for one folder come one after the other.
    targets: Arc<Mutex<HashMap<PathBuf, Arc<tokio::sync::Mutex<()>>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("mounts", &self.mounts().len()).finish()
    }
}

impl Daemon {
    /// Mounts that are alive.
    pub fn mounts(&self) -> Vec<Mount> {
        lock(&self.mounts).values().cloned().collect()
    }

    async fn turn(&self, target: &Path) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = lock(&self.targets).entry(target.to_path_buf()).or_default().clone();
        turn.lock_owned().await
    }

    /// Serves `lazarette.mount.v1.Mount` on a Unix socket (only its owner may connect) until
    /// `stop` resolves; then unmounts everything, for a bounded time.
    pub async fn serve(&self, socket: &Path, stop: impl Future<Output = ()>) -> io::Result<()> {
        if UnixStream::connect(socket).await.is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("another daemon serves {}", socket.display()),
            ));
        }
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if let Some(folder) = socket.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let listener = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        tracing::info!(socket = %socket.display(), "serving");
        tonic::transport::Server::builder()
            .add_service(MountServer::new(self.clone()))
            .serve_with_incoming_shutdown(tokio_stream::wrappers::UnixListenerStream::new(listener), stop)
            .await
            .map_err(io::Error::other)?;
        let _ = std::fs::remove_file(socket);
        self.unmount_all().await;
        Ok(())
    }

    /// Unmounts everything, for a bounded time.
    pub async fn unmount_all(&self) {
        let mut tasks = Vec::new();
        for mount in self.mounts() {
            tasks.push(tokio::spawn(async move { mount.shut_down().await }));
        }
        let all = async {
            for task in tasks {
                let _ = task.await;
            }
        };
        if tokio::time::timeout(SHUT_DOWN, all).await.is_err() {
            tracing::error!("not everything could be unmounted in time");
        }
    }

    async fn mount(&self, request: MountVolumeRequest) -> Result<(), Status> {
        let target = PathBuf::from(&request.target);
        if !target.is_absolute() {
            return Err(Status::invalid_argument(format!(
                "target {:?} is not an absolute path",
                request.target
            )));
        }
        let id = VolumeId(request.volume);
        let _turn = self.turn(&target).await;
        let present = lock(&self.mounts).get(&target).cloned();
        if let Some(present) = present {
            if present.is_alive() {
                if present.volume().id() != id {
                    return Err(Status::already_exists(format!(
                        "volume {} is mounted at {}",
                        present.volume().id(),
                        target.display()
                    )));
                }
                if present.read_only() != request.read_only {
                    return Err(Status::already_exists(format!(
                        "volume {id} is mounted at {} with read_only {}",
                        target.display(),
                        present.read_only()
                    )));
                }
                return Ok(());
            }
            tracing::warn!(folder = %target.display(), "replacing a mount whose volume was deleted");
            present.unmount(true).await.map_err(|error| status(&error))?;
            lock(&self.mounts).remove(&target);
        }
        let cluster = Cluster::connect(request.endpoints)
            .map_err(|error| Status::invalid_argument(format!("endpoints: {error}")))?;
        let finding = cluster.with_options(ClusterOptions {
            give_up_after: Some(FIND),
        });
        finding.get_volume(id).await.map_err(|error| failed(&error))?;
        let mount = tokio::time::timeout(MOUNT, Mount::new(&cluster, id, &target, request.read_only))
            .await
            .map_err(|_| Status::unavailable(format!("volume {id} has no metadata owner yet")))?
            .map_err(|error| status(&error))?;
        lock(&self.mounts).insert(target.clone(), mount.clone());
        let mounts = self.mounts.clone();
        tokio::spawn(async move {
            mount.ended().await;
            let mut mounts = lock(&mounts);
            if mounts.get(&target).is_some_and(|present| present.is(&mount)) {
                mounts.remove(&target);
            }
        });
        Ok(())
    }

    async fn unmount(&self, request: UnmountVolumeRequest) -> Result<(), Status> {
        let target = PathBuf::from(&request.target);
        let _turn = self.turn(&target).await;
        let present = lock(&self.mounts).get(&target).cloned();
        let Some(present) = present else {
            // Perhaps one that a daemon before us left: then it is dead.
            let folder = target.clone();
            let cleared = tokio::task::spawn_blocking(move || match folder.try_exists() {
                Ok(false) => Ok(()),
                _ => crate::mountpoint::clear_dead(&folder),
            });
            return match cleared.await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(Status::failed_precondition(error.to_string())),
                Err(error) => Err(Status::internal(error.to_string())),
            };
        };
        present.unmount(request.force).await.map_err(|error| status(&error))?;
        lock(&self.mounts).remove(&target);
        Ok(())
    }
}

fn failed(error: &lazarette_client::Error) -> Status {
    lazarette_proto::status(error.code(), error.to_string())
}

fn status(error: &MountError) -> Status {
    let message = error.to_string();
    match error {
        MountError::Volume { source, .. } => lazarette_proto::status(source.code(), message),
        MountError::Io(error) if error.kind() == io::ErrorKind::NotFound => Status::not_found(message),
        MountError::Io(_) | MountError::Session(_) => Status::internal(message),
        MountError::Busy(_) => Status::failed_precondition(message),
        MountError::Occupied(_) => Status::already_exists(message),
        MountError::Relative(_) => Status::invalid_argument(message),
    }
}

#[tonic::async_trait]
impl MountService for Daemon {
    async fn mount_volume(
        &self,
        request: Request<MountVolumeRequest>,
    ) -> Result<Response<MountVolumeResponse>, Status> {
        // A task of its own: a caller that gives up must not leave a mount half made.
        let daemon = self.clone();
        let request = request.into_inner();
        joined(tokio::spawn(async move { daemon.mount(request).await })).await?;
        Ok(Response::new(MountVolumeResponse {}))
    }

    async fn unmount_volume(
        &self,
        request: Request<UnmountVolumeRequest>,
    ) -> Result<Response<UnmountVolumeResponse>, Status> {
        let daemon = self.clone();
        let request = request.into_inner();
        joined(tokio::spawn(async move { daemon.unmount(request).await })).await?;
        Ok(Response::new(UnmountVolumeResponse {}))
    }

    async fn list_mounts(&self, _: Request<ListMountsRequest>) -> Result<Response<ListMountsResponse>, Status> {
        let mut mounts: Vec<MountInfo> = self
            .mounts()
            .iter()
            .map(|mount| MountInfo {
                volume: mount.volume().id().0,
                target: mount.target().display().to_string(),
                read_only: mount.read_only(),
                session: mount.volume().session().0,
                dirty_bytes: mount.volume().dirty_bytes(),
            })
            .collect();
        mounts.sort_by(|a, b| a.target.cmp(&b.target));
        Ok(Response::new(ListMountsResponse { mounts }))
    }
}

async fn joined(task: tokio::task::JoinHandle<Result<(), Status>>) -> Result<(), Status> {
    match task.await {
        Ok(result) => result,
        Err(error) => Err(Status::new(Code::Internal, error.to_string())),
    }
}
