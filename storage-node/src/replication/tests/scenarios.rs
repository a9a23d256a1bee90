use super::faults::LinkState;
use super::harness::{Cluster, DEADLINE, chunk, node, quick, read_request, some_time, write_request};
use crate::chunk::{Change, ChunkStore, MemoryChunkStore, Part, Parts, crc32c};
use crate::replication::{RepairBacklog, ReplicationConfig, ReplicationError};
use bytes::Bytes;
use lazarette_metastore::{Op, ReplicaSetRecord, Txn};
use lazarette_proto::clock::boot_ms;
use lazarette_proto::{MAX_WRITE_PARTS, chunk as pb, code_of};
use lazarette_types::{ErrorCode, ReplicaSetId, VolumeId};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
async fn a_write_of_parts_is_one_change_at_every_member() {
    let mut cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    let id = chunk(2, 0);
    let parts = |text: &'static str| [1, 5, 6000].map(|at| (at, Bytes::from_static(text.as_bytes())));
    let whole = |text: &str| {
        let mut whole = vec![0; 6000 + text.len()];
        for at in [1, 5, 6000] {
            whole[at..at + text.len()].copy_from_slice(text.as_bytes());
        }
        Bytes::from(whole)
    };
    client.write_parts(set, id, &parts("one")).await.unwrap();
    cluster.converged(set).await;
    let first = cluster.disks[0].version(set, id).await.unwrap();
    // The third copy hears of the second one only from the next primary; and it is sent twice, as
    // if its acknowledgement had been lost.
    cluster.link(0, 2, LinkState::Paused);
    client.write_parts(set, id, &parts("two")).await.unwrap();
    client.write_parts(set, id, &parts("two")).await.unwrap();
    let last = cluster.disks[0].version(set, id).await.unwrap();
    assert_eq!(last.sequence - first.sequence, 2, "each is one change");
    assert_eq!(cluster.disks[1].version(set, id).await.unwrap(), last);
    assert_eq!(cluster.disks[2].version(set, id).await.unwrap(), first);
    cluster.kill(0).await;
    cluster.link(0, 2, LinkState::Up);
    assert_eq!(client.read(set, id).await.unwrap(), whole("two"));
    client.write_parts(set, id, &parts("six")).await.unwrap();
    cluster.start_node(0).await;
    cluster.whole(set).await;
    let copies = cluster.converged(set).await;
    assert_eq!(copies[&id], whole("six"));
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_cut_off_from_the_store_neither_acknowledges_nor_serves() {
    let mut cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    let id = chunk(2, 0);
    client.write(set, id, 0, "one").await.unwrap();
    let old = cluster.record(set).await;
    assert_eq!(old.primary, node(0));
    // It still reaches the members, only not the store: its lease runs out.
    cluster.running(0).store.cut.store(true, Ordering::SeqCst);
    cluster.until(set, "led by another", |r| r.primary != node(0)).await;
    cluster.serving(set).await;
    client.write(set, id, 0, "two").await.unwrap();
    // A client with the old map.
    let mut stale = client.of(&node(0));
    let read = stale.read(read_request(set, old.epoch, id)).await.unwrap_err();
    assert!(code_of(&read).retryable(), "{read}");
    let data = Bytes::from_static(b"old");
    let mut request = write_request(set, old.epoch, id, 0, &data);
    request.deadline = some_time(&mut stale).await.unwrap();
    let write = stale.write(request).await.unwrap_err();
    assert!(code_of(&write).retryable(), "{write}");
    assert_eq!(client.read(set, id).await.unwrap(), "two");
    // And the old map at the new primary is noticed.
    let primary = cluster.record(set).await.primary;
    let error = client
        .of(&primary)
        .read(read_request(set, old.epoch, id))
        .await
        .unwrap_err();
    assert_eq!(code_of(&error), ErrorCode::WrongEpoch);
    cluster.kill(0).await;
    cluster.start_node(0).await;
    cluster.whole(set).await;
    cluster.converged(set).await;
    assert_eq!(client.read(set, id).await.unwrap(), "two");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_cut_short_does_not_bring_an_older_copy_back() {
    let mut cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    let id = chunk(2, 0);
    client.write(set, id, 0, "old").await.unwrap();
    cluster.converged(set).await;
    // The third member has the old contents only.
    cluster.link(0, 2, LinkState::Paused);
    client.write(set, id, 0, "new").await.unwrap();
    let mut deletion = Box::pin(client.delete(set, id));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut deletion).await;
    assert!(early.is_err(), "deleted without the third member");
    drop(deletion);
    cluster.kill(0).await;
    cluster.link(0, 2, LinkState::Up);
    assert_eq!(client.read(set, id).await.unwrap(), "new");
    client.delete(set, id).await.unwrap();
    cluster.start_node(0).await;
    cluster.whole(set).await;
    assert!(cluster.converged(set).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_does_not_answer_is_ejected_and_returns() {
    let cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    for i in 0..8 {
        client.write(set, chunk(2, i), 0, "before").await.unwrap();
    }
    cluster.link(0, 1, LinkState::Cut);
    for i in 4..12 {
        client.write(set, chunk(2, i), 0, "during").await.unwrap();
    }
    client.delete(set, chunk(2, 0)).await.unwrap();
    cluster
        .until(set, "without node 1", |r| !r.in_sync.contains(&node(1)))
        .await;
    client.write(set, chunk(2, 3), 0, "later").await.unwrap();
    cluster.link(0, 1, LinkState::Up);
    cluster.whole(set).await;
    let copies = cluster.converged(set).await;
    assert_eq!(copies.len(), 11);
    assert_eq!(&copies[&chunk(2, 3)][..], b"latere");
    assert_eq!(cluster.running(0).replicas.repair_backlog(), RepairBacklog::default());
    assert!(cluster.running(0).replicas.counters().members_admitted.get() >= 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_with_an_empty_disk_catches_up_under_load() {
    let mut cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    for i in 0..200 {
        client.write(set, chunk(2, i), 0, vec![i as u8; 5000]).await.unwrap();
    }
    cluster.kill(2).await;
    cluster
        .until(set, "without node 2", |r| !r.in_sync.contains(&node(2)))
        .await;
    cluster.disks[2] = Arc::new(MemoryChunkStore::new());
    let stop = Arc::new(AtomicBool::new(false));
    let mut load = tokio::task::JoinSet::new();
    for worker in 0..4u32 {
        let (client, stop) = (client.clone(), Arc::clone(&stop));
        load.spawn(async move {
            let mut n = 0u32;
            while !stop.load(Ordering::SeqCst) {
                let id = chunk(2, (n * 7 + worker * 50) % 220);
                if n % 11 == 10 {
                    client.delete(set, id).await.unwrap();
                } else {
                    client.write(set, id, n % 4000, vec![worker as u8; 900]).await.unwrap();
                }
                n += 1;
            }
            n
        });
    }
    cluster.start_node(2).await;
    cluster.whole(set).await;
    stop.store(true, Ordering::SeqCst);
    let mut total = 0;
    while let Some(n) = load.join_next().await {
        total += n.unwrap();
    }
    assert!(total > 0);
    cluster.whole(set).await;
    cluster.converged(set).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_copy_is_healed_from_another_member() {
    let cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    let id = chunk(2, 0);
    client.write(set, id, 0, "precious").await.unwrap();
    cluster.converged(set).await;
    assert!(cluster.memory[0].damage(set, id));
    assert_eq!(client.read(set, id).await.unwrap(), "precious");
    assert_eq!(cluster.running(0).replicas.counters().chunks_healed.get(), 1);
    // Written over while damaged.
    assert!(cluster.memory[0].damage(set, id));
    client.write(set, id, 0, "P").await.unwrap();
    assert_eq!(client.read(set, id).await.unwrap(), "Precious");
    cluster.converged(set).await;
    for disk in &cluster.memory {
        assert!(disk.damage(set, id));
    }
    assert_eq!(client.read(set, id).await.unwrap_err(), ErrorCode::Corrupt);
    // Only deleting helps.
    client.delete(set, id).await.unwrap();
    client.write(set, id, 0, "anew").await.unwrap();
    assert_eq!(client.read(set, id).await.unwrap(), "anew");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_an_error_and_leaves_all_members_alike() {
    let cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    let id = chunk(2, 0);
    client.write(set, id, 0, "fits").await.unwrap();
    // The primary's own disk: others may have made the change already.
    cluster.running(0).chunks.full.store(true, Ordering::SeqCst);
    assert_eq!(
        client.write(set, id, 0, "does not").await.unwrap_err(),
        ErrorCode::NoSpace
    );
    cluster.running(0).chunks.full.store(false, Ordering::SeqCst);
    assert_eq!(client.read(set, id).await.unwrap(), "fits");
    cluster.converged(set).await;
    // Both backups': the primary has made it and takes it back.
    for i in [1, 2] {
        cluster.running(i).chunks.full.store(true, Ordering::SeqCst);
    }
    assert_eq!(
        client.write(set, id, 0, "does not").await.unwrap_err(),
        ErrorCode::NoSpace
    );
    assert_eq!(
        client.write(set, chunk(2, 1), 0, "new").await.unwrap_err(),
        ErrorCode::NoSpace
    );
    for i in [1, 2] {
        cluster.running(i).chunks.full.store(false, Ordering::SeqCst);
    }
    client.write(set, id, 4, " now").await.unwrap();
    assert_eq!(client.read(set, id).await.unwrap(), "fits now");
    assert_eq!(client.read(set, chunk(2, 1)).await.unwrap(), "");
    cluster.whole(set).await;
    // Of the one that did not exist an empty one is left, with a version that nothing old follows.
    assert_eq!(cluster.converged(set).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_change_does_not_come_back_with_another_primary() {
    let mut cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    let id = chunk(2, 0);
    client.write(set, id, 0, "fits").await.unwrap();
    cluster.converged(set).await;
    let before = cluster.memory[1].version(set, id).await.unwrap();
    // The primary knows at once that its disk is full, the backups make the change a while later.
    for i in [1, 2] {
        cluster.running(i).chunks.delay.store(300, Ordering::SeqCst);
    }
    cluster.running(0).chunks.full.store(true, Ordering::SeqCst);
    assert_eq!(client.write(set, id, 0, "no").await.unwrap_err(), ErrorCode::NoSpace);
    assert_eq!(client.read(set, id).await.unwrap(), "fits");
    // Nor does a copy of it that is still on its way follow what they have now.
    for disk in &cluster.memory {
        assert!(disk.version(set, id).await.unwrap() > before);
    }
    cluster.kill(0).await;
    assert_eq!(client.read(set, id).await.unwrap(), "fits");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_fewer_in_sync_than_must_acknowledge_reads_go_on_and_writes_wait() {
    let mut cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    client.write(set, chunk(2, 0), 0, "here").await.unwrap();
    cluster.kill(1).await;
    cluster.kill(2).await;
    cluster.until(set, "alone", |r| r.in_sync == [node(0)]).await;
    assert_eq!(client.read(set, chunk(2, 0)).await.unwrap(), "here");
    let data = Bytes::from_static(b"waits");
    let refused = client.write_once(set, chunk(2, 0), 0, &data).await.unwrap_err();
    assert_eq!(refused, ErrorCode::Unavailable);
    assert_eq!(client.read(set, chunk(2, 0)).await.unwrap(), "here");
    cluster.start_node(2).await;
    client.write(set, chunk(2, 0), 0, "went on").await.unwrap();
    cluster.start_node(1).await;
    cluster.whole(set).await;
    cluster.converged(set).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sets_return_to_their_first_member() {
    let mut cluster = Cluster::start(
        3,
        ReplicationConfig {
            hand_back_after: Duration::from_millis(300),
            ..quick()
        },
    )
    .await;
    let table = cluster.table(3, 2).await;
    let client = cluster.client();
    cluster.kill(0).await;
    for set in &table {
        client.write(*set, chunk(2, 0), 0, "kept").await.unwrap();
    }
    cluster.start_node(0).await;
    for set in &table {
        let home = |r: &ReplicaSetRecord| r.primary == r.members[0] && !r.recovering && r.in_sync.len() == 3;
        cluster.until(*set, "back home", home).await;
        assert_eq!(client.read(*set, chunk(2, 0)).await.unwrap(), "kept");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_of_deleted_volumes_are_dropped() {
    let cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    client.write(set, chunk(2, 0), 0, "gone soon").await.unwrap();
    let delete = Txn {
        conditions: vec![],
        then: vec![Op::Delete(cluster.keys.volume(VolumeId(1)))],
    };
    cluster.store.txn(delete).await.unwrap();
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !cluster.converged(set).await.is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "chunks not dropped in time");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_and_misdirected_requests_are_refused_and_counted() {
    let cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    let data = Bytes::from_static(b"x");
    let epoch = cluster.record(set).await.epoch;
    let counters = |i: usize| {
        let counters = cluster.running(i).replicas.counters();
        (counters.malformed_requests.get(), counters.stale_requests.get())
    };
    let error = client
        .of(&node(0))
        .write(write_request(set, epoch, chunk(2, 0), 0, &data))
        .await
        .unwrap_err();
    assert_eq!(code_of(&error), ErrorCode::InvalidArgument, "no deadline: {error}");
    let write_request = async |to: usize, set, epoch, chunk, offset, data: &Bytes| {
        let mut request = write_request(set, epoch, chunk, offset, data);
        request.deadline = some_time(&mut client.of(&node(to))).await.unwrap();
        request
    };
    let mut request = write_request(0, set, epoch, chunk(2, 0), 0, &data).await;
    request.chunk = None;
    let error = client.of(&node(0)).write(request).await.unwrap_err();
    assert_eq!(code_of(&error), ErrorCode::InvalidArgument);
    let mut request = write_request(0, set, epoch, chunk(2, 0), (64 << 20) - 1, &data).await;
    request.parts[0].data = Bytes::from_static(b"too far");
    let error = client.of(&node(0)).write(request).await.unwrap_err();
    assert_eq!(code_of(&error), ErrorCode::InvalidArgument);
    assert_eq!(counters(0).0, 3);
    let part = |offset: u32, data: &'static [u8]| pb::WritePart {
        offset,
        data: Bytes::from_static(data),
        crc: crc32c(data),
    };
    let many = (0..=MAX_WRITE_PARTS as u32).map(|i| part(2 * i, b"x")).collect();
    for parts in [
        vec![],
        vec![part(0, b"ab"), part(1, b"c")],
        vec![part(0, b"a"), part(1, b"")],
        many,
    ] {
        let mut request = write_request(0, set, epoch, chunk(2, 0), 0, &data).await;
        request.parts = parts;
        let error = client.of(&node(0)).write(request).await.unwrap_err();
        assert_eq!(code_of(&error), ErrorCode::InvalidArgument, "{error}");
    }
    assert_eq!(counters(0).0, 7);
    let mut request = write_request(0, set, epoch, chunk(2, 0), 0, &data).await;
    request.parts.push(part(5, b"y"));
    request.parts[1].crc ^= 1;
    let error = client.of(&node(0)).write(request).await.unwrap_err();
    assert_eq!(code_of(&error), ErrorCode::Unavailable);
    // Not the primary, and not a set.
    let error = client
        .of(&node(1))
        .write(write_request(1, set, epoch, chunk(2, 0), 0, &data).await)
        .await
        .unwrap_err();
    assert_eq!(code_of(&error), ErrorCode::WrongEpoch);
    assert_eq!(counters(1).1, 1);
    let error = client
        .of(&node(1))
        .write(write_request(1, ReplicaSetId(999), 1, chunk(2, 0), 0, &data).await)
        .await
        .unwrap_err();
    assert_eq!(code_of(&error), ErrorCode::WrongEpoch);
    assert_eq!(cluster.converged(set).await.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_comes_too_late_is_not_made() {
    let cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    client.write(set, chunk(2, 0), 0, "kept").await.unwrap();
    let epoch = cluster.record(set).await.epoch;
    let mut primary = client.of(&node(0));
    let data = Bytes::from_static(b"late");
    let clock = primary.clock(pb::ClockRequest {}).await.unwrap().into_inner();
    let mut request = write_request(set, epoch, chunk(2, 0), 0, &data);
    let mut refused = async |deadline| {
        request.deadline = Some(deadline);
        code_of(&primary.write(request.clone()).await.unwrap_err())
    };
    let (clock, now) = (clock.clock, clock.now_ms);
    assert_eq!(refused(pb::Deadline { clock, at_ms: now }).await, ErrorCode::Late);
    // Of a process that was at this address before.
    let (clock, at_ms) = (clock ^ 1, u64::MAX);
    assert_eq!(refused(pb::Deadline { clock, at_ms }).await, ErrorCode::Late);
    // In time when it comes, but not when it is its turn.
    let tenure = cluster.running(0).replicas.tenure(set).unwrap();
    let turn = tenure.turn_to_write(chunk(2, 0)).await;
    let until = boot_ms() + 300;
    let waits = tokio::spawn({
        let tenure = Arc::clone(&tenure);
        let crc = crc32c(&data);
        let (offset, data) = (0, data.clone());
        let change = Change::Write(Parts::new(vec![Part { offset, data, crc }]).unwrap());
        async move { tenure.change(chunk(2, 0), change, Some(until)).await }
    });
    while boot_ms() < until {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(turn);
    assert!(matches!(waits.await.unwrap(), Err(ReplicationError::Late)));
    assert_eq!(client.read(set, chunk(2, 0)).await.unwrap(), "kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunk_access_finds_the_primary_from_any_node() {
    let mut cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    client.write(set, chunk(2, 0), 0, "abcdef").await.unwrap();
    let access: Vec<_> = (0..3).map(|i| cluster.running(i).replicas.access()).collect();
    let time = Duration::from_secs(1);
    access[0].truncate(set, chunk(2, 0), 4, time).await.unwrap();
    access[1].truncate(set, chunk(2, 0), 2, time).await.unwrap();
    assert_eq!(client.read(set, chunk(2, 0)).await.unwrap(), "ab");
    // Through the death of the primary.
    let delete = tokio::spawn({
        let access = access[2].clone();
        async move { access.delete(set, chunk(2, 0)).await }
    });
    cluster.kill(0).await;
    delete.await.unwrap().unwrap();
    assert_eq!(client.read(set, chunk(2, 0)).await.unwrap(), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_debt_to_a_backup_is_bounded() {
    let config = ReplicationConfig {
        debt_bytes: 1 << 20,
        ..quick()
    };
    let cluster = Cluster::start(3, config).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    let debt = cluster.running(0).replicas.ctx.links.debt(&node(2));
    cluster.link(0, 2, LinkState::Paused);
    let mut most = 0;
    for i in 0..40 {
        client.write(set, chunk(2, i), 0, vec![1; 256 << 10]).await.unwrap();
        most = most.max(debt.load(Ordering::SeqCst));
    }
    // Acknowledged by two all the while; the third one owes at most the bound and one write, and
    // is ejected in the end, for writes to go on.
    assert!((1 << 20..=(1 << 20) + (512 << 10)).contains(&most), "{most}");
    let record = cluster.record(set).await;
    assert_eq!(record.in_sync, [node(0), node(1)]);
    cluster.link(0, 2, LinkState::Up);
    cluster.whole(set).await;
    assert_eq!(cluster.converged(set).await.len(), 40);
    assert_eq!(debt.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_under_way_when_a_member_returns_reach_it() {
    let mut cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    for i in 0..30 {
        client.write(set, chunk(2, i), 0, "before").await.unwrap();
    }
    cluster.converged(set).await;
    cluster.kill(2).await;
    cluster
        .until(set, "without node 2", |r| !r.in_sync.contains(&node(2)))
        .await;
    // Each of these is under way for a while; the member comes back in the middle, with copies
    // that are the newest until then.
    cluster.running(0).chunks.delay.store(1000, Ordering::SeqCst);
    let mut writes = tokio::task::JoinSet::new();
    for i in 0..30 {
        let client = client.clone();
        writes.spawn(async move { client.write(set, chunk(2, i), 0, "during").await.unwrap() });
    }
    let epoch = cluster.record(set).await.epoch;
    let tenure = cluster.running(0).replicas.leader_of(set, epoch).await.unwrap();
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while tenure.state().waiting.len() < 30 {
        assert!(tokio::time::Instant::now() < deadline, "writes not begun in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cluster.start_node(2).await;
    while let Some(done) = writes.join_next().await {
        done.unwrap();
    }
    cluster.running(0).chunks.delay.store(0, Ordering::SeqCst);
    cluster.whole(set).await;
    for data in cluster.converged(set).await.values() {
        assert_eq!(data, "during");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_full_disk_of_three_stops_nobody() {
    let cluster = Cluster::start(3, quick()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    cluster.running(1).chunks.full.store(true, Ordering::SeqCst);
    let mut n = 0;
    while cluster.record(set).await.in_sync.len() == 3 {
        client.write(set, chunk(2, n % 50), 0, "fits elsewhere").await.unwrap();
        n += 1;
    }
    client.write(set, chunk(2, 50), 0, "fits elsewhere").await.unwrap();
    assert_eq!(cluster.record(set).await.in_sync, [node(0), node(2)]);
    cluster.running(1).chunks.full.store(false, Ordering::SeqCst);
    cluster.whole(set).await;
    cluster.converged(set).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_death_of_all_two_of_three_are_enough() {
    let mut cluster = Cluster::start(3, quick()).await;
    let table = cluster.table(3, 2).await;
    let client = cluster.client();
    // Only the first two have these.
    cluster.link(0, 2, LinkState::Paused);
    for set in &table {
        client.write(*set, chunk(2, 0), 0, "kept").await.unwrap();
    }
    for i in 0..3 {
        let lease = cluster.kill_quietly(i).await;
        cluster.store.revoke(lease.id()).await.unwrap();
    }
    cluster.link(0, 2, LinkState::Up);
    let before = cluster.record(table[0]).await;
    cluster.start_node(2).await;
    // The one that is there may know nothing, and must not even claim a set.
    let alone = client.read_once(table[0], chunk(2, 0)).await.unwrap_err();
    assert!(alone.retryable());
    assert_eq!(cluster.record(table[0]).await, before);
    cluster.start_node(1).await;
    for set in &table {
        assert_eq!(client.read(*set, chunk(2, 0)).await.unwrap(), "kept");
        client.write(*set, chunk(2, 1), 0, "goes on").await.unwrap();
    }
    cluster.start_node(0).await;
    for set in &table {
        cluster.whole(*set).await;
        cluster.converged(*set).await;
    }
}
