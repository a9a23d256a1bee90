//! Acknowledged changes survive any single fault at any moment, and reads are linearizable.
//!
//! Each chunk has one writer, whose changes are numbered: a write puts its number into the chunk,
//! a deletion empties it. An attempt is repeated until it is acknowledged. So at any time the
//! chunk must show the last acknowledged change or the one under way, and never go back.

use super::etcd::Etcd;
use super::faults::LinkState;
use super::harness::{Client, Cluster, DEADLINE, chunk, node, quick};
use crate::chunk::{ChunkStore, FileChunkStore};
use crate::replication::ReplicationConfig;
use bytes::Bytes;
use lazarette_types::{ChunkId, ReplicaSetId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// One chunk's history, as far as the others must know.
#[derive(Default)]
struct History {
    /// The last change begun.
    begun: AtomicU64,
    /// The last change acknowledged.
    acknowledged: AtomicU64,
    /// The highest number ever read.
    seen: AtomicU64,
}

/// Whether change `number` of a chunk is a deletion.
fn deletes(number: u64) -> bool {
    number % 7 == 6
}

fn contents(number: u64) -> Bytes {
    // Of different lengths, with the number at both ends, so that a mixture shows.
    let mut data = number.to_be_bytes().repeat(2 + (number as usize * 37) % 300);
    data.extend(number.to_be_bytes());
    data.into()
}

/// The change as a write of several parts, the number in the first and in the last.
fn parts(number: u64) -> Vec<(u32, Bytes)> {
    let whole = contents(number);
    let least = whole.len().div_ceil(lazarette_proto::MAX_WRITE_PARTS);
    let size = least.max((number as usize * 13) % whole.len());
    (0..whole.len())
        .step_by(size)
        .map(|at| (at as u32, whole.slice(at..whole.len().min(at + size))))
        .collect()
}

/// The highest change up to `limit` after which a chunk could look like this; panics if none.
fn change_of(data: &[u8], limit: u64) -> u64 {
    if data.is_empty() {
        return (0..=limit).rev().find(|n| *n == 0 || deletes(*n)).unwrap();
    }
    let number = u64::from_be_bytes(data[..8].try_into().unwrap());
    let expected = contents(number);
    assert!(data.len() >= expected.len(), "chunk of change {number} is short");
    assert_eq!(data[..expected.len()], expected, "chunk is a mixture");
    number
}

async fn write_on(client: Client, set: ReplicaSetId, id: ChunkId, history: Arc<History>, stop: Arc<AtomicBool>) {
    let mut number = history.acknowledged.load(Ordering::SeqCst);
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        history.begun.store(number, Ordering::SeqCst);
        if deletes(number) {
            client.delete(set, id).await.unwrap();
        } else {
            // The whole change, whatever was there: a shorter one over a longer.
            client.write_parts(set, id, &parts(number)).await.unwrap();
        }
        history.acknowledged.store(number, Ordering::SeqCst);
    }
}

async fn read_on(client: Client, set: ReplicaSetId, id: ChunkId, history: Arc<History>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::SeqCst) {
        check(&client, set, id, &history).await;
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

async fn check(client: &Client, set: ReplicaSetId, id: ChunkId, history: &History) {
    let least = history
        .acknowledged
        .load(Ordering::SeqCst)
        .max(history.seen.load(Ordering::SeqCst));
    let data = client.read(set, id).await.unwrap();
    let found = change_of(&data, history.begun.load(Ordering::SeqCst));
    assert!(found >= least, "chunk {id} shows change {found} after {least}");
    // An empty chunk is of some deletion: of which is not certain.
    if !data.is_empty() {
        history.seen.fetch_max(found, Ordering::SeqCst);
    }
}

async fn one_fault(cluster: &mut Cluster, random: &mut StdRng) {
    let count = cluster.disks.len();
    let victim = random.random_range(0..count);
    let other = (victim + random.random_range(1..count)) % count;
    let pause = Duration::from_millis(random.random_range(0..600));
    match random.random_range(0..7) {
        0 | 1 => {
            cluster.kill(victim).await;
            tokio::time::sleep(pause).await;
            cluster.start_node(victim).await;
        }
        2 => {
            // Restarted before anyone noticed.
            cluster.kill_quietly(victim).await;
            cluster.start_node(victim).await;
        }
        3 => {
            // The third copy falls behind, then a node dies.
            cluster.link(victim, other, LinkState::Paused);
            tokio::time::sleep(pause).await;
            cluster.kill(victim).await;
            cluster.link(victim, other, LinkState::Up);
            tokio::time::sleep(pause).await;
            cluster.start_node(victim).await;
        }
        4 => {
            let state = if random.random() {
                LinkState::Cut
            } else {
                LinkState::Paused
            };
            cluster.link(victim, other, state);
            tokio::time::sleep(pause * 8).await;
            cluster.link(victim, other, LinkState::Up);
        }
        5 => {
            // Alive, but without the metadata store: it must stop serving by itself.
            cluster.running(victim).store.cut.store(true, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(3500)).await;
            cluster.kill(victim).await;
            cluster.start_node(victim).await;
        }
        _ => {
            let chunks = Arc::clone(&cluster.running(victim).chunks);
            chunks.delay.store(random.random_range(1..400), Ordering::SeqCst);
            tokio::time::sleep(pause * 3).await;
            chunks.delay.store(0, Ordering::SeqCst);
        }
    }
}

/// Members of the set are exchanged, or a node is to leave or to stay: while nothing else happens, or
/// in the middle of a fault.
async fn one_move(cluster: &Cluster, set: ReplicaSetId, random: &mut StdRng, draining: &mut Option<usize>) {
    let count = cluster.disks.len();
    if random.random() {
        let members = cluster.record(set).await.members;
        let from = &members[random.random_range(0..members.len())];
        for _ in 0..random.random_range(1..3) {
            cluster.exchange(set, from, random.random_range(0..count)).await;
        }
    } else if let Some(node) = draining.take() {
        cluster.set_draining(node, false).await;
    } else {
        let node = random.random_range(0..count);
        cluster.set_draining(node, true).await;
        *draining = Some(node);
    }
    tokio::time::sleep(Duration::from_millis(random.random_range(0..400))).await;
}

/// With more nodes than copies, members move as well.
async fn survive(mut cluster: Cluster, seed: u64, rounds: usize, copies: u32, ack: u32) {
    let mut random = StdRng::seed_from_u64(seed);
    let set = cluster.table(copies, ack).await[0];
    let mut draining = None;
    let histories: Vec<_> = (0..4).map(|_| Arc::new(History::default())).collect();
    for round in 0..rounds {
        tracing::info!(seed, round, "round");
        let stop = Arc::new(AtomicBool::new(false));
        let mut clients = tokio::task::JoinSet::new();
        for (i, history) in histories.iter().enumerate() {
            let id = chunk(2, i as u32);
            let (history, stop) = (Arc::clone(history), Arc::clone(&stop));
            clients.spawn(write_on(
                cluster.client(),
                set,
                id,
                Arc::clone(&history),
                Arc::clone(&stop),
            ));
            clients.spawn(read_on(cluster.client(), set, id, history, stop));
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..200))).await;
        if cluster.disks.len() > copies as usize {
            one_move(&cluster, set, &mut random, &mut draining).await;
        }
        one_fault(&mut cluster, &mut random).await;
        tokio::time::sleep(Duration::from_millis(random.random_range(0..200))).await;
        stop.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + DEADLINE;
        while let Some(done) = tokio::time::timeout_at(deadline, clients.join_next()).await.unwrap() {
            done.unwrap();
        }
        let client = cluster.client();
        cluster.whole(set).await;
        for (i, history) in histories.iter().enumerate() {
            check(&client, set, chunk(2, i as u32), history).await;
            // What was not acknowledged was repeated until it was.
            assert_eq!(
                history.begun.load(Ordering::SeqCst),
                history.acknowledged.load(Ordering::SeqCst)
            );
        }
        cluster.converged(set).await;
    }
    if let Some(node) = draining {
        cluster.set_draining(node, false).await;
    }
    // Nodes that are not members any more have dropped what they had.
    let deadline = Instant::now() + DEADLINE;
    for (i, disk) in cluster.disks.iter().enumerate() {
        while !cluster.record(set).await.involves(&node(i)) && !disk.list(set).await.unwrap().is_empty() {
            assert!(Instant::now() < deadline, "node {i} keeps what it does not need");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A number from the environment.
fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(otherwise)
}

/// Times that suit moves: what was left is dropped soon, and led by whom it should.
fn moving() -> ReplicationConfig {
    ReplicationConfig {
        sweep_every: Duration::from_millis(100),
        hand_back_after: Duration::from_millis(500),
        ..quick()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_changes_survive_single_faults() {
    // More with LAZARETTE_ROUNDS, others with LAZARETTE_SEED.
    let (seed, rounds) = (number("LAZARETTE_SEED", 1), number("LAZARETTE_ROUNDS", 8));
    survive(Cluster::start(3, quick()).await, seed, rounds as usize, 3, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_changes_survive_single_faults_of_full_replication() {
    survive(Cluster::start(3, quick()).await, 7, 4, 3, 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_changes_survive_faults_while_members_move() {
    let (seed, rounds) = (number("LAZARETTE_SEED", 5), number("LAZARETTE_ROUNDS", 8));
    survive(Cluster::start(4, moving()).await, seed, rounds as usize, 3, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_changes_survive_faults_and_moves_on_real_disks_and_a_real_etcd() {
    let etcd = Etcd::start();
    let folders: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    let disks = folders
        .iter()
        .enumerate()
        .map(|(i, folder)| {
            Arc::new(FileChunkStore::open(folder.path(), "test", &node(i)).unwrap()) as Arc<dyn ChunkStore>
        })
        .collect();
    let never = Duration::from_secs(3600);
    let cluster = Cluster::start_on(etcd.store().await, disks, moving(), never).await;
    survive(cluster, 3, 5, 3, 2).await;
}
