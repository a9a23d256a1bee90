//! POSIX and flock locks of one node.

use lazarette_fuse::attributes::{Lock, LockKind};

/// A lock somebody has.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    owner: u64,
    flock: bool,
    lock: Lock,
}

/// The locks of one node. fcntl(2) and flock(2) locks do not see each other.
#[derive(Debug, Default)]
pub(crate) struct Locks(Vec<Held>);

impl Locks {
    /// A lock of another owner that `lock` cannot be held together with.
    pub(crate) fn conflict(&self, owner: u64, flock: bool, lock: &Lock) -> Option<Lock> {
        let conflicts = |held: &&Held| {
            held.flock == flock
                && held.owner != owner
                && held.lock.start <= lock.end
                && lock.start <= held.lock.end
                && (held.lock.kind == LockKind::Exclusive || lock.kind == LockKind::Exclusive)
        };
        self.0.iter().find(conflicts).map(|held| held.lock)
    }

    /// Gives the owner this lock instead of what it has on the range; `Unlock` takes it away.
    pub(crate) fn set(&mut self, owner: u64, flock: bool, lock: Lock) {
        let mut kept = Vec::with_capacity(self.0.len() + 2);
        for held in self.0.drain(..) {
            let apart = held.lock.end < lock.start || lock.end < held.lock.start;
            if held.owner != owner || held.flock != flock || apart {
                kept.push(held);
                continue;
            }
            if held.lock.start < lock.start {
                kept.push(Held {
                    lock: Lock {
                        end: lock.start - 1,
                        ..held.lock
                    },
                    ..held
                });
            }
            if held.lock.end > lock.end {
                kept.push(Held {
                    lock: Lock {
                        start: lock.end + 1,
                        ..held.lock
                    },
                    ..held
                });
            }
        }
        if lock.kind != LockKind::Unlock {
            kept.push(Held { owner, flock, lock });
        }
        self.0 = kept;
    }

    /// Takes everything from an owner.
    pub(crate) fn release(&mut self, owner: u64, flock: bool) {
        self.0.retain(|held| held.owner != owner || held.flock != flock);
    }
}
