//! Requests under way: who asks, interrupts, the point of no return.

use crate::abi::{Opcode, UNIQUE_INTERRUPT};
use crate::buffer::{ReplyBuffer, lock};
use crate::device;
use crate::errno::{Errno, Result};
use crate::header::Header;
use crate::session::Shared;
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// The handler may be dropped.
const RUNNING: u8 = 0;
/// The handler runs to its end.
const COMMITTED: u8 = 1;
/// The handler is to be dropped, the answer is EINTR.
const CANCELLED: u8 = 2;
/// The handler is to be dropped, there is no answer: the next server gets the request again.
const ABANDONED: u8 = 3;

/// How a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Go,
    Cancel,
    Abandon,
}

/// One request under way.
pub(crate) struct Active {
    pub(crate) header: Header,
    pub(crate) opcode: Opcode,
    pub(crate) groups: Vec<u32>,
    pub(crate) started: Instant,
    state: AtomicU8,
    interrupted: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Active {
    pub(crate) fn new(header: Header, opcode: Opcode, groups: Vec<u32>) -> Arc<Self> {
        Arc::new(Self {
            header,
            opcode,
            groups,
            started: Instant::now(),
            state: AtomicU8::new(RUNNING),
            interrupted: AtomicBool::new(false),
            waker: Mutex::new(None),
        })
    }

    pub(crate) fn verdict(&self) -> Verdict {
        match self.state.load(Ordering::Acquire) {
            CANCELLED => Verdict::Cancel,
            ABANDONED => Verdict::Abandon,
            _ => Verdict::Go,
        }
    }

    /// Whom to wake when the verdict changes.
    pub(crate) fn set_waker(&self, waker: &Waker) {
        let mut slot = lock(&self.waker);
        match &mut *slot {
            Some(known) => known.clone_from(waker),
            empty => *empty = Some(waker.clone()),
        }
    }

    fn wake(&self) {
        let waker = lock(&self.waker).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn decide(&self, verdict: u8) -> bool {
        let changed = self
            .state
            .compare_exchange(RUNNING, verdict, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        self.wake();
        changed
    }

    /// Tells the handler that a signal came, and drops it if `cancel`.
    fn interrupt(&self, cancel: bool) {
        self.interrupted.store(true, Ordering::Release);
        if cancel {
            self.decide(CANCELLED);
        } else {
            self.wake();
        }
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Acquire)
    }

    pub(crate) fn is_committed(&self) -> bool {
        self.state.load(Ordering::Acquire) == COMMITTED
    }

    pub(crate) fn abandon(&self) -> bool {
        self.decide(ABANDONED)
    }

    /// A signal that ends the caller waits for it, as far as /proc shows.
    fn caller_is_dying(&self) -> bool {
        let pid = self.header.pid;
        // A caller in another pid namespace cannot be seen.
        if pid == 0 {
            return false;
        }
        std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| has_kill(&status))
    }
}

/// Is SIGKILL, which every fatal signal becomes for each thread, among those pending?
fn has_kill(status: &str) -> bool {
    const SIGKILL: u64 = 1 << 8;
    ["SigPnd:", "ShdPnd:"].iter().any(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & SIGKILL != 0)
    })
}

/// What an interrupt does to a request whose handler is not beyond its point of no return. Flush and
/// release are never cut short: they clean up after those who die.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InterruptPolicy {
    /// A wait for a lock ends at any signal, as POSIX says. Everything else ends only if the caller
    /// is about to die, as on a local file system: many programs (all in Go) get signals that are
    /// no reason for a call to fail. A caller in a pid namespace that this process does not see is
    /// taken for alive.
    #[default]
    Local,
    /// Everything ends at any signal.
    Any,
}

/// How often interrupted requests whose callers live are looked at: the kernel sends no second
/// interrupt when the first signal was harmless and the second kills.
pub(crate) const DYING_INTERVAL: Duration = Duration::from_millis(100);

/// How often callers are looked at while so much is under way that nothing more is read, no
/// interrupts either.
pub(crate) const FULL_INTERVAL: Duration = Duration::from_millis(500);

/// Interrupts kept for requests that another reader may be about to enter.
const EARLY: usize = 4096;
/// A reader needs microseconds from the device to the table.
const EARLY_KEPT: Duration = Duration::from_secs(5);
const SHARDS: usize = 16;

/// Numbers of requests count up in steps of two: their bits need spreading.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

type Shard = HashMap<u64, Arc<Active>, BuildHasherDefault<Spread>>;

/// The requests under way.
pub(crate) struct InFlight {
    shards: [Mutex<Shard>; SHARDS],
    /// With when they came.
    early: Mutex<VecDeque<(u64, Instant)>>,
    /// Whether `early` has any, to spare the lock.
    has_early: AtomicBool,
    policy: InterruptPolicy,
}

/// The kernel interrupts the flush of a killed process, too; but it closes its files nevertheless,
/// and its locks have to go.
fn is_closing(opcode: Opcode) -> bool {
    matches!(opcode, Opcode::Flush | Opcode::Release | Opcode::Releasedir)
}

/// What came of an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interrupted {
    Cancelled,
    /// It runs on; look again whether its caller dies.
    Watch,
    /// Answered already, not yet entered by the reader that has it, or none of those that end early.
    Unknown,
}

impl InFlight {
    pub(crate) fn new(policy: InterruptPolicy) -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            early: Mutex::default(),
            has_early: AtomicBool::new(false),
            policy,
        }
    }

    fn shard(&self, unique: u64) -> &Mutex<Shard> {
        &self.shards[(unique >> 1) as usize % SHARDS]
    }

    /// Enters a request. Its interrupt may have been read before, by another reader.
    pub(crate) fn enter(&self, active: &Arc<Active>) -> Option<Interrupted> {
        let unique = active.header.unique;
        lock(self.shard(unique)).insert(unique, active.clone());
        if !self.has_early.load(Ordering::SeqCst) {
            return None;
        }
        let mut early = lock(&self.early);
        let position = early.iter().position(|(number, _)| *number == unique);
        if let Some(position) = position {
            early.remove(position);
        }
        // The others are mostly of requests that were answered at that moment.
        while early.front().is_some_and(|(_, since)| since.elapsed() > EARLY_KEPT) {
            early.pop_front();
        }
        self.has_early.store(!early.is_empty(), Ordering::SeqCst);
        drop(early);
        position.map(|_| self.apply(active))
    }

    pub(crate) fn leave(&self, unique: u64) {
        lock(self.shard(unique)).remove(&unique);
    }

    pub(crate) fn interrupt(&self, unique: u64) -> Interrupted {
        let unique = unique & !UNIQUE_INTERRUPT;
        let find = || lock(self.shard(unique)).get(&unique).cloned();
        if let Some(active) = find() {
            return self.apply(&active);
        }
        let mut early = lock(&self.early);
        if early.len() == EARLY {
            early.pop_front();
        }
        early.push_back((unique, Instant::now()));
        self.has_early.store(true, Ordering::SeqCst);
        drop(early);
        // It may have been entered since, by a reader that saw no early interrupt.
        match find() {
            Some(active) => self.apply(&active),
            None => Interrupted::Unknown,
        }
    }

    fn apply(&self, active: &Active) -> Interrupted {
        let cancel = match self.policy {
            _ if is_closing(active.opcode) => {
                active.interrupt(false);
                return Interrupted::Unknown;
            }
            InterruptPolicy::Any => true,
            InterruptPolicy::Local => active.opcode == Opcode::Setlkw || active.caller_is_dying(),
        };
        active.interrupt(cancel);
        if cancel {
            Interrupted::Cancelled
        } else {
            Interrupted::Watch
        }
    }

    /// Cancels every request whose caller is about to die: for when interrupts cannot be read.
    pub(crate) fn cancel_all_dying(&self) {
        for active in self.all() {
            let open = active.verdict() == Verdict::Go && !active.is_committed() && !is_closing(active.opcode);
            if open && active.caller_is_dying() {
                active.interrupt(true);
            }
        }
    }

    /// Cancels interrupted requests whose callers are about to die; true if others remain.
    pub(crate) fn cancel_dying(&self) -> bool {
        let mut remain = false;
        for active in self.all() {
            let open = active.verdict() == Verdict::Go && !active.is_committed() && !is_closing(active.opcode);
            if active.is_interrupted() && open {
                if active.caller_is_dying() {
                    active.interrupt(true);
                } else {
                    remain = true;
                }
            }
        }
        remain
    }

    pub(crate) fn all(&self) -> Vec<Arc<Active>> {
        self.shards
            .iter()
            .flat_map(|shard| lock(shard).values().cloned().collect::<Vec<_>>())
            .collect()
    }
}

/// One line of a session's table of requests under way.
#[derive(Debug, Clone)]
pub struct RequestSnapshot {
    /// What is asked for.
    pub opcode: Opcode,
    /// The request's number.
    pub unique: u64,
    /// The node it is about.
    pub node: u64,
    /// Thread id of the caller.
    pub pid: u32,
    /// Since when.
    pub age: Duration,
    /// A signal reached the caller.
    pub interrupted: bool,
    /// The handler is beyond its point of no return.
    pub committed: bool,
}

impl RequestSnapshot {
    pub(crate) fn of(active: &Active) -> Self {
        Self {
            opcode: active.opcode,
            unique: active.header.unique,
            node: active.header.node,
            pid: active.header.pid,
            age: active.started.elapsed(),
            interrupted: active.is_interrupted(),
            committed: active.is_committed(),
        }
    }
}

/// What a handler learns about its request besides the operation.
pub struct Request {
    pub(crate) active: Arc<Active>,
    pub(crate) shared: Arc<Shared>,
}

impl Request {
    /// The request's number, unique in the life of the connection but for bit 63, which says that
    /// it was sent before.
    pub fn unique(&self) -> u64 {
        self.active.header.unique
    }

    /// The kernel sent this request before, to a server that did not answer: whatever it does may
    /// have been done already.
    pub fn is_resend(&self) -> bool {
        self.active.header.is_resend()
    }

    /// What is asked for.
    pub fn opcode(&self) -> Opcode {
        self.active.opcode
    }

    /// File system user id of the caller.
    pub fn uid(&self) -> u32 {
        self.active.header.uid
    }

    /// File system group id of the caller.
    pub fn gid(&self) -> u32 {
        self.active.header.gid
    }

    /// Thread id of the caller as this process sees it; 0 for the kernel's own requests and for
    /// callers in pid namespaces that the process that mounted does not see.
    pub fn pid(&self) -> u32 {
        self.active.header.pid
    }

    /// With `CREATE_SUPP_GROUP`: the caller's supplementary group that is the directory's, if any.
    pub fn groups(&self) -> &[u32] {
        &self.active.groups
    }

    /// Lets the kernel read and write a file of this machine itself: an open with
    /// `OpenReplyFlags::PASSTHROUGH` names the number in `Opened::backing`. Needs root, and `PASSTHROUGH`
    /// with a `max_stack_depth` agreed. All that have a node open at a time have to have the same number,
    /// or none of them one.
    ///
    /// The number belongs to the connection, not to this process: it is the next server's to give back.
    pub fn back(&self, file: impl AsFd) -> Result<i32> {
        Ok(device::back(self.shared.connection(), file.as_fd())?)
    }

    /// Gives a number of [`Request::back`] back.
    pub fn unback(&self, number: i32) -> Result<()> {
        Ok(device::unback(self.shared.connection(), number)?)
    }

    /// Page-aligned room for data of a reply, from the session's pool.
    pub fn buffer(&self, size: usize) -> ReplyBuffer {
        self.shared.pool.reply(size)
    }

    /// The point of no return: from here on an interrupt does not drop the handler, and a drain
    /// waits for it. Call it before the first effect that an answer of EINTR would deny.
    ///
    /// Fails with EINTR if the request has been interrupted before; return that.
    pub fn commit(&self) -> Result<()> {
        match self
            .active
            .state
            .compare_exchange(RUNNING, COMMITTED, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) | Err(COMMITTED) => Ok(()),
            Err(_) => Err(Errno::EINTR),
        }
    }

    /// A signal has reached the caller.
    pub fn is_interrupted(&self) -> bool {
        self.active.is_interrupted()
    }

    /// Resolves when a signal reaches the caller; of use after [`Request::commit`] or where the
    /// session's policy lets the handler live. For use in the handler itself, not in other tasks.
    pub async fn interrupted(&self) {
        poll_fn(|_| {
            if self.is_interrupted() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        RequestSnapshot::of(&self.active).fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn active(unique: u64, opcode: Opcode, pid: u32) -> Arc<Active> {
        let header = Header {
            length: 0,
            opcode: opcode as u32,
            unique,
            node: 1,
            uid: 0,
            gid: 0,
            pid,
            extensions: 0,
        };
        Active::new(header, opcode, Vec::new())
    }

    #[test]
    fn an_interrupt_before_its_request_is_kept() {
        let table = InFlight::new(InterruptPolicy::Any);
        assert_eq!(table.interrupt(11), Interrupted::Unknown);
        let other = active(12, Opcode::Read, 0);
        assert_eq!(table.enter(&other), None);
        let wanted = active(10, Opcode::Read, 0);
        assert_eq!(table.enter(&wanted), Some(Interrupted::Cancelled));
        assert_eq!((wanted.verdict(), other.verdict()), (Verdict::Cancel, Verdict::Go));
        assert!(!table.has_early.load(Ordering::SeqCst));
    }

    #[test]
    fn lock_waits_end_at_any_signal_and_others_do_not() {
        let table = InFlight::new(InterruptPolicy::Local);
        let alive = std::process::id();
        let wait = active(2, Opcode::Setlkw, alive);
        let read = active(4, Opcode::Read, alive);
        let unseen = active(6, Opcode::Read, 0);
        for request in [&wait, &read, &unseen] {
            table.enter(request);
        }
        assert_eq!(table.interrupt(2), Interrupted::Cancelled);
        assert_eq!(table.interrupt(4), Interrupted::Watch);
        assert_eq!(table.interrupt(6), Interrupted::Watch);
        assert_eq!((read.verdict(), read.is_interrupted()), (Verdict::Go, true));
        assert!(table.cancel_dying());
        table.leave(4);
        table.leave(6);
        assert!(!table.cancel_dying());
    }

    #[test]
    fn closing_is_not_cut_short() {
        let table = InFlight::new(InterruptPolicy::Any);
        let flush = active(2, Opcode::Flush, 0);
        table.enter(&flush);
        table.interrupt(2);
        assert_eq!((flush.verdict(), flush.is_interrupted()), (Verdict::Go, true));
        assert!(!table.cancel_dying());
    }

    #[test]
    fn what_is_committed_stays() {
        let request = active(2, Opcode::Write, 0);
        request.state.store(COMMITTED, Ordering::SeqCst);
        request.interrupt(true);
        assert_eq!((request.verdict(), request.abandon()), (Verdict::Go, false));
        let request = active(4, Opcode::Write, 0);
        assert!(request.abandon());
        request.interrupt(true);
        assert_eq!(request.verdict(), Verdict::Abandon);
    }

    #[test]
    fn pending_kills_are_seen() {
        assert!(has_kill(
            "Name:\tx\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n"
        ));
        assert!(has_kill("SigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n"));
        assert!(!has_kill(
            "SigPnd:\t0000000000000200\nShdPnd:\t0000000000000002\nSigBlk:\t0000000000000100\n"
        ));
        assert!(!has_kill(""));
    }
}
