use super::*;
use crate::membership::Lease;
use crate::meta::chunks::{ChunkError, ChunkRemover};
use async_trait::async_trait;
use lazarette_metastore::{Keys, LivenessRecord, MemoryStore, MetaStore, Txn};
use lazarette_proto::meta::{Create, Kind, Request, StatFs, request::Op as Do, response::Result as Reply};
use lazarette_types::{InodeId, NodeId, ReplicaSetId, ReplicationPolicy, SessionId};

const DEADLINE: Duration = Duration::from_secs(60);

struct NoChunks;

#[async_trait]
impl ChunkRemover for NoChunks {
    async fn remove(&self, _: VolumeId, _: InodeId, _: u32, _: u32, _: u32) -> Result<(), ChunkError> {
        Ok(())
    }

    async fn truncate(&self, _: VolumeId, _: InodeId, _: u32, _: u32, _: u32) -> Result<(), ChunkError> {
        Ok(())
    }
}

struct Cluster {
    store: Arc<dyn MetaStore>,
    keys: Keys,
}

/// A storage node as far as metadata is concerned.
struct Node {
    shards: Arc<Shards>,
    lease: Lease,
    shutdown: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

impl Cluster {
    fn new() -> Self {
        Self {
            store: Arc::new(MemoryStore::new()),
            keys: Keys::new("c"),
        }
    }

    async fn put(&self, op: Op) {
        let txn = Txn {
            conditions: vec![],
            then: vec![op],
        };
        self.store.txn(txn).await.unwrap();
    }

    async fn volume(&self, id: u64, size: u64, state: VolumeState) {
        let record = VolumeRecord {
            id: VolumeId(id),
            name: format!("v{id}"),
            size,
            replication: ReplicationPolicy::default(),
            chunk_size: 1 << 20,
            replica_sets: vec![ReplicaSetId(1)],
            labels: Default::default(),
            state,
        };
        self.put(Op::put(self.keys.volume(VolumeId(id)), encode(&record))).await;
        let name = Op::put(self.keys.volume_name(&record.name), id.to_string());
        self.put(name).await;
    }

    async fn start(&self, name: &str) -> Node {
        let lease = Lease::acquire(Arc::clone(&self.store)).await.unwrap();
        let live = LivenessRecord {
            address: format!("{name}:7400"),
            lease: lease.id().0,
            capacity_bytes: 0,
            used_bytes: 0,
        };
        self.put(Op::Put {
            key: self.keys.node_live(&NodeId(name.into())),
            value: encode(&live),
            lease: Some(lease.id()),
        })
        .await;
        let view = ClusterView::follow(Arc::clone(&self.store), self.keys.clone())
            .await
            .unwrap();
        let context = OwnerContext {
            store: Arc::clone(&self.store),
            keys: self.keys.clone(),
            node: NodeId(name.into()),
            address: live.address,
            lease: lease.clone(),
            chunks: Arc::new(NoChunks),
            metrics: Arc::default(),
        };
        let shards = Arc::new(Shards::default());
        let shutdown = CancellationToken::new();
        let manager = Manager::new(context, Arc::clone(&shards), view).balance_every(Duration::from_millis(500));
        Node {
            shards,
            lease,
            running: tokio::spawn(manager.run(shutdown.clone())),
            shutdown,
        }
    }

    async fn has(&self, prefix: &[u8]) -> bool {
        !self.store.range(prefix).await.unwrap().0.is_empty()
    }
}

impl Node {
    fn serves(&self) -> usize {
        self.shards.all().iter().filter(|shard| !shard.has_ended()).count()
    }
}

async fn until(mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting)
        .await
        .expect("the condition holds");
}

#[tokio::test]
async fn volumes_spread_and_move_when_a_node_dies() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.start("a").await, cluster.start("b").await);
    for id in 1..=6 {
        cluster.volume(id, 1 << 30, VolumeState::Ready).await;
    }
    until(async || (a.serves(), b.serves()) == (3, 3)).await;
    // Dies without a word.
    a.lease.resign(&*cluster.store).await.unwrap();
    until(async || b.serves() == 6).await;
    // One that comes later gets its part.
    let c = cluster.start("c").await;
    until(async || (b.serves(), c.serves()) == (3, 3)).await;
    // One that leaves in good order gives everything up at once.
    b.shutdown.cancel();
    let left = Arc::clone(&b.shards);
    b.running.await.unwrap();
    assert!(left.all().is_empty());
    until(async || c.serves() == 6).await;
}

#[tokio::test]
async fn a_deleted_volume_leaves_nothing() {
    let cluster = Cluster::new();
    let a = cluster.start("a").await;
    cluster.volume(1, 1 << 30, VolumeState::Ready).await;
    cluster.volume(2, 1 << 30, VolumeState::Ready).await;
    until(async || a.serves() == 2).await;
    let shard = a.shards.get(VolumeId(1)).unwrap();
    shard.open_session(SessionId(5), "client".into()).await.unwrap();
    for op_id in 1..50 {
        let op = Do::Create(Create {
            parent: 1,
            name: format!("f{op_id}").into(),
            kind: Kind::File.into(),
            ..Create::default()
        });
        let request = Request {
            volume: 1,
            session: 5,
            op_id,
            ack_below: 0,
            handles: None,
            op: Some(op),
        };
        shard.call(request).await.unwrap();
    }
    until(async || cluster.has(&cluster.keys.usage(VolumeId(1))).await).await;
    cluster.volume(1, 1 << 30, VolumeState::Deleting).await;
    until(async || !cluster.has(&cluster.keys.volume(VolumeId(1))).await).await;
    let keys = &cluster.keys;
    let shard_keys = keys.shard(VolumeId(1)).all();
    for key in [
        shard_keys,
        keys.owner(VolumeId(1)),
        keys.usage(VolumeId(1)),
        keys.volume_name("v1"),
    ] {
        assert!(!cluster.has(&key).await, "{}", String::from_utf8_lossy(&key));
    }
    assert!(cluster.has(&keys.volume_name("v2")).await);
    until(async || a.serves() == 1).await;
    assert!(a.shards.get(VolumeId(1)).is_none());
}

#[tokio::test]
async fn a_volume_that_grows_grows_for_its_owner() {
    let cluster = Cluster::new();
    let a = cluster.start("a").await;
    cluster.volume(1, 1 << 30, VolumeState::Ready).await;
    until(async || a.serves() == 1).await;
    let shard = a.shards.get(VolumeId(1)).unwrap();
    shard.open_session(SessionId(5), "client".into()).await.unwrap();
    cluster.volume(1, 2 << 30, VolumeState::Ready).await;
    until(async || {
        let request = Request {
            volume: 1,
            session: 5,
            op: Some(Do::StatFs(StatFs {})),
            ..Request::default()
        };
        match shard.call(request).await.unwrap().result {
            Some(Reply::StatFs(reply)) => reply.size_bytes == 2 << 30,
            other => panic!("{other:?}"),
        }
    })
    .await;
}
