//! Leases as clients of a shard see them.

use super::*;
use crate::meta::owner::Stream;
use tokio::sync::{mpsc, watch};

const A: u64 = 5;
const B: u64 = 6;

/// A session's end of its stream of recalls.
struct Holder {
    recalls: mpsc::UnboundedReceiver<lazarette_proto::meta::Recall>,
    confirmed: watch::Sender<u64>,
}

async fn open(shard: &Shard, session: u64) -> Holder {
    let client = format!("client {session}");
    shard.open_session(SessionId(session), client).await.unwrap();
    let (sender, recalls) = mpsc::unbounded_channel();
    let (confirmed, receiver) = watch::channel(0);
    let stream = Stream {
        recalls: sender,
        confirmed: receiver,
    };
    shard.recalls(SessionId(session), stream).unwrap();
    Holder { recalls, confirmed }
}

#[tokio::test]
async fn a_change_is_seen_by_nobody_before_holders_have_dropped_what_they_know() {
    let rig = Rig::memory().await;
    let shard = serve(&rig.node("a").await).await;
    let (mut a, mut b) = (open(&shard, A).await, open(&shard, B).await);
    let file = attr(&shard, A, 1, create("f")).await.ino;
    let known = call(&shard, B, 0, lookup("f")).await.unwrap();
    assert_eq!((known.lease_ms, known.cache_ttl_ms), (1000, 0));
    // A was alone at first.
    let announced = a.recalls.recv().await.unwrap();
    assert_eq!((announced.company, announced.inodes.len()), (2, 0));

    let changing = tokio::spawn({
        let shard = shard.clone();
        async move { call(&shard, A, 2, extend(file, 100)).await.unwrap() }
    });
    let recall = b.recalls.recv().await.unwrap();
    assert_eq!(recall.inodes, [file]);
    let seeing = tokio::spawn({
        let shard = shard.clone();
        async move { attr(&shard, A, 0, lookup("f")).await.size }
    });
    // Time for the commit, which is not what they wait for.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!changing.is_finished() && !seeing.is_finished());
    b.confirmed.send_replace(recall.number);
    let changed = changing.await.unwrap();
    assert_eq!(changed.changed, [file]);
    assert_eq!(seeing.await.unwrap(), 100);
    let again = call(&shard, B, 0, lookup("f")).await.unwrap();
    assert_eq!((again.as_of, again.lease_ms), (recall.number, 1000));
}

#[tokio::test]
async fn a_silent_holder_delays_a_change_until_its_lease_has_run_out() {
    let rig = Rig::memory().await;
    let shard = serve(&rig.node("a").await).await;
    let (_a, _b) = (open(&shard, A).await, open(&shard, B).await);
    let file = attr(&shard, A, 1, create("f")).await.ino;
    let granted = tokio::time::Instant::now();
    call(&shard, B, 0, lookup("f")).await.unwrap();
    call(&shard, A, 2, extend(file, 1)).await.unwrap();
    assert!(granted.elapsed() >= Duration::from_millis(900));
    assert_eq!(call(&shard, B, 0, lookup("f")).await.unwrap().lease_ms, 0);
}

#[tokio::test]
async fn a_repeated_request_gets_its_first_answer_without_a_lease() {
    let rig = Rig::memory().await;
    let shard = serve(&rig.node("a").await).await;
    let (_a, _b) = (open(&shard, A).await, open(&shard, B).await);
    let first = call(&shard, A, 1, create("f")).await.unwrap();
    assert_eq!(first.lease_ms, 1000);
    let again = call(&shard, A, 1, create("f")).await.unwrap();
    assert_eq!((again.result, again.lease_ms), (first.result, 0));
}

#[tokio::test]
async fn what_a_sole_client_opened_without_a_word_outlives_the_names_that_others_take() {
    let rig = Rig::memory().await;
    let shard = serve(&rig.node("a").await).await;
    shard.open_session(SessionId(A), "alone".into()).await.unwrap();
    let alone = call(&shard, A, 1, create("f")).await.unwrap();
    assert_eq!((alone.owner_epoch, alone.company, alone.cache_ttl_ms), (1, 1, 1000));
    let directory = alone.also.iter().find(|attr| attr.ino == 1);
    assert!(directory.is_some_and(|attr| attr.change > 1), "what else was changed");
    let Some(ReplyKind::Attr(file)) = alone.result else {
        panic!("{alone:?}");
    };
    let other = attr(&shard, A, 2, create("g")).await.ino;
    // Now it opens "f", and nobody hears of it.
    let known = shard.keep_alive(SessionId(A), None).await.unwrap();
    shard.open_session(SessionId(B), "other".into()).await.unwrap();
    let reply = call(&shard, A, 0, lookup("f")).await.unwrap();
    assert_eq!((reply.company, reply.cache_ttl_ms), (2, 0));
    for (op_id, name) in [(1, "f"), (2, "g")] {
        call(&shard, B, op_id, unlink(name)).await.unwrap();
    }
    let nameless = async |ino: u64| attr(&shard, B, 0, Do::GetAttr(GetAttr { ino })).await.nlink == 0;
    assert!(nameless(file.ino).await && nameless(other).await);
    // It says what it has open, and does not know yet that it is not alone: that may not be all.
    let handles = Handles {
        number: 1,
        opened: Vec::new(),
        closed: Vec::new(),
    };
    let terms = known;
    let registration = Registration { terms, handles };
    let present = shard.keep_alive(SessionId(A), Some(registration)).await.unwrap();
    assert_ne!(present, known);
    assert!(nameless(file.ino).await && nameless(other).await);
    register(&shard, A, 2, &[file.ino]).await;
    let gone = async |ino: u64| call(&shard, B, 0, Do::GetAttr(GetAttr { ino })).await == Err(ErrorCode::Stale);
    assert!(gone(other).await && nameless(file.ino).await);
    report(&shard, A, 3, &[], &[file.ino]).await;
    assert!(gone(file.ino).await);
}

#[tokio::test]
async fn a_reply_from_when_there_was_company_grants_nothing_to_a_client_that_is_alone_now() {
    let rig = Rig::memory().await;
    let shard = serve(&rig.node("a").await).await;
    let (_a, b) = (open(&shard, A).await, open(&shard, B).await);
    let file = attr(&shard, A, 1, create("f")).await.ino;
    call(&shard, B, 0, lookup("f")).await.unwrap();
    // It waits for B, which goes instead.
    let changing = tokio::spawn({
        let shard = shard.clone();
        async move { call(&shard, A, 2, extend(file, 1)).await.unwrap() }
    });
    until(|| async { !b.recalls.is_empty() }).await;
    shard.close_session(SessionId(B)).await.unwrap();
    assert_eq!(changing.await.unwrap().cache_ttl_ms, 0);
    assert_eq!(call(&shard, A, 0, lookup("f")).await.unwrap().cache_ttl_ms, 1000);
}

#[tokio::test]
async fn without_a_stream_there_are_no_leases() {
    let rig = Rig::memory().await;
    let shard = serve(&rig.node("a").await).await;
    for session in [A, B] {
        shard.open_session(SessionId(session), "client".into()).await.unwrap();
    }
    let reply = call(&shard, A, 1, create("f")).await.unwrap();
    assert_eq!((reply.lease_ms, reply.cache_ttl_ms), (0, 0));
}

#[tokio::test]
async fn a_new_owner_waits_for_leases_of_the_one_before() {
    let rig = Rig::memory().await;
    let node = rig.node("a").await;
    let shard = serve(&node).await;
    let (_a, _b) = (open(&shard, A).await, open(&shard, B).await);
    let file = attr(&shard, A, 1, create("f")).await.ino;
    call(&shard, B, 0, lookup("f")).await.unwrap();
    let granted = tokio::time::Instant::now();
    kill(&node).await;
    let shard = serve(&rig.node("b").await).await;
    call(&shard, A, 2, extend(file, 1)).await.unwrap();
    assert!(granted.elapsed() >= Duration::from_millis(900));
}
