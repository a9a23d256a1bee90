//! What the kernel's file handles stand for.

use lazarette_client::{Attr, DirEntry, Entry, File};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Open files and directories, and what the kernel may have cached.
#[derive(Default)]
pub(super) struct Handles {
    next: AtomicU64,
    files: Mutex<HashMap<u64, Arc<File>>>,
    directories: Mutex<HashMap<u64, Arc<tokio::sync::Mutex<Ahead>>>>,
    /// Directories that were removed here and that the kernel may still have: somebody's current one, for
    /// example. The owner knows nothing of them any more.
    removed: Mutex<HashMap<u64, Attr>>,
    /// For inodes whose pages the kernel may have: the change counter they are from.
    cached: Mutex<HashMap<u64, u64>>,
}

/// Entries read ahead for a directory handle.
#[derive(Default)]
pub(super) struct Ahead {
    pub(super) entries: VecDeque<DirEntry>,
    /// The cookie after which they come.
    pub(super) after: u64,
    /// Nothing comes after them.
    pub(super) end: bool,
    /// Until when their attributes hold.
    pub(super) fresh_until: Option<Instant>,
    /// [`lazarette_client::Volume::news`] when they were asked for.
    pub(super) news: u64,
}

impl Ahead {
    /// What is left of the attributes' time.
    pub(super) fn ttl(&self) -> Duration {
        self.fresh_until
            .map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Handles {
    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn add_file(&self, file: File) -> u64 {
        let number = self.number();
        lock(&self.files).insert(number, Arc::new(file));
        number
    }

    pub(super) fn file(&self, number: u64) -> Option<Arc<File>> {
        lock(&self.files).get(&number).cloned()
    }

    pub(super) fn remove_file(&self, number: u64) -> Option<Arc<File>> {
        lock(&self.files).remove(&number)
    }

    pub(super) fn add_directory(&self) -> u64 {
        let number = self.number();
        lock(&self.directories).insert(number, Arc::default());
        number
    }

    pub(super) fn directory(&self, number: u64) -> Option<Arc<tokio::sync::Mutex<Ahead>>> {
        lock(&self.directories).get(&number).cloned()
    }

    pub(super) fn remove_directory(&self, number: u64) {
        lock(&self.directories).remove(&number);
    }

    /// Notes that the kernel's cache is from this change of the inode; false if it was from
    /// another or is not known.
    pub(super) fn note_cached(&self, ino: u64, change: u64) -> bool {
        lock(&self.cached).insert(ino, change) == Some(change)
    }

    /// Forgets what the kernel may have cached, and gives the inodes.
    pub(super) fn forget_cached(&self) -> Vec<u64> {
        lock(&self.cached).drain().map(|(ino, _)| ino).collect()
    }

    /// Forgets what was read ahead of listings.
    pub(super) async fn forget_listings(&self) {
        let all: Vec<_> = lock(&self.directories).values().cloned().collect();
        for ahead in all {
            *ahead.lock().await = Ahead::default();
        }
    }

    /// Keeps the last attributes of a directory until the kernel has dropped it.
    pub(super) fn note_removed(&self, attr: Attr) {
        lock(&self.removed).insert(attr.ino, attr);
    }

    /// A directory that was removed here.
    pub(super) fn removed(&self, ino: u64) -> Option<Entry> {
        let attr = *lock(&self.removed).get(&ino)?;
        let ttl = Duration::ZERO;
        Some(Entry { attr, ttl })
    }

    /// The kernel has dropped the inode.
    pub(super) fn forget(&self, ino: u64) {
        lock(&self.removed).remove(&ino);
        lock(&self.cached).remove(&ino);
    }
}
