use crate::backoff::Backoff;
use crate::channel::{Channels, Dial};
use crate::{Error, Result};
use lazarette_proto::cluster::cluster_client::ClusterClient;
use lazarette_proto::cluster::{
    ClusterStatus, CreateVolumeRequest, DeleteVolumeRequest, ExpandVolumeRequest, GetMapRequest, GetStatusRequest,
    GetVolumeRequest, ListVolumesRequest, Volume, VolumeMap,
};
use lazarette_types::{ErrorCode, VolumeId};
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status, Streaming};

/// One storage node's time to answer before the next one is asked.
const ATTEMPT: Duration = Duration::from_secs(3);

/// How long to try.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClusterOptions {
    /// Give up an administrative call after so long without a storage node that answers. None:
    /// never (the caller may drop the future).
    pub give_up_after: Option<Duration>,
}

/// A cluster as seen through any of its storage nodes. Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
    options: ClusterOptions,
}

struct Inner {
    channels: Channels,
    /// As given: they may be names that resolve to other nodes later, so they always stay.
    given: Vec<String>,
    /// Learnt from maps.
    learnt: Mutex<Vec<String>>,
    /// The one that answered last.
    preferred: AtomicUsize,
}

impl Cluster {
    /// A cluster with these endpoints (`http://host:port` of storage nodes or of a Service in front
    /// of them). Nothing is sent yet: connections are made by the first call.
    pub fn connect<I>(endpoints: I) -> Result<Self>
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        Self::connect_by(endpoints, Arc::new(Endpoint::connect_lazy))
    }

    /// The same over connections of another kind, such as a simulated network's.
    pub fn connect_by<I>(endpoints: I, dial: Dial) -> Result<Self>
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let given: Vec<String> = endpoints.into_iter().map(Into::into).collect();
        if given.is_empty() {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "endpoints is empty; name at least one storage node",
            ));
        }
        let channels = Channels::new(dial);
        for endpoint in &given {
            channels.cluster(endpoint)?;
        }
        Ok(Self {
            inner: Arc::new(Inner {
                channels,
                given,
                learnt: Mutex::default(),
                preferred: AtomicUsize::new(0),
            }),
            options: ClusterOptions::default(),
        })
    }

    /// The same cluster with other options.
    pub fn with_options(&self, options: ClusterOptions) -> Self {
        Self {
            inner: self.inner.clone(),
            options,
        }
    }

    pub(crate) fn channels(&self) -> &Channels {
        &self.inner.channels
    }

    /// Remembers node addresses, so that the cluster is found when the endpoints given are gone.
    pub(crate) fn learn<'a>(&self, addresses: impl Iterator<Item = &'a str>) {
        let mut learnt: Vec<String> = addresses
            .filter(|address| !address.is_empty())
            .map(str::to_string)
            .collect();
        learnt.sort();
        learnt.dedup();
        if !learnt.is_empty() {
            *self.inner.learnt.lock().unwrap_or_else(PoisonError::into_inner) = learnt;
        }
    }

    fn candidates(&self) -> Vec<String> {
        let mut all = self.inner.given.clone();
        all.extend(
            self.inner
                .learnt
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .cloned(),
        );
        all
    }

    /// Asks one storage node after the other until one answers with anything but a retryable error.
    async fn ask<T, F, Fut>(&self, what: &str, mut call: F) -> Result<T>
    where
        F: FnMut(ClusterClient<Channel>) -> Fut,
        Fut: Future<Output = std::result::Result<Response<T>, Status>>,
    {
        let started = Instant::now();
        let mut backoff = Backoff::new();
        let mut failures = 0_usize;
        loop {
            let candidates = self.candidates();
            let at = self.inner.preferred.load(Ordering::Relaxed) % candidates.len();
            let address = &candidates[at];
            let error = match tokio::time::timeout(ATTEMPT, call(self.inner.channels.cluster(address)?)).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner()),
                Ok(Err(status)) => Error::from(status),
                Err(_) => Error::new(ErrorCode::Unavailable, "no answer in time"),
            };
            if !error.retryable() {
                return Err(error);
            }
            tracing::debug!(address, %error, what, "storage node does not answer, trying the next");
            let _ = self.inner.preferred.compare_exchange(
                at,
                (at + 1) % candidates.len(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            failures += 1;
            if let Some(limit) = self.options.give_up_after
                && started.elapsed() >= limit
            {
                return Err(Error::new(
                    ErrorCode::Unavailable,
                    format!("{what}: no storage node answered within {limit:?}; the last error: {error}"),
                ));
            }
            // The first round over all nodes goes without delay.
            if failures >= candidates.len() {
                if failures.is_multiple_of(candidates.len() * 50) {
                    tracing::warn!(%error, what, "no storage node answers, still trying");
                }
                backoff.wait().await;
            }
        }
    }

    /// Creates a volume, or returns the one of that name that has the same parameters.
    pub async fn create_volume(&self, request: CreateVolumeRequest) -> Result<Volume> {
        self.ask("create volume", |mut client| {
            let request = request.clone();
            async move { client.create_volume(request).await }
        })
        .await
    }

    /// Deletes a volume; one that does not exist counts as deleted.
    pub async fn delete_volume(&self, id: VolumeId, force: bool) -> Result<()> {
        self.ask("delete volume", |mut client| async move {
            client.delete_volume(DeleteVolumeRequest { id: id.0, force }).await
        })
        .await?;
        Ok(())
    }

    /// Grows a volume's quota to `size` bytes.
    pub async fn expand_volume(&self, id: VolumeId, size: u64) -> Result<Volume> {
        self.ask("expand volume", |mut client| async move {
            client.expand_volume(ExpandVolumeRequest { id: id.0, size }).await
        })
        .await
    }

    async fn find(&self, request: GetVolumeRequest) -> Result<Volume> {
        self.ask("get volume", |mut client| {
            let request = request.clone();
            async move { client.get_volume(request).await }
        })
        .await
    }

    /// A volume by id.
    pub async fn get_volume(&self, id: VolumeId) -> Result<Volume> {
        self.find(GetVolumeRequest {
            id: id.0,
            name: String::new(),
        })
        .await
    }

    /// A volume by name.
    pub async fn get_volume_by_name(&self, name: &str) -> Result<Volume> {
        self.find(GetVolumeRequest {
            id: 0,
            name: name.to_string(),
        })
        .await
    }

    /// Volumes with ids greater than `after`, at most `limit` (0: all).
    pub async fn list_volumes(&self, after: VolumeId, limit: u32) -> Result<Vec<Volume>> {
        let reply = self
            .ask("list volumes", |mut client| async move {
                client
                    .list_volumes(ListVolumesRequest {
                        after_id: after.0,
                        limit,
                    })
                    .await
            })
            .await?;
        Ok(reply.volumes)
    }

    /// The cluster's state.
    pub async fn status(&self) -> Result<ClusterStatus> {
        self.ask("get status", |mut client| async move {
            client.get_status(GetStatusRequest {}).await
        })
        .await
    }

    pub(crate) async fn map(&self, volume: VolumeId) -> Result<VolumeMap> {
        self.ask("get map", |mut client| async move {
            client.get_map(GetMapRequest { volume: volume.0 }).await
        })
        .await
    }

    pub(crate) async fn watch_map(&self, volume: VolumeId) -> Result<Streaming<VolumeMap>> {
        self.ask("watch map", |mut client| async move {
            client.watch_map(GetMapRequest { volume: volume.0 }).await
        })
        .await
    }
}
