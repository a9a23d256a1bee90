//! The client against in-memory servers on real sockets, with faults.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use lazarette_client::testing::{At, CHUNK_SIZE, Fault, TestCluster, VOLUME, eventually, mount};
use lazarette_client::{
    Cluster, File, Kind, LockKind, LockMode, LockRange, NewNode, OpenMode, SetAttributes, Volume, VolumeOptions,
};
use lazarette_types::{ErrorCode, ROOT_INODE, VolumeId};
use std::time::Duration;

const ROOT: u64 = ROOT_INODE.0;

fn node(kind: Kind) -> NewNode {
    NewNode::new(kind, 0o644)
}

async fn mount_with(cluster: &TestCluster, options: VolumeOptions) -> Volume {
    let cluster = Cluster::connect(cluster.endpoints()).unwrap();
    Volume::mount(&cluster, VOLUME, options).await.unwrap()
}

async fn create(volume: &Volume, name: &str) -> File {
    let (file, _) = volume
        .create(ROOT, name.as_bytes(), node(Kind::File), true, OpenMode::default())
        .await
        .unwrap();
    file
}

async fn open(volume: &Volume, name: &str, mode: OpenMode) -> File {
    let entry = volume.lookup(ROOT, name.as_bytes()).await.unwrap();
    volume.open(entry.attr.ino, mode).await.unwrap().0
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8 ^ seed).collect()
}

#[tokio::test]
async fn what_one_client_closes_another_reads() {
    let cluster = TestCluster::start(3).await;
    let one = mount(&cluster).await;
    let two = mount(&cluster).await;
    let data = pattern(3 * CHUNK_SIZE as usize + 12345, 0);
    let file = create(&one, "f").await;
    for (i, part) in data.chunks(100_000).enumerate() {
        file.write(i as u64 * 100_000, part).await.unwrap();
    }
    assert_eq!(file.attr().size, data.len() as u64, "the writer sees its size at once");
    file.close().await.unwrap();

    let file = open(&two, "f", OpenMode::default()).await;
    assert_eq!(file.attr().size, data.len() as u64);
    let mut got = Vec::new();
    while got.len() < data.len() + 1 {
        let part = file.read(got.len() as u64, 700_001).await.unwrap();
        if part.is_empty() {
            break;
        }
        got.extend_from_slice(&part);
    }
    assert!(got == data);
    file.close().await.unwrap();
    one.close().await.unwrap();
    two.close().await.unwrap();
    assert_eq!(cluster.sessions(), 0);
}

#[tokio::test]
async fn reads_see_buffered_writes_over_stored_data_and_holes_as_zeros() {
    let cluster = TestCluster::start(2).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    file.write(0, &[1; 1000]).await.unwrap();
    file.fsync().await.unwrap();
    file.write(500, &[2; 100]).await.unwrap();
    let far = 2 * u64::from(CHUNK_SIZE) + 7;
    file.write(far, &[3; 10]).await.unwrap();
    assert_eq!(
        cluster.stored_size(file.ino()),
        Some(1000),
        "not flushed without being asked"
    );
    let check = async || {
        let mut want = vec![0; far as usize + 10];
        want[..1000].fill(1);
        want[500..600].fill(2);
        want[far as usize..].fill(3);
        let got = file.read(0, want.len() as u32 + 100).await.unwrap();
        assert!(got == want);
    };
    check().await;
    file.fsync().await.unwrap();
    check().await;
    file.close().await.unwrap();
}

#[tokio::test]
async fn retryable_faults_never_reach_the_caller() {
    let cluster = TestCluster::start(3).await;
    let volume = mount(&cluster).await;
    let data = pattern(2 * CHUNK_SIZE as usize, 1);
    for code in [ErrorCode::NotOwner, ErrorCode::Unavailable] {
        cluster.inject(At::Call, Fault::Refuse(code));
        cluster.inject(At::Call, Fault::Refuse(code));
    }
    let file = create(&volume, "f").await;
    for code in [ErrorCode::WrongEpoch, ErrorCode::Unavailable] {
        cluster.inject(At::Write, Fault::Refuse(code));
        cluster.inject(At::Read, Fault::Refuse(code));
    }
    cluster.inject(At::Write, Fault::LoseReply);
    cluster.inject(At::Read, Fault::Damage);
    file.write(0, &data).await.unwrap();
    cluster.inject(At::Call, Fault::LoseReply);
    file.fsync().await.unwrap();
    assert!(file.read(0, data.len() as u32).await.unwrap() == data);
    assert!(file.read(0, data.len() as u32).await.unwrap() == data);
    assert_eq!(cluster.pending_faults(), 0, "every fault was met");
    file.close().await.unwrap();
}

#[tokio::test]
async fn a_write_that_comes_late_undoes_nothing() {
    // Before and after it may no longer be begun.
    for (delay, made) in [(1, true), (5, false)] {
        let cluster = TestCluster::start(1).await;
        let volume = mount(&cluster).await;
        let file = create(&volume, "f").await;
        cluster.inject(At::Write, Fault::ComeLate(Duration::from_secs(delay)));
        file.write(0, b"first").await.unwrap();
        file.fsync().await.unwrap();
        file.write(0, b"newer").await.unwrap();
        file.fsync().await.unwrap();
        eventually("the late one has come", || !cluster.came_late().is_empty()).await;
        assert_eq!(cluster.came_late(), [made]);
        let other = mount(&cluster).await;
        let seen = open(&other, "f", OpenMode::default()).await;
        assert_eq!(seen.read(0, 5).await.unwrap(), "newer");
    }
}

#[tokio::test]
async fn a_lost_reply_does_not_repeat_the_operation() {
    let cluster = TestCluster::start(1).await;
    let volume = mount(&cluster).await;
    cluster.inject(At::Call, Fault::LoseReply);
    let file = create(&volume, "f").await;
    cluster.inject(At::Call, Fault::LoseReply);
    volume.link(file.ino(), ROOT, b"g").await.unwrap();
    cluster.inject(At::Call, Fault::LoseReply);
    volume.rename((ROOT, b"g"), (ROOT, b"h"), true, false).await.unwrap();
    cluster.inject(At::Call, Fault::LoseReply);
    volume.unlink(ROOT, b"h").await.unwrap();
    assert_eq!(volume.get_attr(file.ino()).await.unwrap().attr.nlink, 1);
    assert_eq!(cluster.pending_faults(), 0);
}

#[tokio::test]
async fn follows_owner_and_primaries_and_registers_open_inodes() {
    let cluster = TestCluster::start(3).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    file.write(0, b"one").await.unwrap();
    cluster.move_owner(1, true);
    cluster.move_primaries(2, false);
    file.fsync().await.unwrap();
    eventually("the open inode is registered with the new owner", || {
        cluster.registrations().contains(&vec![file.ino()])
    })
    .await;
    cluster.move_owner(2, false);
    file.write(3, b" two").await.unwrap();
    file.close().await.unwrap();
    let file = open(&volume, "f", OpenMode::default()).await;
    assert_eq!(file.read(0, 100).await.unwrap(), "one two");
    file.close().await.unwrap();
}

#[tokio::test]
async fn survives_the_death_of_the_node_it_talks_to() {
    let cluster = TestCluster::start(3).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    let data = pattern(4 * CHUNK_SIZE as usize, 3);
    for (i, part) in data.chunks(1 << 18).enumerate() {
        if i == 5 {
            cluster.kill(0, 1).await;
        }
        file.write((i << 18) as u64, part).await.unwrap();
        if i % 3 == 0 {
            file.fsync().await.unwrap();
        }
    }
    file.close().await.unwrap();
    cluster.revive(0).await;
    cluster.kill(1, 0).await;
    let file = open(&volume, "f", OpenMode::default()).await;
    assert!(file.read(0, data.len() as u32).await.unwrap() == data);
    file.close().await.unwrap();
}

#[tokio::test]
async fn a_hanging_primary_is_left_when_the_map_changes() {
    let cluster = TestCluster::start(2).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    cluster.inject(At::Write, Fault::Hang);
    file.write(0, b"data").await.unwrap();
    let fsync = file.fsync();
    tokio::pin!(fsync);
    tokio::select! {
        _ = &mut fsync => panic!("the primary hangs"),
        () = eventually("the write has arrived", || cluster.pending_faults() == 0) => {}
    }
    cluster.move_primaries(1, true);
    fsync.await.unwrap();
    assert_eq!(file.read(0, 10).await.unwrap(), "data");
    file.close().await.unwrap();
}

#[tokio::test]
async fn flush_errors_reach_each_handle_once() {
    let cluster = TestCluster::start(1).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    let other = volume.open(file.ino(), OpenMode::default()).await.unwrap().0;
    file.write(0, &[7; 5000]).await.unwrap();
    // Others have filled the volume meanwhile.
    cluster.set_quota(1000);
    assert_eq!(file.fsync().await.unwrap_err().code(), ErrorCode::NoSpace);
    file.fsync().await.unwrap();
    assert_eq!(other.close().await.unwrap_err().code(), ErrorCode::NoSpace);
    let late = volume.open(file.ino(), OpenMode::default()).await.unwrap().0;
    late.close().await.unwrap();
    assert_eq!(file.attr().size, 0, "what could not be flushed is not part of the file");
    assert_eq!(volume.dirty_bytes(), 0);
    file.close().await.unwrap();
}

#[tokio::test]
async fn an_ended_session_fails_everything_and_says_so() {
    let cluster = TestCluster::start(1).await;
    cluster.set_session_ttl_ms(200);
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    file.write(0, b"never flushed").await.unwrap();
    cluster.expire_sessions();
    assert!(file.fsync().await.is_err());
    assert!(file.write(0, b"x").await.is_err());
    assert!(file.read(0, 1).await.is_err());
    assert!(volume.lookup(ROOT, b"f").await.is_err());
    assert!(volume.check().is_err());
    assert!(file.close().await.is_err());
    assert_eq!(volume.dirty_bytes(), 0);
}

#[tokio::test]
async fn background_flush_when_old_and_when_a_chunk_is_full() {
    let cluster = TestCluster::start(1).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "full").await;
    file.write(0, &vec![1; CHUNK_SIZE as usize]).await.unwrap();
    eventually("a full chunk is flushed", || {
        cluster.stored_size(file.ino()) == Some(u64::from(CHUNK_SIZE))
    })
    .await;
    let quick = VolumeOptions {
        flush_after: Duration::from_millis(50),
        ..VolumeOptions::default()
    };
    let volume = mount_with(&cluster, quick).await;
    let file = create(&volume, "old").await;
    file.write(0, b"a few").await.unwrap();
    eventually("old bytes are flushed", || cluster.stored_size(file.ino()) == Some(5)).await;
    file.write(5, b" more").await.unwrap();
    eventually("again", || cluster.stored_size(file.ino()) == Some(10)).await;
}

#[tokio::test]
async fn scattered_writes_of_a_chunk_are_one_request() {
    let cluster = TestCluster::start(3).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    let size = 2 * CHUNK_SIZE as usize;
    let mut want = pattern(size, 0);
    file.write(0, &want).await.unwrap();
    file.fsync().await.unwrap();
    // What it meets is repeated as a whole: refused, its acknowledgement lost, or the primary silent.
    for round in 0..4_u8 {
        let mut scattered = 0;
        for at in (usize::from(round)..size).step_by(9973) {
            want[at] ^= round + 1;
            file.write(at as u64, &want[at..=at]).await.unwrap();
            scattered += 1;
        }
        assert!(scattered > 200);
        let expected = match round {
            0 => 2..=2,
            1 => {
                cluster.inject(At::Write, Fault::Refuse(ErrorCode::WrongEpoch));
                3..=3
            }
            2 => {
                cluster.inject(At::Write, Fault::LoseReply);
                3..=3
            }
            _ => {
                cluster.inject(At::Write, Fault::Hang);
                // The other one may not have been answered yet when the primaries move.
                3..=4
            }
        };
        let before = cluster.count(At::Write);
        let sync = file.fsync();
        if round == 3 {
            let leave = async {
                eventually("both requests are sent", || cluster.count(At::Write) == before + 2).await;
                cluster.move_primaries(1, true);
            };
            let (synced, ()) = tokio::join!(sync, leave);
            synced.unwrap();
        } else {
            sync.await.unwrap();
        }
        assert_eq!(cluster.pending_faults(), 0);
        let requests = cluster.count(At::Write) - before;
        assert!(expected.contains(&requests), "round {round}: {requests}");
        assert!(file.read(0, size as u32).await.unwrap() == want, "round {round}");
    }
    // More parts than one request may have.
    for i in 0..600_u64 {
        want[i as usize * 1000] ^= 7;
        let byte = &want[i as usize * 1000..][..1];
        file.write(i * 1000, byte).await.unwrap();
    }
    let before = cluster.count(At::Write);
    file.fsync().await.unwrap();
    assert_eq!(cluster.count(At::Write) - before, 2);
    assert!(file.read(0, size as u32).await.unwrap() == want);
    file.close().await.unwrap();
}

#[tokio::test]
async fn writers_wait_for_room() {
    let cluster = TestCluster::start(2).await;
    let options = VolumeOptions {
        dirty_bytes: 1 << 20,
        flush_after: Duration::from_secs(3600),
        ..VolumeOptions::default()
    };
    let volume = mount_with(&cluster, options).await;
    let mut files = Vec::new();
    for i in 0..8_u64 {
        let file = create(&volume, &format!("f{i}")).await;
        file.write(0, &pattern(500_000, i as u8)).await.unwrap();
        assert!(volume.dirty_bytes() <= 1 << 20);
        files.push(file);
    }
    for (i, file) in files.iter().enumerate() {
        file.close().await.unwrap();
        let file = open(&volume, &format!("f{i}"), OpenMode::default()).await;
        assert!(file.read(0, 500_000).await.unwrap() == pattern(500_000, i as u8));
    }
    assert_eq!(volume.dirty_bytes(), 0);
}

#[tokio::test]
async fn truncation_drops_buffered_and_stored_bytes() {
    let cluster = TestCluster::start(2).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    let resize = async |size: u64| {
        let set = SetAttributes {
            size: Some(size),
            ..SetAttributes::default()
        };
        assert_eq!(volume.set_attr(file.ino(), set).await.unwrap().attr.size, size);
    };
    file.write(0, &vec![5; 900_000]).await.unwrap();
    let before = cluster.count(At::Write);
    resize(100).await;
    assert_eq!(cluster.count(At::Write) - before, 1, "what is cut off is not sent");
    assert_eq!(volume.dirty_bytes(), 0);
    resize(3_000_000).await;
    let got = file.read(0, 3_000_000).await.unwrap();
    assert_eq!(got.len(), 3_000_000);
    assert!(got[..100].iter().all(|byte| *byte == 5) && got[100..].iter().all(|byte| *byte == 0));
    file.close().await.unwrap();
    let file = open(
        &volume,
        "f",
        OpenMode {
            truncate: true,
            ..OpenMode::default()
        },
    )
    .await;
    assert_eq!(file.attr().size, 0);
    assert!(file.read(0, 10).await.unwrap().is_empty());
    file.close().await.unwrap();
}

#[tokio::test]
async fn a_time_that_was_set_stays_after_the_flush() {
    let cluster = TestCluster::start(1).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    file.write(0, b"data").await.unwrap();
    let set = SetAttributes {
        mtime: Some(12345),
        ..SetAttributes::default()
    };
    volume.set_attr(file.ino(), set).await.unwrap();
    file.close().await.unwrap();
    let attr = volume.lookup(ROOT, b"f").await.unwrap().attr;
    assert_eq!((attr.mtime, attr.size), (12345, 4));
}

#[tokio::test]
async fn appends_of_several_clients_are_neither_lost_nor_torn() {
    let cluster = TestCluster::start(3).await;
    let first = mount(&cluster).await;
    create(&first, "log").await.close().await.unwrap();
    let mut tasks = Vec::new();
    for client in 0..3 {
        let volume = mount(&cluster).await;
        tasks.push(tokio::spawn(async move {
            let append = OpenMode {
                append: true,
                ..OpenMode::default()
            };
            let file = open(&volume, "log", append).await;
            for line in 0..20 {
                let text = format!("client {client} line {line} {}\n", "x".repeat(line * 7));
                file.write(0, text.as_bytes()).await.unwrap();
            }
            file.close().await.unwrap();
            volume.close().await.unwrap();
        }));
    }
    for code in [At::Call, At::Write, At::Call, At::Write] {
        cluster.inject(code, Fault::LoseReply);
    }
    for task in tasks {
        task.await.unwrap();
    }
    let file = open(&first, "log", OpenMode::default()).await;
    let text = file.read(0, 1 << 20).await.unwrap();
    let mut lines: Vec<&str> = std::str::from_utf8(&text).unwrap().lines().collect();
    lines.sort_unstable();
    let mut want: Vec<String> = (0..3)
        .flat_map(|client| (0..20).map(move |line| format!("client {client} line {line} {}", "x".repeat(line * 7))))
        .collect();
    want.sort_unstable();
    assert_eq!(lines, want);
}

fn lock(mode: LockMode, owner: u64) -> LockRange {
    LockRange {
        kind: LockKind::Flock.into(),
        mode: mode.into(),
        owner,
        start: 0,
        end: i64::MAX as u64,
        pid: 1,
    }
}

#[tokio::test]
async fn a_lock_hands_over_what_was_written_under_it() {
    let cluster = TestCluster::start(2).await;
    create(&mount(&cluster).await, "counter").await.close().await.unwrap();
    let mut tasks = Vec::new();
    for _ in 0..3 {
        let volume = mount(&cluster).await;
        tasks.push(tokio::spawn(async move {
            let file = open(&volume, "counter", OpenMode::default()).await;
            for _ in 0..10 {
                file.lock(lock(LockMode::Exclusive, 1), true).await.unwrap();
                let text = file.read(0, 100).await.unwrap();
                let count: u64 = std::str::from_utf8(&text).unwrap().parse().unwrap_or(0);
                file.write(0, (count + 1).to_string().as_bytes()).await.unwrap();
                file.lock(lock(LockMode::Unlock, 1), false).await.unwrap();
            }
            file.close().await.unwrap();
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let file = open(&mount(&cluster).await, "counter", OpenMode::default()).await;
    assert_eq!(file.read(0, 100).await.unwrap(), "30");
}

#[tokio::test]
async fn a_waiter_that_goes_away_does_not_get_the_lock() {
    let cluster = TestCluster::start(1).await;
    let one = mount(&cluster).await;
    let two = mount(&cluster).await;
    let holder = create(&one, "f").await;
    let waiter = open(&two, "f", OpenMode::default()).await;
    let ino = holder.ino();
    holder.lock(lock(LockMode::Exclusive, 1), false).await.unwrap();
    let refused = waiter.lock(lock(LockMode::Exclusive, 1), false).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::WouldBlock);
    let before = cluster.count(At::Call);
    tokio::select! {
        _ = waiter.lock(lock(LockMode::Exclusive, 1), true) => panic!("the lock is held"),
        () = eventually("the waiter is at the owner", || cluster.count(At::Call) > before) => {}
    }
    holder.lock(lock(LockMode::Unlock, 1), false).await.unwrap();
    eventually("nobody has the lock", || cluster.locks(ino) == 0).await;
    holder.lock(lock(LockMode::Exclusive, 1), true).await.unwrap();
    holder
        .unlock_all(LockKind::Flock, lazarette_client::LockOwner(1))
        .await
        .unwrap();
    eventually("the lock is free", || cluster.locks(ino) == 0).await;
}

#[tokio::test]
async fn an_unlinked_open_file_lives_until_the_last_close() {
    let cluster = TestCluster::start(1).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    let again = volume.open(file.ino(), OpenMode::default()).await.unwrap().0;
    volume.unlink(ROOT, b"f").await.unwrap();
    file.write(0, b"still here").await.unwrap();
    file.close().await.unwrap();
    assert_eq!(again.read(0, 100).await.unwrap(), "still here");
    let ino = again.ino();
    assert!(cluster.exists(ino));
    drop(again);
    eventually("the inode is gone", || !cluster.exists(ino)).await;
}

#[tokio::test]
async fn non_exclusive_create_opens_what_is_there() {
    let cluster = TestCluster::start(1).await;
    let volume = mount(&cluster).await;
    let file = create(&volume, "f").await;
    let mode = OpenMode::default();
    let (again, _) = volume.create(ROOT, b"f", node(Kind::File), false, mode).await.unwrap();
    assert_eq!(again.ino(), file.ino());
    let refused = volume.create(ROOT, b"f", node(Kind::File), true, mode).await;
    assert_eq!(refused.err().map(|error| error.code()), Some(ErrorCode::Exists));
}

#[tokio::test]
async fn bad_input_and_unknown_volumes_fail_at_once() {
    assert!(Cluster::connect(Vec::<String>::new()).is_err());
    assert!(Cluster::connect(["not a url at all"]).is_err());
    let cluster = TestCluster::start(1).await;
    let client = Cluster::connect(cluster.endpoints()).unwrap();
    let missing = Volume::mount(&client, VolumeId(99), VolumeOptions::default()).await;
    assert_eq!(missing.err().map(|error| error.code()), Some(ErrorCode::VolumeNotFound));
    let volume = mount(&cluster).await;
    let long = volume.lookup(ROOT, &[b'x'; 256]).await.unwrap_err();
    assert_eq!(long.code(), ErrorCode::NameTooLong);
    let file = create(&volume, "f").await;
    let far = file.write(u64::MAX - 5, b"0123456789").await.unwrap_err();
    assert_eq!(far.code(), ErrorCode::FileTooBig);
}

#[tokio::test]
async fn streams_are_read_ahead_and_never_stale() {
    let cluster = TestCluster::start(2).await;
    let one = mount(&cluster).await;
    let two = mount(&cluster).await;
    let size = 6 * CHUNK_SIZE as usize + 777;
    let file = create(&one, "f").await;
    file.write(0, &pattern(size, 0)).await.unwrap();
    file.fsync().await.unwrap();
    let reader = open(&two, "f", OpenMode::default()).await;
    for round in 0..4_u8 {
        let want = pattern(size, round);
        let before = cluster.count(At::Read);
        let mut got = Vec::new();
        while got.len() < size {
            let part = reader.read(got.len() as u64, 128 << 10).await.unwrap();
            assert!(!part.is_empty());
            got.extend_from_slice(&part);
        }
        assert!(got == want, "round {round}");
        let requests = cluster.count(At::Read) - before;
        assert!(requests < 20, "{requests} requests for {} reads", size >> 17);
        // Changed under the reader; a lock (or open, or looking at the attributes) tells it.
        file.write(0, &pattern(size, round + 1)).await.unwrap();
        file.fsync().await.unwrap();
        reader.lock(lock(LockMode::Shared, 7), true).await.unwrap();
        reader.lock(lock(LockMode::Unlock, 7), false).await.unwrap();
    }
    // Changed in the midst of a stream, after the next blocks were asked for.
    let half = size as u64 / 2;
    let mut at = half;
    while at < half + (1 << 20) {
        at += reader.read(at, 128 << 10).await.unwrap().len() as u64;
    }
    file.write(0, &pattern(size, 77)).await.unwrap();
    file.fsync().await.unwrap();
    reader.lock(lock(LockMode::Shared, 7), true).await.unwrap();
    let part = reader.read(at, 128 << 10).await.unwrap();
    assert!(part == pattern(size, 77)[at as usize..at as usize + (128 << 10)]);
    reader.lock(lock(LockMode::Unlock, 7), false).await.unwrap();
    file.write(0, &pattern(size, 4)).await.unwrap();
    file.fsync().await.unwrap();
    reader.lock(lock(LockMode::Shared, 7), true).await.unwrap();
    // Its own writes show at once, in the midst of what was read ahead.
    let mut got = reader.read(0, 1 << 20).await.unwrap().to_vec();
    reader.write(2_000_000, b"mine").await.unwrap();
    while got.len() < size {
        got.extend_from_slice(&reader.read(got.len() as u64, 128 << 10).await.unwrap());
    }
    let mut want = pattern(size, 4);
    want[2_000_000..2_000_004].copy_from_slice(b"mine");
    assert!(got == want);
}
