//! A storage node's life: opening the disk, joining the cluster, serving, leaving.

mod joined;

pub use joined::{Joined, Parts, server};

use crate::chunk::{ChunkStore, FileChunkStore, OpenError};
use crate::membership::{JoinError, Lease, Registration, ensure_cluster};
use crate::metrics::NodeMetrics;
use crate::replication::{ReplicationConfig, dial_plain};
use lazarette_metastore::{EtcdConfig, EtcdStore, EtcdTls, Keys, MetaStore, StoreError};
use lazarette_telemetry::{AdminError, Registry};
use lazarette_types::{LayoutError, NodeId, ReplicationPolicy};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tonic::transport::server::TcpIncoming;

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
    /// http://host:port of etcd's members, or https://host:port with --etcd-ca
    #[arg(long, env = "LAZARETTE_ETCD", value_delimiter = ',', required = true)]
    pub etcd: Vec<String>,
    /// PEM file with the authorities that sign the certificates of etcd's members
    #[arg(long, env = "LAZARETTE_ETCD_CA")]
    pub etcd_ca: Option<PathBuf>,
    /// PEM file with this node's own certificate for etcd
    #[arg(long, env = "LAZARETTE_ETCD_CERT", requires = "etcd_ca", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// PEM file with the private key of that certificate
    #[arg(long, env = "LAZARETTE_ETCD_KEY", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
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
    /// How long a storage node may be away before its copies are made anew on others; such as 10m
    #[arg(long, env = "LAZARETTE_REPLACE_AFTER", default_value = "10m", value_parser = humantime::parse_duration)]
    pub replace_after: Duration,
    /// MiB a second that this node copies at most to restore and move copies
    #[arg(long, env = "LAZARETTE_REPAIR_RATE", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    pub repair_rate: u32,
    /// MiB a second that this node reads at most to verify its copies; 0 verifies none
    #[arg(long, env = "LAZARETTE_SCRUB_RATE", default_value_t = 16)]
    pub scrub_rate: u32,
    /// How often all copies are verified at most; such as 7d
    #[arg(long, env = "LAZARETTE_SCRUB_EVERY", default_value = "7d", value_parser = humantime::parse_duration)]
    pub scrub_every: Duration,
}

impl NodeConfig {
    fn etcd_config(&self) -> Result<EtcdConfig, NodeError> {
        let scheme = if self.etcd_ca.is_some() { "https://" } else { "http://" };
        if let Some(other) = self.etcd.iter().find(|endpoint| !endpoint.starts_with(scheme)) {
            return Err(NodeError::EtcdScheme(other.clone()));
        }
        let read = |flag, path: &PathBuf| {
            std::fs::read(path).map_err(|source| NodeError::EtcdTls {
                flag,
                path: path.clone(),
                source,
            })
        };
        let identity = match (&self.etcd_cert, &self.etcd_key) {
            (Some(certificate), Some(key)) => Some((read("--etcd-cert", certificate)?, read("--etcd-key", key)?)),
            _ => None,
        };
        let tls = match &self.etcd_ca {
            Some(ca) => Some(EtcdTls {
                ca: read("--etcd-ca", ca)?,
                identity,
            }),
            None => None,
        };
        Ok(EtcdConfig {
            tls,
            ..EtcdConfig::new(self.etcd.clone())
        })
    }
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
    /// Endpoints and certificates do not go together.
    #[error("--etcd has {0:?}: with --etcd-ca all begin with https://, without with http://")]
    EtcdScheme(String),
    /// A certificate or key for etcd.
    #[error("{flag} {path}: {source}")]
    EtcdTls {
        /// The flag that names it.
        flag: &'static str,
        /// As configured.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
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
        let (parts, chunks) = open(&config, replication).await?;
        let joined = Joined::join(parts).await?;
        metrics.observe(
            joined.replicas().clone(),
            Arc::clone(joined.owners()),
            Arc::clone(&chunks),
        );
        ready.send_replace(Some(joined.lease().clone()));
        Ok::<_, NodeError>((joined, chunks))
    };
    let (joined, chunks) = tokio::select! {
        joined = joining => joined?,
        _ = terminate.recv() => return Ok(Ended::Asked),
    };
    // The builder's own setting is for listeners that it makes itself. With Nagle's algorithm
    // every small answer waits 40 ms for the client's delayed acknowledgement.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let ended = tokio::select! {
        result = server().add_routes(joined.routes()).serve_with_incoming(incoming) => match result {
            Err(error) => return Err(NodeError::Runtime(format!("gRPC: {error}"))),
            Ok(()) => return Err(NodeError::Runtime("the gRPC server ended".into())),
        },
        ended = joined.report() => ended,
        () = joined.lease().ended() => Ended::LeaseLost,
        _ = terminate.recv() => Ended::Asked,
    };
    ready.send_replace(None);
    tracing::info!(?ended, "leaving");
    let leaving = async {
        joined.leave(ended).await;
        if ended == Ended::Asked
            && let Err(error) = chunks.fold().await
        {
            tracing::warn!(%error, "log not folded; the next start takes longer");
        }
    };
    if tokio::time::timeout(LEAVE_WITHIN, leaving).await.is_err() {
        tracing::warn!("leaving took too long");
    }
    Ok(ended)
}

/// Opens etcd and the disk.
async fn open(config: &NodeConfig, replication: ReplicationPolicy) -> Result<(Parts, Arc<FileChunkStore>), NodeError> {
    let keys = Keys::new(&config.cluster);
    let node = NodeId(config.node.clone());
    let store: Arc<dyn MetaStore> = Arc::new(EtcdStore::connect(&config.etcd_config()?).await?);
    let cluster = until_answered(|| ensure_cluster(&*store, &keys)).await?;

    let (folder, id, name) = (config.data_dir.clone(), cluster.id.clone(), node.clone());
    let opening = tokio::task::spawn_blocking(move || FileChunkStore::open(&folder, &id, &name));
    let chunks = opening.await.map_err(|error| NodeError::Runtime(error.to_string()))??;
    let chunks = Arc::new(chunks);
    tracing::info!(disk = chunks.identity().disk, "chunk store open");

    let parts = Parts {
        store,
        keys,
        cluster_id: cluster.id,
        registration: Registration {
            node,
            address: config.advertise.clone(),
            failure_domain: config.failure_domain.clone().unwrap_or_else(|| config.node.clone()),
            disk: chunks.identity().disk.clone(),
        },
        chunks: Arc::clone(&chunks) as Arc<dyn ChunkStore>,
        dial: dial_plain(),
        config: ReplicationConfig {
            repair_rate: u64::from(config.repair_rate) << 20,
            scrub_rate: u64::from(config.scrub_rate) << 20,
            scrub_every: config.scrub_every,
            ..ReplicationConfig::default()
        },
        replication,
        replace_after: config.replace_after,
    };
    Ok((parts, chunks))
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
