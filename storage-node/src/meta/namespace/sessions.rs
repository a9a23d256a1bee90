//! Sessions and what they hold open.

use super::{Fault, Namespace, Reply};
use crate::meta::rows::{Key, Row, Session};
use lazarette_types::{ErrorCode, InodeId, SessionId};
use std::collections::{BTreeSet, HashMap};

/// An open record of this size takes up no more inodes that are given up; they can wait.
const ENOUGH_BYTES: usize = 256 << 10;

/// Who holds which inode open. A session counts once, however many handles it has.
#[derive(Debug, Default)]
pub(super) struct Opens {
    /// By inode: each session with the op id of its last Open.
    by_inode: HashMap<InodeId, HashMap<SessionId, u64>>,
    by_session: HashMap<SessionId, BTreeSet<InodeId>>,
}

impl Opens {
    fn add(&mut self, session: SessionId, ino: InodeId, op_id: u64) {
        let last = self.by_inode.entry(ino).or_default().entry(session).or_default();
        *last = op_id.max(*last);
        self.by_session.entry(session).or_default().insert(ino);
    }

    /// Whether the session had it open. A Close that was sent before the last Open does nothing.
    fn remove(&mut self, session: SessionId, ino: InodeId, op_id: u64) -> bool {
        let Some(sessions) = self.by_inode.get_mut(&ino) else {
            return false;
        };
        match sessions.get(&session) {
            Some(opened) if op_id == 0 || op_id >= *opened => {}
            _ => return false,
        }
        sessions.remove(&session);
        if sessions.is_empty() {
            self.by_inode.remove(&ino);
        }
        if let Some(inodes) = self.by_session.get_mut(&session) {
            inodes.remove(&ino);
        }
        true
    }

    fn remove_session(&mut self, session: SessionId) -> Vec<InodeId> {
        let inodes = self.by_session.remove(&session).unwrap_or_default();
        for ino in &inodes {
            if let Some(sessions) = self.by_inode.get_mut(ino) {
                sessions.remove(&session);
                if sessions.is_empty() {
                    self.by_inode.remove(ino);
                }
            }
        }
        inodes.into_iter().collect()
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

    /// A session says what it holds open; with `complete` it has said everything.
    pub fn register(&mut self, session: SessionId, open: &[InodeId], complete: bool) -> Result<(), Fault> {
        self.check_session(session)?;
        for ino in open {
            self.reopen(session, *ino, 0);
        }
        if complete && self.unregistered.remove(&session) {
            self.collect_orphans();
        }
        Ok(())
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
        if self.unregistered.remove(&session) {
            self.collect_orphans();
        }
        // Those opened by it that do not fit into this record are found among the orphans later.
        for ino in opened {
            if self.state.changed_bytes() < ENOUGH_BYTES {
                self.collect_if_unused(ino);
            }
        }
    }

    pub(super) fn open(&mut self, session: SessionId, ino: InodeId, op_id: u64) -> Result<Reply, Fault> {
        let reply = self.attr_reply(ino)?;
        self.opens.add(session, ino, op_id);
        Ok(reply)
    }

    /// Registers an open of an inode if it is there.
    pub(super) fn reopen(&mut self, session: SessionId, ino: InodeId, op_id: u64) {
        if self.state.inode(ino).is_some() {
            self.opens.add(session, ino, op_id);
        }
    }

    pub(super) fn close(&mut self, session: SessionId, ino: InodeId, op_id: u64) {
        if self.opens.remove(session, ino, op_id) {
            self.release_flocks_left(session, ino);
            self.collect_if_unused(ino);
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

    /// Whether sessions of the previous owner have yet to say what they hold open.
    pub fn is_registering(&self) -> bool {
        !self.unregistered.is_empty()
    }

    /// Inodes that a session holds open.
    pub fn opened_by(&self, session: SessionId) -> usize {
        self.opens.by_session.get(&session).map_or(0, BTreeSet::len)
    }
}
