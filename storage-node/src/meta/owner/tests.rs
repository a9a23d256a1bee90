//! One owner after the other, on the store in memory and on a real etcd.

mod chaos;
mod etcd;
mod leases;
mod model;
mod stores;

use super::*;
use crate::meta::chunks::ChunkError;
use crate::meta::namespace::Reply;
use async_trait::async_trait;
use lazarette_metastore::{MemoryStore, VolumeRecord, VolumeState, encode};
use lazarette_proto::meta::{
    AppendBegin, Attr, Create, Extend, GetAttr, Kind, Lock, LockKind, LockMode, LockRange, Lookup, ReadDir, Report,
    Response, SetAttr, Unlink, request::Op as Do, response::Result as ReplyKind,
};
use lazarette_types::{InodeId, ReplicaSetId, ReplicationPolicy};
use std::sync::Mutex;
use stores::FlakyStore;
use tokio::sync::Semaphore;

const VOLUME: VolumeId = VolumeId(7);
const LIMITS: Limits = Limits {
    size: 1 << 40,
    chunk_size: 1 << 20,
};
const DEADLINE: Duration = Duration::from_secs(60);

/// Chunks that write down what is done to them, and let it be done only as often as permitted.
struct Chunks {
    permits: Semaphore,
    done: Mutex<Vec<String>>,
}

impl Chunks {
    fn new(permits: usize) -> Arc<Self> {
        Arc::new(Self {
            permits: Semaphore::new(permits),
            done: Mutex::default(),
        })
    }

    async fn note(&self, what: String) -> Result<(), ChunkError> {
        let permit = self.permits.acquire().await;
        permit.map_err(|error| ChunkError(error.to_string()))?.forget();
        self.done.lock().unwrap().push(what);
        Ok(())
    }

    fn done(&self) -> Vec<String> {
        let mut done = self.done.lock().unwrap().clone();
        done.sort();
        done
    }
}

#[async_trait]
impl ChunkRemover for Chunks {
    async fn remove(&self, _: VolumeId, ino: InodeId, _: u32, from: u32, to: u32) -> Result<(), ChunkError> {
        self.note(format!("remove {ino} {from}..{to}")).await
    }

    async fn truncate(&self, _: VolumeId, ino: InodeId, _: u32, index: u32, length: u32) -> Result<(), ChunkError> {
        self.note(format!("truncate {ino}/{index} to {length}")).await
    }
}

/// A cluster's store with one volume.
struct Rig {
    store: Arc<dyn MetaStore>,
    keys: Keys,
}

impl Rig {
    async fn new(store: Arc<dyn MetaStore>, cluster: &str) -> Self {
        let keys = Keys::new(cluster);
        let record = VolumeRecord {
            id: VOLUME,
            name: "data".into(),
            size: LIMITS.size,
            replication: ReplicationPolicy::default(),
            chunk_size: LIMITS.chunk_size,
            replica_sets: vec![ReplicaSetId(1)],
            labels: Default::default(),
            state: VolumeState::Ready,
        };
        let txn = Txn {
            conditions: vec![],
            then: vec![Op::put(keys.volume(VOLUME), encode(&record))],
        };
        store.txn(txn).await.unwrap();
        Self { store, keys }
    }

    async fn memory() -> Self {
        Self::new(Arc::new(MemoryStore::new()), "c").await
    }

    async fn node(&self, name: &str) -> OwnerContext {
        self.node_with(name, Chunks::new(1 << 20)).await
    }

    async fn node_with(&self, name: &str, chunks: Arc<Chunks>) -> OwnerContext {
        OwnerContext {
            store: Arc::clone(&self.store),
            keys: self.keys.clone(),
            node: NodeId(name.into()),
            address: format!("{name}:7400"),
            lease: Lease::acquire(Arc::clone(&self.store)).await.unwrap(),
            chunks,
            metrics: Arc::default(),
        }
    }

    async fn journal_length(&self) -> usize {
        let prefix = self.keys.shard(VOLUME).journal();
        self.store.range(&prefix).await.unwrap().0.len()
    }
}

async fn serve(context: &OwnerContext) -> Shard {
    let claim = claim(context, VOLUME).await.unwrap();
    Shard::start(context, claim, LIMITS).await.unwrap()
}

/// The node is gone without a word; its lease has ended.
async fn kill(context: &OwnerContext) {
    context.lease.resign(&*context.store).await.unwrap();
}

fn request(session: u64, op_id: u64, op: Do) -> Request {
    Request {
        volume: VOLUME.0,
        session,
        op_id,
        ack_below: 0,
        handles: None,
        op: Some(op),
    }
}

async fn call(shard: &Shard, session: u64, op_id: u64, op: Do) -> Result<Response, ErrorCode> {
    let answer = tokio::time::timeout(DEADLINE, shard.call(request(session, op_id, op))).await;
    answer.expect("an answer").map_err(|fault| fault.code)
}

/// Tells what a session has opened and closed.
async fn report(shard: &Shard, session: u64, number: u64, opened: &[u64], closed: &[u64]) -> Response {
    let handles = Handles {
        number,
        opened: opened.to_vec(),
        closed: closed.to_vec(),
    };
    let request = Request {
        handles: Some(handles),
        ..request(session, 0, Do::Report(Report {}))
    };
    shard.call(request).await.unwrap()
}

/// Renews a session and says everything that it has open, under the shard's terms.
async fn register(shard: &Shard, session: u64, number: u64, opened: &[u64]) {
    let mut terms = shard.keep_alive(SessionId(session), None).await.unwrap();
    loop {
        let handles = Handles {
            number,
            opened: opened.to_vec(),
            closed: Vec::new(),
        };
        let registration = Registration { terms, handles };
        let reply = shard.keep_alive(SessionId(session), Some(registration)).await.unwrap();
        if reply == terms {
            return;
        }
        terms = reply;
    }
}

async fn attr(shard: &Shard, session: u64, op_id: u64, op: Do) -> Attr {
    match call(shard, session, op_id, op).await.unwrap().result {
        Some(ReplyKind::Attr(attr)) => attr,
        other => panic!("{other:?}"),
    }
}

fn create(name: &str) -> Do {
    Do::Create(Create {
        parent: 1,
        name: name.as_bytes().to_vec().into(),
        kind: Kind::File.into(),
        mode: 0o644,
        exclusive: true,
        ..Create::default()
    })
}

fn lookup(name: &str) -> Do {
    let name = name.as_bytes().to_vec().into();
    Do::Lookup(Lookup { parent: 1, name })
}

fn unlink(name: &str) -> Do {
    let name = name.as_bytes().to_vec().into();
    Do::Unlink(Unlink { parent: 1, name })
}

fn extend(ino: u64, end: u64) -> Do {
    Do::Extend(Extend {
        ino,
        end,
        mtime: 0,
        start: 0,
        since: u64::MAX,
    })
}

fn truncate(ino: u64, size: u64) -> Do {
    Do::SetAttr(SetAttr {
        ino,
        size: Some(size),
        ..SetAttr::default()
    })
}

fn flock(ino: u64, mode: LockMode, wait_ms: u32) -> Do {
    let range = LockRange {
        kind: LockKind::Flock.into(),
        mode: mode.into(),
        owner: 1,
        ..LockRange::default()
    };
    let range = Some(range);
    Do::Lock(Lock { ino, range, wait_ms })
}

async fn names(shard: &Shard, session: u64) -> Vec<String> {
    let mut names = Vec::new();
    let mut after = 0;
    loop {
        let op = ReadDir {
            ino: 1,
            after,
            limit: 0,
        };
        let Some(Reply::ReadDir(reply)) = call(shard, session, 0, Do::ReadDir(op)).await.unwrap().result else {
            panic!("not a listing");
        };
        for entry in &reply.entries {
            names.push(String::from_utf8(entry.name.to_vec()).unwrap());
            after = entry.cookie;
        }
        if reply.end {
            return names;
        }
    }
}

/// Waits until `condition` holds.
async fn until<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting)
        .await
        .expect("the condition holds");
}

/// Everything that is the same on every store.
async fn life_of_a_shard(rig: &Rig) {
    let a = rig.node("a").await;
    let first = serve(&a).await;
    assert_eq!(first.epoch(), 1);
    first.open_session(SessionId(5), "client".into()).await.unwrap();
    let file = attr(&first, 5, 1, create("f")).await;
    attr(&first, 5, 2, extend(file.ino, 100)).await;
    call(&first, 5, 3, flock(file.ino, LockMode::Exclusive, 0))
        .await
        .unwrap();
    let begun = call(
        &first,
        5,
        4,
        Do::AppendBegin(AppendBegin {
            ino: file.ino,
            wait_ms: 0,
            length: 10,
        }),
    )
    .await
    .unwrap();
    let Some(ReplyKind::AppendTurn(turn)) = begun.result else {
        panic!("{begun:?}");
    };
    assert_eq!(turn.offset, 100);

    let b = rig.node("b").await;
    assert!(matches!(claim(&b, VOLUME).await, Err(ClaimError::Taken)));
    kill(&a).await;
    assert_eq!(call(&first, 5, 0, lookup("f")).await, Err(ErrorCode::NotOwner));
    assert_eq!(call(&first, 5, 9, create("g")).await, Err(ErrorCode::NotOwner));

    let second = serve(&b).await;
    assert_eq!(second.epoch(), 2);
    // The session, the file, the lock and the turn to append are there, and every repeated
    // operation gets its first result.
    register(&second, 5, 1, &[]).await;
    assert_eq!(attr(&second, 5, 1, create("f")).await, file);
    assert_eq!(call(&second, 5, 10, create("f")).await, Err(ErrorCode::Exists));
    let begun = call(
        &second,
        5,
        4,
        Do::AppendBegin(AppendBegin {
            ino: file.ino,
            wait_ms: 0,
            length: 10,
        }),
    )
    .await
    .unwrap();
    let Some(ReplyKind::AppendTurn(turn)) = begun.result else {
        panic!("{begun:?}");
    };
    assert_eq!(turn.offset, 100);
    second.open_session(SessionId(6), "other".into()).await.unwrap();
    let wanted = flock(file.ino, LockMode::Exclusive, 0);
    assert_eq!(call(&second, 6, 1, wanted).await, Err(ErrorCode::WouldBlock));
    assert_eq!(names(&second, 6).await, ["f"]);

    // Given up in good order, the next one takes over at once, without any lease ending.
    second.resign().await;
    assert_eq!(call(&second, 6, 0, lookup("f")).await, Err(ErrorCode::NotOwner));
    let third = serve(&rig.node("c").await).await;
    assert_eq!(third.epoch(), 3);
    third.close_session(SessionId(5)).await.unwrap();
    call(&third, 6, 2, flock(file.ino, LockMode::Exclusive, 0))
        .await
        .unwrap();
    assert_eq!(call(&third, 5, 0, lookup("f")).await, Err(ErrorCode::SessionExpired));
    third.resign().await;
}

/// The journal is folded into pages and stays short; nothing is lost on the way.
async fn long_life(rig: &Rig, files: usize) {
    let a = rig.node("a").await;
    let shard = serve(&a).await;
    shard.open_session(SessionId(5), "client".into()).await.unwrap();
    for i in 0..files {
        // One after the other, so that each is a record of its own.
        let mut create = request(5, 1 + i as u64, create(&format!("file-{i:05}")));
        create.ack_below = i as u64;
        shard.call(create).await.unwrap();
    }
    until(|| async { rig.journal_length().await < files / 2 }).await;
    assert!(a.metrics.pages.load(Ordering::Relaxed) > 0);
    kill(&a).await;
    let shard = serve(&rig.node("b").await).await;
    let found = names(&shard, 5).await;
    assert_eq!(found.len(), files);
    assert!(found.is_sorted());
    assert_eq!(shard.usage().used_inodes, files as u64 + 1);
    shard.resign().await;
}

#[tokio::test]
async fn life_of_a_shard_in_memory() {
    life_of_a_shard(&Rig::memory().await).await;
}

#[tokio::test]
async fn long_life_in_memory() {
    long_life(&Rig::memory().await, 1500).await;
}

#[tokio::test]
async fn on_etcd() {
    let etcd = etcd::Etcd::start();
    let store = etcd.store().await;
    life_of_a_shard(&Rig::new(Arc::clone(&store), "life").await).await;
    long_life(&Rig::new(Arc::clone(&store), "long").await, 1500).await;
    a_deposed_owner_commits_nothing(&Rig::new(store, "fence").await).await;
}

/// An owner that does not know yet that its lease has ended.
async fn a_deposed_owner_commits_nothing(rig: &Rig) {
    let a = rig.node("a").await;
    let old = serve(&a).await;
    old.open_session(SessionId(5), "client".into()).await.unwrap();
    call(&old, 5, 1, create("before")).await.unwrap();
    rig.store.revoke(a.lease.id()).await.unwrap();
    let new = serve(&rig.node("b").await).await;
    assert_eq!(call(&old, 5, 2, create("lost")).await, Err(ErrorCode::NotOwner));
    old.ended().await;
    call(&new, 5, 3, create("after")).await.unwrap();
    assert_eq!(names(&new, 5).await, ["before", "after"]);
    new.resign().await;
    let third = serve(&rig.node("c").await).await;
    assert_eq!(names(&third, 5).await, ["before", "after"]);
}

#[tokio::test]
async fn a_deposed_owner_commits_nothing_in_memory() {
    a_deposed_owner_commits_nothing(&Rig::memory().await).await;
}

#[tokio::test]
async fn of_many_claims_one_wins() {
    let rig = Rig::memory().await;
    let mut claims = Vec::new();
    for i in 0..8 {
        let context = rig.node(&format!("n{i}")).await;
        claims.push(tokio::spawn(async move { claim(&context, VOLUME).await.is_ok() }));
    }
    let won = futures::future::join_all(claims).await;
    assert_eq!(won.into_iter().filter(|won| *won.as_ref().unwrap()).count(), 1);
    let none = rig.node("x").await;
    assert!(matches!(claim(&none, VolumeId(99)).await, Err(ClaimError::NoVolume)));
}

/// The store makes some changes without saying so, does not make others without saying so, and
/// fails now and then. Nothing acknowledged is lost and nothing is done twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ambiguous_answers_lose_and_double_nothing() {
    let flaky = Arc::new(FlakyStore::new(5));
    let rig = Rig::new(Arc::clone(&flaky) as Arc<dyn MetaStore>, "c").await;
    let a = rig.node("a").await;
    let shard = serve(&a).await;
    flaky.set_failing(true);
    shard.open_session(SessionId(5), "client".into()).await.unwrap();
    let mut tasks = Vec::new();
    for i in 0..300u64 {
        let shard = shard.clone();
        tasks.push(tokio::spawn(async move {
            call(&shard, 5, 1 + i, create(&format!("f{i}"))).await
        }));
    }
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    flaky.set_failing(false);
    assert!(flaky.failures() > 3);
    kill(&a).await;
    let next = serve(&rig.node("b").await).await;
    assert_eq!(names(&next, 5).await.len(), 300);
}

#[tokio::test]
async fn a_waiting_lock_survives_its_owner() {
    let rig = Rig::memory().await;
    let a = rig.node("a").await;
    let first = serve(&a).await;
    for session in [5, 6] {
        first.open_session(SessionId(session), "client".into()).await.unwrap();
    }
    let ino = attr(&first, 5, 1, create("f")).await.ino;
    call(&first, 5, 2, flock(ino, LockMode::Exclusive, 0)).await.unwrap();
    let waiting = {
        let first = first.clone();
        tokio::spawn(async move { call(&first, 6, 1, flock(ino, LockMode::Exclusive, 60_000)).await })
    };
    tokio::task::yield_now().await;
    kill(&a).await;
    assert_eq!(waiting.await.unwrap(), Err(ErrorCode::NotOwner));
    let second = serve(&rig.node("b").await).await;
    let waiting = {
        let second = second.clone();
        tokio::spawn(async move { call(&second, 6, 1, flock(ino, LockMode::Exclusive, 60_000)).await })
    };
    call(&second, 5, 3, flock(ino, LockMode::Unlock, 0)).await.unwrap();
    assert!(waiting.await.unwrap().is_ok());
}

#[tokio::test]
async fn dropping_the_call_cancels_the_wait() {
    let rig = Rig::memory().await;
    let shard = serve(&rig.node("a").await).await;
    for session in [5, 6, 7] {
        shard.open_session(SessionId(session), "client".into()).await.unwrap();
    }
    let ino = attr(&shard, 5, 1, create("f")).await.ino;
    call(&shard, 5, 2, flock(ino, LockMode::Exclusive, 0)).await.unwrap();
    {
        let waiting = shard.call(request(6, 1, flock(ino, LockMode::Exclusive, 60_000)));
        let given_up = tokio::time::timeout(Duration::from_millis(50), waiting).await;
        assert!(given_up.is_err());
    }
    call(&shard, 5, 3, flock(ino, LockMode::Unlock, 0)).await.unwrap();
    call(&shard, 7, 1, flock(ino, LockMode::Exclusive, 0)).await.unwrap();
    // A wait also ends by itself.
    let ended = call(&shard, 6, 2, flock(ino, LockMode::Exclusive, 20)).await;
    assert_eq!(ended, Err(ErrorCode::WouldBlock));
}

#[tokio::test]
async fn sessions_end_when_they_are_not_renewed() {
    let rig = Rig::memory().await;
    let a = rig.node("a").await;
    let claim = claim(&a, VOLUME).await.unwrap();
    let tuning = Tuning {
        session_ttl: Duration::from_millis(1500),
        ..Tuning::default()
    };
    let shard = Shard::start_with(&a, claim, LIMITS, tuning).await.unwrap();
    for session in [5, 6] {
        shard.open_session(SessionId(session), "client".into()).await.unwrap();
    }
    let ino = attr(&shard, 5, 1, create("f")).await.ino;
    report(&shard, 5, 1, &[ino], &[]).await;
    call(&shard, 5, 3, flock(ino, LockMode::Exclusive, 0)).await.unwrap();
    call(&shard, 6, 1, unlink("f")).await.unwrap();
    let renewals = {
        let shard = shard.clone();
        tokio::spawn(async move {
            loop {
                let _ = shard.keep_alive(SessionId(6), None).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
    };
    // The one that is not renewed loses its lock, and with it goes the file that it kept.
    let waited = call(&shard, 6, 2, flock(ino, LockMode::Exclusive, 60_000)).await;
    assert!(matches!(waited, Ok(_) | Err(ErrorCode::Stale)), "{waited:?}");
    assert_eq!(call(&shard, 5, 0, lookup("f")).await, Err(ErrorCode::SessionExpired));
    let gone = || async { call(&shard, 6, 0, Do::GetAttr(GetAttr { ino })).await == Err(ErrorCode::Stale) };
    until(gone).await;
    assert_eq!(shard.usage().sessions, 1);
    renewals.abort();
}

#[tokio::test]
async fn a_sole_client_may_cache_and_a_second_one_waits_for_that() {
    let rig = Rig::memory().await;
    let shard = serve(&rig.node("a").await).await;
    shard.open_session(SessionId(5), "client".into()).await.unwrap();
    let reply = call(&shard, 5, 1, create("f")).await.unwrap();
    assert_eq!(reply.cache_ttl_ms, 1000);
    let granted = tokio::time::Instant::now();
    shard.open_session(SessionId(6), "other".into()).await.unwrap();
    assert!(granted.elapsed() >= Duration::from_millis(900));
    let reply = call(&shard, 5, 0, lookup("f")).await.unwrap();
    assert_eq!(reply.cache_ttl_ms, 0);
    shard.close_session(SessionId(6)).await.unwrap();
    let reply = call(&shard, 5, 0, lookup("f")).await.unwrap();
    assert_eq!(reply.cache_ttl_ms, 1000);
}

#[tokio::test]
async fn shrinking_is_answered_when_the_chunks_are_cut() {
    let rig = Rig::memory().await;
    let chunks = Chunks::new(1);
    let a = rig.node_with("a", Arc::clone(&chunks)).await;
    let first = serve(&a).await;
    first.open_session(SessionId(5), "client".into()).await.unwrap();
    let ino = attr(&first, 5, 1, create("f")).await.ino;
    attr(&first, 5, 2, extend(ino, 3 << 20)).await;
    let spawn = |shard: &Shard, op_id, op| {
        let shard = shard.clone();
        tokio::spawn(async move { call(&shard, 5, op_id, op).await })
    };
    let shrinking = spawn(&first, 3, truncate(ino, 10));
    until(|| async { chunks.done().len() == 1 }).await;
    let reading = spawn(&first, 0, Do::GetAttr(GetAttr { ino }));
    // Cutting is stuck, so is everything about this file; other files are not.
    call(&first, 5, 4, create("g")).await.unwrap();
    assert!(!shrinking.is_finished() && !reading.is_finished());
    kill(&a).await;
    assert_eq!(shrinking.await.unwrap(), Err(ErrorCode::NotOwner));
    assert_eq!(reading.await.unwrap(), Err(ErrorCode::NotOwner));

    // The next owner finishes the cut before it says anything about the file.
    let chunks = Chunks::new(0);
    let second = serve(&rig.node_with("b", Arc::clone(&chunks)).await).await;
    let reading = spawn(&second, 0, lookup("f"));
    let again = spawn(&second, 3, truncate(ino, 10));
    let extending = spawn(&second, 5, extend(ino, 20));
    call(&second, 5, 0, lookup("g")).await.unwrap();
    assert!(!reading.is_finished() && !again.is_finished() && !extending.is_finished());
    chunks.permits.add_permits(100);
    reading.await.unwrap().unwrap();
    match again.await.unwrap().unwrap().result {
        Some(ReplyKind::Attr(attr)) => assert_eq!(attr.size, 10),
        other => panic!("{other:?}"),
    }
    extending.await.unwrap().unwrap();
    let done = [0, 1, 2].map(|index| format!("truncate {ino}/{index} to {}", if index == 0 { 10 } else { 0 }));
    assert_eq!(chunks.done(), done);
    assert_eq!(attr(&second, 5, 0, Do::GetAttr(GetAttr { ino })).await.size, 20);
}

#[tokio::test]
async fn chunks_of_a_file_that_is_gone_are_removed_by_whoever_owns_it_then() {
    let rig = Rig::memory().await;
    let stuck = Chunks::new(0);
    let a = rig.node_with("a", Arc::clone(&stuck)).await;
    let first = serve(&a).await;
    first.open_session(SessionId(5), "client".into()).await.unwrap();
    let ino = attr(&first, 5, 1, create("f")).await.ino;
    attr(&first, 5, 2, extend(ino, 5 << 20)).await;
    report(&first, 5, 1, &[ino], &[]).await;
    call(&first, 5, 4, unlink("f")).await.unwrap();
    kill(&a).await;
    assert!(stuck.done().is_empty());

    let chunks = Chunks::new(100);
    let b = rig.node_with("b", Arc::clone(&chunks)).await;
    let second = serve(&b).await;
    // The client still has it open, and says so in time.
    call(&second, 5, 5, create("g")).await.unwrap();
    assert!(chunks.done().is_empty());
    register(&second, 5, 1, &[ino]).await;
    assert_eq!(attr(&second, 5, 0, Do::GetAttr(GetAttr { ino })).await.nlink, 0);
    report(&second, 5, 2, &[], &[ino]).await;
    until(|| async { chunks.done() == [format!("remove {ino} 0..5")] }).await;
    until(|| async { b.metrics.removed_files.load(Ordering::Relaxed) == 1 }).await;
    second.resign().await;
    let chunks = Chunks::new(100);
    let third = serve(&rig.node_with("c", Arc::clone(&chunks)).await).await;
    call(&third, 5, 7, create("h")).await.unwrap();
    assert!(chunks.done().is_empty());
}

#[tokio::test]
async fn that_chunks_were_removed_is_noted_with_the_next_change() {
    let rig = Rig::memory().await;
    let a = rig.node("a").await;
    let shard = serve(&a).await;
    shard.open_session(SessionId(5), "client".into()).await.unwrap();
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mut together = false;
    // If the machine stands still at the wrong moment it is noted alone; hardly every time.
    for round in 0..50 {
        call(&shard, 5, 1 + 3 * round, create("f")).await.unwrap();
        let records = read(&a.metrics.records);
        call(&shard, 5, 2 + 3 * round, unlink("f")).await.unwrap();
        until(|| async { read(&a.metrics.removed_files) == round + 1 }).await;
        call(&shard, 5, 3 + 3 * round, create(&format!("g{round}")))
            .await
            .unwrap();
        together |= read(&a.metrics.records) == records + 2;
    }
    assert!(together);
    // Without another change it is noted, too.
    call(&shard, 5, 200, create("f")).await.unwrap();
    let records = read(&a.metrics.records);
    call(&shard, 5, 201, unlink("f")).await.unwrap();
    until(|| async { read(&a.metrics.records) == records + 2 }).await;
    assert_eq!(read(&a.metrics.removed_files), 51);
}

#[tokio::test]
async fn a_damaged_or_missing_record_is_not_served_over() {
    let rig = Rig::memory().await;
    let a = rig.node("a").await;
    let shard = serve(&a).await;
    shard.open_session(SessionId(5), "client".into()).await.unwrap();
    for i in 0..5 {
        call(&shard, 5, 1 + i, create(&format!("f{i}"))).await.unwrap();
    }
    kill(&a).await;
    let key = rig.keys.shard(VOLUME).journal_record(3);
    let good = rig.store.get(&key).await.unwrap().unwrap().value;
    let mut bad = good.clone();
    bad[10] ^= 1;
    let change = |then: Op| {
        let txn = Txn {
            conditions: vec![],
            then: vec![then],
        };
        let store = Arc::clone(&rig.store);
        async move { store.txn(txn).await.unwrap() }
    };
    for (then, missing) in [(Op::put(key.clone(), bad), false), (Op::Delete(key.clone()), true)] {
        change(then).await;
        let node = rig.node("b").await;
        let claim = claim(&node, VOLUME).await.unwrap();
        match Shard::start(&node, claim, LIMITS).await {
            Err(RecoverError::Gap(3)) if missing => {}
            Err(RecoverError::Record(3, _)) if !missing => {}
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("served"),
        }
        assert_eq!(node.metrics.damaged.load(Ordering::Relaxed), 1);
        kill(&node).await;
    }
    change(Op::put(key, good)).await;
    let shard = serve(&rig.node("c").await).await;
    assert_eq!(names(&shard, 5).await.len(), 5);
}

/// While the store does not answer, nothing is acknowledged; afterwards everything goes on.
#[tokio::test]
async fn an_outage_of_the_store_delays_and_loses_nothing() {
    let memory = MemoryStore::new();
    let rig = Rig::new(Arc::new(memory.clone()), "c").await;
    let shard = serve(&rig.node("a").await).await;
    shard.open_session(SessionId(5), "client".into()).await.unwrap();
    call(&shard, 5, 1, create("f")).await.unwrap();
    memory.set_unavailable(true);
    let creating = {
        let shard = shard.clone();
        tokio::spawn(async move { call(&shard, 5, 2, create("g")).await })
    };
    // What is committed can be read on, and what is not cannot be seen.
    call(&shard, 5, 0, Do::GetAttr(GetAttr { ino: 2 })).await.unwrap();
    let seeing = {
        let shard = shard.clone();
        tokio::spawn(async move { call(&shard, 5, 0, lookup("g")).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!creating.is_finished() && !seeing.is_finished());
    memory.set_unavailable(false);
    creating.await.unwrap().unwrap();
    seeing.await.unwrap().unwrap();
}

/// Large values fill records sooner; none becomes larger than the store takes.
#[tokio::test]
async fn records_stay_below_what_the_store_takes() {
    let rig = Rig::memory().await;
    let shard = serve(&rig.node("a").await).await;
    shard.open_session(SessionId(5), "client".into()).await.unwrap();
    let mut inodes = Vec::new();
    for i in 0..40 {
        inodes.push(attr(&shard, 5, 1 + i, create(&format!("f{i}"))).await.ino);
    }
    let calls = inodes.iter().enumerate().map(|(i, ino)| {
        let op = Do::SetXattr(lazarette_proto::meta::SetXattr {
            ino: *ino,
            name: "user.big".into(),
            value: vec![1; 64 << 10].into(),
            ..Default::default()
        });
        call(&shard, 5, 100 + i as u64, op)
    });
    for result in futures::future::join_all(calls).await {
        result.unwrap();
    }
    let prefix = rig.keys.shard(VOLUME).journal();
    let (records, _) = rig.store.range(&prefix).await.unwrap();
    let largest = records.iter().map(|kv| kv.value.len()).max().unwrap();
    assert!(largest > 64 << 10 && largest < 512 << 10, "{largest} bytes");
}

/// Pages show what was done in memory, so they are not written before it is committed.
#[tokio::test]
async fn pages_never_show_what_is_not_committed() {
    let store = Arc::new(FlakyStore::new(5));
    let rig = Rig::new(Arc::clone(&store) as Arc<dyn MetaStore>, "c").await;
    let a = rig.node("a").await;
    let won = claim(&a, VOLUME).await.unwrap();
    let tuning = Tuning {
        fold_records: 3,
        ..Tuning::default()
    };
    let shard = Shard::start_with(&a, won, LIMITS, tuning).await.unwrap();
    shard.open_session(SessionId(5), "client".into()).await.unwrap();
    store.set_gated(true);
    let spawn = |op_id, name: &'static str| {
        let shard = shard.clone();
        tokio::spawn(async move { call(&shard, 5, op_id, create(name)).await })
    };
    // The first is being committed while the second is done in memory.
    let first = spawn(1, "first");
    let counted = |least| {
        let metrics = Arc::clone(&a.metrics);
        move || {
            let done = metrics.operations.load(Ordering::Relaxed) >= least;
            async move { done }
        }
    };
    until(counted(1)).await;
    let second = spawn(2, "second");
    until(counted(2)).await;
    store.gate.add_permits(1);
    first.await.unwrap().unwrap();
    // The journal is long enough to be folded now. Each answer is a turn of the owner's task.
    for _ in 0..20 {
        call(&shard, 5, 0, Do::ReadLink(lazarette_proto::meta::ReadLink { ino: 99 }))
            .await
            .unwrap_err();
        tokio::task::yield_now().await;
    }
    assert!(!second.is_finished());
    let pages = rig.keys.shard(VOLUME).pages();
    assert!(rig.store.range(&pages).await.unwrap().0.is_empty());
    kill(&a).await;
    store.set_gated(false);
    assert_eq!(second.await.unwrap(), Err(ErrorCode::NotOwner));
    let next = serve(&rig.node("b").await).await;
    assert_eq!(names(&next, 5).await, ["first"]);
}

/// A write of pages that was given up for lost arrives after newer ones.
#[tokio::test]
async fn a_late_write_of_pages_changes_nothing() {
    use crate::meta::pages::{EtcdPages, PageBatch, PageStore};
    let store = Arc::new(FlakyStore::new(5));
    let rig = Rig::new(Arc::clone(&store) as Arc<dyn MetaStore>, "c").await;
    let won = claim(&rig.node("a").await, VOLUME).await.unwrap();
    let shard = rig.keys.shard(VOLUME);
    let mut pages = EtcdPages::new(
        Arc::clone(&rig.store),
        shard,
        won.fence,
        won.checkpoint,
        won.config_revision,
    );
    let batch = |image: &str| PageBatch {
        writes: [(1, Some(image.as_bytes().to_vec()))].into(),
    };
    store.keep_next();
    pages.write(batch("old"), None).await.unwrap();
    pages.write(batch("new"), Some(9)).await.unwrap();
    assert!(!store.make_kept().await.succeeded);
    assert_eq!(pages.load().await.unwrap(), [(1, b"new".to_vec())]);
}

/// A claim that was made without an answer, or late, is known to be made: otherwise the node
/// would keep all others from a shard that it does not serve.
#[tokio::test]
async fn a_claim_without_an_answer_is_still_a_claim() {
    let store = Arc::new(FlakyStore::new(5));
    let rig = Rig::new(Arc::clone(&store) as Arc<dyn MetaStore>, "c").await;
    let a = rig.node("a").await;
    store.set_failing(true);
    for epoch in 1..12 {
        let won = loop {
            match claim(&a, VOLUME).await {
                Ok(won) => break won,
                Err(ClaimError::Store(_)) => {}
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(won.fence.epoch, epoch);
        let owner = loop {
            if let Ok(owner) = rig.store.get(&won.fence.key).await {
                break owner.unwrap();
            }
        };
        assert_eq!(owner.create_revision, won.fence.create_revision);
        won.fence.release(&*rig.store).await;
    }
}
