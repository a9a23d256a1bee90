use crate::Error;
use crate::extents::{Extents, Frozen};
use crate::lock::Held;
use lazarette_proto::meta::Attr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Unflushed bytes of one file at which its writers wait.
pub(crate) const DIRTY_PER_INODE: usize = 32 << 20;

/// A reader that meets the end of the file asks the owner at most so often whether it still is.
const SIZE_FRESH: Duration = Duration::from_millis(100);

/// What the client keeps of an open inode.
#[derive(Debug)]
pub(crate) struct Inode {
    pub(crate) ino: u64,
    state: Mutex<State>,
    /// Held by whoever moves this file's data or size: one flush, truncation or append at a time.
    pub(crate) turn: Arc<tokio::sync::Mutex<()>>,
    pub(crate) room: Semaphore,
}

#[derive(Debug)]
pub(crate) struct State {
    /// The newest attributes known from the owner.
    attr: Attr,
    /// Until when they are taken for the size of the file; then the owner is asked again.
    pub(crate) fresh_until: Instant,
    pub(crate) dirty: Extents,
    pub(crate) dirty_since: Option<Instant>,
    /// Sent and not yet acknowledged, or not yet made part of the file by the owner.
    pub(crate) flushing: Option<Frozen>,
    /// Bytes of the budgets that the next flush gives back.
    pub(crate) charged: usize,
    /// Time of the last local write, nanoseconds since the epoch.
    pub(crate) mtime: i64,
    /// The owner has yet to be told that time, of a write that is durable.
    pub(crate) time_owed: bool,
    /// Counts failed flushes; each handle reports each of them once.
    pub(crate) failures: u64,
    pub(crate) failure: Option<Error>,
    pub(crate) handles: usize,
    pub(crate) held: Held,
    /// Raised by whatever makes bytes read ahead stale.
    pub(crate) content: u64,
    /// The owner has reserved chunks up to here.
    pub(crate) reserved: u64,
    /// Bytes by which the file is longer here than the owner knows.
    grown: u64,
    shared: Arc<Totals>,
}

/// What a volume's inodes add up to.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    /// Bytes by which files are longer here than the owner knows.
    pub(crate) growth: AtomicU64,
    /// Bytes by which writes that were let in will make files longer and have not yet.
    admitted: AtomicU64,
    /// Raised whenever something becomes known of an inode that older attributes do not say.
    pub(crate) news: AtomicU64,
}

impl Totals {
    pub(crate) fn note_news(&self) {
        self.news.fetch_add(1, Ordering::Relaxed);
    }

    /// Lets a write in that makes a file so much longer, if it fits into `free` together with all that is
    /// buffered and all others that were let in.
    pub(crate) fn admit(&self, bytes: u64, free: u64) -> Option<Admission<'_>> {
        let before = self.admitted.fetch_add(bytes, Ordering::Relaxed);
        let admission = Admission { totals: self, bytes };
        let taken = self.growth.load(Ordering::Relaxed).saturating_add(before);
        (taken.saturating_add(bytes) <= free).then_some(admission)
    }
}

/// A write that was let in.
pub(crate) struct Admission<'a> {
    totals: &'a Totals,
    bytes: u64,
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        self.totals.admitted.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.shared.growth.fetch_sub(self.grown, Ordering::Relaxed);
    }
}

impl Inode {
    pub(crate) fn new(attr: Attr, shared: Arc<Totals>) -> Self {
        Self {
            ino: attr.ino,
            state: Mutex::new(State {
                attr,
                fresh_until: Instant::now(),
                dirty: Extents::default(),
                dirty_since: None,
                flushing: None,
                charged: 0,
                mtime: 0,
                time_owed: false,
                failures: 0,
                failure: None,
                handles: 0,
                held: Held::default(),
                content: 0,
                reserved: 0,
                grown: 0,
                shared,
            }),
            turn: Arc::default(),
            room: Semaphore::new(DIRTY_PER_INODE),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The owner's attributes as last known.
    pub(crate) fn attr(&self) -> &Attr {
        &self.attr
    }

    /// Takes attributes from the owner unless newer ones are known (replies may overtake each
    /// other), and returns the local view.
    pub(crate) fn learn(&mut self, attr: Attr, ttl: Duration) -> Attr {
        if attr.change >= self.attr.change {
            if attr.change != self.attr.change {
                self.content += 1;
                self.shared.note_news();
            }
            self.attr = attr;
            self.recount();
            self.fresh_until = Instant::now() + ttl.max(SIZE_FRESH);
        }
        self.view()
    }

    /// To be called after the buffer or the owner's size has changed.
    pub(crate) fn recount(&mut self) {
        let grown = self.view().size - self.attr.size;
        if grown > self.grown {
            self.shared.growth.fetch_add(grown - self.grown, Ordering::Relaxed);
        } else {
            self.shared.growth.fetch_sub(self.grown - grown, Ordering::Relaxed);
        }
        self.grown = grown;
    }

    /// Nothing is buffered or being flushed, and the owner knows of everything.
    pub(crate) fn is_clean(&self) -> bool {
        !self.is_dirty() && self.charged == 0 && !self.time_owed
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.flushing.is_some() || !self.dirty.is_empty()
    }

    /// The attributes as applications on this client see them: with what they wrote.
    pub(crate) fn view(&self) -> Attr {
        let mut attr = self.attr;
        if self.is_dirty() || self.time_owed {
            let flushing = self.flushing.as_ref().map_or(0, Frozen::end);
            attr.size = attr.size.max(flushing).max(self.dirty.end());
            attr.mtime = self.mtime;
            attr.ctime = attr.ctime.max(self.mtime);
        }
        attr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_at_the_same_time_are_not_let_in_together_into_what_is_left() {
        let totals = Totals::default();
        let one = totals.admit(60, 100);
        assert!(one.is_some());
        assert!(totals.admit(60, 100).is_none());
        assert!(totals.admit(40, 100).is_some());
        drop(one);
        totals.growth.store(60, Ordering::Relaxed);
        assert!(totals.admit(60, 100).is_none());
        assert!(totals.admit(40, 100).is_some());
    }
}
