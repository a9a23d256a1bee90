//! A storage node put together from its parts, whichever etcd, disk and network they are.

use super::{Ended, NodeError, until_answered};
use crate::chunk::ChunkStore;
use crate::cluster::ClusterService;
use crate::coordinator::Coordinator;
use crate::membership::{ClusterView, JoinError, Lease, Registration};
use crate::meta::manager::Manager;
use crate::meta::owner;
use crate::meta::service::{MetaService, Shards};
use crate::removal::ReplicatedChunks;
use crate::replication::{Dial, Replicas, ReplicasParts, ReplicationConfig};
use lazarette_metastore::{ActivityRecord, Keys, MetaStore, Op, Txn, decode, encode};
use lazarette_proto::FRAME_BYTES;
use lazarette_proto::cluster::cluster_server::ClusterServer;
use lazarette_proto::meta::meta_server::MetaServer;
use lazarette_types::ReplicationPolicy;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;

/// How often capacity and use are reported.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// What a storage node is made of.
pub struct Parts {
    /// etcd.
    pub store: Arc<dyn MetaStore>,
    /// Its keys.
    pub keys: Keys,
    /// The cluster's identity, as [`ensure_cluster`](crate::membership::ensure_cluster) gives it.
    pub cluster_id: String,
    /// What the node registers as.
    pub registration: Registration,
    /// Its disk, which no other process uses.
    pub chunks: Arc<dyn ChunkStore>,
    /// How other storage nodes are reached.
    pub dial: Dial,
    /// Limits and times of replication.
    pub config: ReplicationConfig,
    /// Replication of volumes whose creator does not say it.
    pub replication: ReplicationPolicy,
    /// How long a storage node may be away before it is replaced.
    pub replace_after: Duration,
}

/// A storage node with its place in the cluster.
pub struct Joined {
    keys: Keys,
    store: Arc<dyn MetaStore>,
    cluster_id: String,
    registration: Registration,
    lease: Lease,
    view: watch::Receiver<Arc<ClusterView>>,
    chunks: Arc<dyn ChunkStore>,
    replicas: Replicas,
    shards: Arc<Shards>,
    owners: Arc<owner::Metrics>,
    replication: ReplicationPolicy,
    /// Cancelled to give all shards up.
    leave: CancellationToken,
    manager: JoinHandle<()>,
}

/// A gRPC server with the windows and time-outs that data needs.
pub fn server() -> Server {
    Server::builder()
        // A chunk in flight must not stall the connection for the others.
        .max_frame_size(Some(FRAME_BYTES))
        .initial_stream_window_size(Some(8 << 20))
        .initial_connection_window_size(Some(64 << 20))
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
}

impl Joined {
    /// Takes the node's place in the cluster, as soon as etcd answers.
    pub async fn join(parts: Parts) -> Result<Self, NodeError> {
        let Parts {
            store,
            keys,
            cluster_id,
            registration,
            chunks,
            dial,
            config,
            replication,
            replace_after,
        } = parts;
        let node = registration.node.clone();
        let view =
            until_answered(|| async { Ok(ClusterView::follow(Arc::clone(&store), keys.clone()).await?) }).await?;
        let lease = until_answered(|| async { Ok(Lease::acquire(Arc::clone(&store)).await?) }).await?;
        let usage = space(&*chunks).await;
        until_answered(|| registration.join(&*store, &keys, &lease, usage)).await?;
        tracing::info!(node = %node, address = registration.address, "joined the cluster");

        let activity = until_answered(|| activity(&*store, &keys, &registration)).await?;
        let replicas = Replicas::start(ReplicasParts {
            node: node.clone(),
            store: Arc::clone(&store),
            keys: keys.clone(),
            chunks: Arc::clone(&chunks),
            lease: lease.clone(),
            view: view.clone(),
            dial,
            config,
            scrub: activity.scrub,
        });
        let coordinator = Coordinator::new(
            node.clone(),
            Arc::clone(&store),
            keys.clone(),
            lease.clone(),
            view.clone(),
            replace_after,
        );
        tokio::spawn(coordinator.run());
        let owners = Arc::new(owner::Metrics::default());
        let shards = Arc::new(Shards::default());
        let context = owner::OwnerContext {
            store: Arc::clone(&store),
            keys: keys.clone(),
            node,
            address: registration.address.clone(),
            lease: lease.clone(),
            chunks: Arc::new(ReplicatedChunks {
                access: replicas.access(),
                view: view.clone(),
            }),
            metrics: Arc::clone(&owners),
        };
        let leave = CancellationToken::new();
        let manager = Manager::new(context, Arc::clone(&shards), view.clone());
        let manager = tokio::spawn(manager.run(leave.clone()));
        Ok(Self {
            keys,
            store,
            cluster_id,
            registration,
            lease,
            view,
            chunks,
            replicas,
            shards,
            owners,
            replication,
            leave,
            manager,
        })
    }

    /// The lease on which the node's place hangs.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// The node's copies, and the replica sets that it leads.
    pub fn replicas(&self) -> &Replicas {
        &self.replicas
    }

    /// What the node counts as owner of metadata.
    pub fn owners(&self) -> &Arc<owner::Metrics> {
        &self.owners
    }

    /// What the node serves.
    pub fn routes(&self) -> Routes {
        let (chunk, replica) = self.replicas.services();
        let cluster = ClusterService::new(
            Arc::clone(&self.store),
            self.keys.clone(),
            self.cluster_id.clone(),
            self.view.clone(),
            self.replication,
        );
        Routes::new(ClusterServer::new(cluster))
            .add_service(MetaServer::new(MetaService::new(Arc::clone(&self.shards))))
            .add_service(chunk)
            .add_service(replica)
    }

    /// Reports space and background work now and then; returns when the disk has failed.
    pub async fn report(&self) -> Ended {
        let mut last = None;
        let mut reported = None;
        loop {
            tokio::time::sleep(REPORT_EVERY).await;
            if let Err(error) = self.chunks.health() {
                tracing::error!(%error, "the disk has failed");
                return Ended::DiskFailed;
            }
            let activity = self.activity();
            if reported.as_ref() != Some(&activity) {
                let put = Op::put(self.keys.activity(&self.registration.node), encode(&activity));
                let (conditions, then) = (vec![], vec![put]);
                match self.store.txn(Txn { conditions, then }).await {
                    Ok(_) => reported = Some(activity),
                    Err(error) => tracing::warn!(%error, "background work not reported"),
                }
            }
            let space = space(&*self.chunks).await;
            if last == Some(space) {
                continue;
            }
            match self
                .registration
                .report(&*self.store, &self.keys, &self.lease, space)
                .await
            {
                Ok(()) => last = Some(space),
                Err(error) => tracing::warn!(%error, "space not reported"),
            }
        }
    }

    /// Gives everything up, so that others take over at once where that is still possible.
    pub async fn leave(self, ended: Ended) {
        if ended != Ended::LeaseLost {
            self.leave.cancel();
            let _ = self.manager.await;
            if let Err(error) = self.lease.resign(&*self.store).await {
                tracing::warn!(%error, "lease not given back; it runs out by itself");
            }
        }
        self.replicas.stop();
    }

    fn activity(&self) -> ActivityRecord {
        let backlog = self.replicas.repair_backlog();
        ActivityRecord {
            disk: self.registration.disk.clone(),
            repair_chunks: backlog.chunks,
            repair_bytes: backlog.bytes,
            scrub: self.replicas.scrub(),
        }
    }
}

/// What the node's last process reported of this disk.
async fn activity(
    store: &dyn MetaStore,
    keys: &Keys,
    registration: &Registration,
) -> Result<ActivityRecord, JoinError> {
    let found = store.get(&keys.activity(&registration.node)).await?;
    let record: Option<ActivityRecord> = found.map(|kv| decode(&kv.value)).transpose()?;
    Ok(record
        .filter(|record| record.disk == registration.disk)
        .unwrap_or_default())
}

/// Capacity and use in bytes; zeros if the disk does not say.
async fn space(chunks: &dyn ChunkStore) -> (u64, u64) {
    let usage = chunks.usage().await.unwrap_or_default();
    (usage.capacity, usage.used)
}
