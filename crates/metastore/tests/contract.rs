//! One contract for every metadata store: run on the store in memory and on a real etcd.
#![allow(clippy::unwrap_used)]

use lazarette_metastore::{
    Condition, EtcdConfig, EtcdStore, Event, MemoryStore, MetaStore, Op, StoreError, Txn, WatchBatch,
};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio_stream::StreamExt;

const DEADLINE: Duration = Duration::from_secs(30);

/// A real etcd, stopped when dropped.
struct Etcd {
    child: Child,
    client: String,
    _dir: tempfile::TempDir,
}

impl Etcd {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (client, peer) = (free_url(), free_url());
        let log = std::fs::File::create(dir.path().join("etcd.log")).unwrap();
        let child = Command::new(binary())
            .args(["--name=test", "--log-level=warn", "--unsafe-no-fsync"])
            // As the operator runs it.
            .arg("--grpc-keepalive-min-time=500ms")
            .arg(format!("--data-dir={}", dir.path().join("data").display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=test={peer}"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self {
            child,
            client,
            _dir: dir,
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("LAZARETTE_ETCD") {
        return path.into();
    }
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
    let cache = std::env::var_os("LAZARETTE_CACHE")
        .or_else(|| std::env::var_os("XDG_CACHE_HOME"))
        .map_or_else(|| home().join(".cache"), PathBuf::from);
    let path = cache.join("lazarette/bin/etcd");
    assert!(
        path.exists(),
        "no etcd at {}: run `cargo xtask tools`, or set LAZARETTE_ETCD",
        path.display()
    );
    path
}

fn free_url() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn memory_store_keeps_the_contract() {
    contract(&MemoryStore::new()).await;
}

#[tokio::test]
async fn etcd_keeps_the_contract() {
    let etcd = Etcd::start();
    contract(&connect(&etcd).await).await;
}

/// Signs of life that are asked for too often make etcd hang up: what has nothing to tell for a while
/// must not be taken for that.
#[tokio::test]
async fn etcd_does_not_hang_up_on_who_waits() {
    let etcd = Etcd::start();
    let (waiting, other) = (connect(&etcd).await, connect(&etcd).await);
    let mut stream = waiting.watch(b"quiet/", 0).await.unwrap();
    let silence = tokio::time::timeout(Duration::from_secs(8), stream.next()).await;
    assert!(silence.is_err(), "the watch ended: {silence:?}");
    other.txn(put_if_absent("quiet/a", "1")).await.unwrap();
    let batch = tokio::time::timeout(DEADLINE, stream.next()).await.expect("no event");
    assert_eq!(batch.unwrap().unwrap().events.len(), 1);
}

/// The machine of a member that hangs still accepts connections. At most one request waits for it.
#[tokio::test]
async fn a_member_that_hangs_is_left() {
    let etcd = Etcd::start();
    connect(&etcd).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let hung = format!("http://{}", listener.local_addr().unwrap());
    for endpoints in [[hung.clone(), etcd.client.clone()], [etcd.client.clone(), hung]] {
        let store = EtcdStore::connect(&EtcdConfig::new(endpoints.into())).await.unwrap();
        let mut failures = 0;
        for _ in 0..20 {
            failures += usize::from(store.get(b"x").await.is_err());
        }
        assert!(failures <= 1, "{failures} of 20 requests were not answered");
    }
}

async fn connect(etcd: &Etcd) -> EtcdStore {
    let store = EtcdStore::connect(&EtcdConfig::new(vec![etcd.client.clone()]))
        .await
        .unwrap();
    let up = async {
        while store.get(b"x").await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(DEADLINE, up).await.expect("etcd does not answer");
    store
}

async fn contract(store: &dyn MetaStore) {
    compare_and_swap(store).await;
    ranges(store).await;
    leases(store).await;
    watches(store).await;
}

fn put_if_absent(key: &str, value: &str) -> Txn {
    Txn {
        conditions: vec![Condition::absent(key)],
        then: vec![Op::put(key, value)],
    }
}

async fn compare_and_swap(store: &dyn MetaStore) {
    let first = store.txn(put_if_absent("cas/a", "1")).await.unwrap();
    assert!(first.succeeded);
    let kv = store.get(b"cas/a").await.unwrap().unwrap();
    assert_eq!((kv.create_revision, kv.mod_revision), (first.revision, first.revision));

    let again = store.txn(put_if_absent("cas/a", "2")).await.unwrap();
    assert!(!again.succeeded);
    assert_eq!(store.get(b"cas/a").await.unwrap().unwrap().value, b"1");

    let swap = |seen| Txn {
        conditions: vec![Condition::ModRevision("cas/a".into(), seen)],
        then: vec![Op::put("cas/a", "3"), Op::put("cas/b", "3")],
    };
    let swapped = store.txn(swap(kv.mod_revision)).await.unwrap();
    assert!(swapped.succeeded);
    assert!(!store.txn(swap(kv.mod_revision)).await.unwrap().succeeded);
    let kv = store.get(b"cas/a").await.unwrap().unwrap();
    assert_eq!(
        (kv.create_revision, kv.mod_revision),
        (first.revision, swapped.revision)
    );
    assert_eq!(
        store.get(b"cas/b").await.unwrap().unwrap().mod_revision,
        swapped.revision
    );

    let remove = Txn {
        conditions: vec![],
        then: vec![
            Op::Delete("cas/a".into()),
            Op::DeleteRange("cas/b".into(), "cas/c".into()),
        ],
    };
    assert!(store.txn(remove).await.unwrap().succeeded);
    assert_eq!(store.range(b"cas/").await.unwrap().0, vec![]);
}

async fn ranges(store: &dyn MetaStore) {
    // More than one page, and neighbours that must not be seen.
    for i in 0..200 {
        store.txn(put_if_absent(&format!("r/{i:03}"), "v")).await.unwrap();
    }
    store.txn(put_if_absent("r0", "no")).await.unwrap();
    let (found, revision) = store.range(b"r/").await.unwrap();
    assert_eq!(found.len(), 200);
    assert!(found.windows(2).all(|pair| pair[0].key < pair[1].key));
    assert!(found.iter().all(|kv| kv.mod_revision <= revision));
}

async fn leases(store: &dyn MetaStore) {
    let lease = store.grant(Duration::from_secs(2)).await.unwrap();
    let leased = |key: &str| Txn {
        conditions: vec![Condition::absent(key)],
        then: vec![Op::Put {
            key: key.into(),
            value: b"v".to_vec(),
            lease: Some(lease),
        }],
    };
    assert!(store.txn(leased("l/a")).await.unwrap().succeeded);
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        store.keep_alive(lease).await.unwrap();
    }
    assert!(store.get(b"l/a").await.unwrap().is_some(), "renewed but gone");

    let gone = async {
        while store.get(b"l/a").await.unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.expect("lease never ends");
    assert!(matches!(store.keep_alive(lease).await, Err(StoreError::LeaseExpired(l)) if l == lease));
    assert!(matches!(
        store.txn(leased("l/b")).await,
        Err(StoreError::LeaseExpired(_))
    ));
    store.revoke(lease).await.unwrap();

    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    let put = Txn {
        conditions: vec![],
        then: vec![Op::Put {
            key: b"l/c".to_vec(),
            value: b"v".to_vec(),
            lease: Some(lease),
        }],
    };
    store.txn(put).await.unwrap();
    store.revoke(lease).await.unwrap();
    assert_eq!(store.get(b"l/c").await.unwrap(), None);
}

async fn watches(store: &dyn MetaStore) {
    let first = store.txn(put_if_absent("w/a", "1")).await.unwrap().revision;
    let mut stream = store.watch(b"w/", first).await.unwrap();
    store.txn(put_if_absent("other", "1")).await.unwrap();
    let remove = Txn {
        conditions: vec![],
        then: vec![Op::Delete("w/a".into()), Op::put("w/b", "2")],
    };
    let second = store.txn(remove).await.unwrap().revision;

    let mut next = async || -> WatchBatch {
        let next = tokio::time::timeout(DEADLINE, stream.next()).await;
        next.expect("no event").expect("watch ended").unwrap()
    };
    let mut events = Vec::new();
    let mut revision = 0;
    while revision < second {
        let batch = next().await;
        assert!(batch.revision > revision);
        revision = batch.revision;
        events.extend(batch.events);
    }
    assert!(matches!(&events[0], Event::Put(kv) if kv.key == b"w/a" && kv.mod_revision == first));
    assert_eq!(events[1], Event::Delete(b"w/a".to_vec()));
    assert!(matches!(&events[2], Event::Put(kv) if kv.key == b"w/b"));
    assert_eq!(events.len(), 3);

    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    let leased = Txn {
        conditions: vec![],
        then: vec![Op::Put {
            key: b"w/c".to_vec(),
            value: vec![],
            lease: Some(lease),
        }],
    };
    store.txn(leased).await.unwrap();
    next().await;
    store.revoke(lease).await.unwrap();
    assert_eq!(next().await.events, vec![Event::Delete(b"w/c".to_vec())]);
}
