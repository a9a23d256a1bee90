//! Open files and what is known of the volume when another client comes, and when the owner changes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bytes::Bytes;
use lazarette_client::testing::{At, Fault, TestCluster, VOLUME, eventually, mount};
use lazarette_client::{Cluster, File, Kind, NewNode, OpenMode, Volume, VolumeOptions};
use lazarette_types::ROOT_INODE;
use std::time::Duration;

const ROOT: u64 = ROOT_INODE.0;

/// Long enough for what is between a grant and its use here, short enough to wait for.
async fn start(nodes: usize) -> TestCluster {
    let cluster = TestCluster::start(nodes).await;
    cluster.set_cache_ttl(Duration::from_millis(300));
    cluster
}

async fn create(volume: &Volume, name: &str) -> File {
    let node = NewNode::new(Kind::File, 0o644);
    let created = volume.create(ROOT, name.as_bytes(), node, true, OpenMode::default());
    created.await.unwrap().0
}

async fn make(volume: &Volume, name: &str, text: &str) -> u64 {
    let file = create(volume, name).await;
    file.write(0, text.as_bytes()).await.unwrap();
    file.close().await.unwrap();
    file.ino()
}

/// Opens a file until that happens without asking the owner: on a slow machine the grant may have run out.
async fn open_without_a_word(cluster: &TestCluster, volume: &Volume, ino: u64) -> File {
    loop {
        volume.get_attr(ino).await.unwrap();
        let before = cluster.count(At::Call);
        let (file, _) = volume.open(ino, OpenMode::default()).await.unwrap();
        if cluster.count(At::Call) == before {
            return file;
        }
        file.close().await.unwrap();
        volume.stat_fs().await.unwrap();
    }
}

#[tokio::test]
async fn what_was_opened_without_a_word_is_kept_when_another_client_unlinks_it() {
    let cluster = start(1).await;
    let one = mount(&cluster).await;
    let ino = make(&one, "f", "still here").await;
    // The close is told, so that the owner knows of nothing.
    one.stat_fs().await.unwrap();
    assert_eq!(cluster.open_inodes(), [0_u64; 0]);
    let file = open_without_a_word(&cluster, &one, ino).await;
    let two = mount(&cluster).await;
    two.unlink(ROOT, b"f").await.unwrap();
    assert!(cluster.exists(ino));
    assert_eq!(file.read(0, 100).await.unwrap(), "still here");
    eventually("the first client says what it has open", || {
        cluster.open_inodes() == [ino]
    })
    .await;
    assert!(cluster.exists(ino));
    assert_eq!(file.read(0, 100).await.unwrap(), "still here");
    file.close().await.unwrap();
    eventually("the file is given up", || !cluster.exists(ino)).await;
}

#[tokio::test]
async fn what_this_client_unlinks_while_it_is_open_is_kept() {
    let cluster = start(1).await;
    let volume = mount(&cluster).await;
    let (ino, other) = (make(&volume, "f", "one").await, make(&volume, "g", "two").await);
    let file = open_without_a_word(&cluster, &volume, ino).await;
    volume.unlink(ROOT, b"f").await.unwrap();
    assert!(cluster.exists(ino));
    assert_eq!(file.read(0, 100).await.unwrap(), "one");
    let replaced = open_without_a_word(&cluster, &volume, other).await;
    make(&volume, "h", "three").await;
    volume.rename((ROOT, b"h"), (ROOT, b"g"), false, false).await.unwrap();
    assert_eq!(replaced.read(0, 100).await.unwrap(), "two");
    // Of what has no name any more the owner hears at once.
    for file in [file, replaced] {
        file.close().await.unwrap();
        assert!(!cluster.exists(file.ino()));
    }
}

#[tokio::test]
async fn a_close_is_told_in_passing_or_after_a_while() {
    let cluster = start(1).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    let ino = file.ino();
    assert_eq!(cluster.open_inodes(), [ino]);
    let calls = cluster.count(At::Call);
    file.close().await.unwrap();
    assert_eq!(cluster.count(At::Call), calls);
    volume.stat_fs().await.unwrap();
    assert_eq!(cluster.open_inodes(), [0_u64; 0]);
    let (again, _) = volume.open(ino, OpenMode::default()).await.unwrap();
    eventually("the owner hears of it, though nothing else is sent", || {
        cluster.open_inodes() == [ino]
    })
    .await;
    let before = cluster.count(At::Report);
    cluster.inject(At::Report, Fault::LoseReply);
    again.close().await.unwrap();
    eventually("and of the close", || cluster.open_inodes().is_empty()).await;
    eventually("again, as the answer was lost", || {
        cluster.count(At::Report) >= before + 2
    })
    .await;
}

#[tokio::test]
async fn a_lost_answer_to_an_open_or_close_changes_nothing() {
    let cluster = start(1).await;
    let (one, _two) = (mount(&cluster).await, mount(&cluster).await);
    let ino = make(&one, "f", "text").await;
    one.stat_fs().await.unwrap();
    for _ in 0..3 {
        cluster.inject(At::Call, Fault::LoseReply);
        let (file, _) = one.open(ino, OpenMode::default()).await.unwrap();
        assert_eq!(
            cluster.open_inodes(),
            [ino],
            "one of several clients asks, or the owner knows"
        );
        file.close().await.unwrap();
        cluster.inject(At::Call, Fault::LoseReply);
        one.stat_fs().await.unwrap();
        assert_eq!(cluster.open_inodes(), [0_u64; 0]);
    }
}

#[tokio::test]
async fn a_new_owner_hears_of_what_was_opened_without_a_word() {
    let cluster = start(2).await;
    let volume = mount(&cluster).await;
    let ino = make(&volume, "f", "text").await;
    volume.stat_fs().await.unwrap();
    let file = open_without_a_word(&cluster, &volume, ino).await;
    cluster.move_owner(1, true);
    eventually("it is registered", || cluster.registrations().contains(&vec![ino])).await;
    volume.unlink(ROOT, b"f").await.unwrap();
    assert_eq!(file.read(0, 100).await.unwrap(), "text");
    file.close().await.unwrap();
    eventually("the file is given up", || !cluster.exists(ino)).await;
}

#[tokio::test]
async fn what_a_sole_client_knew_it_asks_for_when_it_has_company() {
    let cluster = start(1).await;
    let one = mount(&cluster).await;
    let ino = make(&one, "f", "text").await;
    one.read_dir(ROOT, 0, 100).await.unwrap();
    assert!(one.lookup(ROOT, b"g").await.is_err());
    let two = mount(&cluster).await;
    make(&two, "g", "new").await;
    two.rename((ROOT, b"f"), (ROOT, b"h"), false, false).await.unwrap();
    one.lookup(ROOT, b"g").await.unwrap();
    assert!(one.lookup(ROOT, b"f").await.is_err());
    assert_eq!(one.lookup(ROOT, b"h").await.unwrap().attr.ino, ino);
    two.unlink(ROOT, b"g").await.unwrap();
    two.close().await.unwrap();
    // Alone again, and what it knew from before the company stays void.
    assert!(one.lookup(ROOT, b"g").await.is_err());
    assert_eq!(one.lookup(ROOT, b"h").await.unwrap().attr.ino, ino);
}

#[tokio::test]
async fn a_change_whose_caller_has_gone_is_known_all_the_same() {
    let cluster = start(1).await;
    cluster.set_cache_ttl(Duration::from_secs(600));
    let volume = mount(&cluster).await;
    let ino = make(&volume, "f", "text").await;
    volume.read_dir(ROOT, 0, 100).await.unwrap();
    assert!(volume.lookup(ROOT, b"g").await.is_err());
    // The answer is lost, and the caller does not wait for another.
    cluster.inject(At::Call, Fault::LoseReply);
    tokio::select! {
        _ = volume.link(ino, ROOT, b"g") => {}
        () = async { while cluster.pending_faults() > 0 { tokio::task::yield_now().await } } => {}
    }
    let known = async || volume.lookup(ROOT, b"g").await.is_ok();
    for _ in 0..3000 {
        if known().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never known");
}

#[tokio::test]
async fn what_fdatasync_leaves_to_be_told_is_told_and_not_with_company() {
    let cluster = start(1).await;
    let options = VolumeOptions {
        flush_after: Duration::from_millis(50),
        ..VolumeOptions::default()
    };
    let connected = Cluster::connect(cluster.endpoints()).unwrap();
    let one = Volume::mount(&connected, VOLUME, options).await.unwrap();
    let ino = make(&one, "f", "one").await;
    let file = open_without_a_word(&cluster, &one, ino).await;
    let before = one.get_attr(ino).await.unwrap().attr.mtime;
    file.write(0, b"two").await.unwrap();
    file.sync_data().await.unwrap();
    let two = mount(&cluster).await;
    assert_eq!(read(&two, ino).await, "two");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while two.get_attr(ino).await.unwrap().attr.mtime == before {
        assert!(tokio::time::Instant::now() < deadline, "the time is never told");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = two.get_attr(ino).await.unwrap().attr.mtime;
    file.write(0, b"six").await.unwrap();
    file.sync_data().await.unwrap();
    assert_ne!(two.get_attr(ino).await.unwrap().attr.mtime, before);
    assert_eq!(read(&two, ino).await, "six");
    file.close().await.unwrap();
}

async fn read(volume: &Volume, ino: u64) -> Bytes {
    let (file, _) = volume.open(ino, OpenMode::default()).await.unwrap();
    let data = file.read(0, 100).await.unwrap();
    file.close().await.unwrap();
    data
}
