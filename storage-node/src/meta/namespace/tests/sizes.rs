//! What lies beyond the end of a file.

use super::*;

fn extend(ino: u64, end: u64, since: u64) -> Op {
    Op::Extend(Extend {
        ino,
        end,
        mtime: 0,
        start: 0,
        since,
    })
}

fn reserve(ino: u64, end: u64, holes: bool) -> Op {
    Op::Reserve(Reserve {
        ino,
        end,
        reach: end,
        holes,
    })
}

impl Tree {
    /// The cut that is under way, which is then done.
    fn finish_cut(&mut self, ino: u64) -> Option<(u64, u64)> {
        let cut = self.ns.state().truncate(InodeId(ino))?;
        self.ns.cut(InodeId(ino), cut);
        Some((cut.from, cut.to))
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn a_file_grows_over_holes_only_when_they_are_clean() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.call(extend(ino, 10, u64::MAX)).unwrap();
    assert_eq!(t.finish_cut(ino), None, "written from end to end");
    // By truncation, and by a write that leaves a hole: what the last chunk may have goes.
    t.attr(truncate(ino, 100));
    assert_eq!(t.finish_cut(ino), Some((MIB, 10)));
    t.call(reserve(ino, 200, true)).unwrap();
    assert_eq!(t.finish_cut(ino), Some((MIB, 100)));
    // Without holes it is only noted how far the chunks may reach.
    t.call(reserve(ino, 5 * MIB, false)).unwrap();
    assert_eq!(t.finish_cut(ino), None);
    t.attr(truncate(ino, 300));
    assert_eq!(t.finish_cut(ino), Some((5 * MIB, 100)));
    // Nobody else has the file open, so nothing is left there.
    t.attr(truncate(ino, 400));
    assert_eq!(t.finish_cut(ino), Some((MIB, 300)));
    // A file that ends with a chunk has nothing beyond it.
    t.attr(truncate(ino, MIB));
    t.finish_cut(ino);
    t.attr(truncate(ino, 2 * MIB));
    assert_eq!(t.finish_cut(ino), None);
}

#[test]
fn what_a_dead_client_left_goes_with_the_hole_or_the_file() {
    let mut t = tree();
    let (a, b) = (t.file(1, "a"), t.file(1, "b"));
    for ino in [a, b] {
        t.open(BOB, ino);
        t.by(BOB, reserve(ino, 7 * MIB, false)).unwrap();
    }
    t.ns.end_session(SessionId(BOB));
    t.attr(truncate(a, 8 * MIB));
    assert_eq!(t.finish_cut(a), Some((7 * MIB, 0)));
    t.call(unlink(1, "b")).unwrap();
    let (_, garbage) = t.ns.state().garbage().next().unwrap();
    assert_eq!(garbage.chunks, 7);
    assert!(t.ns.state().get(&Key::reach(InodeId(b))).is_none());
}

#[test]
fn who_was_writing_while_chunks_were_cut_writes_again() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.open(BOB, ino);
    let since = t.stat(ino).change;
    t.by(BOB, reserve(ino, 3 * MIB, false)).unwrap();
    // Alice cuts the file while Bob's bytes are on their way; some may come after the cut.
    let begun = t.by(BOB, append_begin(ino, 0));
    t.attr(truncate(ino, 5));
    assert_eq!(t.finish_cut(ino), Some((3 * MIB, 0)));
    assert_eq!(t.by(BOB, extend(ino, 3 * MIB, since)), Err(ErrorCode::Overtaken));
    let Ok(Reply::AppendTurn(turn)) = begun else {
        panic!("{begun:?}");
    };
    let end = |since| {
        Op::AppendEnd(AppendEnd {
            ino,
            offset: turn.offset,
            length: 10,
            mtime: 0,
            since,
        })
    };
    assert_eq!(t.by(BOB, end(turn.change)), Err(ErrorCode::Overtaken));
    assert_eq!(
        t.by(BOB, end(turn.change)),
        Err(ErrorCode::InvalidArgument),
        "the turn is over"
    );
    assert_eq!(t.stat(ino).size, 5);
    t.attr(truncate(ino, 6));
    assert_eq!(t.finish_cut(ino), Some((3 * MIB, 5)), "Bob's bytes may be there still");
    let since = t.stat(ino).change;
    assert!(t.by(BOB, extend(ino, 3 * MIB, since)).is_ok());
}

#[test]
fn what_the_quota_refuses_is_cut() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.call(extend(ino, 99 * MIB, u64::MAX)).unwrap();
    assert_eq!(t.call(reserve(ino, 101 * MIB, false)), Err(ErrorCode::NoSpace));
    t.call(reserve(ino, 100 * MIB, false)).unwrap();
    let other = t.file(1, "g");
    t.call(extend(other, MIB, u64::MAX)).unwrap();
    assert_eq!(t.ns.free_bytes(), 0);
    assert_eq!(t.call(extend(ino, 100 * MIB, u64::MAX)), Err(ErrorCode::NoSpace));
    assert_eq!(t.finish_cut(ino), Some((100 * MIB, 99 * MIB)));
    // Space that is given up is there at once.
    t.call(unlink(1, "g")).unwrap();
    t.call(extend(ino, 100 * MIB, u64::MAX)).unwrap();
}

#[test]
fn malformed_reservations_are_refused() {
    let mut t = tree();
    let ino = t.file(1, "f");
    let reserve = |ino, end, reach| {
        Op::Reserve(Reserve {
            ino,
            end,
            reach,
            holes: true,
        })
    };
    assert_eq!(t.call(reserve(ino, 5, 4)), Err(ErrorCode::InvalidArgument));
    assert_eq!(t.call(reserve(ino, 5, 6 + (1 << 30))), Err(ErrorCode::InvalidArgument));
    assert_eq!(t.call(reserve(1, 5, 5)), Err(ErrorCode::IsDirectory));
    assert_eq!(t.call(reserve(99, 5, 5)), Err(ErrorCode::Stale));
    assert_eq!(t.finish_cut(ino), None);
}

#[test]
fn those_who_would_learn_of_a_cut_wait_for_it() {
    let mut t = tree();
    let dir = t.dir(1, "d");
    let ino = t.file(dir, "f");
    t.call(link(ino, 1, "g")).unwrap();
    t.attr(truncate(ino, 5));
    let held_up = |op: Op| {
        let request = Request {
            op: Some(op),
            ..Request::default()
        };
        t.ns.held_up_by(&request) == Some(InodeId(ino))
    };
    let list = |ino| {
        Op::ReadDir(ReadDir {
            ino,
            after: 0,
            limit: 0,
        })
    };
    assert!(held_up(list(1)) && held_up(list(dir)));
    assert!(held_up(link(ino, 1, "h")) && held_up(rename(1, "g", dir, "g")));
    assert!(held_up(reserve(ino, 9, true)) && held_up(extend(ino, 9, 0)));
    assert!(!held_up(unlink(1, "g")));
}

#[test]
fn a_changed_program_has_no_capabilities() {
    let mut t = tree();
    let ino = t.file(1, "f");
    let name = || bytes::Bytes::from("security.capability");
    let give = || {
        Op::SetXattr(SetXattr {
            ino,
            name: name(),
            value: "c".into(),
            ..SetXattr::default()
        })
    };
    let chown = Op::SetAttr(SetAttr {
        ino,
        gid: Some(5),
        ..SetAttr::default()
    });
    for change in [extend(ino, 7, u64::MAX), truncate(ino, 3), chown] {
        t.call(give()).unwrap();
        t.call(change).unwrap();
        t.finish_cut(ino);
        let get = Op::GetXattr(GetXattr { ino, name: name() });
        assert_eq!(t.call(get), Err(ErrorCode::NoAttribute));
    }
}

#[test]
fn a_volume_has_inodes_for_its_size() {
    let limits = |size| Limits {
        size,
        chunk_size: CHUNK,
    };
    assert_eq!(limits(1).inodes(), 100_000);
    assert_eq!(limits(1 << 40).inodes(), 50_000_000);
    let mut t = tree();
    let most = t.ns.limits().inodes();
    for i in 1..most {
        t.next += 1;
        let request = Request {
            session: ALICE,
            op_id: t.next,
            ack_below: t.next,
            op: Some(create(1, &i.to_string(), Kind::File)),
            ..Request::default()
        };
        let Outcome::Reply(reply) = t.ns.execute(&request, 5).outcome else {
            panic!("waits");
        };
        reply.unwrap();
    }
    assert_eq!(t.call(create(1, "f", Kind::File)), Err(ErrorCode::NoSpace));
    t.call(unlink(1, "7")).unwrap();
    t.file(1, "f");
}

#[test]
fn a_time_is_set_together_with_what_was_written() {
    let mut t = tree();
    let ino = t.file(1, "f");
    let set = |ino, of, since, size| {
        let extend = Extend {
            ino: of,
            start: 0,
            end: 500,
            mtime: 70,
            since,
        };
        Op::SetAttr(SetAttr {
            ino,
            size,
            mtime: Some(7),
            extend: Some(extend),
            ..SetAttr::default()
        })
    };
    let since = t.stat(ino).change;
    assert_eq!(t.call(set(ino, ino, since, Some(3))), Err(ErrorCode::InvalidArgument));
    assert_eq!(t.call(set(ino, 1, since, None)), Err(ErrorCode::InvalidArgument));
    let done = t.attr(set(ino, ino, since, None));
    assert_eq!((done.size, done.mtime), (500, 7));
    // Of what was overtaken nothing is done.
    t.attr(truncate(ino, 5));
    t.finish_cut(ino);
    assert_eq!(t.call(set(ino, ino, done.change, None)), Err(ErrorCode::Overtaken));
    assert_eq!(t.stat(ino).size, 5);
}
