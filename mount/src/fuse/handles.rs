//! What the kernel's file handles stand for.

use lazarette_client::{DirEntry, File};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Open files and directories, and what the kernel may have cached.
#[derive(Default)]
pub(crate) struct Handles {
    next: AtomicU64,
    files: Mutex<HashMap<u64, Arc<File>>>,
    directories: Mutex<HashMap<u64, Arc<tokio::sync::Mutex<Listing>>>>,
    /// For inodes whose pages the kernel may have: the change counter they are from.
    cached: Mutex<HashMap<u64, u64>>,
}

/// Entries read ahead for a directory handle.
#[derive(Default)]
pub(crate) struct Listing {
    pub(crate) entries: VecDeque<DirEntry>,
    /// The cookie after which they come.
    pub(crate) after: u64,
    /// Nothing comes after them.
    pub(crate) end: bool,
    /// Until when their attributes hold.
    pub(crate) fresh_until: Option<Instant>,
}

impl Listing {
    /// What is left of the attributes' time.
    pub(crate) fn ttl(&self) -> Duration {
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

    pub(crate) fn add_file(&self, file: File) -> u64 {
        let number = self.number();
        lock(&self.files).insert(number, Arc::new(file));
        number
    }

    pub(crate) fn file(&self, number: u64) -> Option<Arc<File>> {
        lock(&self.files).get(&number).cloned()
    }

    pub(crate) fn remove_file(&self, number: u64) -> Option<Arc<File>> {
        lock(&self.files).remove(&number)
    }

    pub(crate) fn add_directory(&self) -> u64 {
        let number = self.number();
        lock(&self.directories).insert(number, Arc::default());
        number
    }

    pub(crate) fn directory(&self, number: u64) -> Option<Arc<tokio::sync::Mutex<Listing>>> {
        lock(&self.directories).get(&number).cloned()
    }

    pub(crate) fn remove_directory(&self, number: u64) {
        lock(&self.directories).remove(&number);
    }

    /// Notes that the kernel's cache is from this change of the inode; false if it was from
    /// another or is not known.
    pub(crate) fn note_cached(&self, ino: u64, change: u64) -> bool {
        lock(&self.cached).insert(ino, change) == Some(change)
    }

    /// The kernel has dropped the inode.
    pub(crate) fn forget(&self, ino: u64) {
        lock(&self.cached).remove(&ino);
    }
}
