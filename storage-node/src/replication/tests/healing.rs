//! Lost nodes are replaced, moved copies arrive, damage is found and repaired.

use super::faults::LinkState;
use super::harness::{Cluster, DEADLINE, Node, chunk, node, quick};
use crate::chunk::{ChunkStore, FileChunkStore};
use crate::replication::ReplicationConfig;
use lazarette_metastore::{MemoryStore, ReplicaSetRecord, decode};
use lazarette_types::{ErrorCode, ReplicaSetId, Version};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// What is not needed any more goes soon, and sets are led by whom they should.
fn moving() -> ReplicationConfig {
    ReplicationConfig {
        sweep_every: Duration::from_millis(50),
        hand_back_after: Duration::from_millis(300),
        ..quick()
    }
}

fn scrubbing() -> ReplicationConfig {
    ReplicationConfig {
        scrub_rate: 1 << 40,
        scrub_every: Duration::ZERO,
        ..quick()
    }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Cluster {
    /// Waits until all sets are at rest as described.
    async fn all(&self, table: &[ReplicaSetId], what: &str, is: impl Fn(&ReplicaSetRecord) -> bool) {
        for set in table {
            self.until(*set, what, |r| r.settled() && !r.recovering && is(r)).await;
        }
    }

    /// Waits until no disk has anything of sets that its node is not a member of.
    async fn no_leftovers(&self, table: &[ReplicaSetId]) {
        for set in table {
            for (i, disk) in self.disks.iter().enumerate() {
                eventually(&format!("nothing left of {set} on node {i}"), async || {
                    self.record(*set).await.involves(&node(i)) || disk.list(*set).await.unwrap().is_empty()
                })
                .await;
            }
        }
    }

    fn scrub(&self) -> (u64, u64, u64) {
        let sum = |of: fn(&lazarette_metastore::ScrubRecord) -> u64| {
            let running = self.nodes.iter().flatten();
            running.map(|node| of(&node.replicas.scrub())).sum()
        };
        (sum(|s| s.found), sum(|s| s.repaired), sum(|s| s.lost))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_node_is_replaced_and_a_late_return_leaves_nothing_behind() {
    let mut cluster = Cluster::start_replacing(4, moving(), Duration::from_millis(1500)).await;
    let table = cluster.table(3, 2).await;
    let client = cluster.client();
    for set in &table {
        for i in 0..5 {
            client.write(*set, chunk(2, i), 0, format!("{set} {i}")).await.unwrap();
        }
    }
    cluster.kill(1).await;
    cluster
        .all(&table, "whole without node 1", |r| !r.involves(&node(1)))
        .await;
    for set in &table {
        let copies = cluster.converged(*set).await;
        assert_eq!(copies.len(), 5);
        for i in 0..5 {
            assert_eq!(copies[&chunk(2, i)], format!("{set} {i}"));
        }
        client
            .write(*set, chunk(2, 0), 0, format!("{set} after"))
            .await
            .unwrap();
    }
    // It comes back with everything that it had, and gets its share again.
    cluster.start_node(1).await;
    eventually("node 1 has a share", async || {
        let mut shares = 0;
        for set in &table {
            shares += usize::from(cluster.record(*set).await.members.contains(&node(1)));
        }
        shares + 3 > table.len() * 3 / 4
    })
    .await;
    cluster.all(&table, "at rest", |_| true).await;
    for set in &table {
        let copies = cluster.converged(*set).await;
        assert_eq!(copies[&chunk(2, 0)], format!("{set} after"));
    }
    cluster.no_leftovers(&table).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_are_kept_until_the_set_is_whole_without_them() {
    let mut cluster = Cluster::start(4, moving()).await;
    let table = cluster.table(3, 2).await;
    let mut set = table[0];
    for candidate in table {
        if !cluster.record(candidate).await.involves(&node(3)) {
            set = candidate;
        }
    }
    let client = cluster.client();
    client.write(set, chunk(2, 0), 0, "precious").await.unwrap();
    cluster.converged(set).await;
    let primary = cluster.serving(set).await;
    let dead = (0..3).find(|i| *i != primary).unwrap();
    cluster.kill(dead).await;
    cluster
        .until(set, "ejected", |r| !r.in_sync.contains(&node(dead)))
        .await;
    cluster.link(primary, 3, LinkState::Cut);
    assert!(cluster.exchange(set, &node(dead), 3).await);
    // It looks at what it has many times, and the set is not whole.
    cluster.start_node(dead).await;
    tokio::time::sleep(moving().sweep_every * 10).await;
    assert_eq!(cluster.disks[dead].list(set).await.unwrap().len(), 1);
    cluster.link(primary, 3, LinkState::Up);
    cluster
        .until(set, "whole", |r| r.settled() && r.in_sync.contains(&node(3)))
        .await;
    cluster.no_leftovers(&[set]).await;
    assert_eq!(cluster.converged(set).await[&chunk(2, 0)], "precious");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_node_gives_everything_away_and_gets_its_share_again() {
    let cluster = Cluster::start(4, moving()).await;
    let table = cluster.table(3, 2).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = tokio::task::JoinSet::new();
    for (worker, set) in (0u32..).zip(table.clone()) {
        let (client, stop) = (cluster.client(), Arc::clone(&stop));
        writers.spawn(async move {
            let mut n = 0u64;
            while !stop.load(Ordering::SeqCst) {
                n += 1;
                let id = chunk(2, worker * 10 + (n % 5) as u32);
                client.write(set, id, 0, n.to_be_bytes().to_vec()).await.unwrap();
                let read = client.read(set, id).await.unwrap();
                assert_eq!(read, n.to_be_bytes().to_vec());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            (set, worker, n)
        });
    }
    let (store, keys, sets, stopped) = (
        Arc::clone(&cluster.store),
        cluster.keys.clone(),
        table.clone(),
        Arc::clone(&stop),
    );
    let fewest_copies = tokio::spawn(async move {
        let mut fewest = usize::MAX;
        while !stopped.load(Ordering::SeqCst) {
            for set in &sets {
                let kv = store.get(&keys.replica_set(*set)).await.unwrap().unwrap();
                let record: ReplicaSetRecord = decode(&kv.value).unwrap();
                fewest = fewest.min(record.in_sync.len());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        fewest
    });
    // It leads some of the sets.
    assert!(!cluster.running(0).replicas.leading().is_empty());
    cluster.set_draining(0, true).await;
    cluster.all(&table, "without node 0", |r| !r.involves(&node(0))).await;
    cluster.no_leftovers(&table).await;
    assert!(cluster.running(0).replicas.leading().is_empty());
    cluster.set_draining(0, false).await;
    eventually("node 0 has a share", async || {
        let mut shares = 0;
        for set in &table {
            shares += usize::from(cluster.record(*set).await.in_sync.contains(&node(0)));
        }
        shares + 3 > table.len() * 3 / 4
    })
    .await;
    stop.store(true, Ordering::SeqCst);
    let mut written = BTreeMap::new();
    while let Some(done) = writers.join_next().await {
        let (set, worker, n) = done.unwrap();
        written.insert(set, (worker, n));
    }
    // Moving leaves never a copy less; a machine that stands still may.
    let ejected = |node: &Node| node.replicas.counters().members_ejected.get();
    let ejected: u64 = cluster.nodes.iter().flatten().map(ejected).sum();
    assert!(fewest_copies.await.unwrap() == 3 || ejected > 0);
    cluster.all(&table, "at rest", |_| true).await;
    for (set, (worker, n)) in written {
        let copies = cluster.converged(set).await;
        let last = chunk(2, worker * 10 + (n % 5) as u32);
        assert_eq!(copies[&last], n.to_be_bytes().to_vec());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_exchanged_and_put_back_while_they_are_brought_in_lose_nothing() {
    let cluster = Cluster::start(4, moving()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    for i in 0..50 {
        client.write(set, chunk(2, i), 0, vec![i as u8; 3000]).await.unwrap();
    }
    // Again and again a node is brought in, struck off, drops what it has got, and is brought in.
    for _ in 0..10 {
        let record = cluster.record(set).await;
        let outside = (0..4).find(|i| !record.members.contains(&node(*i))).unwrap();
        let member = record.members.last().unwrap().clone();
        cluster.exchange(set, &member, outside).await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        let back = member.0.trim_start_matches("node-").parse().unwrap();
        cluster.exchange(set, &node(outside), back).await;
        cluster.exchange(set, &member, outside).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cluster.whole(set).await;
    assert_eq!(cluster.converged(set).await.len(), 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_starts_over_when_its_member_was_struck_off_and_put_back() {
    let cluster = Cluster::start(4, moving()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    for i in 0..100 {
        client.write(set, chunk(2, i), 0, "copied slowly").await.unwrap();
    }
    let primary = cluster.serving(set).await;
    let tenure = cluster.running(primary).replicas.tenure(set).unwrap();
    let record = cluster.record(set).await;
    let outside = (0..4).find(|i| !record.members.contains(&node(*i))).unwrap();
    let member = (0..4).find(|i| *i != outside && *i != primary).unwrap();
    cluster.running(outside).chunks.delay.store(300, Ordering::SeqCst);
    assert!(cluster.exchange(set, &node(member), outside).await);
    let learner = || tenure.state().peers.get(&node(outside)).map(|p| Arc::clone(&p.peer));
    eventually("brought in", async || learner().is_some()).await;
    let first = learner().unwrap();
    // The members are the same as before when the primary hears of it.
    assert!(cluster.exchange(set, &node(outside), member).await);
    assert!(cluster.exchange(set, &node(member), outside).await);
    eventually("given up", async || first.gone.is_cancelled()).await;
    cluster.running(outside).chunks.delay.store(0, Ordering::SeqCst);
    cluster.whole(set).await;
    assert_eq!(cluster.converged(set).await.len(), 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scrubbing_finds_damaged_copies_that_nobody_reads() {
    let cluster = Cluster::start(3, scrubbing()).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    for i in 0..6 {
        client.write(set, chunk(2, i), 0, "precious").await.unwrap();
    }
    cluster.converged(set).await;
    // The primary's, a backup's, and two copies of one chunk.
    for (disk, index) in [(0, 0), (1, 1), (1, 2), (2, 2)] {
        assert!(cluster.memory[disk].damage(set, chunk(2, index)));
    }
    eventually("repaired", async || cluster.scrub() == (4, 4, 0)).await;
    assert_eq!(cluster.converged(set).await.len(), 6);
    // A copy that is not there at all, and one that is not in the newest version.
    let one = &cluster.disks[1];
    one.install(set, chunk(2, 3), Version::NONE, Default::default(), 0)
        .await
        .unwrap();
    let old = Version { epoch: 0, sequence: 1 };
    let crc = crate::chunk::crc32c(b"old");
    one.install(set, chunk(2, 4), old, "old".into(), crc).await.unwrap();
    eventually("repaired", async || cluster.scrub() == (6, 6, 0)).await;
    assert!(cluster.converged(set).await.values().all(|data| data == "precious"));
    // The primary itself has lost one: it looks anew at what the others have.
    let zero = &cluster.disks[0];
    zero.install(set, chunk(2, 5), Version::NONE, Default::default(), 0)
        .await
        .unwrap();
    eventually("recovered", async || {
        zero.version(set, chunk(2, 5)).await.unwrap() != Version::NONE
    })
    .await;
    assert_eq!(client.read(set, chunk(2, 5)).await.unwrap(), "precious");
    // Without any good copy nothing is made up, and nothing taken away.
    for disk in &cluster.memory {
        assert!(disk.damage(set, chunk(2, 0)));
    }
    eventually("noticed", async || cluster.scrub().2 > 0).await;
    assert_eq!(client.read(set, chunk(2, 0)).await.unwrap_err(), ErrorCode::Corrupt);
    for disk in &cluster.disks {
        assert_eq!(disk.list(set).await.unwrap().len(), 6);
    }
}

fn chunk_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(chunk_files(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Changes one byte of a file.
fn flip(path: &Path, offset: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_on_real_disks_is_served_around_and_repaired() {
    /// Where the data begins in a chunk file.
    const DATA: u64 = 69632;
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let open = |i: usize| Arc::new(FileChunkStore::open(folders[i].path(), "test", &node(i)).unwrap());
    let mut files: Vec<_> = (0..3).map(open).collect();
    let disks = files
        .iter()
        .map(|disk| Arc::clone(disk) as Arc<dyn ChunkStore>)
        .collect();
    let never = Duration::from_secs(3600);
    let mut cluster = Cluster::start_on(Arc::new(MemoryStore::new()), disks, quick(), never).await;
    let set = cluster.table(3, 2).await[0];
    let client = cluster.client();
    for i in 0..4 {
        client.write(set, chunk(2, i), 0, vec![i as u8; 20_000]).await.unwrap();
    }
    cluster.converged(set).await;
    for disk in &files {
        disk.fold().await.unwrap();
    }
    let on = |i: usize| chunk_files(&folders[i].path().join("chunks"));
    assert_eq!(on(0).len(), 4);
    // Under the primary: a bit of the data, and a whole file.
    flip(&on(0)[0], DATA + 5000);
    std::fs::remove_file(&on(0)[1]).unwrap();
    for i in 0..2 {
        assert_eq!(client.read(set, chunk(2, i)).await.unwrap(), vec![i as u8; 20_000]);
    }
    assert_eq!(cluster.running(0).replicas.counters().chunks_healed.get(), 2);
    // Under a backup, which nobody reads: data, a whole file, and while it is down a header and
    // another file.
    flip(&on(1)[0], DATA + 19_000);
    std::fs::remove_file(&on(1)[1]).unwrap();
    cluster.kill(2).await;
    cluster
        .until(set, "without node 2", |r| !r.in_sync.contains(&node(2)))
        .await;
    flip(&on(2)[2], 20);
    std::fs::remove_file(&on(2)[3]).unwrap();
    cluster.config = scrubbing();
    // Its process is gone when nothing uses its disk any more.
    cluster.disks[2] = Arc::new(crate::chunk::MemoryChunkStore::new());
    let mut third = Some(files.pop().unwrap());
    eventually("the disk is free", async || {
        third = third.take().filter(|disk| Arc::strong_count(disk) > 1);
        third.is_none()
    })
    .await;
    cluster.disks[2] = open(2);
    cluster.start_node(2).await;
    for i in [1, 0] {
        // With scrubbing from now on.
        cluster.kill(i).await;
        cluster.start_node(i).await;
        cluster.whole(set).await;
    }
    eventually("all copies good", async || {
        for disk in &cluster.disks {
            for i in 0..4 {
                match disk.fetch(set, chunk(2, i)).await {
                    Ok(contents) if contents.data == vec![i as u8; 20_000] => {}
                    _ => return false,
                }
            }
        }
        true
    })
    .await;
    // A repair is counted after the copy is there.
    eventually("all counted", async || {
        let (found, repaired, lost) = cluster.scrub();
        found >= 2 && repaired == found && lost == 0
    })
    .await;
}
