//! The mount daemon of this machine, reached through its Unix socket.

use crate::error::csi_status;
use hyper_util::rt::TokioIo;
use lazarette_proto::code_of;
use lazarette_proto::mount::mount_client::MountClient;
use lazarette_proto::mount::{ListMountsRequest, MountVolumeRequest, UnmountVolumeRequest};
use lazarette_types::{ErrorCode, VolumeId};
use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// A connection to the mount daemon, made on first use and again after the daemon's restart.
#[derive(Clone, Debug)]
pub struct MountDaemon {
    channel: Channel,
    socket: PathBuf,
}

impl MountDaemon {
    /// The daemon that listens (or will) at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        let path = socket.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The URL is not used: the connector knows the way.
        let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector);
        Self { channel, socket }
    }

    /// Mounts a volume at an existing folder.
    pub async fn mount(
        &self,
        endpoint: &str,
        volume: VolumeId,
        target: &str,
        read_only: bool,
        deadline: Instant,
    ) -> Result<(), Status> {
        let request = MountVolumeRequest {
            endpoints: vec![endpoint.to_owned()],
            volume: volume.0,
            target: target.to_owned(),
            read_only,
        };
        self.call(deadline, |mut client| {
            let request = request.clone();
            async move { client.mount_volume(request).await }
        })
        .await
        .map(|_| ())
        .map_err(|status| csi_status(&status))
    }

    /// Flushes and unmounts. What can never be flushed, because the owner has ended the session or
    /// the volume is gone, is given up: a pod's end must not wait for it for ever.
    pub async fn unmount(&self, target: &str, deadline: Instant) -> Result<(), Status> {
        match self.unmount_once(target, false, deadline).await {
            Err(status) if hopeless(code_of(&status)) => {
                tracing::error!(target, error = status.message(), "unflushed writes are lost");
                self.detach(target, deadline).await
            }
            Err(status) => Err(csi_status(&status)),
            Ok(()) => Ok(()),
        }
    }

    /// Detaches at once, without flushing.
    pub async fn detach(&self, target: &str, deadline: Instant) -> Result<(), Status> {
        let detached = self.unmount_once(target, true, deadline).await;
        detached.map_err(|status| csi_status(&status))
    }

    async fn unmount_once(&self, target: &str, force: bool, deadline: Instant) -> Result<(), Status> {
        let request = UnmountVolumeRequest {
            target: target.to_owned(),
            force,
        };
        self.call(deadline, |mut client| {
            let request = request.clone();
            async move { client.unmount_volume(request).await }
        })
        .await
        .map(|_| ())
    }

    /// Whether the daemon answers within `time`.
    pub async fn answers(&self, time: Duration) -> bool {
        let mut client = MountClient::new(self.channel.clone());
        let call = client.list_mounts(ListMountsRequest {});
        matches!(tokio::time::timeout(time, call).await, Ok(Ok(_)))
    }

    /// Calls the daemon, again while it restarts or cannot reach the storage nodes, until
    /// `deadline`. The error is the daemon's.
    async fn call<T, F, R>(&self, deadline: Instant, call: F) -> Result<T, Status>
    where
        F: Fn(MountClient<Channel>) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let mut pause = PAUSE_MIN;
        loop {
            let client = MountClient::new(self.channel.clone());
            let error = match tokio::time::timeout_at(deadline, call(client)).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) if !code_of(&status).retryable() => return Err(status),
                Ok(Err(status)) => status.message().to_owned(),
                Err(_) => "no answer".to_owned(),
            };
            if Instant::now() + pause >= deadline {
                return Err(Status::unavailable(format!(
                    "mount daemon at {}: {error}",
                    self.socket.display()
                )));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// Whether writes can never be flushed any more.
fn hopeless(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::SessionExpired | ErrorCode::VolumeNotFound)
}
