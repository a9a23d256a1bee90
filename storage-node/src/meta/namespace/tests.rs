use super::*;
use lazarette_proto::meta::{
    AppendBegin, AppendEnd, Attr, Close, Create, Extend, GetAttr, GetXattr, Link, ListXattr, Lock, LockKind, LockMode,
    LockRange, Lookup, Open, ReadDir, ReadLink, RemoveXattr, Rename, RmDir, SetAttr, SetXattr, StatFs, TestLock,
    Unlink,
};

const CHUNK: u32 = 1 << 20;
const ALICE: u64 = 11;
const BOB: u64 = 22;

/// A namespace with two sessions, and the next op id.
struct Tree {
    ns: Namespace,
    next: u64,
    now: i64,
}

fn tree() -> Tree {
    let limits = Limits {
        size: 100 << 20,
        chunk_size: CHUNK,
    };
    let mut ns = Namespace::new(State::new(1), limits, 1);
    ns.open_session(SessionId(ALICE), "alice").unwrap();
    ns.open_session(SessionId(BOB), "bob").unwrap();
    Tree { ns, next: 1, now: 10 }
}

impl Tree {
    fn run(&mut self, session: u64, op: Op) -> Outcome {
        self.next += 1;
        self.now += 1;
        let request = Request {
            volume: 1,
            session,
            op_id: self.next,
            ack_below: 0,
            op: Some(op),
        };
        self.ns.execute(&request, self.now).outcome
    }

    fn by(&mut self, session: u64, op: Op) -> Result<Reply, ErrorCode> {
        match self.run(session, op) {
            Outcome::Reply(result) => result.map_err(|fault| fault.code),
            Outcome::Wait { .. } => panic!("waits"),
        }
    }

    fn waits(&mut self, session: u64, op: Op) -> WaiterId {
        match self.run(session, op) {
            Outcome::Wait { waiter, .. } => waiter,
            Outcome::Reply(reply) => panic!("does not wait: {reply:?}"),
        }
    }

    fn call(&mut self, op: Op) -> Result<Reply, ErrorCode> {
        self.by(ALICE, op)
    }

    fn attr(&mut self, op: Op) -> Attr {
        match self.call(op) {
            Ok(Reply::Attr(attr)) => attr,
            other => panic!("{other:?}"),
        }
    }

    fn make(&mut self, parent: u64, name: &str, kind: Kind) -> u64 {
        self.attr(create(parent, name, kind)).ino
    }

    fn file(&mut self, parent: u64, name: &str) -> u64 {
        self.make(parent, name, Kind::File)
    }

    fn dir(&mut self, parent: u64, name: &str) -> u64 {
        self.make(parent, name, Kind::Directory)
    }

    fn stat(&mut self, ino: u64) -> Attr {
        self.attr(Op::GetAttr(GetAttr { ino }))
    }

    fn find(&mut self, parent: u64, name: &str) -> Result<u64, ErrorCode> {
        let name = name.as_bytes().to_vec().into();
        match self.call(Op::Lookup(Lookup { parent, name }))? {
            Reply::Attr(attr) => Ok(attr.ino),
            other => panic!("{other:?}"),
        }
    }

    fn list(&mut self, ino: u64) -> Vec<String> {
        let op = ReadDir {
            ino,
            after: 0,
            limit: 0,
        };
        match self.call(Op::ReadDir(op)).unwrap() {
            Reply::ReadDir(reply) => reply
                .entries
                .iter()
                .map(|entry| String::from_utf8(entry.name.to_vec()).unwrap())
                .collect(),
            other => panic!("{other:?}"),
        }
    }

    fn extend(&mut self, ino: u64, end: u64) -> Result<Reply, ErrorCode> {
        self.call(Op::Extend(Extend {
            ino,
            end,
            mtime: 0,
            start: 0,
        }))
    }

    fn used(&mut self) -> (u64, u64) {
        match self.call(Op::StatFs(StatFs {})).unwrap() {
            Reply::StatFs(reply) => (reply.used_bytes, reply.used_inodes),
            other => panic!("{other:?}"),
        }
    }

    fn garbage(&self) -> Vec<u64> {
        self.ns.state().garbage().map(|(ino, _)| ino.0).collect()
    }
}

fn create(parent: u64, name: &str, kind: Kind) -> Op {
    Op::Create(Create {
        parent,
        name: name.as_bytes().to_vec().into(),
        kind: kind.into(),
        mode: if kind == Kind::Directory { 0o755 } else { 0o644 },
        uid: 1000,
        gid: 1000,
        rdev: 0,
        target: if kind == Kind::Symlink { "t".into() } else { "".into() },
        exclusive: true,
        open: false,
    })
}

fn unlink(parent: u64, name: &str) -> Op {
    let name = name.as_bytes().to_vec().into();
    Op::Unlink(Unlink { parent, name })
}

fn rm_dir(parent: u64, name: &str) -> Op {
    let name = name.as_bytes().to_vec().into();
    Op::RmDir(RmDir { parent, name })
}

fn rename_op(parent: u64, name: &str, new_parent: u64, new_name: &str) -> Rename {
    Rename {
        parent,
        name: name.as_bytes().to_vec().into(),
        new_parent,
        new_name: new_name.as_bytes().to_vec().into(),
        no_replace: false,
        exchange: false,
    }
}

fn rename(parent: u64, name: &str, new_parent: u64, new_name: &str) -> Op {
    Op::Rename(rename_op(parent, name, new_parent, new_name))
}

fn exchange(parent: u64, name: &str, new_parent: u64, new_name: &str) -> Op {
    Op::Rename(Rename {
        exchange: true,
        ..rename_op(parent, name, new_parent, new_name)
    })
}

fn link(ino: u64, new_parent: u64, new_name: &str) -> Op {
    let new_name = new_name.as_bytes().to_vec().into();
    Op::Link(Link {
        ino,
        new_parent,
        new_name,
    })
}

fn truncate(ino: u64, size: u64) -> Op {
    Op::SetAttr(SetAttr {
        ino,
        size: Some(size),
        ..SetAttr::default()
    })
}

fn range(kind: LockKind, mode: LockMode, owner: u64, start: u64, end: u64) -> LockRange {
    LockRange {
        kind: kind.into(),
        mode: mode.into(),
        owner,
        start,
        end,
        pid: 7,
    }
}

fn posix(ino: u64, mode: LockMode, owner: u64, start: u64, end: u64, wait_ms: u32) -> Op {
    let range = Some(range(LockKind::Posix, mode, owner, start, end));
    Op::Lock(Lock { ino, range, wait_ms })
}

fn flock(ino: u64, mode: LockMode, owner: u64, wait_ms: u32) -> Op {
    let range = Some(range(LockKind::Flock, mode, owner, 0, 0));
    Op::Lock(Lock { ino, range, wait_ms })
}

#[test]
fn a_new_volume_has_a_root_directory() {
    let mut t = tree();
    let root = t.stat(1);
    assert_eq!((root.kind(), root.nlink, root.parent), (Kind::Directory, 2, 1));
    assert_eq!(t.used(), (0, 1));
}

#[test]
fn created_things_can_be_found_with_their_attributes() {
    let mut t = tree();
    let dir = t.dir(1, "d");
    let file = t.attr(create(dir, "f", Kind::File));
    assert_eq!(t.find(dir, "f"), Ok(file.ino));
    assert_eq!((file.uid, file.gid, file.mode, file.nlink), (1000, 1000, 0o644, 1));
    assert_eq!((file.parent, file.size), (dir, 0));
    assert_eq!(t.stat(1).nlink, 3);
    assert_eq!(t.find(dir, "g"), Err(ErrorCode::NotFound));
    assert_eq!(t.find(file.ino, "g"), Err(ErrorCode::NotDirectory));
    assert_eq!(t.find(999, "g"), Err(ErrorCode::Stale));
    let link = t.make(dir, "l", Kind::Symlink);
    assert_eq!(
        t.call(Op::ReadLink(ReadLink { ino: link })),
        Ok(Reply::Bytes("t".into()))
    );
    assert_eq!(
        t.call(Op::ReadLink(ReadLink { ino: file.ino })),
        Err(ErrorCode::InvalidArgument)
    );
    assert_eq!(t.stat(link).size, 1);
}

#[test]
fn creating_an_existing_name_fails_only_when_exclusive() {
    let mut t = tree();
    let file = t.file(1, "f");
    let again = |exclusive| match create(1, "f", Kind::File) {
        Op::Create(op) => Op::Create(Create { exclusive, ..op }),
        _ => unreachable!(),
    };
    assert_eq!(t.call(again(true)), Err(ErrorCode::Exists));
    assert_eq!(t.attr(again(false)).ino, file);
    assert_eq!(t.call(create(1, "f", Kind::Directory)), Err(ErrorCode::Exists));
    t.dir(1, "d");
    let over_dir = match create(1, "d", Kind::File) {
        Op::Create(op) => Op::Create(Create { exclusive: false, ..op }),
        _ => unreachable!(),
    };
    assert_eq!(t.call(over_dir), Err(ErrorCode::IsDirectory));
}

#[test]
fn bad_names_change_nothing() {
    let mut t = tree();
    for name in ["", ".", "..", "a/b", "a\0b"] {
        assert_eq!(
            t.call(create(1, name, Kind::File)),
            Err(ErrorCode::InvalidArgument),
            "{name:?}"
        );
    }
    let long = "x".repeat(256);
    assert_eq!(t.call(create(1, &long, Kind::File)), Err(ErrorCode::NameTooLong));
    t.file(1, &long[1..]);
    assert_eq!(t.list(1).len(), 1);
    assert_eq!(
        t.call(create(1, "k", Kind::Unspecified)),
        Err(ErrorCode::InvalidArgument)
    );
}

#[test]
fn a_setgid_directory_hands_its_group_down() {
    let mut t = tree();
    let dir = t.dir(1, "d");
    t.attr(Op::SetAttr(SetAttr {
        ino: dir,
        mode: Some(0o2775),
        gid: Some(77),
        ..SetAttr::default()
    }));
    let file = t.attr(create(dir, "f", Kind::File));
    assert_eq!((file.gid, file.mode), (77, 0o644));
    let below = t.attr(create(dir, "s", Kind::Directory));
    assert_eq!((below.gid, below.mode), (77, 0o2755));
}

#[test]
fn unlink_and_rmdir_check_what_they_remove() {
    let mut t = tree();
    let dir = t.dir(1, "d");
    t.file(dir, "f");
    assert_eq!(t.call(unlink(1, "d")), Err(ErrorCode::IsDirectory));
    assert_eq!(t.call(rm_dir(1, "d")), Err(ErrorCode::NotEmpty));
    assert_eq!(t.call(rm_dir(dir, "f")), Err(ErrorCode::NotDirectory));
    assert_eq!(t.call(unlink(dir, "x")), Err(ErrorCode::NotFound));
    t.call(unlink(dir, "f")).unwrap();
    t.call(rm_dir(1, "d")).unwrap();
    assert_eq!(t.stat(1).nlink, 2);
    assert_eq!(t.used(), (0, 1));
    assert_eq!(t.call(create(dir, "f", Kind::File)), Err(ErrorCode::Stale));
}

#[test]
fn inode_numbers_are_never_reused() {
    let mut t = tree();
    let first = t.file(1, "f");
    t.call(unlink(1, "f")).unwrap();
    assert!(t.file(1, "f") > first);
}

#[test]
fn an_unlinked_file_lives_until_its_last_close() {
    let mut t = tree();
    let file = t.file(1, "f");
    t.extend(file, 5).unwrap();
    t.by(ALICE, Op::Open(Open { ino: file })).unwrap();
    t.by(BOB, Op::Open(Open { ino: file })).unwrap();
    t.call(unlink(1, "f")).unwrap();
    assert_eq!(t.stat(file).nlink, 0);
    assert_eq!(t.call(link(file, 1, "again")), Err(ErrorCode::NotFound));
    t.by(ALICE, Op::Close(Close { ino: file })).unwrap();
    t.by(ALICE, Op::Close(Close { ino: file })).unwrap();
    t.extend(file, 9).unwrap();
    t.by(BOB, Op::Close(Close { ino: file })).unwrap();
    assert_eq!(t.call(Op::GetAttr(GetAttr { ino: file })), Err(ErrorCode::Stale));
    assert_eq!(t.garbage(), [file]);
    assert_eq!(t.used(), (0, 1));
    assert!(t.ns.take_work().contains(&Work::Remove(InodeId(file))));
    t.ns.removed(InodeId(file));
    assert!(t.garbage().is_empty());
}

#[test]
fn a_late_close_does_not_undo_a_later_open() {
    let mut t = tree();
    let file = t.file(1, "f");
    t.by(ALICE, Op::Open(Open { ino: file })).unwrap();
    let close = Request {
        volume: 1,
        session: ALICE,
        op_id: t.next - 1,
        ack_below: 0,
        op: Some(Op::Close(Close { ino: file })),
    };
    t.ns.execute(&close, 1);
    t.call(unlink(1, "f")).unwrap();
    assert_eq!(t.stat(file).nlink, 0);
}

#[test]
fn the_end_of_a_session_closes_and_unlocks() {
    let mut t = tree();
    let file = t.file(1, "f");
    t.by(BOB, Op::Open(Open { ino: file })).unwrap();
    t.by(BOB, flock(file, LockMode::Exclusive, 1, 0)).unwrap();
    t.by(BOB, Op::AppendBegin(AppendBegin { ino: file, wait_ms: 0 }))
        .unwrap();
    t.call(unlink(1, "f")).unwrap();
    let waiter = t.waits(ALICE, flock(file, LockMode::Shared, 2, 100));
    let turn = t.waits(ALICE, Op::AppendBegin(AppendBegin { ino: file, wait_ms: 9 }));
    t.by(ALICE, Op::Open(Open { ino: file })).unwrap();
    t.ns.end_session(SessionId(BOB));
    let mut finished = t.ns.take_finished();
    finished.sort_by_key(|finished| finished.waiter);
    assert_eq!(
        (finished[0].waiter, &finished[0].result),
        (waiter, &Ok(Reply::Done(Done {})))
    );
    assert_eq!(
        (finished[1].waiter, &finished[1].result),
        (turn, &Ok(Reply::AppendOffset(0)))
    );
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
fn hard_links_count() {
    let mut t = tree();
    let file = t.file(1, "a");
    let dir = t.dir(1, "d");
    assert_eq!(t.attr(link(file, dir, "b")).nlink, 2);
    assert_eq!(t.call(link(file, dir, "b")), Err(ErrorCode::Exists));
    assert_eq!(t.call(link(dir, 1, "e")), Err(ErrorCode::NotPermitted));
    t.call(unlink(1, "a")).unwrap();
    assert_eq!(t.stat(file).nlink, 1);
    assert_eq!(t.find(dir, "b"), Ok(file));
    t.call(unlink(dir, "b")).unwrap();
    assert_eq!(t.garbage(), [file]);
}

#[test]
fn rename_moves_and_replaces() {
    let mut t = tree();
    let (a, b) = (t.dir(1, "a"), t.dir(1, "b"));
    let file = t.file(a, "f");
    assert_eq!(t.attr(rename(a, "f", b, "g")).parent, b);
    assert_eq!(t.find(a, "f"), Err(ErrorCode::NotFound));
    assert_eq!(t.find(b, "g"), Ok(file));
    let other = t.file(b, "h");
    t.call(rename(b, "g", b, "h")).unwrap();
    assert_eq!(t.find(b, "h"), Ok(file));
    assert_eq!(t.list(b), ["h"]);
    assert_eq!(t.garbage(), [other]);
    assert_eq!(t.call(rename(b, "x", b, "h")), Err(ErrorCode::NotFound));
}

#[test]
fn rename_of_directories_keeps_counts_and_parents() {
    let mut t = tree();
    let (a, b) = (t.dir(1, "a"), t.dir(1, "b"));
    let d = t.dir(a, "d");
    t.call(rename(a, "d", b, "d")).unwrap();
    assert_eq!((t.stat(a).nlink, t.stat(b).nlink, t.stat(d).parent), (2, 3, b));
    let empty = t.dir(a, "e");
    t.call(rename(b, "d", a, "e")).unwrap();
    assert_eq!((t.stat(a).nlink, t.stat(b).nlink), (3, 2));
    assert_eq!(t.find(a, "e"), Ok(d));
    assert_eq!(t.call(Op::GetAttr(GetAttr { ino: empty })), Err(ErrorCode::Stale));
    t.file(d, "f");
    t.dir(b, "x");
    assert_eq!(t.call(rename(b, "x", a, "e")), Err(ErrorCode::NotEmpty));
    t.file(b, "file");
    assert_eq!(t.call(rename(b, "file", b, "x")), Err(ErrorCode::IsDirectory));
    assert_eq!(t.call(rename(b, "x", b, "file")), Err(ErrorCode::NotDirectory));
    // Within one directory counts stay.
    t.call(rename(b, "x", b, "y")).unwrap();
    assert_eq!(t.stat(b).nlink, 3);
}

#[test]
fn a_directory_cannot_move_below_itself() {
    let mut t = tree();
    let a = t.dir(1, "a");
    let b = t.dir(a, "b");
    let c = t.dir(b, "c");
    assert_eq!(t.call(rename(1, "a", c, "x")), Err(ErrorCode::InvalidArgument));
    assert_eq!(t.call(rename(1, "a", a, "x")), Err(ErrorCode::InvalidArgument));
    assert_eq!(t.call(exchange(1, "a", b, "c")), Err(ErrorCode::InvalidArgument));
    t.file(1, "f");
    assert_eq!(t.call(exchange(b, "c", 1, "a")), Err(ErrorCode::InvalidArgument));
    assert_eq!(t.call(rename(b, "c", 1, "a")), Err(ErrorCode::NotEmpty));
}

#[test]
fn rename_flags() {
    let mut t = tree();
    let d = t.dir(1, "d");
    let (f, g, s) = (t.file(1, "f"), t.file(d, "g"), t.dir(d, "s"));
    let no_replace = Op::Rename(Rename {
        no_replace: true,
        ..rename_op(1, "f", d, "g")
    });
    assert_eq!(t.call(no_replace), Err(ErrorCode::Exists));
    assert_eq!(t.call(exchange(1, "f", d, "none")), Err(ErrorCode::NotFound));
    t.call(exchange(1, "f", d, "g")).unwrap();
    assert_eq!((t.find(1, "f"), t.find(d, "g")), (Ok(g), Ok(f)));
    // A file against a directory in another directory.
    t.call(exchange(1, "f", d, "s")).unwrap();
    assert_eq!((t.find(1, "f"), t.find(d, "s")), (Ok(s), Ok(g)));
    assert_eq!((t.stat(1).nlink, t.stat(d).nlink, t.stat(s).parent), (4, 2, 1));
}

#[test]
fn renaming_onto_the_same_inode_does_nothing() {
    let mut t = tree();
    let file = t.file(1, "a");
    t.call(link(file, 1, "b")).unwrap();
    t.call(rename(1, "a", 1, "b")).unwrap();
    assert_eq!(
        (t.find(1, "a"), t.find(1, "b"), t.stat(file).nlink),
        (Ok(file), Ok(file), 2)
    );
}

#[test]
fn cookies_stay_while_entries_come_and_go() {
    let mut t = tree();
    for i in 0..10 {
        t.file(1, &format!("f{i}"));
    }
    let page = |t: &mut Tree, after| match t
        .call(Op::ReadDir(ReadDir {
            ino: 1,
            after,
            limit: 4,
        }))
        .unwrap()
    {
        Reply::ReadDir(reply) => reply,
        other => panic!("{other:?}"),
    };
    let first = page(&mut t, 0);
    assert!(!first.end && first.entries.len() == 4);
    let after = first.entries[3].cookie;
    t.call(unlink(1, "f0")).unwrap();
    t.call(unlink(1, "f3")).unwrap();
    t.call(unlink(1, "f5")).unwrap();
    t.file(1, "new");
    let mut names = Vec::new();
    let mut at = after;
    loop {
        let reply = page(&mut t, at);
        for entry in &reply.entries {
            assert_eq!(entry.attr.as_ref().map(|attr| attr.nlink), Some(1));
            names.push(String::from_utf8(entry.name.to_vec()).unwrap());
            at = entry.cookie;
        }
        if reply.end {
            break;
        }
    }
    assert_eq!(names, ["f4", "f6", "f7", "f8", "f9", "new"]);
}

#[test]
fn attributes_follow_posix() {
    let mut t = tree();
    let ino = t.file(1, "f");
    let before = t.stat(ino);
    let mode = |mode| SetAttr {
        ino,
        mode: Some(mode),
        ..SetAttr::default()
    };
    let after = t.attr(Op::SetAttr(mode(0o6755)));
    assert_eq!((after.mode, after.mtime), (0o6755, before.mtime));
    assert!(after.ctime > before.ctime && after.change > before.change);
    // A new owner clears set-id bits, unless the mode is given with it.
    let chown = SetAttr {
        ino,
        uid: Some(5),
        ..SetAttr::default()
    };
    assert_eq!(t.attr(Op::SetAttr(chown)).mode, 0o755);
    let both = SetAttr {
        uid: Some(6),
        ..mode(0o4755)
    };
    assert_eq!(t.attr(Op::SetAttr(both)).mode, 0o4755);
    let times = SetAttr {
        ino,
        atime: Some(3),
        mtime: Some(4),
        ..SetAttr::default()
    };
    let after = t.attr(Op::SetAttr(times));
    assert_eq!((after.atime, after.mtime), (3, 4));
    let sized = t.attr(truncate(ino, 10));
    assert_eq!(sized.size, 10);
    assert!(sized.mtime > 4);
    assert_eq!(t.call(truncate(1, 10)), Err(ErrorCode::IsDirectory));
    assert_eq!(t.call(truncate(ino, FILE_TOO_BIG)), Err(ErrorCode::FileTooBig));
}

const FILE_TOO_BIG: u64 = lazarette_types::FILE_SIZE_MAX + 1;

#[test]
fn shrinking_leaves_the_chunks_to_be_cut_and_holds_others_up() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.extend(ino, 5 << 20).unwrap();
    t.ns.take_work();
    t.attr(truncate(ino, 3));
    let cut = t.ns.state().truncate(InodeId(ino)).unwrap();
    assert_eq!((cut.from, cut.to), (5 << 20, 3));
    assert_eq!(t.ns.take_work(), [Work::Cut(InodeId(ino))]);
    let held_up = |t: &Tree, op: Op| {
        let request = Request {
            op: Some(op),
            ..Request::default()
        };
        t.ns.held_up_by(&request).is_some()
    };
    let name = || "f".into();
    assert!(held_up(&t, Op::GetAttr(GetAttr { ino })));
    assert!(held_up(
        &t,
        Op::Lookup(Lookup {
            parent: 1,
            name: name()
        })
    ));
    assert!(held_up(&t, truncate(ino, 9)));
    assert!(!held_up(&t, Op::GetAttr(GetAttr { ino: 1 })));
    t.ns.cut(InodeId(ino), cut);
    assert!(!held_up(&t, Op::GetAttr(GetAttr { ino })));
    // A file that goes while it is cut takes all its chunks along.
    t.attr(truncate(ino, 0));
    t.extend(ino, 3 << 20).unwrap();
    t.attr(truncate(ino, 1));
    t.call(unlink(1, "f")).unwrap();
    let (_, garbage) = t.ns.state().garbage().next().unwrap();
    assert_eq!(garbage.chunks, 3);
    assert_eq!(t.ns.state().truncates().count(), 0);
}

#[test]
fn the_quota_counts_file_sizes() {
    let mut t = tree();
    let (a, b) = (t.file(1, "a"), t.file(1, "b"));
    t.extend(a, 60 << 20).unwrap();
    assert_eq!(t.extend(b, 41 << 20), Err(ErrorCode::NoSpace));
    t.extend(b, 40 << 20).unwrap();
    assert_eq!(t.used(), (100 << 20, 3));
    assert_eq!(t.call(truncate(a, 61 << 20)), Err(ErrorCode::NoSpace));
    // Overwriting within the file is always possible.
    t.extend(a, 10 << 20).unwrap();
    assert_eq!(t.stat(a).size, 60 << 20);
    t.call(unlink(1, "b")).unwrap();
    assert_eq!(t.used(), (60 << 20, 2));
    t.ns.set_limits(Limits {
        size: 200 << 20,
        chunk_size: CHUNK,
    });
    t.extend(a, 190 << 20).unwrap();
}

#[test]
fn extended_attributes() {
    let mut t = tree();
    let ino = t.file(1, "f");
    let name = || "user.a".into();
    let set = |value: &'static str, create_only, replace_only| {
        Op::SetXattr(SetXattr {
            ino,
            name: name(),
            value: value.into(),
            create_only,
            replace_only,
        })
    };
    let get = || Op::GetXattr(GetXattr { ino, name: name() });
    assert_eq!(t.call(get()), Err(ErrorCode::NoAttribute));
    assert_eq!(t.call(set("1", false, true)), Err(ErrorCode::NoAttribute));
    t.call(set("1", true, false)).unwrap();
    assert_eq!(t.call(set("2", true, false)), Err(ErrorCode::Exists));
    t.call(set("3", false, true)).unwrap();
    assert_eq!(t.call(get()), Ok(Reply::Bytes("3".into())));
    match t.call(Op::ListXattr(ListXattr { ino })).unwrap() {
        Reply::XattrNames(names) => assert_eq!(names.names, ["user.a"]),
        other => panic!("{other:?}"),
    }
    let big = Op::SetXattr(SetXattr {
        ino,
        name: name(),
        value: vec![0; (64 << 10) + 1].into(),
        ..SetXattr::default()
    });
    assert_eq!(t.call(big), Err(ErrorCode::OutOfRange));
    t.call(Op::RemoveXattr(RemoveXattr { ino, name: name() })).unwrap();
    assert_eq!(
        t.call(Op::RemoveXattr(RemoveXattr { ino, name: name() })),
        Err(ErrorCode::NoAttribute)
    );
    t.call(set("4", false, false)).unwrap();
    t.call(unlink(1, "f")).unwrap();
    assert!(t.ns.state().get(&Key::xattr(InodeId(ino), b"user.a")).is_none());
}

#[test]
fn a_repeated_operation_gets_the_first_result() {
    let mut t = tree();
    let request = Request {
        volume: 1,
        session: ALICE,
        op_id: 5,
        ack_below: 0,
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
    match t.by(BOB, test(LockMode::Exclusive, 0, 99)).unwrap() {
        Reply::Conflict(found) => assert_eq!((found.start, found.end, found.pid), (5, 9, 7)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn appends_take_turns() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.extend(ino, 100).unwrap();
    let begin = |wait_ms| Op::AppendBegin(AppendBegin { ino, wait_ms });
    let end = |offset, length| {
        Op::AppendEnd(AppendEnd {
            ino,
            offset,
            length,
            mtime: 0,
        })
    };
    assert_eq!(t.by(ALICE, begin(0)), Ok(Reply::AppendOffset(100)));
    assert_eq!(t.by(BOB, begin(0)), Err(ErrorCode::WouldBlock));
    assert_eq!(t.by(BOB, end(100, 1)), Err(ErrorCode::InvalidArgument));
    let bob = t.waits(BOB, begin(100));
    let alice = t.waits(ALICE, begin(100));
    t.by(ALICE, end(100, 10)).unwrap();
    let finished = t.ns.take_finished();
    assert_eq!(
        (finished[0].waiter, &finished[0].result),
        (bob, &Ok(Reply::AppendOffset(110)))
    );
    // A turn that appends nothing.
    t.by(BOB, end(110, 0)).unwrap();
    let finished = t.ns.take_finished();
    assert_eq!(
        (finished[0].waiter, &finished[0].result),
        (alice, &Ok(Reply::AppendOffset(110)))
    );
    // The turn ends although the bytes do not fit.
    assert_eq!(t.by(ALICE, end(110, 100 << 20)), Err(ErrorCode::NoSpace));
    assert_eq!(t.by(BOB, begin(0)), Ok(Reply::AppendOffset(110)));
}

#[test]
fn orphans_wait_for_sessions_of_the_owner_before() {
    let mut t = tree();
    let file = t.file(1, "f");
    t.by(BOB, Op::Open(Open { ino: file })).unwrap();
    t.call(unlink(1, "f")).unwrap();
    let gone = t.file(1, "g");
    // The next owner has the rows, but does not know who holds what open.
    let mut state = State::new(1);
    for (key, row) in t.ns.state().rows() {
        state.redo(key.clone(), Some(row.clone()));
    }
    let mut next = Tree {
        ns: Namespace::new(state, t.ns.limits(), 1),
        next: 1000,
        now: 1000,
    };
    assert!(next.ns.is_registering());
    next.call(unlink(1, "g")).unwrap();
    next.ns.register(SessionId(ALICE), &[], true).unwrap();
    assert!(next.garbage().is_empty());
    next.ns.register(SessionId(BOB), &[InodeId(file)], true).unwrap();
    assert_eq!(next.garbage(), [gone]);
    next.by(BOB, Op::Close(Close { ino: file })).unwrap();
    assert_eq!(next.garbage(), [file, gone]);
}

#[test]
fn nobody_gets_the_turn_to_append_while_the_file_is_cut() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.extend(ino, 100).unwrap();
    let begin = |wait_ms| Op::AppendBegin(AppendBegin { ino, wait_ms });
    t.by(BOB, begin(0)).unwrap();
    let waiter = t.waits(ALICE, begin(100));
    t.attr(truncate(ino, 7));
    t.ns.end_session(SessionId(BOB));
    assert!(t.ns.take_finished().is_empty());
    let cut = t.ns.state().truncate(InodeId(ino)).unwrap();
    t.ns.cut(InodeId(ino), cut);
    let finished = t.ns.take_finished();
    assert_eq!(
        (finished[0].waiter, &finished[0].result),
        (waiter, &Ok(Reply::AppendOffset(7)))
    );
}
