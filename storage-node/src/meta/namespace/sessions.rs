//! Sessions and what they hold open.

use super::{Fault, Namespace};
use crate::meta::rows::{Key, Row, Session};
use lazarette_proto::meta::Handles;
use lazarette_types::{ErrorCode, InodeId, SessionId};
use std::collections::{BTreeSet, HashMap, HashSet};

/// An open record of this size takes up no more inodes that are given up; they can wait.
const ENOUGH_BYTES: usize = 256 << 10;

/// Who holds which inode open. A session counts once, however many handles it has.
#[derive(Debug, Default)]
pub(super) struct Opens {
    by_inode: HashMap<InodeId, HashSet<SessionId>>,
    by_session: HashMap<SessionId, Opened>,
}

/// What a session holds open.
#[derive(Debug, Default)]
struct Opened {
    inodes: BTreeSet<InodeId>,
    /// The number of its newest report.
    reported: u64,
}

impl Opens {
    fn add(&mut self, session: SessionId, ino: InodeId) {
        self.by_inode.entry(ino).or_default().insert(session);
        self.by_session.entry(session).or_default().inodes.insert(ino);
    }

    /// Whether the session had it open.
    fn remove(&mut self, session: SessionId, ino: InodeId) -> bool {
        if let Some(opened) = self.by_session.get_mut(&session) {
            opened.inodes.remove(&ino);
        }
        self.forget(session, ino)
    }

    fn forget(&mut self, session: SessionId, ino: InodeId) -> bool {
        let Some(sessions) = self.by_inode.get_mut(&ino) else {
            return false;
        };
        let had = sessions.remove(&session);
        if sessions.is_empty() {
            self.by_inode.remove(&ino);
        }
        had
    }

    fn remove_session(&mut self, session: SessionId) -> BTreeSet<InodeId> {
        let inodes = self.by_session.remove(&session).unwrap_or_default().inodes;
        for ino in &inodes {
            self.forget(session, *ino);
        }
        inodes
    }

    /// Takes note of a report's number; gives that of the newest one before.
    fn note_report(&mut self, session: SessionId, number: u64) -> u64 {
        let opened = self.by_session.entry(session).or_default();
        let before = opened.reported;
        opened.reported = number.max(before);
        before
    }
}

impl Namespace {
    /// Whether the session exists.
    pub fn check_session(&self, session: SessionId) -> Result<(), Fault> {
        if self.state.get(&Key::Session(session)).is_some() {
            Ok(())
        } else {
            Err(Fault::new(
                ErrorCode::SessionExpired,
                "session is unknown or has ended; open a new one",
            ))
        }
    }

    /// Makes a session known. Opening it again changes nothing.
    pub fn open_session(&mut self, session: SessionId, client: &str) -> Result<(), Fault> {
        if session.0 == 0 {
            return Err(super::invalid("session is 0; choose a random number"));
        }
        if self.check_session(session).is_err() {
            // Names are for people; a long one is cut.
            let client = client.chars().take(256).collect();
            self.state
                .put(Key::Session(session), Row::Session(Box::new(Session { client })));
        }
        Ok(())
    }

    /// From now on it is not known what a session holds open: until it has registered all of it, no inode
    /// without a name is given up.
    pub fn doubt(&mut self, session: SessionId) {
        if self.check_session(session).is_ok() {
            self.unregistered.insert(session, HashMap::new());
        }
    }

    /// A session says everything that it holds open.
    pub fn register(&mut self, session: SessionId, handles: &Handles) -> Result<(), Fault> {
        self.check_session(session)?;
        let closed_since = self.unregistered.get(&session).cloned().unwrap_or_default();
        for ino in handles.opened.iter().copied().map(InodeId) {
            // A report may have overtaken this one.
            if closed_since.get(&ino).is_none_or(|closed| *closed <= handles.number) {
                self.reopen(session, ino);
            }
        }
        if self.opens.note_report(session, handles.number) < handles.number {
            self.close_all(session, handles);
        }
        if self.unregistered.remove(&session).is_some() {
            self.collect_orphans();
        }
        Ok(())
    }

    /// Takes note of what a session says that it has opened and closed, unless it has said something newer.
    pub(super) fn note_handles(&mut self, session: SessionId, handles: &Handles) {
        if self.opens.note_report(session, handles.number) >= handles.number {
            return;
        }
        for ino in handles.opened.iter().copied().map(InodeId) {
            self.reopen(session, ino);
            if let Some(closed) = self.unregistered.get_mut(&session) {
                closed.remove(&ino);
            }
        }
        self.close_all(session, handles);
    }

    /// Ends a session: its locks are released, its opens are closed, its results forgotten.
    pub fn end_session(&mut self, session: SessionId) {
        if self.check_session(session).is_err() {
            return;
        }
        self.drop_waiters(session);
        for ino in self.state.locked_by(session) {
            let left = self.state.locks(ino).iter().filter(|held| held.session != session);
            let left = left.cloned().collect();
            self.state.set_locks(ino, left);
            self.wake(ino);
        }
        let opened = self.opens.remove_session(session);
        self.state.remove_results(session, u64::MAX);
        self.state.remove(Key::Result(session, u64::MAX));
        self.state.remove(Key::Acked(session));
        self.state.remove(Key::Session(session));
        if self.unregistered.remove(&session).is_some() {
            self.collect_orphans();
        }
        // Those opened by it that do not fit into this record are found among the orphans later.
        for ino in opened {
            if self.state.changed_bytes() < ENOUGH_BYTES {
                self.collect_if_unused(ino);
            }
        }
    }

    /// Notes that a session has an inode open, if it is there.
    pub(super) fn reopen(&mut self, session: SessionId, ino: InodeId) {
        if self.state.inode(ino).is_some() {
            self.opens.add(session, ino);
        }
    }

    fn close_all(&mut self, session: SessionId, handles: &Handles) {
        for ino in handles.closed.iter().copied().map(InodeId) {
            if let Some(closed) = self.unregistered.get_mut(&session) {
                closed.insert(ino, handles.number);
            }
            if self.opens.remove(session, ino) {
                self.release_flocks_left(session, ino);
                self.collect_if_unused(ino);
            }
        }
    }

    /// A session without any handle has no locks either, even if a release got lost.
    fn release_flocks_left(&mut self, session: SessionId, ino: InodeId) {
        let held = self.state.locks(ino);
        if held.iter().any(|held| held.session == session) {
            let left = held.iter().filter(|held| held.session != session).cloned().collect();
            self.state.set_locks(ino, left);
            self.wake(ino);
        }
    }

    /// Whether an inode without name must be kept.
    pub(super) fn in_use(&self, ino: InodeId) -> bool {
        !self.unregistered.is_empty() || self.opens.by_inode.contains_key(&ino)
    }

    /// Whether no other session can have the inode open.
    pub(super) fn is_sole_user(&self, session: SessionId, ino: InodeId) -> bool {
        let users = self.opens.by_inode.get(&ino);
        self.unregistered.is_empty() && users.is_none_or(|users| users.iter().all(|user| *user == session))
    }

    fn collect_if_unused(&mut self, ino: InodeId) {
        if self.state.orphans().contains(&ino) && !self.in_use(ino) {
            self.collect(ino);
        }
    }

    /// Gives up inodes that have neither name nor user, a limited number at once.
    pub fn collect_orphans(&mut self) {
        if !self.unregistered.is_empty() {
            return;
        }
        let unused = self.state.orphans().iter().filter(|ino| !self.in_use(**ino));
        let orphans: Vec<InodeId> = unused.copied().collect();
        for ino in orphans {
            if self.state.changed_bytes() >= ENOUGH_BYTES {
                return;
            }
            self.collect_if_unused(ino);
        }
    }

    /// Whether sessions have yet to say what they hold open.
    pub fn is_registering(&self) -> bool {
        !self.unregistered.is_empty()
    }

    /// Inodes that a session holds open.
    pub fn opened_by(&self, session: SessionId) -> usize {
        self.opens
            .by_session
            .get(&session)
            .map_or(0, |opened| opened.inodes.len())
    }
}
