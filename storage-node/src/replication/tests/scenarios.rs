use super::faults::LinkState;
use super::harness::{Cluster, chunk, node, quick};
use bytes::Bytes;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_are_read_and_reach_all_members() {
    let cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    client.write(set, chunk(2, 0), 0, "hello world").await.unwrap();
    client.write(set, chunk(2, 0), 6, "there").await.unwrap();
    assert_eq!(client.read(set, chunk(2, 0)).await.unwrap(), "hello there");
    client.truncate(set, chunk(2, 0), 5).await.unwrap();
    assert_eq!(client.read(set, chunk(2, 0)).await.unwrap(), "hello");
    client.write(set, chunk(2, 1), 2, "x").await.unwrap();
    client.delete(set, chunk(2, 0)).await.unwrap();
    assert_eq!(client.read(set, chunk(2, 0)).await.unwrap(), "");
    let copies = cluster.converged(set).await;
    assert_eq!(copies.len(), 1);
    assert_eq!(&copies[&chunk(2, 1)][..], b"\0\0x");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_primary_is_replaced_and_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::start(3, quick()).await;
    let table = cluster.table(3, 2).await;
    let set = table[0];
    assert_eq!(cluster.serving(set).await, 0);
    let client = cluster.client();
    // The third copy hears nothing of these.
    cluster.link(0, 2, LinkState::Paused);
    for i in 0..20 {
        client.write(set, chunk(2, i), 0, format!("chunk {i}")).await.unwrap();
    }
    cluster.kill(0).await;
    cluster.link(0, 2, LinkState::Up);
    for i in 0..20 {
        assert_eq!(client.read(set, chunk(2, i)).await.unwrap(), format!("chunk {i}"));
    }
    // Writes go on with two, also in the other sets.
    for set in &table {
        client.write(*set, chunk(3, 0), 0, "after").await.unwrap();
    }
    let record = cluster.record(set).await;
    assert_eq!(record.in_sync, [node(1), node(2)]);
    // The dead one returns with what it had and catches up.
    cluster.start_node(0).await;
    for set in &table {
        cluster.whole(*set).await;
        cluster.converged(*set).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_restarted_before_anyone_noticed_finds_what_only_others_have() {
    let mut cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    cluster.link(0, 2, LinkState::Paused);
    client
        .write(set, chunk(2, 0), 0, Bytes::from_static(b"acknowledged"))
        .await
        .unwrap();
    let before = cluster.record(set).await;
    // Its lease goes on, so no other primary is made, but what it knew of deliveries is gone.
    cluster.kill_quietly(0).await;
    cluster.link(0, 2, LinkState::Up);
    cluster.start_node(0).await;
    cluster
        .until(set, "claimed", |r| r.epoch > before.epoch && !r.recovering)
        .await;
    cluster.whole(set).await;
    assert_eq!(client.read(set, chunk(2, 0)).await.unwrap(), "acknowledged");
    cluster.converged(set).await;
}
