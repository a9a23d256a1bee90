//! The failure story on a local cluster: what goes wrong while the verifier runs on several mounts of
//! one volume, and what must be true afterwards.
#![allow(clippy::unwrap_used)]

mod support;

use lazarette_e2e::faults::{Arena, Fault, Node};
use lazarette_e2e::local::Shape;
use lazarette_e2e::story::Quiet;
use std::time::Duration;
use support::Cluster;

async fn play(shape: Shape, faults: &[Fault]) {
    let cluster = Cluster::up_as(shape).await;
    let mut arena = Arena::new(&cluster.inner, 1, &Quiet).await.unwrap();
    for fault in faults {
        arena.inflict(*fault).await.unwrap();
    }
    arena.finish().await.unwrap();
    cluster.down().await;
}

#[tokio::test]
async fn storage_nodes_fail() {
    let faults = [
        Fault::KillNode(Node::Owner),
        Fault::KillNode(Node::Primary),
        Fault::PauseNode(Node::Owner),
        Fault::CutNode(Node::Primary, Duration::from_secs(30)),
        Fault::KillAllNodes,
    ];
    play(Arena::NETWORKS, &faults).await;
}

#[tokio::test]
async fn etcd_fails() {
    let faults = [
        Fault::KillEtcd,
        Fault::PauseEtcd,
        Fault::CutEtcd(Duration::from_secs(8)),
        Fault::KillAllEtcd,
        Fault::PowerCut,
    ];
    play(Arena::NETWORKS, &faults).await;
}

#[tokio::test]
async fn clients_fail() {
    let faults = [
        Fault::CutClient(1, Duration::from_secs(6)),
        Fault::PauseClient(2, Duration::from_secs(6)),
        Fault::LoseClient(0),
    ];
    play(Arena::NETWORKS, &faults).await;
}

#[tokio::test]
async fn disks_fail() {
    let shape = Shape {
        disk_mib: Some(512),
        ..Shape::default()
    };
    let faults = [Fault::LoseDisk(1), Fault::FillDisk(0), Fault::FillAllDisks];
    play(shape, &faults).await;
}
