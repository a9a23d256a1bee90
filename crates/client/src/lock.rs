//! Advisory locks, granted by the owner, held by the session.

use crate::flush::Scope;
use crate::inode::Inode;
use crate::volume::Inner;
use crate::{Entry, Error, File, Result};
use lazarette_proto::meta::{Lock, LockKind, LockMode, LockRange, TestLock, request::Op, response};
use lazarette_types::ErrorCode;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// How long the owner holds a request for a lock that another has; then it is asked again, at
/// the end of the queue.
const WAIT_MS: u32 = 10_000;

/// Before it is asked again; an owner that has no room for waiters answers at once.
const PAUSE: Duration = Duration::from_millis(10);

/// Last byte of a range that covers everything.
const EVERYTHING: u64 = i64::MAX as u64;

/// Who holds a lock, within the session: the kernel's id of an open file or of a process's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockOwner(pub u64);

/// The locks that this client holds on an inode, by kind and owner.
#[derive(Debug, Default)]
pub(crate) struct Held(HashMap<(i32, u64), Owned>);

/// What one owner holds.
#[derive(Debug, Default)]
struct Owned {
    /// The handle through which the last lock was taken. With it the locks go whose owner is an open file.
    handle: u64,
    /// Sorted, no overlaps.
    pieces: Vec<Piece>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: u64,
    end: u64,
    mode: i32,
}

impl Held {
    fn any(&self, kind: LockKind, owner: LockOwner) -> bool {
        self.0.contains_key(&(kind.into(), owner.0))
    }

    /// Owners whose last lock was taken through a handle.
    fn through(&self, handle: u64) -> Vec<(i32, u64)> {
        let owned = self.0.iter().filter(|(_, owned)| owned.handle == handle);
        owned.map(|(key, _)| *key).collect()
    }

    /// Notes a change that was granted through a handle and returns what was held in its range before.
    fn set(&mut self, range: &LockRange, handle: u64) -> Vec<Piece> {
        let key = (range.kind, range.owner);
        let owned = self.0.entry(key).or_default();
        if range.mode() != LockMode::Unlock {
            owned.handle = handle;
        }
        let pieces = &mut owned.pieces;
        let mut before = Vec::new();
        let mut after = Vec::new();
        for piece in pieces.drain(..) {
            if piece.end < range.start || piece.start > range.end {
                after.push(piece);
                continue;
            }
            before.push(Piece {
                start: piece.start.max(range.start),
                end: piece.end.min(range.end),
                ..piece
            });
            if piece.start < range.start {
                after.push(Piece {
                    end: range.start - 1,
                    ..piece
                });
            }
            if piece.end > range.end {
                after.push(Piece {
                    start: range.end + 1,
                    ..piece
                });
            }
        }
        if range.mode() != LockMode::Unlock {
            after.push(Piece {
                start: range.start,
                end: range.end,
                mode: range.mode,
            });
        }
        after.sort_by_key(|piece| piece.start);
        *pieces = after;
        if pieces.is_empty() {
            self.0.remove(&key);
        }
        before
    }
}

/// A lock that the owner has granted. Unless kept, it is undone: the waiter has gone away.
struct Grant {
    inner: Arc<Inner>,
    inode: Arc<Inode>,
    range: LockRange,
    handle: u64,
    before: Vec<Piece>,
    kept: bool,
}

impl Drop for Grant {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let inner = self.inner.clone();
        let inode = self.inode.clone();
        let (steps, handle) = (undo(&self.range, &self.before), self.handle);
        let tracker = inner.work.clone();
        tracker.spawn_on(
            async move {
                for range in steps {
                    if let Err(error) = ask(&inner, &inode, range, handle).await {
                        tracing::warn!(%error, ino = inode.ino, "cannot undo a lock whose waiter has gone");
                    }
                }
            },
            &runtime,
        );
    }
}

/// What brings a range back to what was held before.
fn undo(range: &LockRange, before: &[Piece]) -> Vec<LockRange> {
    let mut steps = Vec::new();
    let mut at = range.start;
    for piece in before {
        if piece.start > at {
            steps.push(LockRange {
                start: at,
                end: piece.start - 1,
                mode: LockMode::Unlock.into(),
                ..*range
            });
        }
        if piece.mode != range.mode {
            steps.push(LockRange {
                start: piece.start,
                end: piece.end,
                mode: piece.mode,
                ..*range
            });
        }
        at = piece.end.saturating_add(1);
    }
    if at <= range.end {
        steps.push(LockRange {
            start: at,
            mode: LockMode::Unlock.into(),
            ..*range
        });
    }
    steps
}

fn request(inode: &Inode, range: LockRange, wait_ms: u32) -> Op {
    Op::Lock(Lock {
        ino: inode.ino,
        range: Some(range),
        wait_ms,
    })
}

/// Takes or releases without waiting; gives what was held in the range before.
async fn ask(inner: &Inner, inode: &Inode, range: LockRange, handle: u64) -> Result<Vec<Piece>> {
    inner.call(request(inode, range, 0)).await?;
    Ok(inode.state().held.set(&range, handle))
}

/// Waits for a lock until the owner's time for it is over, or the waiter is gone.
async fn ask_and_wait<T>(
    inner: &Inner,
    inode: &Inode,
    range: LockRange,
    handle: u64,
    waiter: &mut oneshot::Sender<T>,
) -> Result<Vec<Piece>> {
    let id = inner.lease.unless_dead(inner.ops.begin()).await?;
    let answer = tokio::select! {
        biased;
        answer = inner.call_as(id.get(), request(inode, range, WAIT_MS)) => answer,
        // The same id without waiting: the owner ends the wait, or says that it has granted.
        () = waiter.closed() => inner.call_as(id.get(), request(inode, range, 0)).await,
    };
    answer?;
    Ok(inode.state().held.set(&range, handle))
}

impl File {
    /// Takes, changes or (mode Unlock) releases a lock. With `wait`, waits as long as it takes:
    /// drop the future to give up, the lock is then not held. Otherwise WouldBlock.
    ///
    /// What was written is flushed before a lock is released, and the attributes returned are
    /// from after the lock was taken.
    pub async fn lock(&self, range: LockRange, wait: bool) -> Result<Entry> {
        if range.kind() == LockKind::Unspecified || range.mode() == LockMode::Unspecified || range.start > range.end {
            return Err(Error::new(ErrorCode::InvalidArgument, "malformed lock range"));
        }
        if range.mode() == LockMode::Unlock {
            // A failed flush is reported by fsync and close; the lock is released all the same.
            let _ = self.volume.inner.flush(&self.inode, Scope::All).await;
            ask(&self.volume.inner, &self.inode, range, self.id).await?;
            return Ok(Entry {
                attr: self.attr(),
                ttl: Duration::ZERO,
            });
        }
        let mut grant = loop {
            let (mut sender, receiver) = oneshot::channel();
            let inner = self.volume.inner.clone();
            let inode = self.inode.clone();
            let handle = self.id;
            // A task of its own: what was asked for is known to be held or not in the end.
            self.volume.inner.work.spawn(async move {
                let before = if wait {
                    ask_and_wait(&inner, &inode, range, handle, &mut sender).await
                } else {
                    ask(&inner, &inode, range, handle).await
                };
                // If nobody receives it, the grant is dropped and thereby undone.
                let _ = sender.send(before.map(|before| Grant {
                    inner,
                    inode,
                    range,
                    handle,
                    before,
                    kept: false,
                }));
            });
            let answer = receiver
                .await
                .map_err(|_| Error::new(ErrorCode::Internal, "lock task failed"))?;
            match answer {
                Ok(grant) => break grant,
                Err(error) if error.code() == ErrorCode::WouldBlock && wait => {
                    self.volume.inner.lease.unless_dead(tokio::time::sleep(PAUSE)).await?;
                }
                Err(error) => return Err(error),
            }
        };
        let entry = self.volume.get_attr(self.ino()).await?;
        grant.kept = true;
        Ok(entry)
    }

    /// The lock that stands in the way of this one, if any.
    pub async fn test_lock(&self, range: LockRange) -> Result<Option<LockRange>> {
        let test = TestLock {
            ino: self.ino(),
            range: Some(range),
        };
        match self.volume.inner.call(Op::TestLock(test)).await?.result {
            Some(response::Result::Conflict(conflict)) => Ok(Some(conflict)),
            Some(response::Result::Done(_)) => Ok(None),
            _ => Err(Error::malformed("no lock")),
        }
    }

    /// Releases what is left of locks that were taken through this handle: those of the open file itself.
    /// A process's locks were released when it closed its descriptor; if it has taken another one since,
    /// through another handle, that one stays.
    pub(crate) async fn unlock_own(&self) {
        let owners = self.inode.state().held.through(self.id);
        for (kind, owner) in owners {
            let kind = LockKind::try_from(kind).unwrap_or_default();
            if let Err(error) = self.unlock_all(kind, LockOwner(owner)).await {
                tracing::warn!(%error, ino = self.ino(), "cannot release a lock at close");
            }
        }
    }

    /// Releases all locks of one kind that an owner has through this client; asks nobody if there
    /// are none.
    pub async fn unlock_all(&self, kind: LockKind, owner: LockOwner) -> Result<()> {
        if !self.inode.state().held.any(kind, owner) {
            return Ok(());
        }
        let range = LockRange {
            kind: kind.into(),
            mode: LockMode::Unlock.into(),
            owner: owner.0,
            start: 0,
            end: EVERYTHING,
            pid: 0,
        };
        self.lock(range, false).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64, mode: LockMode) -> LockRange {
        LockRange {
            kind: LockKind::Posix.into(),
            mode: mode.into(),
            owner: 1,
            start,
            end,
            pid: 0,
        }
    }

    fn modes(held: &Held, bytes: u64) -> Vec<i32> {
        let pieces: Vec<Piece> = held.0.values().flat_map(|owned| owned.pieces.clone()).collect();
        (0..bytes)
            .map(|at| {
                pieces
                    .iter()
                    .find(|piece| piece.start <= at && at <= piece.end)
                    .map_or(0, |piece| piece.mode)
            })
            .collect()
    }

    #[test]
    fn undo_restores_what_was_held() {
        let mut held = Held::default();
        held.set(&range(2, 4, LockMode::Shared), 1);
        held.set(&range(6, 7, LockMode::Exclusive), 1);
        held.set(&range(9, 20, LockMode::Shared), 1);
        let was = modes(&held, 24);
        for (start, end) in [(0, 10), (3, 3), (5, 5), (4, 6), (0, 23), (21, 22)] {
            let taken = range(start, end, LockMode::Exclusive);
            let before = held.set(&taken, 1);
            assert_eq!(modes(&held, 24)[start as usize], i32::from(LockMode::Exclusive));
            for step in undo(&taken, &before) {
                held.set(&step, 1);
            }
            assert_eq!(modes(&held, 24), was, "after [{start}, {end}]");
        }
        assert_eq!((held.through(1).len(), held.through(2).len()), (1, 0));
        held.set(&range(1, 1, LockMode::Shared), 2);
        held.set(&range(1, 1, LockMode::Unlock), 1);
        assert_eq!((held.through(1).len(), held.through(2).len()), (0, 1));
        held.set(&range(0, EVERYTHING, LockMode::Unlock), 1);
        assert!(!held.any(LockKind::Posix, LockOwner(1)));
    }
}
