//! Sessions, open files, exactly-once, what reads wait for.

use super::*;

#[test]
fn an_unlinked_file_lives_until_its_last_close() {
    let mut t = tree();
    let file = t.file(1, "f");
    t.extend(file, 5).unwrap();
    t.open(ALICE, file);
    t.open(BOB, file);
    t.call(unlink(1, "f")).unwrap();
    assert_eq!(t.stat(file).nlink, 0);
    assert_eq!(t.call(link(file, 1, "again")), Err(ErrorCode::NotFound));
    t.close(ALICE, file);
    t.close(ALICE, file);
    t.extend(file, 9).unwrap();
    t.close(BOB, file);
    assert_eq!(t.call(Op::GetAttr(GetAttr { ino: file })), Err(ErrorCode::Stale));
    assert_eq!(t.garbage(), [file]);
    assert_eq!(t.used(), (0, 1));
    assert!(t.ns.take_work().contains(&Work::Remove(InodeId(file))));
    t.ns.removed(InodeId(file));
    assert!(t.garbage().is_empty());
}

#[test]
fn late_and_repeated_reports_change_nothing() {
    let mut t = tree();
    let file = t.file(1, "f");
    t.report(ALICE, 3, &[file], &[]);
    t.report(ALICE, 2, &[], &[file]);
    t.report(BOB, 1, &[file], &[]);
    t.report(BOB, 2, &[], &[file]);
    t.report(BOB, 1, &[file], &[]);
    t.call(unlink(1, "f")).unwrap();
    assert_eq!(t.stat(file).nlink, 0);
    t.report(ALICE, 4, &[], &[file]);
    t.report(ALICE, 3, &[file], &[]);
    assert_eq!(t.garbage(), [file]);
    // One of what is gone is no harm.
    t.report(ALICE, 5, &[file], &[]);
    assert_eq!(t.ns.opened_by(SessionId(ALICE)), 0);
}

#[test]
fn a_report_counts_whatever_comes_of_its_request() {
    let mut t = tree();
    let file = t.file(1, "f");
    let with = |ino: u64, number: u64, op: Op| Request {
        volume: 1,
        session: BOB,
        op_id: number,
        handles: Some(handles(number, &[ino], &[])),
        op: Some(op),
        ..Request::default()
    };
    t.ns.execute(&with(file, 1, rm_dir(1, "none")), 5);
    t.call(unlink(1, "f")).unwrap();
    assert_eq!(t.stat(file).nlink, 0);
    // What is unlinked by the very request that says that it is open stays, too.
    let other = t.file(1, "g");
    t.ns.execute(&with(other, 2, unlink(1, "g")), 6);
    assert_eq!(t.stat(other).nlink, 0);
}

#[test]
fn a_session_that_was_alone_says_what_it_opened_before_anything_is_given_up() {
    let mut t = tree();
    let (file, other) = (t.file(1, "f"), t.file(1, "g"));
    t.ns.doubt(SessionId(ALICE));
    t.by(BOB, unlink(1, "f")).unwrap();
    t.by(BOB, unlink(1, "g")).unwrap();
    assert!(t.garbage().is_empty());
    t.ns.register(SessionId(ALICE), &handles(1, &[file], &[])).unwrap();
    assert_eq!(t.garbage(), [other]);
    t.report(ALICE, 2, &[], &[file]);
    assert_eq!(t.garbage(), [file, other]);
}

#[test]
fn a_registration_that_a_report_overtook_opens_nothing_again() {
    let mut t = tree();
    let (file, other) = (t.file(1, "f"), t.file(1, "g"));
    t.ns.doubt(SessionId(ALICE));
    t.report(ALICE, 7, &[], &[file]);
    t.ns.register(SessionId(ALICE), &handles(6, &[file, other], &[]))
        .unwrap();
    t.by(BOB, unlink(1, "f")).unwrap();
    t.by(BOB, unlink(1, "g")).unwrap();
    assert_eq!(t.garbage(), [file]);
    // A report from before the registration does not close what is open in it.
    t.report(ALICE, 6, &[], &[other]);
    assert_eq!(t.garbage(), [file]);
}

#[test]
fn a_repeated_creation_opens_once_at_each_owner() {
    let mut t = tree();
    let request = Request {
        volume: 1,
        session: ALICE,
        op_id: 90,
        op: Some(Op::Create(Create {
            open: true,
            ..creation("f")
        })),
        ..Request::default()
    };
    t.ns.execute(&request, 5);
    let file = t.find(1, "f").unwrap();
    t.close(ALICE, file);
    t.ns.execute(&request, 6);
    assert_eq!(t.ns.opened_by(SessionId(ALICE)), 0);
    let mut next = t.next_owner();
    next.ns.execute(&request, 7);
    assert_eq!(next.ns.opened_by(SessionId(ALICE)), 1);
    next.close(ALICE, file);
    next.ns.execute(&request, 8);
    assert_eq!(next.ns.opened_by(SessionId(ALICE)), 0);
}

#[test]
fn the_end_of_a_session_closes_and_unlocks() {
    let mut t = tree();
    let file = t.file(1, "f");
    t.open(BOB, file);
    t.by(BOB, flock(file, LockMode::Exclusive, 1, 0)).unwrap();
    t.by(BOB, append_begin(file, 0)).unwrap();
    t.call(unlink(1, "f")).unwrap();
    let waiter = t.waits(ALICE, flock(file, LockMode::Shared, 2, 100));
    let turn = t.waits(ALICE, append_begin(file, 9));
    t.open(ALICE, file);
    t.ns.end_session(SessionId(BOB));
    let mut finished = t.ns.take_finished();
    finished.sort_by_key(|finished| finished.waiter);
    assert_eq!(
        (finished[0].waiter, &finished[0].result),
        (waiter, &Ok(Reply::Done(Done {})))
    );
    assert_eq!((finished[1].waiter, super::turn(&finished[1].result)), (turn, 0));
    t.ns.end_session(SessionId(ALICE));
    assert_eq!(t.garbage(), [file]);
    assert_eq!(t.by(BOB, Op::StatFs(StatFs {})), Err(ErrorCode::SessionExpired));
    // Nothing of the sessions is left.
    let rows = t.ns.state().rows();
    assert!(
        rows.keys()
            .all(|key| matches!(key, Key::Counters | Key::Garbage(_) | Key::Inode(..))),
        "{rows:?}"
    );
}

#[test]
fn a_repeated_operation_gets_the_first_result() {
    let mut t = tree();
    let request = Request {
        volume: 1,
        session: ALICE,
        op_id: 5,
        ack_below: 0,
        handles: None,
        op: Some(create(1, "f", Kind::File)),
    };
    let first = t.ns.execute(&request, 100).outcome;
    assert_eq!(t.ns.execute(&request, 200).outcome, first);
    assert_eq!(t.list(1), ["f"]);
    // Failures are results, too: the name may be gone when the request comes again.
    let failing = Request {
        op_id: 6,
        ..request.clone()
    };
    let first = t.ns.execute(&failing, 300).outcome;
    t.next = 10;
    t.call(unlink(1, "f")).unwrap();
    assert_eq!(t.ns.execute(&failing, 400).outcome, first);
    // Acknowledged results are forgotten and cannot be asked for again.
    let acknowledging = Request {
        op_id: 20,
        ack_below: 7,
        op: Some(create(1, "g", Kind::File)),
        ..request.clone()
    };
    t.ns.execute(&acknowledging, 500);
    assert!(t.ns.state().get(&Key::Result(SessionId(ALICE), 5)).is_none());
    assert!(t.ns.state().get(&Key::Result(SessionId(ALICE), 20)).is_some());
    match t.ns.execute(&request, 600).outcome {
        Outcome::Reply(Err(fault)) => assert_eq!(fault.code, ErrorCode::InvalidArgument),
        other => panic!("{other:?}"),
    }
    assert_eq!(t.list(1), ["g"]);
}

#[test]
fn malformed_requests_are_refused() {
    let mut t = tree();
    let refused = |t: &mut Tree, request: Request| match t.ns.execute(&request, 1).outcome {
        Outcome::Reply(Err(fault)) => fault.code,
        other => panic!("{other:?}"),
    };
    let good = Request {
        volume: 1,
        session: ALICE,
        op_id: 9,
        ack_below: 0,
        handles: None,
        op: Some(create(1, "f", Kind::File)),
    };
    let invalid = ErrorCode::InvalidArgument;
    assert_eq!(
        refused(
            &mut t,
            Request {
                op: None,
                ..good.clone()
            }
        ),
        invalid
    );
    assert_eq!(
        refused(
            &mut t,
            Request {
                op_id: 0,
                ..good.clone()
            }
        ),
        invalid
    );
    assert_eq!(
        refused(
            &mut t,
            Request {
                ack_below: 10,
                ..good.clone()
            }
        ),
        invalid
    );
    assert_eq!(
        refused(
            &mut t,
            Request {
                op_id: 1 << 40,
                ..good.clone()
            }
        ),
        invalid
    );
    assert_eq!(
        refused(&mut t, Request { session: 5, ..good }),
        ErrorCode::SessionExpired
    );
    assert_eq!(t.call(posix(1, LockMode::Exclusive, 1, 9, 8, 0)), Err(invalid));
    assert_eq!(t.call(posix(1, LockMode::Unspecified, 1, 0, 8, 0)), Err(invalid));
    assert_eq!(
        t.call(Op::Lock(Lock {
            ino: 1,
            range: None,
            wait_ms: 0
        })),
        Err(invalid)
    );
}

#[test]
fn reads_wait_for_what_they_saw() {
    let mut t = tree();
    let quiet = t.file(1, "quiet");
    let (lsn, keys) = t.ns.state_mut().cut();
    t.ns.state_mut().committed(lsn, &keys);
    let after = |t: &mut Tree, op: Op| {
        let request = Request {
            volume: 1,
            session: ALICE,
            op: Some(op),
            ..Request::default()
        };
        t.ns.execute(&request, 1).after
    };
    assert_eq!(after(&mut t, Op::GetAttr(GetAttr { ino: quiet })), 0);
    let busy = t.file(1, "busy");
    let open = t.ns.state().open_record();
    assert_eq!(after(&mut t, Op::GetAttr(GetAttr { ino: busy })), open);
    assert_eq!(after(&mut t, Op::GetAttr(GetAttr { ino: quiet })), 0);
    // Also that a name is absent was seen in the directory.
    let name = || "nothing".into();
    assert_eq!(
        after(
            &mut t,
            Op::Lookup(Lookup {
                parent: 1,
                name: name()
            })
        ),
        open
    );
    let (lsn, keys) = t.ns.state_mut().cut();
    let quiet_change = truncate(quiet, 7);
    t.call(quiet_change).unwrap();
    t.ns.state_mut().committed(lsn, &keys);
    assert_eq!(after(&mut t, Op::GetAttr(GetAttr { ino: busy })), 0);
    assert_eq!(after(&mut t, Op::GetAttr(GetAttr { ino: quiet })), open + 1);
}

#[test]
fn orphans_wait_for_sessions_of_the_owner_before() {
    let mut t = tree();
    let file = t.file(1, "f");
    t.open(BOB, file);
    t.call(unlink(1, "f")).unwrap();
    let gone = t.file(1, "g");
    // The next owner has the rows, but does not know who holds what open.
    let mut next = t.next_owner();
    assert!(next.ns.is_registering());
    next.call(unlink(1, "g")).unwrap();
    next.ns.register(SessionId(ALICE), &handles(0, &[], &[])).unwrap();
    assert!(next.garbage().is_empty());
    next.ns.register(SessionId(BOB), &handles(1, &[file], &[])).unwrap();
    assert_eq!(next.garbage(), [gone]);
    next.close(BOB, file);
    assert_eq!(next.garbage(), [file, gone]);
}
