mod files;
mod locking;
mod sessions;
mod sizes;
mod tree;

use super::*;
use lazarette_proto::meta::{
    AppendBegin, AppendEnd, Attr, Create, Extend, GetAttr, GetXattr, Handles, Link, ListXattr, Lock, LockKind,
    LockMode, LockRange, Lookup, ReadDir, ReadLink, RemoveXattr, Rename, Report, Reserve, RmDir, SetAttr, SetXattr,
    StatFs, TestLock, Unlink,
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
            handles: None,
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

    /// A session tells what it has opened and closed.
    fn report(&mut self, session: u64, number: u64, opened: &[u64], closed: &[u64]) {
        let request = Request {
            volume: 1,
            session,
            handles: Some(handles(number, opened, closed)),
            op: Some(Op::Report(Report {})),
            ..Request::default()
        };
        let outcome = self.ns.execute(&request, self.now).outcome;
        assert_eq!(outcome, Outcome::Reply(Ok(Reply::Done(Done {}))));
    }

    fn open(&mut self, session: u64, ino: u64) {
        self.next += 1;
        self.report(session, self.next, &[ino], &[]);
    }

    fn close(&mut self, session: u64, ino: u64) {
        self.next += 1;
        self.report(session, self.next, &[], &[ino]);
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
            Reply::Missing(_) => Err(ErrorCode::NotFound),
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
            since: u64::MAX,
        }))
    }

    /// An owner that has the rows and knows of nothing else.
    fn next_owner(&self) -> Self {
        let mut state = State::new(1);
        for (key, row) in self.ns.state().rows() {
            state.redo(key.clone(), Some(row.clone()));
        }
        Self {
            ns: Namespace::new(state, self.ns.limits(), 1),
            next: 1000,
            now: 1000,
        }
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

fn handles(number: u64, opened: &[u64], closed: &[u64]) -> Handles {
    Handles {
        number,
        opened: opened.to_vec(),
        closed: closed.to_vec(),
    }
}

fn creation(name: &str) -> Create {
    match create(1, name, Kind::File) {
        Op::Create(create) => create,
        other => panic!("{other:?}"),
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
        unnamed: false,
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

fn append_begin(ino: u64, wait_ms: u32) -> Op {
    Op::AppendBegin(AppendBegin {
        ino,
        wait_ms,
        length: 10,
    })
}

/// Where the turn to append begins.
fn turn<E: std::fmt::Debug>(reply: &Result<Reply, E>) -> u64 {
    match reply {
        Ok(Reply::AppendTurn(turn)) => turn.offset,
        other => panic!("{other:?}"),
    }
}
