use super::{ReplicationConfig, ReplicationError, wire};
use crate::chunk::{Change, ChunkSummary, Contents};
use crate::membership::ClusterView;
use lazarette_proto::chunk::{self as pb, chunk_client::ChunkClient, replica_client::ReplicaClient};
use lazarette_proto::{FRAME_BYTES, MAX_MESSAGE_BYTES};
use lazarette_types::{ChunkId, NodeId, ReplicaSetId, Version};
use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

/// Makes the connection to an address `host:port`; it may connect later.
pub type Dial = Arc<dyn Fn(&str) -> Result<Channel, tonic::transport::Error> + Send + Sync>;

/// Dials without encryption.
pub fn dial_plain() -> Dial {
    Arc::new(|address| Ok(endpoint(format!("http://{address}"))?.connect_lazy()))
}

/// An endpoint with the windows and time-outs that data between storage nodes needs.
pub fn endpoint(uri: String) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(uri)?
        .connect_timeout(Duration::from_millis(800))
        .tcp_nodelay(true)
        // A peer that vanished without a word is noticed although nothing is sent.
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(2))
        .max_frame_size(FRAME_BYTES)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20))
}

/// Requests from this node to the other members.
pub(crate) struct Links {
    view: watch::Receiver<Arc<ClusterView>>,
    dial: Dial,
    call_timeout: Duration,
    bulk_timeout: Duration,
    /// By node, with the address that it was made for.
    channels: Mutex<HashMap<NodeId, (String, Channel)>>,
    /// Bytes on their way to each node, over all replica sets.
    debts: Mutex<HashMap<NodeId, Arc<AtomicUsize>>>,
}

impl Links {
    pub(crate) fn new(view: watch::Receiver<Arc<ClusterView>>, dial: Dial, config: &ReplicationConfig) -> Self {
        Self {
            view,
            dial,
            call_timeout: config.call_timeout,
            bulk_timeout: config.bulk_timeout,
            channels: Mutex::default(),
            debts: Mutex::default(),
        }
    }

    /// The account of bytes on their way to a node.
    pub(crate) fn debt(&self, node: &NodeId) -> Arc<AtomicUsize> {
        let mut debts = self.debts.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(debts.entry(node.clone()).or_default())
    }

    fn channel(&self, node: &NodeId) -> Result<Channel, ReplicationError> {
        let address = match self.view.borrow().live.get(node) {
            Some(live) => live.address.clone(),
            None => return Err(ReplicationError::unreachable(node, "not running")),
        };
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, channel)) = channels.get(node)
            && *of == address
        {
            return Ok(channel.clone());
        }
        let channel = (self.dial)(&address).map_err(|e| ReplicationError::unreachable(node, e.to_string()))?;
        channels.insert(node.clone(), (address, channel.clone()));
        Ok(channel)
    }

    fn replica(&self, node: &NodeId) -> Result<ReplicaClient<Channel>, ReplicationError> {
        Ok(ReplicaClient::new(self.channel(node)?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }

    /// A client of a primary's Chunk service.
    pub(crate) fn primary(&self, node: &NodeId) -> Result<ChunkClient<Channel>, ReplicationError> {
        Ok(ChunkClient::new(self.channel(node)?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }

    pub(crate) async fn prepare(&self, node: &NodeId, set: ReplicaSetId, epoch: u64) -> Result<(), ReplicationError> {
        let request = pb::PrepareRequest {
            replica_set: set.0,
            epoch,
            member: node.0.clone(),
        };
        let mut client = self.replica(node)?;
        within(node, self.call_timeout, client.prepare(request)).await?;
        Ok(())
    }

    pub(crate) async fn apply(
        &self,
        node: &NodeId,
        set: ReplicaSetId,
        epoch: u64,
        chunk: ChunkId,
        (previous, version): (Version, Version),
        change: &Change,
    ) -> Result<Version, ReplicationError> {
        let request = pb::ApplyRequest {
            replica_set: set.0,
            epoch,
            chunk: wire::chunk_to(chunk),
            previous: wire::version_to(previous),
            version: wire::version_to(version),
            change: wire::change_to(change),
            member: node.0.clone(),
        };
        let mut client = self.replica(node)?;
        let reply = within(node, self.call_timeout, client.apply(request)).await?;
        Ok(wire::version_from(reply.present))
    }

    pub(crate) async fn install(
        &self,
        node: &NodeId,
        set: ReplicaSetId,
        epoch: u64,
        chunk: ChunkId,
        previous: Version,
        contents: Contents,
    ) -> Result<Version, ReplicationError> {
        let request = pb::InstallRequest {
            replica_set: set.0,
            epoch,
            chunk: wire::chunk_to(chunk),
            version: wire::version_to(contents.version),
            data: contents.data,
            crc: contents.crc,
            previous: wire::version_to(previous),
            member: node.0.clone(),
        };
        let mut client = self.replica(node)?;
        let reply = within(node, self.bulk_timeout, client.install(request)).await?;
        Ok(wire::version_from(reply.present))
    }

    pub(crate) async fn fetch(
        &self,
        node: &NodeId,
        set: ReplicaSetId,
        epoch: u64,
        chunk: ChunkId,
    ) -> Result<Contents, ReplicationError> {
        let request = pb::FetchRequest {
            replica_set: set.0,
            epoch,
            chunk: wire::chunk_to(chunk),
            member: node.0.clone(),
        };
        let mut client = self.replica(node)?;
        let reply = within(node, self.bulk_timeout, client.fetch(request)).await?;
        let contents = Contents::new(wire::version_from(reply.version), reply.data);
        if contents.crc != reply.crc {
            return Err(ReplicationError::unreachable(node, "a chunk was damaged on its way"));
        }
        Ok(contents)
    }

    /// Asks the primary to replace this node's damaged copy.
    pub(crate) async fn restore(
        &self,
        primary: &NodeId,
        set: ReplicaSetId,
        epoch: u64,
        chunk: ChunkId,
        damaged: &NodeId,
    ) -> Result<(), ReplicationError> {
        let request = pb::RestoreRequest {
            replica_set: set.0,
            epoch,
            chunk: wire::chunk_to(chunk),
            member: primary.0.clone(),
            damaged: damaged.0.clone(),
        };
        let mut client = self.replica(primary)?;
        within(primary, self.bulk_timeout, client.restore(request)).await?;
        Ok(())
    }

    pub(crate) async fn list(
        &self,
        node: &NodeId,
        set: ReplicaSetId,
        epoch: u64,
    ) -> Result<Vec<ChunkSummary>, ReplicationError> {
        let request = pb::ListRequest {
            replica_set: set.0,
            epoch,
            member: node.0.clone(),
        };
        let mut client = self.replica(node)?;
        let mut stream = within(node, self.call_timeout, client.list(request)).await?;
        let mut all = Vec::new();
        // The limit is on silence: a long list may take its time.
        while let Some(part) = tokio::time::timeout(self.call_timeout, stream.message())
            .await
            .map_err(|_| ReplicationError::unreachable(node, "no answer"))?
            .map_err(|status| ReplicationError::from_peer(node, &status))?
        {
            for summary in part.chunks {
                all.push(wire::summary_from(summary)?);
            }
        }
        Ok(all)
    }
}

async fn within<T>(
    node: &NodeId,
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, ReplicationError> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(ReplicationError::from_peer(node, &status)),
        Err(_) => Err(ReplicationError::unreachable(node, "no answer")),
    }
}
