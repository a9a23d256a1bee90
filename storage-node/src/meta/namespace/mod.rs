//! A volume's inode tree: what each operation means. Synchronous and without I/O; what it changes
//! are rows, which the owner journals.

mod attributes;
mod locking;
mod sessions;
mod sizes;
#[cfg(test)]
mod tests;
mod tree;

use super::rows::{Inode, Key, OpResult, Row, Truncate};
use super::state::State;
use lazarette_proto::meta::{AppendTurn, Done, Kind, Request, StatFsReply, request::Op, response::Result as ReplyKind};
use lazarette_types::{ErrorCode, InodeId, NAME_MAX, ROOT_INODE, SessionId};
use locking::Waiters;
use sessions::Opens;
use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{HashMap, HashSet};

/// Results that a session may leave unacknowledged.
const MAX_RESULTS: u64 = 1 << 16;

/// A successful answer.
pub type Reply = ReplyKind;

/// Why an operation failed. It changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: Cow<'static, str>,
}

impl Fault {
    /// An error with a message.
    pub fn new(code: ErrorCode, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// A lock request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaiterId(pub u64);

/// What became of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It is answered.
    Reply(Result<Reply, Fault>),
    /// The answer comes through [`Namespace::take_finished`].
    Wait {
        /// Under which number.
        waiter: WaiterId,
        /// After so long without a grant the caller calls [`Namespace::time_out`].
        wait_ms: u32,
    },
}

/// What a request did, and which record must be committed before anyone hears of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Executed {
    /// The answer.
    pub outcome: Outcome,
    /// The log sequence number to wait for; 0 for none.
    pub after: u64,
    /// The answer is the one that the same request got before: what it says may be past.
    pub repeated: bool,
}

/// A waiting request that came to its end in the record that is open now.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// The waiter.
    pub waiter: WaiterId,
    /// Its answer.
    pub result: Result<Reply, Fault>,
}

/// Work at the chunks that a change brought about. It may begin when the record is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Remove the chunks of a [`Key::Garbage`] row.
    Remove(InodeId),
    /// Cut the chunks of a [`Key::Truncate`] row.
    Cut(InodeId),
}

/// What a volume's record says that matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Quota in bytes.
    pub size: u64,
    /// Bytes, a power of two.
    pub chunk_size: u32,
}

impl Limits {
    /// Inodes at most: they are kept in the owner's memory and in etcd, so a volume cannot be filled with
    /// empty files for ever.
    pub fn inodes(&self) -> u64 {
        /// Bytes of quota for each inode, the fewest and the most inodes.
        const BYTES_PER_INODE: u64 = 4096;
        const FEWEST: u64 = 100_000;
        const MOST: u64 = 50_000_000;
        (self.size / BYTES_PER_INODE).clamp(FEWEST, MOST)
    }
}

/// The tree of one shard: rows, and what lives in memory only (open files, waiters).
#[derive(Debug)]
pub struct Namespace {
    state: State,
    limits: Limits,
    opens: Opens,
    /// Sessions that have yet to say what they hold open: those of the owner before, and one that was alone
    /// and could open files without a word. While there are any, no unlinked inode is given up. With what
    /// they have closed since, by the number of the report.
    unregistered: HashMap<SessionId, HashMap<InodeId, u64>>,
    /// Results of the owner before, which may have left open what they created.
    inherited: HashSet<(SessionId, u64)>,
    waiters: Waiters,
    finished: Vec<Finished>,
    work: Vec<Work>,
    /// The newest record that the present operation depends on.
    seen: Cell<u64>,
}

impl Namespace {
    /// The tree in these rows. An empty shard gets its root directory.
    pub fn new(state: State, limits: Limits, now: i64) -> Self {
        let mut namespace = Self {
            unregistered: state.sessions().map(|session| (session, HashMap::new())).collect(),
            inherited: state.results().collect(),
            state,
            limits,
            opens: Opens::default(),
            waiters: Waiters::default(),
            finished: Vec::new(),
            work: Vec::new(),
            seen: Cell::new(0),
        };
        if namespace.state.inode(ROOT_INODE).is_none() {
            let next_inode = ROOT_INODE.0 + 1;
            namespace.state.put(Key::Counters, Row::Counters { next_inode });
            let root = Inode {
                kind: Kind::Directory,
                mode: 0o755,
                nlink: 2,
                uid: 0,
                gid: 0,
                size: 0,
                atime: now,
                mtime: now,
                ctime: now,
                rdev: 0,
                seed: 0,
                change: 1,
                parent: ROOT_INODE,
                next_cookie: 1,
                target: Box::default(),
            };
            let key = Key::attributes(ROOT_INODE);
            namespace.state.put(key, Row::Inode(Box::new(root)));
        }
        namespace
            .work
            .extend(namespace.state.garbage().map(|(ino, _)| Work::Remove(ino)));
        namespace
            .work
            .extend(namespace.state.truncates().map(|(ino, _)| Work::Cut(ino)));
        namespace.collect_orphans();
        namespace
    }

    /// The rows.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The rows, for the journal's and the pages' marks.
    pub fn state_mut(&mut self) -> &mut State {
        &mut self.state
    }

    /// Takes over a changed volume record.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// The volume's limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Waiting requests that came to their end since the last call.
    pub fn take_finished(&mut self) -> Vec<Finished> {
        std::mem::take(&mut self.finished)
    }

    /// Work at the chunks that came up since the last call.
    pub fn take_work(&mut self) -> Vec<Work> {
        std::mem::take(&mut self.work)
    }

    /// The newest record that has anything in it.
    pub fn newest_record(&self) -> u64 {
        let open = self.state.open_record();
        if self.state.changed_bytes() > 0 { open } else { open - 1 }
    }

    /// Executes a request at `now`, in nanoseconds since the Unix epoch.
    pub fn execute(&mut self, request: &Request, now: i64) -> Executed {
        self.seen.set(0);
        let session = SessionId(request.session);
        let repeated = self.state.get(&Key::Result(session, request.op_id)).is_some();
        let (outcome, after) = match self.run(request, now) {
            Ok(done) => done,
            Err(fault) => (Outcome::Reply(Err(fault)), self.seen.get()),
        };
        Executed {
            outcome,
            after,
            repeated,
        }
    }

    fn run(&mut self, request: &Request, now: i64) -> Result<(Outcome, u64), Fault> {
        let session = SessionId(request.session);
        self.check_session(session)?;
        if let Some(handles) = &request.handles {
            self.note_handles(session, handles);
        }
        let Some(op) = &request.op else {
            return Err(Fault::new(ErrorCode::InvalidArgument, "request has no operation"));
        };
        if let Some(reply) = self.read(session, op)? {
            return Ok((Outcome::Reply(Ok(reply)), self.seen.get()));
        }
        let id = request.op_id;
        self.check_op_id(session, id, request.ack_below)?;
        if let Some(Row::Result(result)) = self.state.get(&Key::Result(session, id)) {
            let result = OpResult::clone(result);
            // Once: the session may have closed it when the request comes yet again.
            if let (Op::Create(create), OpResult::Attr(ino, _)) = (op, &result)
                && create.open
                && self.inherited.remove(&(session, id))
            {
                self.reopen(session, *ino);
            }
            return Ok((Outcome::Reply(reply_of(result)), self.newest_record()));
        }
        if let Some(outcome) = self.join_waiter(session, id, op) {
            return Ok((outcome, self.newest_record()));
        }
        let acked = self.acked(session);
        if request.ack_below > acked {
            self.state.put(Key::Acked(session), Row::Acked(request.ack_below));
            self.state.remove_results(session, request.ack_below);
        }
        let result = match self.mutate(session, id, op, now) {
            Ok(Mutated::Now(result)) => result,
            Ok(Mutated::Later(waiter, wait_ms)) => return Ok((Outcome::Wait { waiter, wait_ms }, 0)),
            Err(fault) => OpResult::Failed(fault.code, fault.message.into_owned()),
        };
        let reply = reply_of(result.clone());
        self.record(session, id, result);
        Ok((Outcome::Reply(reply), self.state.open_record()))
    }

    fn record(&mut self, session: SessionId, id: u64, result: OpResult) {
        self.state.put(Key::Result(session, id), Row::Result(Box::new(result)));
    }

    fn acked(&self, session: SessionId) -> u64 {
        match self.state.get(&Key::Acked(session)) {
            Some(Row::Acked(below)) => *below,
            _ => 0,
        }
    }

    fn check_op_id(&self, session: SessionId, id: u64, ack_below: u64) -> Result<(), Fault> {
        let acked = self.acked(session);
        if id == 0 {
            return Err(invalid("op_id is 0; give each mutation an id of its own, from 1 on"));
        }
        if id < acked {
            return Err(invalid(
                "op_id is below what the session has acknowledged; use a new id",
            ));
        }
        if ack_below > id {
            return Err(invalid(
                "ack_below is greater than op_id; acknowledge finished operations only",
            ));
        }
        if id - acked.max(ack_below) > MAX_RESULTS {
            return Err(invalid(
                "op_id is too far ahead of ack_below; acknowledge finished operations",
            ));
        }
        Ok(())
    }

    /// Executes operations that change no rows. `None` for the others.
    fn read(&mut self, session: SessionId, op: &Op) -> Result<Option<Reply>, Fault> {
        Ok(Some(match op {
            Op::Lookup(op) => self.lookup(op)?,
            Op::GetAttr(op) => self.attr_reply(InodeId(op.ino))?,
            Op::ReadLink(op) => self.read_link(InodeId(op.ino))?,
            Op::ReadDir(op) => self.read_dir(op)?,
            Op::StatFs(_) => {
                let usage = self.state.usage();
                Reply::StatFs(StatFsReply {
                    size_bytes: self.limits.size,
                    used_bytes: usage.bytes,
                    used_inodes: usage.inodes,
                    inodes: self.limits.inodes(),
                })
            }
            Op::GetXattr(op) => self.get_xattr(op)?,
            Op::ListXattr(op) => self.list_xattr(InodeId(op.ino))?,
            Op::TestLock(op) => self.test_lock(session, op)?,
            Op::Report(_) => Reply::Done(Done {}),
            Op::Create(_)
            | Op::Unlink(_)
            | Op::RmDir(_)
            | Op::Rename(_)
            | Op::Link(_)
            | Op::SetAttr(_)
            | Op::Reserve(_)
            | Op::Extend(_)
            | Op::SetXattr(_)
            | Op::RemoveXattr(_)
            | Op::Lock(_)
            | Op::AppendBegin(_)
            | Op::AppendEnd(_) => return Ok(None),
        }))
    }

    fn mutate(&mut self, session: SessionId, id: u64, op: &Op, now: i64) -> Result<Mutated, Fault> {
        Ok(Mutated::Now(match op {
            Op::Create(op) => self.create(session, op, now)?,
            Op::Unlink(op) => self.unlink(InodeId(op.parent), &op.name, now)?,
            Op::RmDir(op) => self.rm_dir(InodeId(op.parent), &op.name, now)?,
            Op::Rename(op) => self.rename(op, now)?,
            Op::Link(op) => self.link(op, now)?,
            Op::SetAttr(op) => self.set_attr(session, op, now)?,
            Op::Reserve(op) => self.reserve(session, op)?,
            Op::Extend(op) => self.extend(op, now)?,
            Op::SetXattr(op) => self.set_xattr(op, now)?,
            Op::RemoveXattr(op) => self.remove_xattr(op, now)?,
            Op::Lock(op) => return self.lock(session, id, op),
            Op::AppendBegin(op) => return self.append_begin(session, id, op),
            Op::AppendEnd(op) => self.append_end(session, op, now)?,
            _ => return Err(invalid("not a mutation")),
        }))
    }

    /// The inode with an unfinished cut that this request has to wait for, if any: nobody may extend the
    /// file or learn of it before its chunks are cut.
    pub fn held_up_by(&self, request: &Request) -> Option<InodeId> {
        let ino = match request.op.as_ref()? {
            Op::ReadDir(op) => {
                let names = |ino: &InodeId| {
                    let inode = self.state.inode(*ino);
                    inode.is_some_and(|inode| inode.nlink > 1 || inode.parent.0 == op.ino)
                };
                return self.state.truncates().map(|(ino, _)| ino).find(names);
            }
            Op::Rename(op) => self.state.entry(InodeId(op.parent), &op.name)?.1,
            Op::Link(op) => InodeId(op.ino),
            Op::Lookup(op) => self.state.entry(InodeId(op.parent), &op.name)?.1,
            Op::Create(op) => self.state.entry(InodeId(op.parent), &op.name)?.1,
            Op::GetAttr(op) => InodeId(op.ino),
            Op::SetAttr(op) => InodeId(op.ino),
            Op::Reserve(op) => InodeId(op.ino),
            Op::Extend(op) => InodeId(op.ino),
            Op::AppendBegin(op) => InodeId(op.ino),
            Op::AppendEnd(op) => InodeId(op.ino),
            _ => return None,
        };
        self.state.truncate(ino).map(|_| ino)
    }

    /// The chunks of an inode that is gone are removed.
    pub fn removed(&mut self, ino: InodeId) {
        self.state.remove(Key::Garbage(ino));
    }

    /// Chunks are cut. `cut` is what was done: if more is to be cut meanwhile, the row stays.
    pub fn cut(&mut self, ino: InodeId, cut: Truncate) {
        if self.state.truncate(ino) == Some(cut) {
            self.state.remove(Key::Truncate(ino));
            self.wake(ino);
        }
    }

    fn see(&self, ino: InodeId) {
        self.seen.set(self.seen.get().max(self.state.mark(ino)));
    }

    /// An inode addressed by number.
    fn inode(&self, ino: InodeId) -> Result<&Inode, Fault> {
        self.see(ino);
        self.state
            .inode(ino)
            .ok_or_else(|| Fault::new(ErrorCode::Stale, "inode is gone"))
    }

    /// A directory that still has a name.
    fn dir(&self, ino: InodeId) -> Result<&Inode, Fault> {
        let inode = self.inode(ino)?;
        if !inode.is_dir() {
            return Err(Fault::new(ErrorCode::NotDirectory, "not a directory"));
        }
        if inode.nlink == 0 {
            return Err(Fault::new(ErrorCode::NotFound, "directory is removed"));
        }
        Ok(inode)
    }

    fn attr_reply(&self, ino: InodeId) -> Result<Reply, Fault> {
        Ok(Reply::Attr(self.inode(ino)?.attr(ino)))
    }

    fn attr_result(&self, ino: InodeId) -> Result<OpResult, Fault> {
        Ok(OpResult::Attr(ino, Box::new(self.inode(ino)?.clone())))
    }
}

/// What became of a mutation.
enum Mutated {
    Now(OpResult),
    Later(WaiterId, u32),
}

fn reply_of(result: OpResult) -> Result<Reply, Fault> {
    match result {
        OpResult::Done => Ok(Reply::Done(Done {})),
        OpResult::Attr(ino, inode) => Ok(Reply::Attr(inode.attr(ino))),
        OpResult::Turn { offset, change } => Ok(Reply::AppendTurn(AppendTurn { offset, change })),
        OpResult::Failed(code, message) => Err(Fault::new(code, message)),
    }
}

fn invalid(message: &'static str) -> Fault {
    Fault::new(ErrorCode::InvalidArgument, message)
}

fn check_name(name: &[u8]) -> Result<(), Fault> {
    if name.len() > NAME_MAX {
        return Err(Fault::new(ErrorCode::NameTooLong, "name is over 255 bytes"));
    }
    if name.is_empty() || name == b"." || name == b".." || name.iter().any(|byte| matches!(byte, b'/' | 0)) {
        return Err(invalid("name is empty, a dot name, or has a slash or NUL in it"));
    }
    Ok(())
}
