//! The storage part on a local cluster of real processes: etcd, three storage nodes, mount daemons.
#![allow(clippy::unwrap_used)]

mod support;

use lazarette_e2e::local::LocalCluster;
use lazarette_e2e::story::{self, Fault, Mounts, Quiet};
use std::fs::{self, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::process::Command;
use support::Cluster;

#[tokio::test]
async fn the_story() {
    let cluster = Cluster::up().await;
    story::play(&cluster.inner, &Quiet).await.unwrap();
    cluster.down().await;
}

#[tokio::test]
async fn data_survives_a_restart_of_everything() {
    let cluster = Cluster::up().await;
    let mounts = Mounts::new(&cluster.inner, "kept", 1).await.unwrap();
    let content = vec![42; 9 << 20];
    fs::write(mounts.path(0, "file"), &content).unwrap();
    fs::create_dir(mounts.path(0, "folder")).unwrap();
    cluster.inner.down().await.unwrap();
    assert_eq!(cluster.inner.processes().len(), 0);

    let again = LocalCluster::up(cluster.inner.dir(), None).await.unwrap();
    let mounts = Mounts::new(&again, "kept", 1).await.unwrap();
    assert!(fs::read(mounts.path(0, "file")).unwrap() == content);
    assert!(mounts.path(0, "folder").is_dir());
    cluster.down().await;
}

#[tokio::test]
async fn files_can_be_mapped() {
    let cluster = Cluster::up().await;
    let mounts = Mounts::new(&cluster.inner, "mapped", 2).await.unwrap();
    let script = "import mmap, sys
f = open(sys.argv[1], 'w+b'); f.truncate(8192)
m = mmap.mmap(f.fileno(), 8192)
m[0:5] = b'hello'; m[8187:8192] = b'world'; m.flush(); m.close(); f.close()";
    let python = Command::new("python3")
        .args(["-c", script])
        .arg(mounts.path(0, "m"))
        .output();
    let output = python.unwrap();
    assert!(output.status.success(), "{output:?}");
    let content = fs::read(mounts.path(1, "m")).unwrap();
    assert!(content.starts_with(b"hello") && content.ends_with(b"world") && content.len() == 8192);
    cluster.down().await;
}

#[tokio::test]
async fn clients_see_each_others_changes() {
    let cluster = Cluster::up().await;
    let mounts = Mounts::new(&cluster.inner, "shared", 2).await.unwrap();
    let (a, b) = (|name: &str| mounts.path(0, name), |name: &str| mounts.path(1, name));

    fs::write(a("f"), "one").unwrap();
    assert_eq!(fs::read_to_string(b("f")).unwrap(), "one");
    // Replaced by rename, the way editors do.
    fs::write(b("new"), "second").unwrap();
    fs::rename(b("new"), b("f")).unwrap();
    assert_eq!(fs::read_to_string(a("f")).unwrap(), "second");
    fs::write(b("f"), "3").unwrap();
    assert_eq!(fs::read_to_string(a("f")).unwrap(), "3");

    fs::hard_link(a("f"), a("g")).unwrap();
    assert_eq!(fs::metadata(b("f")).unwrap().nlink(), 2);
    std::os::unix::fs::symlink("g", b("s")).unwrap();
    assert_eq!(fs::read_to_string(a("s")).unwrap(), "3");
    fs::remove_file(a("f")).unwrap();
    assert!(!b("f").exists());

    // Truncated and grown again: the bytes between are zeros for everyone.
    fs::write(a("t"), vec![1; 5 << 20]).unwrap();
    let file = fs::OpenOptions::new().write(true).open(b("t")).unwrap();
    file.set_len(10).unwrap();
    file.set_len(5 << 20).unwrap();
    drop(file);
    let content = fs::read(a("t")).unwrap();
    assert!(content[..10].iter().all(|&byte| byte == 1) && content[10..].iter().all(|&byte| byte == 0));
    assert_eq!(content.len(), 5 << 20);

    // A file without a name gets one.
    let unnamed = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(0o20_200_000)
        .open(a(""))
        .unwrap();
    unnamed.write_all_at(b"first a file, then a name", 0).unwrap();
    assert_eq!(unnamed.metadata().unwrap().nlink(), 0);
    let path = format!("/proc/self/fd/{}", unnamed.as_raw_fd());
    rustix::fs::linkat(
        rustix::fs::CWD,
        path,
        rustix::fs::CWD,
        a("named"),
        rustix::fs::AtFlags::SYMLINK_FOLLOW,
    )
    .unwrap();
    drop(unnamed);
    assert_eq!(fs::read_to_string(b("named")).unwrap(), "first a file, then a name");

    // An open file outlives its name.
    let open = fs::File::open(a("t")).unwrap();
    fs::remove_file(b("t")).unwrap();
    assert_eq!(open.metadata().unwrap().len(), 5 << 20);
    let mut byte = [0];
    open.read_exact_at(&mut byte, 3).unwrap();
    assert_eq!(byte, [1]);
    cluster.down().await;
}

/// A stale owner or primary that wakes up changes nothing.
#[tokio::test]
async fn a_storage_node_may_stand_still() {
    let cluster = Cluster::up().await;
    let mounts = Mounts::new(&cluster.inner, "still", 2).await.unwrap();
    for node in 0..cluster.inner.nodes() {
        let folder = format!("paused-{node}");
        story::hurt_while_writing(&cluster.inner, &mounts, node, Fault::Pause, &folder, &Quiet)
            .await
            .unwrap();
    }
    cluster.down().await;
}

/// Each client knows names and attributes under leases when the other changes them.
#[tokio::test]
async fn changes_are_seen_at_once() {
    let cluster = Cluster::up().await;
    let mounts = Mounts::new(&cluster.inner, "leases", 2).await.unwrap();
    let size = |client, name: &str| fs::metadata(mounts.path(client, name)).ok().map(|found| found.len());
    fs::create_dir(mounts.path(0, "dir")).unwrap();
    for round in 0..200 {
        let (here, there) = (round % 2, 1 - round % 2);
        let (old, new) = (format!("dir/old-{round}"), format!("dir/new-{round}"));
        assert_eq!(size(there, &old), None);
        fs::write(mounts.path(here, &old), vec![1; round]).unwrap();
        assert_eq!([size(there, &old), size(here, &old)], [Some(round as u64); 2]);
        fs::write(mounts.path(there, &old), vec![2; 2 * round]).unwrap();
        assert_eq!(size(here, &old), Some(2 * round as u64), "round {round}");
        fs::rename(mounts.path(here, &old), mounts.path(here, &new)).unwrap();
        assert_eq!((size(there, &old), size(there, &new)), (None, Some(2 * round as u64)));
        fs::remove_file(mounts.path(there, &new)).unwrap();
        assert_eq!(size(here, &new), None, "round {round}");
    }
    cluster.down().await;
}
