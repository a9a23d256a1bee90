//! The store on a real folder.

use super::*;
use crate::chunk::contract;

fn node() -> NodeId {
    NodeId("storage-0".into())
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let store = FileChunkStore::open(dir.path(), "c", &node()).unwrap();
    contract::suite(&store).await;
    store.fold().await.unwrap();
    let rs = store.replica_sets().await.unwrap();
    let mut before = Vec::new();
    for &rs in &rs {
        before.push(store.list(rs).await.unwrap());
    }
    drop(store);
    let report = check(dir.path()).unwrap();
    assert_eq!(report.problems, []);
    let store = FileChunkStore::open(dir.path(), "c", &node()).unwrap();
    for (i, &rs) in rs.iter().enumerate() {
        assert_eq!(store.list(rs).await.unwrap(), before[i]);
    }
}
