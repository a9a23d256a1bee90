//! A storage node's processes.

use crate::conditions::World;
use crate::disk::Disk;
use crate::etcd::Etcd;
use crate::messages::Unreliable;
use crate::network;
use crate::system::{self, Clock};
use lazarette_metastore::{Keys, MetaStore};
use lazarette_node::membership::{Registration, ensure_cluster};
use lazarette_node::node::{Ended, Joined, Parts, server};
use lazarette_node::replication::ReplicationConfig;
use lazarette_types::{NodeId, ReplicationPolicy};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The cluster's name.
const CLUSTER: &str = "sim";

/// A machine on which a storage node runs.
pub(crate) struct Machine {
    pub(crate) name: String,
    pub(crate) world: Arc<World>,
    pub(crate) etcd: Arc<Etcd>,
    pub(crate) disk: Arc<Disk>,
    pub(crate) clock: Clock,
    /// The process has ended and wants to be started anew.
    pub(crate) ended: AtomicBool,
}

pub(crate) fn keys() -> Keys {
    Keys::new(CLUSTER)
}

impl Machine {
    /// One process, until it ends by itself.
    pub(crate) async fn run(self: Arc<Self>) -> turmoil::Result {
        system::set_clock(self.clock);
        let ended = self.serve().await;
        self.world.note(&self.name, format_args!("ended: {ended:?}"));
        // Nothing of a process outlives it, as the world sees to.
        self.ended.store(true, Ordering::Relaxed);
        std::future::pending().await
    }

    async fn serve(&self) -> Result<Ended, Box<dyn std::error::Error>> {
        let store: Arc<dyn MetaStore> = Arc::new(self.etcd.path(&self.world, &self.name));
        let incoming = network::listen().await?;
        let cluster = loop {
            match ensure_cluster(&*store, &keys()).await {
                Ok(cluster) => break cluster,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        let joined = Joined::join(Parts {
            store,
            keys: keys(),
            cluster_id: cluster.id,
            registration: Registration {
                node: NodeId(self.name.clone()),
                address: format!("{}:{}", self.name, network::PORT),
                failure_domain: self.name.clone(),
                disk: format!("disk of {}", self.name),
            },
            chunks: self.disk.open(),
            dial: network::dial_of_node(),
            config: ReplicationConfig {
                // Sooner than in production, so that it comes to that.
                dead_grace: Duration::from_secs(2),
                hand_back_after: Duration::from_secs(6),
                scrub_every: Duration::from_secs(10),
                ..ReplicationConfig::default()
            },
            replication: ReplicationPolicy { copies: 3, ack: 2 },
            replace_after: Duration::from_secs(6),
        })
        .await?;
        self.world.note(&self.name, "joined");
        let unreliable = Unreliable {
            world: Arc::clone(&self.world),
            etcd: Arc::clone(&self.etcd),
        };
        let server = server().layer(unreliable).add_routes(joined.routes());
        let ended = tokio::select! {
            result = server.serve_with_incoming(incoming) => return Err(format!("gRPC: {result:?}").into()),
            ended = joined.report() => ended,
            () = joined.lease().ended() => Ended::LeaseLost,
        };
        joined.leave(ended).await;
        Ok(ended)
    }
}
