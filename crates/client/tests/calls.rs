//! How often the owner is asked: what a sole client knows it does not ask for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use lazarette_client::testing::{At, TestCluster, mount};
use lazarette_client::{Kind, NewNode, OpenMode, SetAttributes};
use lazarette_types::ROOT_INODE;
use std::time::Duration;

const ROOT: u64 = ROOT_INODE.0;

fn node(kind: Kind) -> NewNode {
    NewNode::new(kind, 0o755)
}

/// A step's name, its calls to the owner and its writes to the chunks.
type Row = (&'static str, u64, u64);

async fn count(cluster: &TestCluster, rows: &mut Vec<Row>, what: &'static str, work: impl Future<Output = ()>) {
    let before = (cluster.count(At::Call), cluster.count(At::Write));
    work.await;
    let calls = cluster.count(At::Call) - before.0;
    rows.push((what, calls, cluster.count(At::Write) - before.1));
}

#[tokio::test]
async fn a_sole_client_asks_only_for_what_it_does_not_know() {
    let cluster = TestCluster::start(1).await;
    // What it may know does not run out while the test runs.
    cluster.set_cache_ttl(Duration::from_secs(600));
    let volume = &mount(&cluster).await;
    let rows = &mut Vec::new();
    let mode = OpenMode::default();

    count(&cluster, rows, "mkdir", async {
        volume.make(ROOT, b"d", node(Kind::Directory)).await.unwrap();
    })
    .await;
    let dir = volume.lookup(ROOT, b"d").await.unwrap().attr.ino;
    count(&cluster, rows, "look up a name that is not in a new directory", async {
        assert!(volume.lookup(dir, b"f").await.is_err());
    })
    .await;
    count(&cluster, rows, "create, write 4 KiB, close", async {
        let create = volume.create(dir, b"f", node(Kind::File), true, mode);
        let (file, _) = create.await.unwrap();
        file.write(0, &[7; 4096]).await.unwrap();
        file.close().await.unwrap();
    })
    .await;
    count(&cluster, rows, "look up", async {
        volume.lookup(dir, b"f").await.unwrap();
    })
    .await;
    let ino = volume.lookup(dir, b"f").await.unwrap().attr.ino;
    count(&cluster, rows, "open, close", async {
        let (file, entry) = volume.open(ino, mode).await.unwrap();
        assert_eq!(entry.attr.size, 4096);
        file.close().await.unwrap();
    })
    .await;
    count(&cluster, rows, "stat", async {
        assert_eq!(volume.get_attr(ino).await.unwrap().attr.size, 4096);
        assert_eq!(volume.get_attr(dir).await.unwrap().attr.nlink, 2);
    })
    .await;
    count(&cluster, rows, "overwrite, close", async {
        let (file, _) = volume.open(ino, mode).await.unwrap();
        file.write(0, &[8; 100]).await.unwrap();
        file.close().await.unwrap();
    })
    .await;
    let (file, _) = volume.open(ino, mode).await.unwrap();
    count(&cluster, rows, "overwrite and fdatasync, twice", async {
        let before = volume.get_attr(ino).await.unwrap().attr.mtime;
        for byte in [1, 2] {
            file.write(0, &[byte; 100]).await.unwrap();
            file.sync_data().await.unwrap();
        }
        assert!(volume.get_attr(ino).await.unwrap().attr.mtime > before);
    })
    .await;
    count(&cluster, rows, "fsync after that, twice", async {
        file.fsync().await.unwrap();
        file.fsync().await.unwrap();
    })
    .await;
    count(&cluster, rows, "append and fdatasync, close", async {
        file.write(4096, &[1; 100]).await.unwrap();
        file.sync_data().await.unwrap();
        file.close().await.unwrap();
    })
    .await;
    count(&cluster, rows, "chmod", async {
        let set = SetAttributes {
            mode: Some(0o600),
            ..SetAttributes::default()
        };
        volume.set_attr(ino, set).await.unwrap();
    })
    .await;
    count(&cluster, rows, "write, set a time, close", async {
        let (file, _) = volume.open(ino, mode).await.unwrap();
        file.write(0, &[9; 100]).await.unwrap();
        let set = SetAttributes {
            mtime: Some(12345),
            ..SetAttributes::default()
        };
        assert_eq!(volume.set_attr(ino, set).await.unwrap().attr.mtime, 12345);
        file.close().await.unwrap();
        assert_eq!(volume.get_attr(ino).await.unwrap().attr.mtime, 12345);
    })
    .await;
    count(&cluster, rows, "rename", async {
        let renamed = volume.rename((dir, b"f"), (dir, b"g"), false, false);
        renamed.await.unwrap();
    })
    .await;
    count(&cluster, rows, "look up both names", async {
        assert!(volume.lookup(dir, b"f").await.is_err());
        assert_eq!(volume.lookup(dir, b"g").await.unwrap().attr.ino, ino);
    })
    .await;
    count(&cluster, rows, "unlink", async {
        volume.unlink(dir, b"g").await.unwrap();
    })
    .await;
    count(&cluster, rows, "look up what was unlinked", async {
        assert!(volume.lookup(dir, b"g").await.is_err());
    })
    .await;
    count(&cluster, rows, "rmdir", async {
        volume.rmdir(ROOT, b"d").await.unwrap();
    })
    .await;
    count(
        &cluster,
        rows,
        "look up a missing name twice in an old directory",
        async {
            for _ in 0..2 {
                assert!(volume.lookup(ROOT, b"missing").await.is_err());
            }
        },
    )
    .await;
    count(&cluster, rows, "list", async {
        volume.read_dir(ROOT, 0, 100).await.unwrap();
    })
    .await;
    count(&cluster, rows, "look up a missing name in what was listed", async {
        assert!(volume.lookup(ROOT, b"also missing").await.is_err());
    })
    .await;

    let expected: Vec<Row> = vec![
        ("mkdir", 1, 0),
        ("look up a name that is not in a new directory", 0, 0),
        ("create, write 4 KiB, close", 2, 1),
        ("look up", 0, 0),
        ("open, close", 0, 0),
        ("stat", 0, 0),
        ("overwrite, close", 1, 1),
        ("overwrite and fdatasync, twice", 0, 2),
        ("fsync after that, twice", 1, 0),
        ("append and fdatasync, close", 1, 1),
        ("chmod", 1, 0),
        ("write, set a time, close", 1, 1),
        ("rename", 1, 0),
        ("look up both names", 0, 0),
        ("unlink", 1, 0),
        ("look up what was unlinked", 0, 0),
        ("rmdir", 1, 0),
        ("look up a missing name twice in an old directory", 1, 0),
        ("list", 1, 0),
        ("look up a missing name in what was listed", 0, 0),
    ];
    assert_eq!(*rows, expected);
}
