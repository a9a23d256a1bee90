//! What the parts of a session share: counts of what is under way, and how it stands.

use super::End;
use crate::abi::Opcode;
use crate::buffer::{Pool, lock};
use crate::device::Channel;
use crate::negotiation::Parameters;
use crate::notify::{Notifier, Retrieves};
use crate::request::{DYING_INTERVAL, FULL_INTERVAL, InFlight};
use crate::statistics::Statistics;
use bytes::Bytes;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Serving,
    Changing,
    Paused,
    Ended,
}

/// A thread that reads requests.
pub(super) struct Reader {
    pub(super) thread: JoinHandle<()>,
    /// It is in a read, or about to be.
    pub(super) blocked: Arc<AtomicBool>,
}

/// A session but for its file system.
pub(crate) struct Shared {
    pub(crate) parameters: Parameters,
    pub(crate) pool: Arc<Pool>,
    pub(crate) in_flight: InFlight,
    pub(crate) statistics: Statistics,
    pub(crate) runtime: Handle,
    pub(super) channels: Vec<Arc<Channel>>,
    pub(super) mountpoint: Option<PathBuf>,
    pub(super) notifier: Notifier,
    pub(super) retrieves: Arc<Retrieves>,
    pub(super) max_requests: usize,
    pub(super) readers: usize,
    pub(super) threads: Mutex<Vec<Reader>>,
    /// Requests under way, and those of them that count against the limit.
    pub(super) requests: AtomicUsize,
    pub(super) limited: AtomicUsize,
    pub(super) admission: Mutex<()>,
    pub(super) admitted: Condvar,
    pub(super) stopping: AtomicBool,
    pub(super) draining: AtomicBool,
    /// Somebody is to send requests again that were dropped without an answer.
    pub(super) owes_resend: AtomicBool,
    pub(super) drained: Notify,
    pub(super) watching: AtomicBool,
    pub(super) phase: Mutex<Phase>,
    pub(super) reading: watch::Sender<usize>,
    pub(super) end: watch::Sender<Option<End>>,
}

impl Shared {
    /// Waits until another request may be read; false once the session stops.
    pub(crate) fn admit(&self) -> bool {
        if self.limited.load(Ordering::SeqCst) >= self.max_requests {
            let mut guard = lock(&self.admission);
            while self.limited.load(Ordering::SeqCst) >= self.max_requests && !self.stopping.load(Ordering::SeqCst) {
                let (held, waited) = self
                    .admitted
                    .wait_timeout(guard, FULL_INTERVAL)
                    .unwrap_or_else(PoisonError::into_inner);
                guard = held;
                if waited.timed_out() {
                    drop(guard);
                    self.in_flight.cancel_all_dying();
                    guard = lock(&self.admission);
                }
            }
        }
        !self.stopping.load(Ordering::SeqCst)
    }

    /// The descriptor that was mounted.
    pub(crate) fn connection(&self) -> BorrowedFd<'_> {
        self.channels[0].as_fd()
    }

    pub(crate) fn entered(&self, opcode: Opcode) {
        self.requests.fetch_add(1, Ordering::SeqCst);
        if opcode != Opcode::Setlkw {
            self.limited.fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn left(&self, opcode: Opcode) {
        if opcode != Opcode::Setlkw && self.limited.fetch_sub(1, Ordering::SeqCst) >= self.max_requests {
            drop(lock(&self.admission));
            self.admitted.notify_all();
        }
        if self.requests.fetch_sub(1, Ordering::SeqCst) == 1 && self.draining.load(Ordering::SeqCst) {
            self.drained.notify_waiters();
        }
    }

    pub(crate) fn note_abandoned(&self) {
        self.owes_resend.store(true, Ordering::SeqCst);
    }

    pub(crate) fn retrieved(&self, number: u64, body: Bytes) {
        self.retrieves.answer(number, body);
    }

    /// Looks after interrupted requests whose callers were alive, as long as there are any.
    pub(crate) fn watch_interrupted(self: &Arc<Self>) {
        if self.watching.swap(true, Ordering::SeqCst) {
            return;
        }
        let shared = self.clone();
        self.runtime.spawn(async move {
            loop {
                tokio::time::sleep(DYING_INTERVAL).await;
                if shared.in_flight.cancel_dying() {
                    continue;
                }
                shared.watching.store(false, Ordering::SeqCst);
                // One may have come after the look and before the store.
                if !shared.in_flight.cancel_dying() || shared.watching.swap(true, Ordering::SeqCst) {
                    return;
                }
            }
        });
    }

    pub(super) fn set_stopping(&self, stopping: bool) {
        self.stopping.store(stopping, Ordering::SeqCst);
        self.pool.set_stopping(stopping);
        drop(lock(&self.admission));
        self.admitted.notify_all();
    }

    /// Drops handlers that are not beyond their point of no return.
    pub(super) fn abandon_all(&self) {
        for active in self.in_flight.all() {
            if active.abandon() {
                self.note_abandoned();
            }
        }
    }

    pub(super) fn finish(&self, end: End) {
        *lock(&self.phase) = Phase::Ended;
        self.end.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                *slot = Some(end);
            }
            first
        });
    }
}

/// A session with its file system.
pub(crate) struct Core<F> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) filesystem: F,
}
