use super::*;
use lazarette_metastore::{
    ActivityRecord, ClusterRecord, LivenessRecord, MemoryStore, NodeRecord, OwnerRecord, ReplicaSetRecord, ScrubRecord,
};
use lazarette_proto::code_of;

fn node(i: usize) -> NodeId {
    NodeId(format!("node-{i}"))
}

/// A cluster of nodes that all run.
struct Nodes {
    store: Arc<MemoryStore>,
    keys: Keys,
    service: ClusterService,
}

impl Nodes {
    async fn new(count: usize) -> Self {
        let (store, keys) = (Arc::new(MemoryStore::new()), Keys::new("c"));
        let record = ClusterRecord {
            id: "c".into(),
            next_volume: 1,
            next_replica_set: 1,
        };
        let mut then = vec![Op::put(keys.cluster(), encode(&record))];
        for i in 0..count {
            let record = NodeRecord {
                disk: format!("disk-{i}"),
                failure_domain: format!("zone-{i}"),
                draining: false,
            };
            let live = LivenessRecord {
                address: format!("node-{i}:7400"),
                lease: 1,
                capacity_bytes: 1 << 40,
                used_bytes: 0,
            };
            then.push(Op::put(keys.node(&node(i)), encode(&record)));
            then.push(Op::put(keys.node_live(&node(i)), encode(&live)));
        }
        let nodes = Self {
            service: ClusterService::new(
                store.clone(),
                keys.clone(),
                "c".into(),
                ClusterView::follow(store.clone(), keys.clone()).await.unwrap(),
                ReplicationPolicy::default(),
            ),
            store,
            keys,
        };
        nodes.change(then).await;
        nodes
    }

    async fn change(&self, then: Vec<Op>) {
        let conditions = vec![];
        self.store.txn(Txn { conditions, then }).await.unwrap();
    }

    async fn drain(&self, node: &NodeId) -> Result<(), Status> {
        let request = pb::DrainNodeRequest { node: node.0.clone() };
        self.service.drain_node(Request::new(request)).await.map(drop)
    }

    async fn forget(&self, node: &NodeId) -> Result<(), Status> {
        let request = pb::ForgetNodeRequest { node: node.0.clone() };
        self.service.forget_node(Request::new(request)).await.map(drop)
    }

    async fn record(&self, node: &NodeId) -> Option<NodeRecord> {
        let kv = self.store.get(&self.keys.node(node)).await.unwrap()?;
        Some(decode(&kv.value).unwrap())
    }

    /// The status of a node, once this is true of it.
    async fn status(&self, node: &NodeId, is: impl Fn(&pb::NodeStatus) -> bool) -> pb::NodeStatus {
        let wait = async {
            loop {
                let status = self.service.get_status(Request::new(pb::GetStatusRequest {})).await;
                let found = status.unwrap().into_inner().nodes.into_iter().find(|n| n.id == node.0);
                if let Some(found) = found.filter(&is) {
                    return found;
                }
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), wait)
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn draining_is_marked_reported_and_taken_back() {
    let nodes = Nodes::new(4).await;
    let sets = ensure_table(&*nodes.store, &nodes.keys, ReplicationPolicy::default())
        .await
        .unwrap();
    assert_eq!(sets.len(), 16);
    nodes.drain(&node(3)).await.unwrap();
    nodes.drain(&node(3)).await.unwrap();
    let status = nodes.status(&node(3), |node| node.draining).await;
    assert_eq!((status.replica_sets, status.safe_to_remove), (12, false));
    // No new sets on it.
    let policy = ReplicationPolicy { copies: 2, ack: 2 };
    let two = ensure_table(&*nodes.store, &nodes.keys, policy).await.unwrap();
    for set in two {
        let kv = nodes.store.get(&nodes.keys.replica_set(set)).await.unwrap().unwrap();
        let record: ReplicaSetRecord = decode(&kv.value).unwrap();
        assert!(!record.involves(&node(3)));
    }
    // Nothing refers to it but a volume's metadata, then nothing at all.
    let owner = OwnerRecord {
        node: node(3),
        address: String::new(),
        epoch: 1,
    };
    let mut then = vec![Op::put(nodes.keys.owner(VolumeId(1)), encode(&owner))];
    then.extend(sets.iter().map(|set| Op::Delete(nodes.keys.replica_set(*set))));
    nodes.change(then).await;
    let status = nodes.status(&node(3), |node| node.replica_sets == 0).await;
    assert_eq!((status.owned_volumes, status.safe_to_remove), (1, false));
    nodes.change(vec![Op::Delete(nodes.keys.owner(VolumeId(1)))]).await;
    nodes.status(&node(3), |node| node.safe_to_remove).await;
    assert!(!nodes.status(&node(0), |_| true).await.safe_to_remove);

    let request = pb::UndrainNodeRequest { node: node(3).0 };
    nodes.service.undrain_node(Request::new(request)).await.unwrap();
    let status = nodes.status(&node(3), |node| !node.draining).await;
    assert!(!status.safe_to_remove);
}

#[tokio::test]
async fn draining_is_refused_when_too_few_nodes_would_remain() {
    let nodes = Nodes::new(4).await;
    ensure_table(&*nodes.store, &nodes.keys, ReplicationPolicy::default())
        .await
        .unwrap();
    let unknown = nodes.drain(&node(9)).await.unwrap_err();
    assert_eq!(code_of(&unknown), ErrorCode::InvalidArgument);
    assert!(unknown.message().contains("\"node-9\""), "{}", unknown.message());
    // Two at once: one of them at most.
    let (a, b) = (node(2), node(3));
    let (a, b) = tokio::join!(nodes.drain(&a), nodes.drain(&b));
    assert_eq!([a.is_ok(), b.is_ok()].iter().filter(|ok| **ok).count(), 1);
    let refused = a.err().or(b.err()).unwrap();
    assert_eq!(code_of(&refused), ErrorCode::InsufficientNodes);
    assert!(refused.message().contains("2 would run"), "{}", refused.message());
    assert_eq!(
        code_of(&nodes.drain(&node(0)).await.unwrap_err()),
        ErrorCode::InsufficientNodes
    );
    assert!(!nodes.record(&node(0)).await.unwrap().draining);
    // Nor do those that are away count.
    let nodes = Nodes::new(4).await;
    ensure_table(&*nodes.store, &nodes.keys, ReplicationPolicy::default())
        .await
        .unwrap();
    nodes.change(vec![Op::Delete(nodes.keys.node_live(&node(1)))]).await;
    assert_eq!(
        code_of(&nodes.drain(&node(3)).await.unwrap_err()),
        ErrorCode::InsufficientNodes
    );
}

#[tokio::test]
async fn only_a_node_that_is_gone_and_holds_nothing_is_forgotten() {
    let nodes = Nodes::new(4).await;
    let sets = ensure_table(&*nodes.store, &nodes.keys, ReplicationPolicy::default())
        .await
        .unwrap();
    assert!(nodes.forget(&node(3)).await.unwrap_err().message().contains("is live"));
    nodes.change(vec![Op::Delete(nodes.keys.node_live(&node(3)))]).await;
    let held = nodes.forget(&node(3)).await.unwrap_err();
    assert_eq!(code_of(&held), ErrorCode::Unavailable);
    assert!(held.message().contains("in 12 replica sets"), "{}", held.message());
    let gone = sets.iter().map(|set| Op::Delete(nodes.keys.replica_set(*set)));
    nodes.change(gone.collect()).await;
    nodes.forget(&node(3)).await.unwrap();
    nodes.forget(&node(3)).await.unwrap();
    assert_eq!(nodes.record(&node(3)).await, None);
}

#[tokio::test]
async fn background_work_is_reported_while_the_node_and_its_disk_are_there() {
    let nodes = Nodes::new(3).await;
    let activity = |disk: &str| ActivityRecord {
        disk: disk.into(),
        repair_chunks: 3,
        repair_bytes: 9,
        scrub: ScrubRecord {
            verified_bytes: 5,
            found: 2,
            ..ScrubRecord::default()
        },
    };
    let report = |disk| vec![Op::put(nodes.keys.activity(&node(0)), encode(&activity(disk)))];
    assert_eq!(nodes.status(&node(0), |node| node.live).await.scrub, None);
    nodes.change(report("disk-0")).await;
    let status = nodes.status(&node(0), |_| true).await;
    assert_eq!((status.repair_chunks, status.repair_bytes), (3, 9));
    assert_eq!(
        status.scrub.map(|scrub| (scrub.verified_bytes, scrub.found)),
        Some((5, 2))
    );
    nodes.change(vec![Op::Delete(nodes.keys.node_live(&node(0)))]).await;
    let status = nodes.status(&node(0), |node| !node.live).await;
    assert_eq!(status.repair_bytes, 0);
    nodes.change(report("another")).await;
    assert_eq!(nodes.status(&node(0), |_| true).await.scrub, None);
}
