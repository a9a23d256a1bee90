use crate::Error;
use crate::extents::{Extents, Frozen};
use crate::lock::Held;
use lazarette_proto::meta::Attr;
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
    /// Held while the owner is told of the first open or the last close.
    pub(crate) opening: tokio::sync::Mutex<()>,
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
    /// Counts failed flushes; each handle reports each of them once.
    pub(crate) failures: u64,
    pub(crate) failure: Option<Error>,
    pub(crate) handles: usize,
    /// No longer in the volume's table: look it up again.
    pub(crate) gone: bool,
    pub(crate) held: Held,
    /// Raised by whatever makes bytes read ahead stale.
    pub(crate) content: u64,
}

impl Inode {
    pub(crate) fn new(attr: Attr) -> Self {
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
                failures: 0,
                failure: None,
                handles: 0,
                gone: false,
                held: Held::default(),
                content: 0,
            }),
            turn: Arc::default(),
            opening: tokio::sync::Mutex::default(),
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
            }
            self.attr = attr;
            self.fresh_until = Instant::now() + ttl.max(SIZE_FRESH);
        }
        self.view()
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.flushing.is_some() || !self.dirty.is_empty()
    }

    /// The attributes as applications on this client see them: with what they wrote.
    pub(crate) fn view(&self) -> Attr {
        let mut attr = self.attr;
        if self.is_dirty() {
            let flushing = self.flushing.as_ref().map_or(0, Frozen::end);
            attr.size = attr.size.max(flushing).max(self.dirty.end());
            attr.mtime = self.mtime;
            attr.ctime = attr.ctime.max(self.mtime);
        }
        attr
    }
}
