//! A cluster that loses a storage node, gets flipped bits, grows and shrinks under a running writer.
#![allow(clippy::unwrap_used)]

mod support;

use anyhow::{Result, ensure};
use lazarette_e2e::local::{LocalCluster, Shape, node_name};
use lazarette_e2e::story::{Mounts, Writer};
use lazarette_e2e::{Deadline, wait_for};
use lazarette_proto::cluster::{ClusterStatus, DrainNodeRequest, ForgetNodeRequest, NodeStatus};
use lazarette_workload::verify;
use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::Cluster;

/// Files of 1 to 3 MiB.
const FILES: usize = 24;
/// Where the data begins in a chunk file.
const DATA: u64 = 69632;

fn content(file: usize) -> Vec<u8> {
    let length = (1 << 20) + file * 90_001;
    (0..length).map(|at| (at * 31 + at / 4096 + file * 7) as u8).collect()
}

/// Reads everything as a client that has nothing cached.
async fn read_all(cluster: &LocalCluster, name: &str) {
    let folder = cluster.dir().join("mnt").join(name);
    cluster.mount("data", &folder).await.unwrap();
    for file in 0..FILES {
        let found = fs::read(folder.join(format!("file-{file}"))).unwrap();
        assert!(found == content(file), "file {file} reads differently");
    }
    cluster.umount(&folder).await.unwrap();
}

/// Waits for a state of the cluster.
async fn until(cluster: &LocalCluster, what: &str, is: impl Fn(&ClusterStatus) -> Result<()>) -> ClusterStatus {
    let deadline = Deadline::secs(180).logs(cluster.dir().join("logs"));
    wait_for(deadline, what, || async {
        let status = cluster.status().await?;
        is(&status)?;
        Ok(Some(status))
    })
    .await
    .unwrap()
}

fn at_rest(status: &ClusterStatus) -> Result<()> {
    ensure!(
        status.degraded_replica_sets == 0
            && status.unavailable_replica_sets == 0
            && status.moving_replica_sets == 0
            && status.repair_bytes == 0,
        "{status:?}"
    );
    Ok(())
}

fn node(status: &ClusterStatus, index: usize) -> &NodeStatus {
    status.nodes.iter().find(|node| node.id == node_name(index)).unwrap()
}

/// The chunk files of a storage node, the largest first.
fn chunk_files(cluster: &LocalCluster, index: usize) -> Vec<PathBuf> {
    fn walk(folder: &Path, into: &mut Vec<(u64, PathBuf)>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(found) if found.is_dir() => walk(&entry.path(), into),
                Ok(found) => into.push((found.len(), entry.path())),
                Err(_) => {}
            }
        }
    }
    let mut files = Vec::new();
    walk(&cluster.dir().join(node_name(index)).join("chunks"), &mut files);
    files.sort();
    files.into_iter().rev().map(|(_, path)| path).collect()
}

async fn kill(cluster: &LocalCluster, index: usize) {
    let process = cluster.node(index).unwrap();
    process.signal(Signal::KILL).unwrap();
    process.wait(Duration::from_secs(20)).await.unwrap();
}

#[tokio::test]
async fn the_cluster_heals_grows_and_shrinks_while_it_is_written() {
    let shape = Shape {
        storage_nodes: 4,
        node_args: &["--replace-after=3s", "--scrub-every=1s", "--scrub-rate=400"],
        ..Shape::default()
    };
    let cluster = Cluster::up_as(shape).await;
    let inner = &cluster.inner;
    let mounts = Mounts::new(inner, "data", 2).await.unwrap();
    for file in 0..FILES {
        fs::write(mounts.path(0, &format!("file-{file}")), content(file)).unwrap();
    }
    let writer = Writer::start(mounts.path(1, "steady"));
    writer.progress(inner, 20).await.unwrap();

    // A storage node never comes back.
    kill(inner, 3).await;
    let status = until(inner, "whole without storage-3", |status| {
        at_rest(status)?;
        ensure!(node(status, 3).replica_sets == 0, "{status:?}");
        Ok(())
    })
    .await;
    assert_eq!((status.missing_copies, node(&status, 3).live), (0, false));
    read_all(inner, "after-loss").await;
    writer.progress(inner, 20).await.unwrap();

    // Bits flip on a disk, and a file vanishes. Chunk files are written some seconds after the log.
    let deadline = Deadline::secs(60).logs(inner.dir().join("logs"));
    let files = wait_for(deadline, "chunk files", || async {
        let files = chunk_files(inner, 1);
        ensure!(files.len() >= 5, "{} files", files.len());
        Ok(Some(files))
    })
    .await
    .unwrap();
    for (path, at) in [(&files[0], 5000), (&files[1], 300_000)] {
        let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, DATA + at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], DATA + at).unwrap();
    }
    fs::remove_file(&files[2]).unwrap();
    until(inner, "three damaged copies repaired", |status| {
        let scrub = node(status, 1).scrub.unwrap_or_default();
        // Reads may have met one of them first.
        ensure!(
            scrub.found >= 1 && scrub.repaired == scrub.found && scrub.lost == 0,
            "{status:?}"
        );
        let present = chunk_files(inner, 1);
        for damaged in &files[..3] {
            // In another file, of the same chunk.
            let again = present.iter().any(|file| file.file_stem() == damaged.file_stem());
            let replaced = again && !damaged.exists();
            ensure!(replaced, "{} is not replaced", damaged.display());
        }
        Ok(())
    })
    .await;
    // Every byte of every copy, by the offline check.
    kill(inner, 1).await;
    fsck(inner, 1);
    inner.start_node(1).await.unwrap();
    writer.progress(inner, 20).await.unwrap();

    // A fifth node; the lost one returns as well, with what it had.
    let grown = LocalCluster::up(inner.dir(), Some(5)).await.unwrap();
    let status = until(&grown, "shares for all five", |status| {
        at_rest(status)?;
        let least = status.nodes.iter().map(|node| node.replica_sets).min().unwrap_or(0);
        let fair = status.replica_sets * 3 / 5;
        ensure!(status.nodes.len() == 5 && least + 3 >= fair, "{status:?}");
        Ok(())
    })
    .await;
    assert!(status.nodes.iter().all(|node| node.live), "{status:?}");
    read_all(&grown, "after-growth").await;
    writer.progress(&grown, 20).await.unwrap();

    // One is to leave.
    let mut client = grown.client().await.unwrap();
    let leaving = node_name(0);
    let request = DrainNodeRequest { node: leaving.clone() };
    client.drain_node(request).await.unwrap();
    let status = until(&grown, "storage-0 holds nothing", |status| {
        at_rest(status)?;
        ensure!(node(status, 0).safe_to_remove, "{status:?}");
        Ok(())
    })
    .await;
    let drained = node(&status, 0);
    assert_eq!(
        (
            drained.replica_sets,
            drained.primary_replica_sets,
            drained.owned_volumes
        ),
        (0, 0, 0)
    );
    writer.progress(&grown, 20).await.unwrap();
    kill(&grown, 0).await;
    let deadline = Deadline::secs(60).logs(grown.dir().join("logs"));
    wait_for(deadline, "storage-0 to be forgotten", || async {
        let request = ForgetNodeRequest { node: leaving.clone() };
        grown.client().await?.forget_node(request).await?;
        Ok(Some(()))
    })
    .await
    .unwrap();
    let status = until(&grown, "four storage nodes", at_rest).await;
    assert_eq!(status.nodes.len(), 4);
    read_all(&grown, "after-drain").await;

    writer.progress(&grown, 20).await.unwrap();
    let report = writer.stop().await.unwrap();
    assert!(
        report.errors.is_empty(),
        "the application saw errors: {:?}",
        report.errors
    );
    eprintln!(
        "{} records, longest stall {} ms",
        report.acknowledged, report.longest_ms
    );
    verify(&mounts.path(0, "steady"), report.acknowledged).unwrap();
    cluster.down().await;
}

/// The offline check of a storage node's disk finds nothing wrong.
fn fsck(cluster: &LocalCluster, index: usize) {
    let output = std::process::Command::new(lazarette_e2e::build::release_dir().join("lazarette-node"))
        .arg("fsck")
        .arg(cluster.dir().join(node_name(index)))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}
