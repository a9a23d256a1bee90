//! A cluster in memory: real gRPC servers on loopback ports in front of one shared state, with
//! faults on demand. It has no durability and no replication; it is the other side of the wire for
//! tests of the client and of what builds on it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod namespace;
mod service;

use lazarette_proto::MAX_MESSAGE_BYTES;
use lazarette_proto::chunk::chunk_server::ChunkServer;
use lazarette_proto::cluster::cluster_server::ClusterServer;
use lazarette_proto::cluster::{ReplicaSet, ReplicationPolicy, Volume, VolumeMap};
use lazarette_proto::meta::meta_server::MetaServer;
use lazarette_types::{ErrorCode, VolumeId};
use namespace::Namespace;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

/// The volume that every test cluster has.
pub const VOLUME: VolumeId = VolumeId(1);
/// Its chunk size in bytes.
pub const CHUNK_SIZE: u32 = 1 << 20;

/// What a request meets instead of, or after, being served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Refused with this code, nothing done.
    Refuse(ErrorCode),
    /// Done, but the answer is lost.
    LoseReply,
    /// Writes only: the connection is lost at once, and the request arrives after this time.
    ComeLate(Duration),
    /// Answered never: the request hangs until the client gives up or the test ends.
    Hang,
    /// Reads only: the data is damaged on the way.
    Damage,
}

/// Which requests a fault meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    /// `Meta.Call`, but for reports alone.
    Call,
    /// `Meta.Call` with nothing but a report of opens and closes.
    Report,
    /// `Meta.KeepAlive`.
    KeepAlive,
    /// `Chunk.Write`.
    Write,
    /// `Chunk.Read`.
    Read,
}

pub(crate) struct World {
    pub(crate) volume: Volume,
    pub(crate) owner: usize,
    pub(crate) owner_epoch: u64,
    /// Per replica set: epoch and primary.
    pub(crate) sets: HashMap<u32, (u64, usize)>,
    pub(crate) chunks: HashMap<(u64, u32), Vec<u8>>,
    pub(crate) namespace: Namespace,
    pub(crate) faults: HashMap<At, VecDeque<Fault>>,
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) ttl_ms: u32,
    pub(crate) counts: HashMap<At, u64>,
    /// Of writes that came late, whether each was made.
    pub(crate) came_late: Vec<bool>,
    pub(crate) registrations: Vec<Vec<u64>>,
}

pub(crate) struct Shared {
    world: Mutex<World>,
    pub(crate) changed: Notify,
    pub(crate) map: watch::Sender<u64>,
}

impl Shared {
    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl World {
    pub(crate) fn map(&self) -> VolumeMap {
        VolumeMap {
            volume: Some(self.volume.clone()),
            owner_address: self.addresses[self.owner].to_string(),
            owner_epoch: self.owner_epoch,
            replica_sets: self
                .sets
                .iter()
                .map(|(&id, &(epoch, primary))| ReplicaSet {
                    id,
                    epoch,
                    primary_address: self.addresses[primary].to_string(),
                    members: Vec::new(),
                })
                .collect(),
        }
    }
}

/// A running cluster; its servers stop when it is dropped.
pub struct TestCluster {
    pub(crate) shared: Arc<Shared>,
    servers: Mutex<Vec<CancellationToken>>,
}

/// Mounts [`VOLUME`], so that it flushes only when asked or full.
///
/// # Panics
/// If it cannot be mounted.
pub async fn mount(cluster: &TestCluster) -> crate::Volume {
    let options = crate::VolumeOptions {
        flush_after: Duration::from_secs(3600),
        ..crate::VolumeOptions::default()
    };
    let cluster = crate::Cluster::connect(cluster.endpoints()).unwrap();
    crate::Volume::mount(&cluster, VOLUME, options).await.unwrap()
}

/// Waits for a state.
///
/// # Panics
/// If it has not come after a generous time.
pub async fn eventually(what: &str, mut state: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if state() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never happened: {what}");
}

impl TestCluster {
    /// Starts this many nodes. All replica sets have copies everywhere, so any node can be primary.
    pub async fn start(nodes: usize) -> Self {
        let mut listeners = Vec::new();
        for _ in 0..nodes {
            listeners.push(tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let sets: HashMap<u32, (u64, usize)> = (0..nodes).map(|node| (10 + node as u32, (1, node))).collect();
        let mut table: Vec<u32> = sets.keys().copied().collect();
        table.sort_unstable();
        let world = World {
            volume: Volume {
                id: VOLUME.0,
                name: "test".into(),
                size: 1 << 30,
                replication: Some(ReplicationPolicy { copies: 1, ack: 1 }),
                chunk_size: CHUNK_SIZE,
                replica_sets: table,
                ..Volume::default()
            },
            owner: 0,
            owner_epoch: 1,
            sets,
            chunks: HashMap::new(),
            namespace: Namespace::new(),
            faults: HashMap::new(),
            addresses: listeners
                .iter()
                .map(|listener| listener.local_addr().unwrap())
                .collect(),
            ttl_ms: 3000,
            counts: HashMap::new(),
            came_late: Vec::new(),
            registrations: Vec::new(),
        };
        let cluster = Self {
            shared: Arc::new(Shared {
                world: Mutex::new(world),
                changed: Notify::new(),
                map: watch::Sender::new(0),
            }),
            servers: Mutex::default(),
        };
        for (node, listener) in listeners.into_iter().enumerate() {
            let stop = cluster.serve(node, listener);
            cluster.servers.lock().unwrap().push(stop);
        }
        cluster
    }

    fn serve(&self, node: usize, listener: tokio::net::TcpListener) -> CancellationToken {
        let stop = CancellationToken::new();
        let service = service::Node {
            shared: self.shared.clone(),
            node,
        };
        let server = tonic::transport::Server::builder()
            .add_service(ClusterServer::new(service.clone()))
            .add_service(MetaServer::new(service.clone()))
            .add_service(
                ChunkServer::new(service)
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .max_encoding_message_size(MAX_MESSAGE_BYTES),
            )
            .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
        let token = stop.clone();
        tokio::spawn(async move { token.run_until_cancelled(server).await });
        stop
    }

    /// The node's endpoint.
    pub fn endpoint(&self, node: usize) -> String {
        format!("http://{}", self.shared.world().addresses[node])
    }

    /// All endpoints.
    pub fn endpoints(&self) -> Vec<String> {
        let nodes = self.shared.world().addresses.len();
        (0..nodes).map(|node| self.endpoint(node)).collect()
    }

    /// The next request of this kind meets the fault; several queue up.
    pub fn inject(&self, at: At, fault: Fault) {
        self.shared.world().faults.entry(at).or_default().push_back(fault);
    }

    /// Of the writes that came late so far, whether each was made.
    pub fn came_late(&self) -> Vec<bool> {
        self.shared.world().came_late.clone()
    }

    /// How many faults have not been met yet.
    pub fn pending_faults(&self) -> usize {
        self.shared.world().faults.values().map(VecDeque::len).sum()
    }

    /// How many requests of this kind have been served or have met a fault.
    pub fn count(&self, at: At) -> u64 {
        self.shared.world().counts.get(&at).copied().unwrap_or(0)
    }

    /// Makes another node the metadata owner. With `tell`, the map's watchers hear of it;
    /// otherwise clients find out by being refused.
    pub fn move_owner(&self, node: usize, tell: bool) {
        {
            let mut world = self.shared.world();
            world.owner = node;
            world.owner_epoch += 1;
            world.namespace.change_owner();
        }
        if tell {
            self.shared.map.send_modify(|version| *version += 1);
        }
        self.shared.changed.notify_waiters();
    }

    /// Makes another node primary of all replica sets.
    pub fn move_primaries(&self, node: usize, tell: bool) {
        for set in self.shared.world().sets.values_mut() {
            *set = (set.0 + 1, node);
        }
        if tell {
            self.shared.map.send_modify(|version| *version += 1);
        }
    }

    /// Kills a node's server: its connections break. What it owned moves to `heir`, unannounced.
    pub async fn kill(&self, node: usize, heir: usize) {
        self.servers.lock().unwrap()[node].cancel();
        let owner = {
            let mut world = self.shared.world();
            for set in world.sets.values_mut() {
                if set.1 == node {
                    *set = (set.0 + 1, heir);
                }
            }
            world.owner == node
        };
        if owner {
            self.move_owner(heir, false);
        }
    }

    /// Starts a killed node again, at another address.
    pub async fn revive(&self, node: usize) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.shared.world().addresses[node] = listener.local_addr().unwrap();
        let stop = self.serve(node, listener);
        self.servers.lock().unwrap()[node] = stop;
    }

    /// Ends all sessions at the owner.
    pub fn expire_sessions(&self) {
        self.shared.world().namespace.expire_sessions();
        self.shared.changed.notify_waiters();
    }

    /// Sets how long a sole client may use what it is told.
    pub fn set_cache_ttl(&self, ttl: Duration) {
        self.shared.world().namespace.cache_ttl = ttl;
    }

    /// Inodes that the owner has as open, over all sessions.
    pub fn open_inodes(&self) -> Vec<u64> {
        self.shared.world().namespace.open_inodes()
    }

    /// Sets the sessions' time to live, for sessions opened from now on.
    pub fn set_session_ttl_ms(&self, ttl_ms: u32) {
        self.shared.world().ttl_ms = ttl_ms;
    }

    /// Limits the volume; more bytes in files than this get NoSpace.
    pub fn set_quota(&self, bytes: u64) {
        self.shared.world().volume.size = bytes;
    }

    /// The size of an inode as the owner has it.
    pub fn stored_size(&self, ino: u64) -> Option<u64> {
        self.shared.world().namespace.size(ino)
    }

    /// Whether the inode exists, with or without a name.
    pub fn exists(&self, ino: u64) -> bool {
        self.stored_size(ino).is_some()
    }

    /// The locks held on an inode, over all sessions.
    pub fn locks(&self, ino: u64) -> usize {
        self.shared.world().namespace.locks(ino)
    }

    /// What clients have sent in complete KeepAlives, oldest first.
    pub fn registrations(&self) -> Vec<Vec<u64>> {
        self.shared.world().registrations.clone()
    }

    /// Sessions that are open.
    pub fn sessions(&self) -> usize {
        self.shared.world().namespace.sessions()
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        for server in self.servers.lock().unwrap().iter() {
            server.cancel();
        }
    }
}
