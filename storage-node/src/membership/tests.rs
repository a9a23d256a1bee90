use super::*;
use lazarette_metastore::{
    Keys, LivenessRecord, MemoryStore, MetaStore, NodeRecord, Op, ReplicaSetRecord, Txn, decode, encode,
};
use lazarette_types::{NodeId, ReplicaSetId, ReplicationPolicy};
use std::sync::Arc;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(20);

fn registration(disk: &str) -> Registration {
    Registration {
        node: NodeId("n1".into()),
        address: "10.0.0.1:7400".into(),
        failure_domain: "zone-a".into(),
        disk: disk.into(),
    }
}

async fn put(store: &MemoryStore, key: Vec<u8>, value: Vec<u8>) {
    let txn = Txn {
        conditions: vec![],
        then: vec![Op::put(key, value)],
    };
    store.txn(txn).await.unwrap();
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn the_cluster_gets_one_identity() {
    let (store, keys) = (MemoryStore::new(), Keys::new("c"));
    let (a, b) = tokio::join!(ensure_cluster(&store, &keys), ensure_cluster(&store, &keys));
    assert_eq!(a.unwrap(), b.unwrap());
}

#[tokio::test]
async fn a_lease_that_cannot_be_renewed_is_not_valid_before_the_store_gives_it_up() {
    let store = Arc::new(MemoryStore::new());
    let lease = Lease::acquire_for(store.clone(), Duration::from_millis(900))
        .await
        .unwrap();
    assert!(lease.valid());
    store.set_unavailable(true);
    until("invalid", async || !lease.valid()).await;
    store.set_unavailable(false);
    // Either it was renewed in time, or it has ended for good.
    tokio::select! {
        () = lease.ended() => assert!(!lease.valid()),
        () = until("valid again", async || lease.valid()) => {}
    }
}

#[tokio::test]
async fn a_lease_ended_by_the_store_is_never_valid_again() {
    let store = Arc::new(MemoryStore::new());
    let lease = Lease::acquire(store.clone()).await.unwrap();
    store.expire(lease.id());
    tokio::time::timeout(DEADLINE, lease.ended()).await.unwrap();
    assert!(!lease.valid());
}

#[tokio::test]
async fn a_resigned_lease_takes_its_keys_along() {
    let (store, keys) = (Arc::new(MemoryStore::new()), Keys::new("c"));
    let lease = Lease::acquire(store.clone()).await.unwrap();
    let me = registration("d1");
    me.join(&*store, &keys, &lease, (1, 0)).await.unwrap();
    assert!(store.get(&keys.node_live(&me.node)).await.unwrap().is_some());
    lease.resign(&*store).await.unwrap();
    assert!(!lease.valid());
    assert!(store.get(&keys.node_live(&me.node)).await.unwrap().is_none());
}

#[tokio::test]
async fn the_next_process_on_the_same_disk_need_not_wait() {
    let (store, keys) = (Arc::new(MemoryStore::new()), Keys::new("c"));
    let me = registration("d1");
    let killed = Lease::acquire(store.clone()).await.unwrap();
    me.join(&*store, &keys, &killed, (1, 0)).await.unwrap();
    let next = Lease::acquire(store.clone()).await.unwrap();
    me.join(&*store, &keys, &next, (1, 0)).await.unwrap();
    let live: LivenessRecord = decode(&store.get(&keys.node_live(&me.node)).await.unwrap().unwrap().value).unwrap();
    assert_eq!(live.lease, next.id().0);
    tokio::time::timeout(DEADLINE, killed.ended()).await.unwrap();
}

#[tokio::test]
async fn a_new_disk_waits_until_nobody_counts_on_the_old_one() {
    let (store, keys) = (Arc::new(MemoryStore::new()), Keys::new("c"));
    let me = registration("d2");
    let old = NodeRecord {
        disk: "d1".into(),
        failure_domain: "zone-a".into(),
        draining: false,
    };
    put(&store, keys.node(&me.node), encode(&old)).await;
    let mut set = ReplicaSetRecord {
        id: ReplicaSetId(1),
        epoch: 1,
        replication: ReplicationPolicy { copies: 2, ack: 1 },
        members: vec![me.node.clone(), NodeId("n2".into())],
        in_sync: vec![me.node.clone(), NodeId("n2".into())],
        primary: NodeId("n2".into()),
        recovering: false,
        recovery_quorum: 0,
    };
    put(&store, keys.replica_set(set.id), encode(&set)).await;

    let lease = Lease::acquire(store.clone()).await.unwrap();
    let joining = tokio::spawn({
        let (store, keys, lease, me) = (store.clone(), keys.clone(), lease.clone(), me.clone());
        async move { me.join(&*store, &keys, &lease, (1, 0)).await }
    });
    // It has looked at least once: its lease is there, its liveness is not.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(store.get(&keys.node_live(&me.node)).await.unwrap().is_none());
    set.in_sync.remove(0);
    put(&store, keys.replica_set(set.id), encode(&set)).await;
    tokio::time::timeout(DEADLINE, joining).await.unwrap().unwrap().unwrap();
    let record: NodeRecord = decode(&store.get(&keys.node(&me.node)).await.unwrap().unwrap().value).unwrap();
    assert_eq!(record.disk, "d2");
}

#[tokio::test]
async fn the_view_follows_the_store() {
    let (store, keys) = (Arc::new(MemoryStore::new()), Keys::new("c"));
    put(&store, keys.node(&NodeId("n0".into())), b"not a record".to_vec()).await;
    let mut view = ClusterView::follow(store.clone(), keys.clone()).await.unwrap();
    assert!(view.borrow().nodes.is_empty());
    let lease = Lease::acquire(store.clone()).await.unwrap();
    let me = registration("d1");
    me.join(&*store, &keys, &lease, (7, 3)).await.unwrap();
    let seen = view.wait_for(|view| view.live.contains_key(&me.node));
    let seen = tokio::time::timeout(DEADLINE, seen).await.unwrap().unwrap().clone();
    assert_eq!(seen.live[&me.node].used_bytes, 3);
    assert_eq!(seen.nodes[&me.node].disk, "d1");
    lease.resign(&*store).await.unwrap();
    let gone = view.wait_for(|view| view.live.is_empty());
    tokio::time::timeout(DEADLINE, gone).await.unwrap().unwrap();
}
