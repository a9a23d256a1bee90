//! Locks and turns to append.

use super::*;

#[test]
fn flock_is_shared_or_exclusive_and_converts() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.by(ALICE, flock(ino, LockMode::Shared, 1, 0)).unwrap();
    t.by(BOB, flock(ino, LockMode::Shared, 1, 0)).unwrap();
    assert_eq!(
        t.by(BOB, flock(ino, LockMode::Exclusive, 2, 0)),
        Err(ErrorCode::WouldBlock)
    );
    // Both holders want more: neither waits for ever.
    let alice = t.waits(ALICE, flock(ino, LockMode::Exclusive, 1, 100));
    t.by(BOB, flock(ino, LockMode::Exclusive, 1, 0)).unwrap();
    assert!(t.ns.take_finished().is_empty());
    t.by(BOB, flock(ino, LockMode::Unlock, 1, 0)).unwrap();
    assert_eq!(t.ns.take_finished()[0].waiter, alice);
}

#[test]
fn waiters_are_served_in_order() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.by(ALICE, posix(ino, LockMode::Exclusive, 1, 0, 99, 0)).unwrap();
    let second = t.waits(BOB, posix(ino, LockMode::Exclusive, 2, 0, 9, 100));
    let third = t.waits(BOB, posix(ino, LockMode::Exclusive, 3, 0, 9, 100));
    let other = t.waits(BOB, posix(ino, LockMode::Shared, 4, 50, 59, 100));
    t.by(ALICE, posix(ino, LockMode::Unlock, 1, 0, 49, 0)).unwrap();
    assert_eq!(
        t.ns.take_finished().iter().map(|f| f.waiter).collect::<Vec<_>>(),
        [second]
    );
    t.by(ALICE, posix(ino, LockMode::Shared, 1, 50, 99, 0)).unwrap();
    assert_eq!(
        t.ns.take_finished().iter().map(|f| f.waiter).collect::<Vec<_>>(),
        [other]
    );
    t.by(BOB, posix(ino, LockMode::Unlock, 2, 0, 9, 0)).unwrap();
    assert_eq!(
        t.ns.take_finished().iter().map(|f| f.waiter).collect::<Vec<_>>(),
        [third]
    );
    assert_eq!(t.ns.waiting(), 0);
}

#[test]
fn waiting_can_end_without_a_lock() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.by(ALICE, flock(ino, LockMode::Exclusive, 1, 0)).unwrap();
    let waiter = t.waits(BOB, flock(ino, LockMode::Exclusive, 2, 100));
    t.ns.time_out(waiter);
    let finished = t.ns.take_finished();
    assert_eq!(finished[0].result.as_ref().unwrap_err().code, ErrorCode::WouldBlock);
    // Repeated with wait_ms 0, the request learns for certain that it has no lock.
    let waiter = t.waits(BOB, flock(ino, LockMode::Exclusive, 2, 100));
    let again = |wait_ms, t: &mut Tree| {
        let request = Request {
            volume: 1,
            session: BOB,
            op_id: t.next,
            ack_below: 0,
            handles: None,
            op: Some(flock(ino, LockMode::Exclusive, 2, wait_ms)),
        };
        t.ns.execute(&request, 1).outcome
    };
    assert_eq!(again(50, &mut t), Outcome::Wait { waiter, wait_ms: 50 });
    assert!(matches!(again(0, &mut t), Outcome::Reply(Err(_))));
    t.by(ALICE, flock(ino, LockMode::Unlock, 1, 0)).unwrap();
    assert!(matches!(
        again(50, &mut Tree { next: t.next - 1, ..t }),
        Outcome::Reply(Err(_))
    ));
}

#[test]
fn a_cancelled_waiter_gets_nothing() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.by(ALICE, flock(ino, LockMode::Exclusive, 1, 0)).unwrap();
    let waiter = t.waits(BOB, flock(ino, LockMode::Exclusive, 2, 100));
    t.ns.cancel(waiter);
    t.by(ALICE, flock(ino, LockMode::Unlock, 1, 0)).unwrap();
    assert!(t.ns.state().locks(InodeId(ino)).is_empty());
}

#[test]
fn deadlocks_of_ranges_are_found() {
    let mut t = tree();
    let (a, b) = (t.file(1, "a"), t.file(1, "b"));
    let x = LockMode::Exclusive;
    t.by(ALICE, posix(a, x, 1, 0, 9, 0)).unwrap();
    t.by(BOB, posix(b, x, 2, 0, 9, 0)).unwrap();
    t.by(BOB, posix(b, x, 3, 10, 19, 0)).unwrap();
    t.waits(ALICE, posix(b, x, 1, 0, 9, 100));
    // Through a third owner.
    t.waits(BOB, posix(b, x, 2, 10, 19, 100));
    assert_eq!(t.by(BOB, posix(a, x, 3, 0, 9, 100)), Err(ErrorCode::Deadlock));
    assert_eq!(t.by(BOB, posix(a, x, 3, 0, 9, 0)), Err(ErrorCode::WouldBlock));
    t.waits(BOB, posix(a, x, 4, 0, 9, 100));
}

#[test]
fn a_lock_can_be_tested() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.by(ALICE, posix(ino, LockMode::Shared, 1, 5, 9, 0)).unwrap();
    let test = |mode, start, end| {
        let range = Some(range(LockKind::Posix, mode, 2, start, end));
        Op::TestLock(TestLock { ino, range })
    };
    assert_eq!(t.by(BOB, test(LockMode::Shared, 0, 99)), Ok(Reply::Done(Done {})));
    assert_eq!(t.by(BOB, test(LockMode::Exclusive, 0, 4)), Ok(Reply::Done(Done {})));
    // A process is named on its own machine only.
    for (session, pid) in [(ALICE, 7), (BOB, 0)] {
        match t.by(session, test(LockMode::Exclusive, 0, 99)).unwrap() {
            Reply::Conflict(found) => assert_eq!((found.start, found.end, found.pid), (5, 9, pid)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn appends_take_turns() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.extend(ino, 100).unwrap();
    let begin = |wait_ms| append_begin(ino, wait_ms);
    let end = |offset, length| {
        Op::AppendEnd(AppendEnd {
            ino,
            offset,
            length,
            mtime: 0,
            since: u64::MAX,
        })
    };
    assert_eq!(turn(&t.by(ALICE, begin(0))), 100);
    assert_eq!(t.by(BOB, begin(0)), Err(ErrorCode::WouldBlock));
    assert_eq!(t.by(BOB, end(100, 1)), Err(ErrorCode::InvalidArgument));
    let bob = t.waits(BOB, begin(100));
    let alice = t.waits(ALICE, begin(100));
    t.by(ALICE, end(100, 10)).unwrap();
    let finished = t.ns.take_finished();
    assert_eq!((finished[0].waiter, turn(&finished[0].result)), (bob, 110));
    // A turn that appends nothing.
    t.by(BOB, end(110, 0)).unwrap();
    let finished = t.ns.take_finished();
    assert_eq!((finished[0].waiter, turn(&finished[0].result)), (alice, 110));
    // The turn ends although the bytes do not fit.
    assert_eq!(t.by(ALICE, end(110, 100 << 20)), Err(ErrorCode::NoSpace));
    assert_eq!(turn(&t.by(BOB, begin(0))), 110);
}

#[test]
fn nobody_gets_the_turn_to_append_while_the_file_is_cut() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.extend(ino, 100).unwrap();
    let begin = |wait_ms| append_begin(ino, wait_ms);
    t.by(BOB, begin(0)).unwrap();
    let waiter = t.waits(ALICE, begin(100));
    t.attr(truncate(ino, 7));
    t.ns.end_session(SessionId(BOB));
    assert!(t.ns.take_finished().is_empty());
    let cut = t.ns.state().truncate(InodeId(ino)).unwrap();
    t.ns.cut(InodeId(ino), cut);
    let finished = t.ns.take_finished();
    assert_eq!((finished[0].waiter, turn(&finished[0].result)), (waiter, 7));
}
