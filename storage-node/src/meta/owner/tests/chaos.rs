//! Several clients at work while owners die one after the other and the store answers badly.

use super::*;
use lazarette_proto::meta::{AppendEnd, Rename};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use tokio::sync::watch;

const CLIENTS: u64 = 6;
const OPERATIONS: usize = 120;
const APPENDED: u64 = 10;

/// Serves the shard for a while, over and over, each time by another owner. Most end with their
/// lease lost behind their backs.
async fn owners(rig: Arc<Rig>, shards: watch::Sender<Option<Shard>>) {
    let tuning = Tuning {
        cache_ttl: Duration::from_millis(10),
        fold_records: 12,
        ..Tuning::default()
    };
    let mut number = 0;
    loop {
        number += 1;
        let context = rig.node(&format!("n{number}")).await;
        let claim = match claim(&context, VOLUME).await {
            Ok(claim) => claim,
            Err(_) => {
                // Perhaps it was made without an answer.
                rig.store.revoke(context.lease.id()).await.unwrap();
                continue;
            }
        };
        let Ok(shard) = Shard::start_with(&context, claim, LIMITS, tuning).await else {
            rig.store.revoke(context.lease.id()).await.unwrap();
            continue;
        };
        for client in 1..=CLIENTS {
            let Ok(terms) = shard.keep_alive(SessionId(client), None).await else {
                continue;
            };
            let registration = Registration {
                terms,
                handles: Handles::default(),
            };
            let _ = shard.keep_alive(SessionId(client), Some(registration)).await;
        }
        shards.send_replace(Some(shard.clone()));
        tokio::time::sleep(Duration::from_millis(100 + number * 37 % 200)).await;
        match number % 3 {
            0 => shard.resign().await,
            _ => rig.store.revoke(context.lease.id()).await.unwrap(),
        }
    }
}

struct Client {
    session: u64,
    next: u64,
    shards: watch::Receiver<Option<Shard>>,
    names: BTreeSet<String>,
    appends: u64,
    repeated: u64,
}

impl Client {
    /// Repeats an operation, with its id, until some owner answers.
    async fn call(&mut self, op: Do) -> Result<Option<ReplyKind>, ErrorCode> {
        self.next += 1;
        let mut request = request(self.session, self.next, op);
        request.ack_below = self.next;
        loop {
            let shard = self.shards.borrow_and_update().clone().expect("an owner");
            match shard.call(request.clone()).await {
                Ok(response) => return Ok(response.result),
                Err(fault) if fault.code.retryable() => {
                    self.repeated += 1;
                    let _ = tokio::time::timeout(Duration::from_millis(20), self.shards.changed()).await;
                }
                Err(fault) => return Err(fault.code),
            }
        }
    }

    async fn work(mut self, log: u64) -> Self {
        let mut random = StdRng::seed_from_u64(self.session);
        for number in 0..OPERATIONS {
            let fresh = format!("c{}-{number}", self.session);
            let known = self
                .names
                .iter()
                .nth(random.random_range(0..=self.names.len()))
                .cloned();
            match (random.random_range(0..5), known) {
                (0, Some(name)) => {
                    self.call(unlink(&name)).await.unwrap();
                    self.names.remove(&name);
                }
                (1, Some(name)) => {
                    let op = Rename {
                        parent: 1,
                        name: name.clone().into(),
                        new_parent: 1,
                        new_name: fresh.clone().into(),
                        ..Rename::default()
                    };
                    self.call(Do::Rename(op)).await.unwrap();
                    self.names.remove(&name);
                    self.names.insert(fresh);
                }
                (2, _) => self.append(log).await,
                _ => {
                    self.call(create(&fresh)).await.unwrap();
                    self.names.insert(fresh);
                }
            }
        }
        self
    }

    async fn append(&mut self, ino: u64) {
        let turn = loop {
            let begin = AppendBegin {
                ino,
                wait_ms: 1000,
                length: APPENDED,
            };
            match self.call(Do::AppendBegin(begin)).await {
                Ok(Some(ReplyKind::AppendTurn(turn))) => break turn,
                Err(ErrorCode::WouldBlock) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(turn.offset % APPENDED, 0);
        let end = AppendEnd {
            ino,
            offset: turn.offset,
            length: APPENDED,
            mtime: 0,
            since: turn.change,
        };
        self.call(Do::AppendEnd(end)).await.unwrap();
        self.appends += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_doubled_while_owners_come_and_go() {
    let flaky = Arc::new(FlakyStore::new(17));
    let rig = Arc::new(Rig::new(Arc::clone(&flaky) as Arc<dyn MetaStore>, "c").await);
    let first = rig.node("first").await;
    let shard = serve(&first).await;
    for session in 1..=CLIENTS {
        shard.open_session(SessionId(session), "client".into()).await.unwrap();
    }
    let log = attr(&shard, 1, 1, create("log")).await.ino;
    shard.resign().await;
    flaky.set_failing(true);

    let (sender, mut shards) = watch::channel(None);
    let owning = tokio::spawn(owners(Arc::clone(&rig), sender));
    shards.wait_for(Option::is_some).await.unwrap();
    let mut tasks = Vec::new();
    for session in 1..=CLIENTS {
        let client = Client {
            session,
            next: 10,
            shards: shards.clone(),
            names: BTreeSet::new(),
            appends: 0,
            repeated: 0,
        };
        tasks.push(tokio::spawn(client.work(log)));
    }
    let mut expected = BTreeSet::from(["log".to_owned()]);
    let (mut appends, mut repeated) = (0, 0);
    for task in tasks {
        let client = tokio::time::timeout(DEADLINE, task)
            .await
            .expect("clients finish")
            .unwrap();
        expected.extend(client.names);
        appends += client.appends;
        repeated += client.repeated;
    }
    assert!(repeated > 10, "{repeated} repetitions");
    owning.abort();
    let _ = owning.await;
    flaky.set_failing(false);

    if let Some(last) = &*shards.borrow() {
        let txn = Txn {
            conditions: vec![],
            then: vec![Op::Delete(last.fence().key.clone())],
        };
        rig.store.txn(txn).await.unwrap();
    }
    let last = serve(&rig.node("last").await).await;
    let found: BTreeSet<String> = names(&last, 1).await.into_iter().collect();
    assert_eq!(found, expected);
    let size = attr(&last, 1, 0, Do::GetAttr(GetAttr { ino: log })).await.size;
    assert_eq!(size, appends * APPENDED);
    assert_eq!(last.usage().used_inodes, expected.len() as u64 + 1);
    assert_eq!(last.usage().used_bytes, size);
}
