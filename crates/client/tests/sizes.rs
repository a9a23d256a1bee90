//! Sizes of files: quota, holes, what several clients do to one file at the same time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use lazarette_client::testing::{At, CHUNK_SIZE, Fault, TestCluster, mount};
use lazarette_client::{File, Kind, LockKind, LockMode, LockRange, NewNode, OpenMode, SetAttributes, Volume};
use lazarette_types::{ErrorCode, ROOT_INODE};
use std::time::Duration;

const ROOT: u64 = ROOT_INODE.0;
const CHUNK: u64 = CHUNK_SIZE as u64;

async fn create(volume: &Volume, name: &str) -> File {
    let node = NewNode::new(Kind::File, 0o644);
    let mode = OpenMode::default();
    volume.create(ROOT, name.as_bytes(), node, true, mode).await.unwrap().0
}

async fn resize(volume: &Volume, ino: u64, size: u64) {
    let set = SetAttributes {
        size: Some(size),
        ..SetAttributes::default()
    };
    assert_eq!(volume.set_attr(ino, set).await.unwrap().attr.size, size);
}

fn no_space<T: std::fmt::Debug>(result: Result<T, lazarette_client::Error>) {
    assert_eq!(result.unwrap_err().code(), ErrorCode::NoSpace);
}

#[tokio::test]
async fn a_full_volume_is_full_for_every_writer_at_once() {
    let cluster = TestCluster::start(1).await;
    let volume = mount(&cluster).await;
    cluster.set_quota(10_000);
    let (one, two) = (create(&volume, "one").await, create(&volume, "two").await);
    one.write(0, &[1; 6000]).await.unwrap();
    // Nothing is flushed yet, and the owner knows of nothing.
    assert_eq!(cluster.stored_size(one.ino()), Some(0));
    no_space(two.write(0, &[2; 4001]).await);
    assert_eq!(two.attr().size, 0);
    two.write(0, &[2; 4000]).await.unwrap();
    no_space(one.write(6000, &[1]).await);
    no_space(two.write(1 << 40, &[1]).await);
    // What does not make a file longer is always possible.
    one.write(1000, &[3; 5000]).await.unwrap();
    one.fsync().await.unwrap();
    two.fsync().await.unwrap();
    // Space that is given up, or added, is there at once.
    resize(&volume, one.ino(), 1000).await;
    two.write(4000, &[2; 5000]).await.unwrap();
    no_space(two.write(9000, &[2]).await);
    cluster.set_quota(10_001);
    two.write(9000, &[2]).await.unwrap();
    two.close().await.unwrap();
    one.close().await.unwrap();
}

#[tokio::test]
async fn zeroing_leaves_the_rest() {
    let cluster = TestCluster::start(2).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    let length = 3 * CHUNK as usize + 5000;
    let mut want: Vec<u8> = (0..length).map(|i| (i % 250) as u8 + 1).collect();
    for (at, part) in want.chunks(1 << 18).enumerate() {
        file.write((at << 18) as u64, part).await.unwrap();
    }
    for (from, to) in [
        (100, 200),
        (CHUNK - 7, 2 * CHUNK + 9),
        (3 * CHUNK - 1, 3 * CHUNK + 1),
        (3 * CHUNK + 4000, 9 * CHUNK),
    ] {
        file.zero(from, to - from).await.unwrap();
        let end = (to as usize).min(length);
        want[from as usize..end].fill(0);
        let mut got = Vec::new();
        while got.len() < length {
            got.extend_from_slice(&file.read(got.len() as u64, 1 << 20).await.unwrap());
        }
        assert!(got == want, "{from}..{to}");
    }
    assert_eq!(file.attr().size, length as u64);
    file.zero(length as u64, 10).await.unwrap();
    file.grow(5).await.unwrap();
    assert_eq!(file.attr().size, length as u64);
    file.grow(length as u64 + 10).await.unwrap();
    assert_eq!(file.attr().size, length as u64 + 10);
    file.close().await.unwrap();
}

/// A flush of `file` whose bytes are at the chunks, and of which the owner has not heard yet.
async fn half_flushed(cluster: &TestCluster, file: &File) -> tokio::task::JoinHandle<()> {
    // A size that needs no reservation, so that the next call is the one after the bytes.
    cluster.inject(At::Call, Fault::Hang);
    let calls = cluster.count(At::Call);
    let volume = file.volume().clone();
    let flush = tokio::spawn(async move {
        let _ = volume.flush_all().await;
    });
    while cluster.count(At::Call) == calls {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    flush
}

#[tokio::test]
async fn bytes_of_a_dead_client_do_not_show_in_holes() {
    let cluster = TestCluster::start(1).await;
    let (dying, other) = (mount(&cluster).await, mount(&cluster).await);
    for by_write in [false, true] {
        let name = format!("by-write-{by_write}");
        let lost = create(&dying, &name).await;
        lost.write(0, b"kept").await.unwrap();
        lost.fsync().await.unwrap();
        lost.write(4, &[9; 5000]).await.unwrap();
        let flush = half_flushed(&cluster, &lost).await;
        flush.abort();
        let file = other.open(lost.ino(), OpenMode::default()).await.unwrap().0;
        assert_eq!(file.attr().size, 4);
        if by_write {
            file.write(8000, b"end").await.unwrap();
            file.fsync().await.unwrap();
        } else {
            resize(&other, file.ino(), 8003).await;
        }
        let got = file.read(0, 10_000).await.unwrap();
        assert_eq!((got.len(), &got[..4]), (8003, &b"kept"[..]));
        assert!(got[4..8000].iter().all(|byte| *byte == 0), "by write: {by_write}");
        file.close().await.unwrap();
    }
    dying.abort();
}

#[tokio::test]
async fn a_flush_that_a_truncation_overtook_is_repeated() {
    let cluster = TestCluster::start(2).await;
    let (writer, other) = (mount(&cluster).await, mount(&cluster).await);
    let file = create(&writer, "f").await;
    file.write(0, &[1; 1000]).await.unwrap();
    file.fsync().await.unwrap();
    file.write(500, &[2; 1000]).await.unwrap();
    let flush = half_flushed(&cluster, &file).await;
    resize(&other, file.ino(), 10).await;
    // The call is repeated at the next owner.
    cluster.move_owner(1, true);
    flush.await.unwrap();
    file.fsync().await.unwrap();
    let got = file.read(0, 2000).await.unwrap();
    assert_eq!(got.len(), 1500);
    assert!(got[..10].iter().all(|byte| *byte == 1) && got[10..500].iter().all(|byte| *byte == 0));
    assert!(got[500..].iter().all(|byte| *byte == 2), "acknowledged by fsync");

    // The same for an append: it goes to where the end is now.
    let appender = writer
        .open(
            file.ino(),
            OpenMode {
                append: true,
                truncate: false,
            },
        )
        .await;
    let appender = appender.unwrap().0;
    cluster.inject(At::Write, Fault::Hang);
    let writes = cluster.count(At::Write);
    let append = tokio::spawn(async move { appender.write(0, b"appended").await.unwrap() });
    while cluster.count(At::Write) == writes {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    resize(&other, file.ino(), 20).await;
    cluster.move_primaries(1, true);
    assert_eq!(append.await.unwrap(), 20);
    assert_eq!(file.read(20, 100).await.unwrap(), "appended");
    file.close().await.unwrap();
}

#[tokio::test]
async fn locks_of_an_open_file_end_with_it_and_those_of_a_process_stay() {
    let cluster = TestCluster::start(1).await;
    let volume = mount(&cluster).await;
    let one = create(&volume, "f").await;
    let two = volume.open(one.ino(), OpenMode::default()).await.unwrap().0;
    let range = |owner, start| LockRange {
        kind: LockKind::Posix.into(),
        mode: LockMode::Exclusive.into(),
        owner,
        start,
        end: start,
        pid: 1,
    };
    // An owner that is the open file, and a process that goes on with another descriptor.
    one.lock(range(77, 0), false).await.unwrap();
    one.lock(range(5, 1), false).await.unwrap();
    two.lock(range(5, 2), false).await.unwrap();
    assert_eq!(cluster.locks(one.ino()), 3);
    one.close().await.unwrap();
    assert_eq!(cluster.locks(two.ino()), 2);
    two.close().await.unwrap();
    assert_eq!(cluster.locks(two.ino()), 0);
}
