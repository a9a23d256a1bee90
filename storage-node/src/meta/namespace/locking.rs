//! Locks and the turn to append: granting, waiting in order of arrival, deadlocks.

use super::{Fault, Finished, Mutated, Namespace, Outcome, Reply, WaiterId, invalid, reply_of};
use crate::meta::locks::{self, END_OF_FILE};
use crate::meta::rows::{Held, LockClass, OpResult};
use lazarette_proto::meta::{
    AppendBegin, AppendEnd, Done, Kind, Lock, LockKind, LockMode, LockRange, TestLock, request::Op,
};
use lazarette_types::{ErrorCode, InodeId, SessionId};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// Locks on one inode at most.
const MAX_LOCKS: usize = 4096;
/// Requests waiting in one shard at most.
const MAX_WAITERS: usize = 1 << 16;

/// A request that waits for its lock.
#[derive(Debug)]
struct Waiter {
    op_id: u64,
    ino: InodeId,
    wanted: Held,
    /// Bytes that will be appended.
    length: u64,
}

/// All waiting requests. Numbers grow, so the order of numbers is that of arrival.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    next: u64,
    waiting: BTreeMap<WaiterId, Waiter>,
    by_inode: HashMap<InodeId, BTreeSet<WaiterId>>,
    by_op: HashMap<(SessionId, u64), WaiterId>,
}

impl Waiters {
    fn add(&mut self, waiter: Waiter) -> WaiterId {
        self.next += 1;
        let id = WaiterId(self.next);
        self.by_inode.entry(waiter.ino).or_default().insert(id);
        self.by_op.insert((waiter.wanted.session, waiter.op_id), id);
        self.waiting.insert(id, waiter);
        id
    }

    fn remove(&mut self, id: WaiterId) -> Option<Waiter> {
        let waiter = self.waiting.remove(&id)?;
        if let Some(ids) = self.by_inode.get_mut(&waiter.ino) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_inode.remove(&waiter.ino);
            }
        }
        self.by_op.remove(&(waiter.wanted.session, waiter.op_id));
        Some(waiter)
    }

    fn of_inode(&self, ino: InodeId) -> Vec<WaiterId> {
        self.by_inode.get(&ino).into_iter().flatten().copied().collect()
    }
}

/// What a request wants: a lock, or to give one up.
enum Wish {
    Lock(Held),
    Unlock(Held),
}

impl Namespace {
    pub(super) fn lock(&mut self, session: SessionId, id: u64, op: &Lock) -> Result<Mutated, Fault> {
        let ino = InodeId(op.ino);
        self.inode(ino)?;
        let wanted = match wish(session, op.range.as_ref())? {
            Wish::Unlock(range) => {
                if locks::holds(self.state.locks(ino), &range) {
                    let left = locks::release(self.state.locks(ino), &range);
                    self.check_lock_count(&left)?;
                    self.state.set_locks(ino, left);
                    self.wake(ino);
                }
                return Ok(Mutated::Now(OpResult::Done));
            }
            Wish::Lock(wanted) => wanted,
        };
        let blocked = locks::conflict(self.state.locks(ino), &wanted).is_some();
        if blocked && wanted.class == LockClass::Flock && locks::holds(self.state.locks(ino), &wanted) {
            // As in flock(2), a conversion gives up the lock first: two holders of a shared lock
            // that both want the exclusive one would otherwise wait for each other forever.
            let left = locks::release(self.state.locks(ino), &wanted);
            self.state.set_locks(ino, left);
            self.wake(ino);
        }
        if locks::conflict(self.state.locks(ino), &wanted).is_none() {
            let table = locks::grant(self.state.locks(ino), &wanted);
            self.check_lock_count(&table)?;
            self.state.set_locks(ino, table);
            self.wake(ino);
            return Ok(Mutated::Now(OpResult::Done));
        }
        if op.wait_ms == 0 {
            return Err(would_block());
        }
        if wanted.class == LockClass::Posix && self.would_deadlock(ino, &wanted) {
            return Err(Fault::new(ErrorCode::Deadlock, "waiting for the lock would never end"));
        }
        self.wait(id, ino, wanted, 0, op.wait_ms)
    }

    pub(super) fn append_begin(&mut self, session: SessionId, id: u64, op: &AppendBegin) -> Result<Mutated, Fault> {
        let ino = InodeId(op.ino);
        let inode = self.inode(ino)?;
        if inode.kind != Kind::File {
            return Err(invalid("only files can be appended to"));
        }
        let turn = Held {
            class: LockClass::Append,
            exclusive: true,
            session,
            owner: 0,
            start: 0,
            end: END_OF_FILE,
            pid: 0,
        };
        if locks::conflict(self.state.locks(ino), &turn).is_none() {
            let table = locks::grant(self.state.locks(ino), &turn);
            self.state.set_locks(ino, table);
            return Ok(Mutated::Now(self.begin_append(ino, op.length)));
        }
        if op.wait_ms == 0 {
            return Err(would_block());
        }
        self.wait(id, ino, turn, op.length, op.wait_ms)
    }

    pub(super) fn append_end(&mut self, session: SessionId, op: &AppendEnd, now: i64) -> Result<OpResult, Fault> {
        let ino = InodeId(op.ino);
        self.inode(ino)?;
        let mine = |held: &Held| held.class == LockClass::Append && held.session == session;
        if !self.state.locks(ino).iter().any(mine) {
            return Err(invalid("the session does not have the turn to append"));
        }
        let end = op
            .offset
            .checked_add(op.length)
            .ok_or_else(|| Fault::new(ErrorCode::FileTooBig, "append ends over 16 TiB"))?;
        // The turn ends also if the bytes cannot become part of the file.
        let left = self
            .state
            .locks(ino)
            .iter()
            .filter(|held| !mine(held))
            .cloned()
            .collect();
        self.state.set_locks(ino, left);
        let extended = if op.length > 0 {
            self.extend_to(ino, end, op.since, op.mtime, now)
        } else {
            Ok(())
        };
        self.wake(ino);
        extended?;
        self.attr_result(ino)
    }

    pub(super) fn test_lock(&mut self, session: SessionId, op: &TestLock) -> Result<Reply, Fault> {
        let ino = InodeId(op.ino);
        self.inode(ino)?;
        let Wish::Lock(wanted) = wish(session, op.range.as_ref())? else {
            return Err(invalid("mode of a lock to test is unlock"));
        };
        Ok(match locks::conflict(self.state.locks(ino), &wanted) {
            None => Reply::Done(Done {}),
            Some(held) => Reply::Conflict(LockRange {
                kind: match held.class {
                    LockClass::Flock => LockKind::Flock.into(),
                    LockClass::Posix | LockClass::Append => LockKind::Posix.into(),
                },
                mode: if held.exclusive {
                    LockMode::Exclusive
                } else {
                    LockMode::Shared
                }
                .into(),
                owner: held.owner,
                start: held.start,
                end: held.end,
                // A process of another machine has no number here.
                pid: if held.session == session { held.pid } else { 0 },
            }),
        })
    }

    fn check_lock_count(&self, table: &[Held]) -> Result<(), Fault> {
        if table.len() > MAX_LOCKS {
            return Err(Fault::new(ErrorCode::NoSpace, "too many locks on one file"));
        }
        Ok(())
    }

    fn wait(&mut self, op_id: u64, ino: InodeId, wanted: Held, length: u64, wait_ms: u32) -> Result<Mutated, Fault> {
        if self.waiters.waiting.len() >= MAX_WAITERS {
            return Err(would_block());
        }
        let waiter = self.waiters.add(Waiter {
            op_id,
            ino,
            wanted,
            length,
        });
        Ok(Mutated::Later(waiter, wait_ms))
    }

    /// A repeated request whose first copy still waits takes that one's place in the queue. With
    /// `wait_ms` 0 both end now: so a client that gave up waiting learns for certain that it does
    /// not have the lock.
    pub(super) fn join_waiter(&mut self, session: SessionId, op_id: u64, op: &Op) -> Option<Outcome> {
        let waiter = *self.waiters.by_op.get(&(session, op_id))?;
        let wait_ms = match op {
            Op::Lock(op) => op.wait_ms,
            Op::AppendBegin(op) => op.wait_ms,
            _ => 0,
        };
        if wait_ms > 0 {
            return Some(Outcome::Wait { waiter, wait_ms });
        }
        self.time_out(waiter);
        Some(Outcome::Reply(Err(would_block())))
    }

    /// The waiter's time is over: it gets `WouldBlock`.
    pub fn time_out(&mut self, waiter: WaiterId) {
        self.finish(waiter, failed(would_block()));
    }

    /// Nobody waits for the waiter's answer any more. Its op id may be used again.
    pub fn cancel(&mut self, waiter: WaiterId) {
        self.waiters.remove(waiter);
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.waiters.waiting.len()
    }

    fn finish(&mut self, waiter: WaiterId, result: OpResult) {
        let Some(found) = self.waiters.remove(waiter) else {
            return;
        };
        self.record(found.wanted.session, found.op_id, result.clone());
        let result = reply_of(result);
        self.finished.push(Finished { waiter, result });
    }

    /// Locks of an inode were given up: grants what can be granted now, in order of arrival.
    pub(super) fn wake(&mut self, ino: InodeId) {
        // Granting may give something up, too: an owner that turns its exclusive range into a
        // shared one. Then those before it in the queue get another look.
        loop {
            let mut granted = false;
            for id in self.waiters.of_inode(ino) {
                let Some(waiter) = self.waiters.waiting.get(&id) else {
                    continue;
                };
                let (wanted, length) = (waiter.wanted.clone(), waiter.length);
                if locks::conflict(self.state.locks(ino), &wanted).is_some() {
                    continue;
                }
                if wanted.class == LockClass::Append && self.state.truncate(ino).is_some() {
                    // What it writes must not be cut; it is looked at again after the cut.
                    continue;
                }
                let table = locks::grant(self.state.locks(ino), &wanted);
                self.state.set_locks(ino, table);
                let result = match wanted.class {
                    LockClass::Append => self.begin_append(ino, length),
                    LockClass::Flock | LockClass::Posix => OpResult::Done,
                };
                self.finish(id, result);
                granted = true;
            }
            if !granted {
                return;
            }
        }
    }

    /// The inode is gone: nobody will ever get its locks.
    pub(super) fn fail_waiters(&mut self, ino: InodeId) {
        for id in self.waiters.of_inode(ino) {
            self.finish(id, failed(Fault::new(ErrorCode::Stale, "inode is gone")));
        }
    }

    /// The session has ended: its requests end with it.
    pub(super) fn drop_waiters(&mut self, session: SessionId) {
        let of_session = self
            .waiters
            .waiting
            .iter()
            .filter(|(_, waiter)| waiter.wanted.session == session);
        let ids: Vec<WaiterId> = of_session.map(|(id, _)| *id).collect();
        for waiter in ids {
            self.waiters.remove(waiter);
            let result = Err(Fault::new(ErrorCode::SessionExpired, "session has ended"));
            self.finished.push(Finished { waiter, result });
        }
    }

    /// Whether some holder of what `wanted` conflicts with waits, through others, for the holder
    /// of `wanted`.
    fn would_deadlock(&self, ino: InodeId, wanted: &Held) -> bool {
        let me = (wanted.session, wanted.owner);
        let mut seen = HashSet::new();
        let mut todo: Vec<(InodeId, &Held)> = vec![(ino, wanted)];
        while let Some((ino, wanted)) = todo.pop() {
            for held in self
                .state
                .locks(ino)
                .iter()
                .filter(|held| locks::conflicts(held, wanted))
            {
                let holder = (held.session, held.owner);
                if holder == me {
                    return true;
                }
                if !seen.insert(holder) {
                    continue;
                }
                let waits = self.waiters.waiting.values().filter(|waiter| {
                    waiter.wanted.class == LockClass::Posix && (waiter.wanted.session, waiter.wanted.owner) == holder
                });
                todo.extend(waits.map(|waiter| (waiter.ino, &waiter.wanted)));
            }
        }
        false
    }
}

fn wish(session: SessionId, range: Option<&LockRange>) -> Result<Wish, Fault> {
    let range = range.ok_or_else(|| invalid("range is not given"))?;
    let class = match LockKind::try_from(range.kind) {
        Ok(LockKind::Flock) => LockClass::Flock,
        Ok(LockKind::Posix) => LockClass::Posix,
        _ => return Err(invalid("kind of lock is not given")),
    };
    let (start, end) = match class {
        LockClass::Flock => (0, END_OF_FILE),
        _ => (range.start, range.end),
    };
    if start > end || end > END_OF_FILE {
        return Err(invalid("range of lock ends before its start or beyond 2^63-1"));
    }
    let held = |exclusive| Held {
        class,
        exclusive,
        session,
        owner: range.owner,
        start,
        end,
        pid: range.pid,
    };
    match LockMode::try_from(range.mode) {
        Ok(LockMode::Shared) => Ok(Wish::Lock(held(false))),
        Ok(LockMode::Exclusive) => Ok(Wish::Lock(held(true))),
        Ok(LockMode::Unlock) => Ok(Wish::Unlock(held(false))),
        _ => Err(invalid("mode of lock is not given")),
    }
}

fn would_block() -> Fault {
    Fault::new(ErrorCode::WouldBlock, "lock is held by another owner")
}

fn failed(fault: Fault) -> OpResult {
    OpResult::Failed(fault.code, fault.message.into_owned())
}
