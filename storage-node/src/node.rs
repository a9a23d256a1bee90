//! A storage node's life: opening the disk, joining the cluster, serving, leaving.

use crate::chunk::{ChunkStore, FileChunkStore, OpenError};
use crate::cluster::ClusterService;
use crate::coordinator::Coordinator;
use crate::membership::{ClusterView, JoinError, Lease, Registration, ensure_cluster};
use crate::meta::manager::Manager;
use crate::meta::owner;
use crate::meta::service::{MetaService, Shards};
use crate::metrics::NodeMetrics;
use crate::removal::ReplicatedChunks;
use crate::replication::{Replicas, ReplicasParts, ReplicationConfig, dial_plain};
use lazarette_metastore::{EtcdConfig, EtcdStore, Keys, MetaStore, StoreError};
use lazarette_proto::cluster::cluster_server::ClusterServer;
use lazarette_proto::meta::meta_server::MetaServer;
use lazarette_telemetry::{AdminError, Registry};
use lazarette_types::{LayoutError, NodeId, ReplicationPolicy};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

/// How often capacity and use are reported.
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// How long leaving may take: what waits for it (a kubelet) kills after 30 s.
const LEAVE_WITHIN: Duration = Duration::from_secs(20);

/// Settings of a storage node.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeConfig {
    /// Name of the cluster: the prefix of its keys in etcd
    #[arg(long, env = "LAZARETTE_CLUSTER")]
    pub cluster: String,
    /// Name of this storage node, the same at every start
    #[arg(long, env = "LAZARETTE_NODE")]
    pub node: String,
    /// http://host:port of etcd's members
    #[arg(long, env = "LAZARETTE_ETCD", value_delimiter = ',', required = true)]
    pub etcd: Vec<String>,
    /// Folder for the chunks, on a disk of its own
    #[arg(long, env = "LAZARETTE_DATA_DIR")]
    pub data_dir: PathBuf,
    /// Where to serve gRPC
    #[arg(long, env = "LAZARETTE_LISTEN", default_value = "0.0.0.0:7400")]
    pub listen: SocketAddr,
    /// host:port under which clients and other storage nodes reach it
    #[arg(long, env = "LAZARETTE_ADVERTISE")]
    pub advertise: String,
    /// Where to serve /livez, /readyz and /metrics
    #[arg(long, env = "LAZARETTE_ADMIN", default_value = "0.0.0.0:7401")]
    pub admin: SocketAddr,
    /// Copies of the same data are put in different failure domains where possible
    #[arg(long, env = "LAZARETTE_FAILURE_DOMAIN")]
    pub failure_domain: Option<String>,
    /// Copies of volumes whose creator does not say it, 1 to 8
    #[arg(long, env = "LAZARETTE_COPIES", default_value_t = 3)]
    pub copies: u32,
    /// Durable copies before an acknowledgement, of volumes whose creator does not say it
    #[arg(long, env = "LAZARETTE_ACK", default_value_t = 2)]
    pub ack: u32,
}

/// Why a storage node cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The disk cannot be used.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// No place in the cluster.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// etcd failed at the start.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The admin server.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The replication that volumes get by default.
    #[error("--copies and --ack: {0}")]
    Replication(#[from] LayoutError),
    /// The gRPC port.
    #[error("cannot serve on {address}: {source}")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// gRPC or a signal handler.
    #[error("{0}")]
    Runtime(String),
}

/// Why a storage node stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to.
    Asked,
    /// Its lease is lost: it must start anew, with nothing left of before.
    LeaseLost,
    /// Its disk failed.
    DiskFailed,
}

/// Serves until the node has to stop.
pub async fn run(config: NodeConfig) -> Result<Ended, NodeError> {
    let replication = ReplicationPolicy {
        copies: config.copies,
        ack: config.ack,
    }
    .validate()?;
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|source| NodeError::Listen {
            address: config.listen,
            source,
        })?;
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| NodeError::Runtime(format!("no signal handler: {error}")))?;
    let (ready, is_ready) = watch::channel(None::<Lease>);
    let metrics = NodeMetrics::default();
    let mut registry = Registry::with_prefix("lazarette_node");
    metrics.register(&mut registry);
    lazarette_telemetry::admin(config.admin, registry, move || {
        is_ready.borrow().as_ref().is_some_and(Lease::valid)
    })
    .await?;

    let joining = async {
        let joined = Joined::join(&config, &metrics).await?;
        ready.send_replace(Some(joined.lease.clone()));
        Ok::<_, NodeError>(joined)
    };
    let joined = tokio::select! {
        joined = joining => joined?,
        _ = terminate.recv() => return Ok(Ended::Asked),
    };
    let lease = joined.lease.clone();
    let ended = tokio::select! {
        result = joined.serve(listener, replication) => match result {
            Err(error) => return Err(error),
            Ok(()) => return Err(NodeError::Runtime("the gRPC server ended".into())),
        },
        ended = joined.report() => ended,
        () = lease.ended() => Ended::LeaseLost,
        _ = terminate.recv() => Ended::Asked,
    };
    ready.send_replace(None);
    tracing::info!(?ended, "leaving");
    let leaving = async {
        if ended != Ended::LeaseLost {
            joined.leave.cancel();
            let _ = joined.manager.await;
            if let Err(error) = lease.resign(&*joined.store).await {
                tracing::warn!(%error, "lease not given back; it runs out by itself");
            }
        }
        joined.replicas.stop();
        if ended == Ended::Asked
            && let Err(error) = joined.chunks.fold().await
        {
            tracing::warn!(%error, "log not folded; the next start takes longer");
        }
    };
    if tokio::time::timeout(LEAVE_WITHIN, leaving).await.is_err() {
        tracing::warn!("leaving took too long");
    }
    Ok(ended)
}

/// A storage node with its place in the cluster.
struct Joined {
    keys: Keys,
    store: Arc<dyn MetaStore>,
    cluster_id: String,
    registration: Registration,
    lease: Lease,
    view: watch::Receiver<Arc<ClusterView>>,
    chunks: Arc<FileChunkStore>,
    replicas: Replicas,
    shards: Arc<Shards>,
    /// Cancelled to give all shards up.
    leave: CancellationToken,
    manager: JoinHandle<()>,
}

impl Joined {
    async fn join(config: &NodeConfig, metrics: &NodeMetrics) -> Result<Self, NodeError> {
        let keys = Keys::new(&config.cluster);
        let node = NodeId(config.node.clone());
        let store: Arc<dyn MetaStore> = Arc::new(EtcdStore::connect(&EtcdConfig::new(config.etcd.clone())).await?);
        let cluster = until_answered(|| ensure_cluster(&*store, &keys)).await?;

        let (folder, id, name) = (config.data_dir.clone(), cluster.id.clone(), node.clone());
        let opening = tokio::task::spawn_blocking(move || FileChunkStore::open(&folder, &id, &name));
        let chunks = opening.await.map_err(|error| NodeError::Runtime(error.to_string()))??;
        let chunks = Arc::new(chunks);
        tracing::info!(disk = chunks.identity().disk, "chunk store open");

        let registration = Registration {
            node: node.clone(),
            address: config.advertise.clone(),
            failure_domain: config.failure_domain.clone().unwrap_or_else(|| config.node.clone()),
            disk: chunks.identity().disk.clone(),
        };
        let view =
            until_answered(|| async { Ok(ClusterView::follow(Arc::clone(&store), keys.clone()).await?) }).await?;
        let lease = until_answered(|| async { Ok(Lease::acquire(Arc::clone(&store)).await?) }).await?;
        let usage = space(&*chunks).await;
        until_answered(|| registration.join(&*store, &keys, &lease, usage)).await?;
        tracing::info!(node = %node, address = registration.address, "joined the cluster");

        let replicas = Replicas::start(ReplicasParts {
            node: node.clone(),
            store: Arc::clone(&store),
            keys: keys.clone(),
            chunks: Arc::clone(&chunks) as Arc<dyn ChunkStore>,
            lease: lease.clone(),
            view: view.clone(),
            dial: dial_plain(),
            config: ReplicationConfig::default(),
        });
        let coordinator = Coordinator::new(
            node.clone(),
            Arc::clone(&store),
            keys.clone(),
            lease.clone(),
            view.clone(),
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
        metrics.observe(replicas.clone(), owners, Arc::clone(&chunks));
        Ok(Self {
            keys,
            store,
            cluster_id: cluster.id,
            registration,
            lease,
            view,
            chunks,
            replicas,
            shards,
            leave,
            manager,
        })
    }

    async fn serve(&self, listener: TcpListener, replication: ReplicationPolicy) -> Result<(), NodeError> {
        let (chunk, replica) = self.replicas.services();
        let cluster = ClusterService::new(
            Arc::clone(&self.store),
            self.keys.clone(),
            self.cluster_id.clone(),
            self.view.clone(),
            replication,
        );
        Server::builder()
            // A chunk in flight must not stall the connection for the others.
            .initial_stream_window_size(Some(8 << 20))
            .initial_connection_window_size(Some(64 << 20))
            .http2_keepalive_interval(Some(Duration::from_secs(5)))
            .http2_keepalive_timeout(Some(Duration::from_secs(5)))
            .add_service(ClusterServer::new(cluster))
            .add_service(MetaServer::new(MetaService::new(Arc::clone(&self.shards))))
            .add_service(chunk)
            .add_service(replica)
            // The builder's own setting is for listeners that it makes itself. With Nagle's algorithm
            // every small answer waits 40 ms for the client's delayed acknowledgement.
            .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
            .await
            .map_err(|error| NodeError::Runtime(format!("gRPC: {error}")))
    }

    /// Reports space now and then; returns when the disk has failed.
    async fn report(&self) -> Ended {
        let mut last = None;
        loop {
            tokio::time::sleep(REPORT_EVERY).await;
            if let Err(error) = self.chunks.health() {
                tracing::error!(%error, "the disk has failed");
                return Ended::DiskFailed;
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
}

/// Capacity and use in bytes; zeros if the disk does not say.
async fn space(chunks: &dyn ChunkStore) -> (u64, u64) {
    let usage = chunks.usage().await.unwrap_or_default();
    (usage.capacity, usage.used)
}

/// Tries until etcd answers: at a cold start it comes up together with the storage nodes.
async fn until_answered<T, F>(mut attempt: impl FnMut() -> F) -> Result<T, JoinError>
where
    F: Future<Output = Result<T, JoinError>>,
{
    let mut pause = Duration::from_millis(100);
    loop {
        match attempt().await {
            Err(JoinError::Store(error @ (StoreError::Unavailable(_) | StoreError::Ambiguous(_)))) => {
                tracing::warn!(%error, "etcd does not answer yet");
            }
            result => return result,
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}
