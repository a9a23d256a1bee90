use super::faults::{CutStore, FaultyChunks, Link, LinkState};
use crate::chunk::{ChunkStore, MemoryChunkStore, crc32c};
use crate::coordinator::{Coordinator, ensure_table};
use crate::membership::{ClusterView, Lease};
use crate::replication::configuration::exchanged;
use crate::replication::{Replicas, ReplicasParts, ReplicationConfig, dial_plain};
use bytes::Bytes;
use lazarette_metastore::{
    ClusterRecord, Condition, Keys, LivenessRecord, MemoryStore, MetaStore, NodeRecord, Op, ReplicaSetRecord,
    ScrubRecord, Txn, VolumeRecord, VolumeState, decode, encode,
};
use lazarette_proto::chunk as pb;
use lazarette_proto::chunk::chunk_client::ChunkClient;
use lazarette_proto::code_of;
use lazarette_types::{ChunkId, ErrorCode, InodeId, NodeId, ReplicaSetId, ReplicationPolicy, VolumeId};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;

/// Long enough for any machine; reached only by a failure.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

pub(super) fn node(i: usize) -> NodeId {
    NodeId(format!("node-{i}"))
}

pub(super) fn chunk(ino: u64, index: u32) -> ChunkId {
    ChunkId {
        volume: VolumeId(1),
        ino: InodeId(ino),
        index,
    }
}

/// Times that suit tests: faults are noticed sooner.
pub(super) fn quick() -> ReplicationConfig {
    ReplicationConfig {
        eject_slow: Duration::from_millis(2000),
        eject_dead: Duration::from_millis(200),
        dead_grace: Duration::from_millis(1000),
        call_timeout: Duration::from_millis(1000),
        bulk_timeout: Duration::from_secs(5),
        patience: Duration::from_secs(2),
        hand_back_after: Duration::from_secs(3600),
        ..ReplicationConfig::default()
    }
}

pub(super) struct Cluster {
    pub(super) store: Arc<dyn MetaStore>,
    pub(super) keys: Keys,
    pub(super) config: ReplicationConfig,
    /// How long nodes that start may see others away before they replace them.
    pub(super) replace_after: Duration,
    pub(super) disks: Vec<Arc<dyn ChunkStore>>,
    /// The same, where they are in memory.
    pub(super) memory: Vec<Arc<MemoryChunkStore>>,
    pub(super) nodes: Vec<Option<Node>>,
    /// From, to.
    pub(super) links: Arc<BTreeMap<(usize, usize), Link>>,
    /// For clients: each node's present address.
    pub(super) addresses: Arc<Mutex<HashMap<NodeId, String>>>,
}

/// A running process.
pub(super) struct Node {
    pub(super) replicas: Replicas,
    pub(super) chunks: Arc<FaultyChunks>,
    pub(super) store: Arc<CutStore>,
    pub(super) lease: Lease,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Cluster {
    pub(super) async fn start(count: usize, config: ReplicationConfig) -> Self {
        Self::start_replacing(count, config, Duration::from_secs(3600)).await
    }

    /// Nodes that are away for so long are replaced.
    pub(super) async fn start_replacing(count: usize, config: ReplicationConfig, replace_after: Duration) -> Self {
        let memory: Vec<_> = (0..count).map(|_| Arc::new(MemoryChunkStore::new())).collect();
        let disks = memory
            .iter()
            .map(|disk| Arc::clone(disk) as Arc<dyn ChunkStore>)
            .collect();
        let mut cluster = Self::start_on(Arc::new(MemoryStore::new()), disks, config, replace_after).await;
        cluster.memory = memory;
        cluster
    }

    /// On these parts, a node for each disk.
    pub(super) async fn start_on(
        store: Arc<dyn MetaStore>,
        disks: Vec<Arc<dyn ChunkStore>>,
        config: ReplicationConfig,
        replace_after: Duration,
    ) -> Self {
        let count = disks.len();
        // Shown for failed tests.
        let _ = tracing_subscriber::fmt()
            .with_test_writer()
            .with_env_filter("lazarette_node=debug")
            .try_init();
        let keys = Keys::new("test");
        let mut links = BTreeMap::new();
        for from in 0..count {
            for to in (0..count).filter(|to| *to != from) {
                links.insert((from, to), Link::open().await);
            }
        }
        let mut then = vec![
            Op::put(
                keys.cluster(),
                encode(&ClusterRecord {
                    id: "test".into(),
                    next_volume: 2,
                    next_replica_set: 1,
                }),
            ),
            Op::put(
                keys.volume(VolumeId(1)),
                encode(&VolumeRecord {
                    id: VolumeId(1),
                    name: "v".into(),
                    size: 1 << 40,
                    replication: ReplicationPolicy::default(),
                    chunk_size: 4 << 20,
                    replica_sets: vec![ReplicaSetId(1)],
                    labels: BTreeMap::new(),
                    state: VolumeState::Ready,
                }),
            ),
        ];
        for i in 0..count {
            let record = NodeRecord {
                disk: format!("disk-{i}"),
                failure_domain: format!("zone-{i}"),
                draining: false,
            };
            then.push(Op::put(keys.node(&node(i)), encode(&record)));
        }
        store
            .txn(Txn {
                conditions: vec![],
                then,
            })
            .await
            .unwrap();
        let mut cluster = Self {
            store,
            keys,
            config,
            replace_after,
            disks,
            memory: Vec::new(),
            nodes: (0..count).map(|_| None).collect(),
            links: Arc::new(links),
            addresses: Arc::default(),
        };
        for i in 0..count {
            cluster.start_node(i).await;
        }
        cluster
    }

    /// Replica sets of this policy; the first is led by node 0.
    pub(super) async fn table(&self, copies: u32, ack: u32) -> Vec<ReplicaSetId> {
        let table = ensure_table(&*self.store, &self.keys, ReplicationPolicy { copies, ack })
            .await
            .unwrap();
        for set in &table {
            self.serving(*set).await;
        }
        table
    }

    pub(super) async fn start_node(&mut self, i: usize) {
        let store = Arc::new(CutStore {
            inner: Arc::clone(&self.store),
            cut: Arc::new(AtomicBool::new(false)),
        });
        let dyn_store: Arc<dyn MetaStore> = store.clone();
        let lease = Lease::acquire(Arc::clone(&dyn_store)).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        for (&(_, to), link) in self.links.iter() {
            if to == i {
                link.target.send_replace(Some(address));
            }
        }
        self.addresses.lock().unwrap().insert(node(i), address.to_string());
        let live = LivenessRecord {
            address: address.to_string(),
            lease: lease.id().0,
            capacity_bytes: 1 << 40,
            used_bytes: 0,
        };
        let put = Op::Put {
            key: self.keys.node_live(&node(i)),
            value: encode(&live),
            lease: Some(lease.id()),
        };
        store
            .txn(Txn {
                conditions: vec![],
                then: vec![put],
            })
            .await
            .unwrap();
        let real = ClusterView::follow(Arc::clone(&dyn_store), self.keys.clone())
            .await
            .unwrap();
        let (view, rewriting) = self.through_links(i, real);
        let chunks = Arc::new(FaultyChunks {
            disk: Arc::clone(&self.disks[i]),
            dead: AtomicBool::new(false),
            full: AtomicBool::new(false),
            delay: AtomicU64::new(0),
        });
        let replicas = Replicas::start(ReplicasParts {
            node: node(i),
            store: Arc::clone(&dyn_store),
            keys: self.keys.clone(),
            chunks: chunks.clone(),
            lease: lease.clone(),
            view: view.clone(),
            dial: dial_plain(),
            config: self.config.clone(),
            scrub: ScrubRecord::default(),
        });
        let (chunk_service, replica_service) = replicas.services();
        let server = tokio::spawn(async move {
            let _ = tonic::transport::Server::builder()
                .add_service(chunk_service)
                .add_service(replica_service)
                .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
                .await;
        });
        let coordinator = Coordinator::new(
            node(i),
            dyn_store,
            self.keys.clone(),
            lease.clone(),
            view,
            self.replace_after,
        );
        self.nodes[i] = Some(Node {
            replicas,
            chunks,
            store,
            lease,
            tasks: vec![server, rewriting, tokio::spawn(coordinator.run())],
        });
    }

    /// The view of one node, with the addresses of its links.
    fn through_links(
        &self,
        i: usize,
        mut real: watch::Receiver<Arc<ClusterView>>,
    ) -> (watch::Receiver<Arc<ClusterView>>, tokio::task::JoinHandle<()>) {
        let links = Arc::clone(&self.links);
        let rewrite = move |view: &ClusterView| {
            let mut view = view.clone();
            for (&(from, to), link) in links.iter() {
                if from == i
                    && let Some(live) = view.live.get_mut(&node(to))
                {
                    live.address = link.address.to_string();
                }
            }
            Arc::new(view)
        };
        let (sender, receiver) = watch::channel(rewrite(&real.borrow_and_update()));
        let task = tokio::spawn(async move {
            while real.changed().await.is_ok() {
                let next = rewrite(&real.borrow_and_update());
                if sender.send(next).is_err() {
                    return;
                }
            }
        });
        (receiver, task)
    }

    /// Kills a node's process as SIGKILL does. Its keys stay until its lease ends.
    pub(super) async fn kill_quietly(&mut self, i: usize) -> Lease {
        let killed = self.nodes[i].take().unwrap();
        killed.chunks.dead.store(true, Ordering::Release);
        killed.store.cut.store(true, Ordering::Release);
        killed.replicas.stop();
        for task in &killed.tasks {
            task.abort();
        }
        // Ends the renewals; the store is cut off, so the lease itself goes on.
        let _ = killed.lease.resign(&*killed.store).await;
        // Connections of the dead process end, with what is on its way in them.
        for (&(from, to), link) in self.links.iter() {
            if to == i {
                link.target.send_replace(None);
            } else if from == i {
                link.target.send_modify(|_| {});
            }
        }
        killed.lease
    }

    /// Kills a node's process and lets the time pass until its lease has ended.
    pub(super) async fn kill(&mut self, i: usize) {
        let lease = self.kill_quietly(i).await;
        self.store.revoke(lease.id()).await.unwrap();
    }

    /// Marks a node as one that is to leave, or not.
    pub(super) async fn set_draining(&self, i: usize, draining: bool) {
        let key = self.keys.node(&node(i));
        let record: NodeRecord = decode(&self.store.get(&key).await.unwrap().unwrap().value).unwrap();
        let record = NodeRecord { draining, ..record };
        let conditions = vec![];
        let then = vec![Op::put(key, encode(&record))];
        self.store.txn(Txn { conditions, then }).await.unwrap();
    }

    /// Exchanges a member as the coordinator does. Whether nothing came between.
    pub(super) async fn exchange(&self, set: ReplicaSetId, from: &NodeId, to: usize) -> bool {
        let key = self.keys.replica_set(set);
        let kv = self.store.get(&key).await.unwrap().unwrap();
        let record: ReplicaSetRecord = decode(&kv.value).unwrap();
        let Some(next) = exchanged(&record, from, &node(to)) else {
            return false;
        };
        let conditions = vec![Condition::ModRevision(key.clone(), kv.mod_revision)];
        let then = vec![Op::put(key, encode(&next))];
        self.store.txn(Txn { conditions, then }).await.unwrap().succeeded
    }

    pub(super) fn link(&self, from: usize, to: usize, state: LinkState) {
        self.links[&(from, to)].state.send_replace(state);
    }

    pub(super) fn running(&self, i: usize) -> &Node {
        self.nodes[i].as_ref().unwrap()
    }

    pub(super) async fn record(&self, set: ReplicaSetId) -> ReplicaSetRecord {
        let kv = self.store.get(&self.keys.replica_set(set)).await.unwrap().unwrap();
        decode(&kv.value).unwrap()
    }

    /// Waits for a state of a set's record.
    pub(super) async fn until(
        &self,
        set: ReplicaSetId,
        what: &str,
        is: impl Fn(&ReplicaSetRecord) -> bool,
    ) -> ReplicaSetRecord {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let record = self.record(set).await;
            if is(&record) {
                return record;
            }
            assert!(Instant::now() < deadline, "not {what} in time: {record:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until a set's primary serves; returns its number.
    pub(super) async fn serving(&self, set: ReplicaSetId) -> usize {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let record = self.record(set).await;
            for (i, running) in self.nodes.iter().enumerate() {
                if let Some(running) = running
                    && record.primary == node(i)
                    && !record.recovering
                    && running.replicas.leading().contains(&(set, record.epoch))
                {
                    return i;
                }
            }
            assert!(Instant::now() < deadline, "no primary in time: {record:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until all members are in sync and served by a primary.
    pub(super) async fn whole(&self, set: ReplicaSetId) {
        self.until(set, "whole", |r| r.settled() && !r.recovering).await;
        self.serving(set).await;
    }

    /// Waits until all members have the same chunks, and returns these.
    pub(super) async fn converged(&self, set: ReplicaSetId) -> BTreeMap<ChunkId, Bytes> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let record = self.record(set).await;
            let mut copies = Vec::new();
            for (i, disk) in self.disks.iter().enumerate() {
                if !record.members.contains(&node(i)) {
                    continue;
                }
                let mut chunks = BTreeMap::new();
                for summary in disk.list(set).await.unwrap() {
                    let contents = disk.fetch(set, summary.chunk).await.unwrap();
                    chunks.insert(summary.chunk, (contents.version, contents.data));
                }
                copies.push(chunks);
            }
            if copies.iter().all(|copy| *copy == copies[0]) {
                return copies.remove(0).into_iter().map(|(c, (_, data))| (c, data)).collect();
            }
            assert!(Instant::now() < deadline, "copies differ: {:?}", differences(&copies));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(super) fn client(&self) -> Client {
        Client {
            store: Arc::clone(&self.store),
            keys: self.keys.clone(),
            addresses: Arc::clone(&self.addresses),
            channels: Arc::default(),
        }
    }
}

type Copy = BTreeMap<ChunkId, (lazarette_types::Version, Bytes)>;

fn differences(copies: &[Copy]) -> Vec<String> {
    let mut all: Vec<_> = copies.iter().flat_map(|copy| copy.keys().copied()).collect();
    all.sort();
    all.dedup();
    all.into_iter()
        .filter(|c| copies.iter().any(|copy| copy.get(c) != copies[0].get(c)))
        .map(|c| {
            let versions: Vec<_> = copies.iter().map(|copy| copy.get(&c).map(|(v, _)| *v)).collect();
            format!("{c}: {versions:?}")
        })
        .collect()
}

/// A client as the mount is one: finds the primary by the record, tries again on what is
/// retryable, and gives each attempt a limit.
#[derive(Clone)]
pub(super) struct Client {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    addresses: Arc<Mutex<HashMap<NodeId, String>>>,
    channels: Arc<Mutex<HashMap<String, Channel>>>,
}

impl Client {
    /// The primary and epoch by the store.
    async fn primary(&self, set: ReplicaSetId) -> (NodeId, u64) {
        let kv = self.store.get(&self.keys.replica_set(set)).await.unwrap().unwrap();
        let record: ReplicaSetRecord = decode(&kv.value).unwrap();
        (record.primary, record.epoch)
    }

    /// A client of a node.
    pub(super) fn of(&self, node: &NodeId) -> ChunkClient<Channel> {
        let address = self.addresses.lock().unwrap()[node].clone();
        let mut channels = self.channels.lock().unwrap();
        let channel = channels
            .entry(address.clone())
            .or_insert_with(|| dial_plain()(&address).unwrap());
        ChunkClient::new(channel.clone())
            .max_decoding_message_size(lazarette_proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(lazarette_proto::MAX_MESSAGE_BYTES)
    }

    /// One attempt at the present primary.
    async fn attempt<T, F: Future<Output = Result<tonic::Response<T>, Status>>>(
        &self,
        set: ReplicaSetId,
        call: impl FnOnce(ChunkClient<Channel>, u64) -> F,
    ) -> Result<T, ErrorCode> {
        let (primary, epoch) = self.primary(set).await;
        let client = self.of(&primary);
        match tokio::time::timeout(Duration::from_secs(4), call(client, epoch)).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(code_of(&status)),
            Err(_) => Err(ErrorCode::Unavailable),
        }
    }

    async fn persist<T, F: Future<Output = Result<T, ErrorCode>>>(&self, call: impl Fn() -> F) -> Result<T, ErrorCode> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match call().await {
                Err(code) if code.retryable() => {
                    assert!(Instant::now() < deadline, "no answer in time: {code:?}");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                result => return result,
            }
        }
    }

    pub(super) async fn write_once(
        &self,
        set: ReplicaSetId,
        chunk: ChunkId,
        offset: u32,
        data: &Bytes,
    ) -> Result<(), ErrorCode> {
        self.write_parts_once(set, chunk, &[(offset, data.clone())]).await
    }

    async fn write_parts_once(
        &self,
        set: ReplicaSetId,
        chunk: ChunkId,
        parts: &[(u32, Bytes)],
    ) -> Result<(), ErrorCode> {
        self.attempt(set, |mut client, epoch| {
            let mut request = parts_request(set, epoch, chunk, parts);
            async move {
                request.deadline = some_time(&mut client).await?;
                client.write(request).await
            }
        })
        .await
        .map(drop)
    }

    /// One write of several parts, until it is acknowledged or refused for good.
    pub(super) async fn write_parts(
        &self,
        set: ReplicaSetId,
        chunk: ChunkId,
        parts: &[(u32, Bytes)],
    ) -> Result<(), ErrorCode> {
        self.persist(|| self.write_parts_once(set, chunk, parts)).await
    }

    /// Until it is acknowledged, or refused for good.
    pub(super) async fn write(
        &self,
        set: ReplicaSetId,
        chunk: ChunkId,
        offset: u32,
        data: impl Into<Bytes>,
    ) -> Result<(), ErrorCode> {
        let data = data.into();
        self.persist(|| self.write_once(set, chunk, offset, &data)).await
    }

    pub(super) async fn read_once(&self, set: ReplicaSetId, chunk: ChunkId) -> Result<Bytes, ErrorCode> {
        let reply = self
            .attempt(set, |mut client, epoch| {
                let request = read_request(set, epoch, chunk);
                async move { client.read(request).await }
            })
            .await?;
        assert_eq!(crc32c(&reply.data), reply.crc);
        Ok(reply.data)
    }

    pub(super) async fn read(&self, set: ReplicaSetId, chunk: ChunkId) -> Result<Bytes, ErrorCode> {
        self.persist(|| self.read_once(set, chunk)).await
    }

    pub(super) async fn delete(&self, set: ReplicaSetId, chunk: ChunkId) -> Result<(), ErrorCode> {
        self.persist(|| async move {
            self.attempt(set, |mut client, epoch| async move {
                let request = pb::DeleteRequest {
                    replica_set: set.0,
                    epoch,
                    chunk: chunk_id(chunk),
                };
                client.delete(request).await
            })
            .await
            .map(drop)
        })
        .await
    }

    pub(super) async fn truncate(&self, set: ReplicaSetId, chunk: ChunkId, length: u32) -> Result<(), ErrorCode> {
        self.persist(|| async move {
            self.attempt(set, |mut client, epoch| async move {
                let request = pb::TruncateRequest {
                    replica_set: set.0,
                    epoch,
                    chunk: chunk_id(chunk),
                    length,
                    deadline: some_time(&mut client).await?,
                };
                client.truncate(request).await
            })
            .await
            .map(drop)
        })
        .await
    }
}

pub(super) fn chunk_id(chunk: ChunkId) -> Option<pb::ChunkId> {
    Some(pb::ChunkId {
        volume: chunk.volume.0,
        ino: chunk.ino.0,
        index: chunk.index,
    })
}

/// Without a deadline.
pub(super) fn write_request(
    set: ReplicaSetId,
    epoch: u64,
    chunk: ChunkId,
    offset: u32,
    data: &Bytes,
) -> pb::WriteRequest {
    parts_request(set, epoch, chunk, &[(offset, data.clone())])
}

pub(super) fn parts_request(set: ReplicaSetId, epoch: u64, chunk: ChunkId, parts: &[(u32, Bytes)]) -> pb::WriteRequest {
    let part = |(offset, data): &(u32, Bytes)| pb::WritePart {
        offset: *offset,
        crc: crc32c(data),
        data: data.clone(),
    };
    pb::WriteRequest {
        replica_set: set.0,
        epoch,
        chunk: chunk_id(chunk),
        parts: parts.iter().map(part).collect(),
        deadline: None,
    }
}

/// A deadline that does not matter.
pub(super) async fn some_time(client: &mut ChunkClient<Channel>) -> Result<Option<pb::Deadline>, Status> {
    let clock = client.clock(pb::ClockRequest {}).await?.into_inner().clock;
    Ok(Some(pb::Deadline { clock, at_ms: u64::MAX }))
}

pub(super) fn read_request(set: ReplicaSetId, epoch: u64, chunk: ChunkId) -> pb::ReadRequest {
    pb::ReadRequest {
        replica_set: set.0,
        epoch,
        chunk: chunk_id(chunk),
        offset: 0,
        length: 1 << 20,
    }
}
