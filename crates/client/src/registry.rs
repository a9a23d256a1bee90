//! Which inodes this session has open, and what of that the owner has yet to be told.
//!
//! Opens and closes ride on other requests: each one carries all that no reply has acknowledged yet.
//! Reports are numbered by the newest open or close in them, and the owner heeds none that is older than
//! one it has seen, so it does not matter how often, how late and in which order they arrive.

use lazarette_proto::meta::Handles;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// What a session holds open.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    state: Mutex<State>,
    /// There is something to report.
    news: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Counts opens and closes.
    number: u64,
    /// The number of the newest report that was, perhaps, sent.
    sent: u64,
    inodes: HashMap<u64, Held>,
    /// Those with something to report.
    unreported: BTreeSet<u64>,
}

/// An inode that is open here, or may be for the owner.
#[derive(Debug)]
struct Held {
    open: bool,
    /// Of its last open or close.
    number: u64,
    /// Whether the owner has it as open.
    told: Told,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Not,
    Perhaps,
    Surely,
}

impl State {
    fn note(&mut self, ino: u64, open: bool, told: Told) {
        self.number += 1;
        let number = self.number;
        self.inodes.insert(ino, Held { open, number, told });
        self.unreported.insert(ino);
    }
}

impl Registry {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An inode has its first handle. Gives whether the owner surely knows it as open.
    pub(crate) fn opened(&self, ino: u64) -> bool {
        let mut state = self.state();
        let sent = state.sent;
        match state.inodes.get_mut(&ino) {
            // The owner was never told that it was closed.
            Some(held) if held.told == Told::Surely && (held.open || held.number > sent) => {
                held.open = true;
                state.unreported.remove(&ino);
                return true;
            }
            Some(held) => {
                let told = if held.told == Told::Not {
                    Told::Not
                } else {
                    Told::Perhaps
                };
                state.note(ino, true, told);
            }
            None => state.note(ino, true, Told::Not),
        }
        drop(state);
        self.news.notify_one();
        false
    }

    /// Whether the owner surely has an open inode as open.
    pub(crate) fn is_known(&self, ino: u64) -> bool {
        self.state()
            .inodes
            .get(&ino)
            .is_some_and(|held| held.told == Told::Surely && held.open)
    }

    /// The owner has created an inode and has it as open.
    pub(crate) fn created(&self, ino: u64) {
        let told = Told::Surely;
        let mut state = self.state();
        let number = state.number;
        state.unreported.remove(&ino);
        state.inodes.insert(
            ino,
            Held {
                open: true,
                number,
                told,
            },
        );
    }

    /// An inode has lost its last handle.
    pub(crate) fn closed(&self, ino: u64) {
        let mut state = self.state();
        let Some(held) = state.inodes.get(&ino) else { return };
        let told = held.told;
        if told == Told::Not && held.number > state.sent {
            state.inodes.remove(&ino);
            state.unreported.remove(&ino);
            return;
        }
        // Told::Not: it was sent, without an answer yet.
        state.note(ino, false, if told == Told::Not { Told::Perhaps } else { told });
        drop(state);
        self.news.notify_one();
    }

    /// What the next request tells the owner, if anything.
    pub(crate) fn report(&self) -> Option<Handles> {
        let mut state = self.state();
        if state.unreported.is_empty() {
            return None;
        }
        Some(state.send(false))
    }

    /// Everything that is open, and whatever else the owner has to be told.
    pub(crate) fn everything(&self) -> Handles {
        self.state().send(true)
    }

    /// The owner has taken note of a report.
    pub(crate) fn acknowledge(&self, number: u64) {
        let mut state = self.state();
        let state = &mut *state;
        let inodes = &mut state.inodes;
        state.unreported.retain(|ino| {
            let Some(held) = inodes.get_mut(ino) else { return false };
            if held.number > number {
                return true;
            }
            held.told = Told::Surely;
            if !held.open {
                inodes.remove(ino);
            }
            false
        });
    }

    /// Whether there is something to report.
    pub(crate) fn has_news(&self) -> bool {
        !self.state().unreported.is_empty()
    }

    /// Returns when there is something to report.
    pub(crate) async fn news(&self) {
        loop {
            let news = self.news.notified();
            if self.has_news() {
                return;
            }
            news.await;
        }
    }
}

impl State {
    fn send(&mut self, everything: bool) -> Handles {
        self.sent = self.number;
        let mut handles = Handles {
            number: self.number,
            ..Handles::default()
        };
        for ino in &self.unreported {
            match self.inodes.get(ino) {
                Some(held) if !held.open => handles.closed.push(*ino),
                _ if !everything => handles.opened.push(*ino),
                _ => {}
            }
        }
        if everything {
            let open = self.inodes.iter().filter(|(_, held)| held.open);
            handles.opened.extend(open.map(|(ino, _)| *ino));
        }
        handles
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handles(number: u64, opened: &[u64], closed: &[u64]) -> Handles {
        Handles {
            number,
            opened: opened.to_vec(),
            closed: closed.to_vec(),
        }
    }

    #[test]
    fn what_was_opened_and_closed_without_a_word_is_not_told() {
        let registry = Registry::default();
        assert!(!registry.opened(7));
        registry.closed(7);
        assert_eq!(registry.report(), None);
        assert_eq!(registry.everything().opened, [0_u64; 0]);
    }

    #[test]
    fn reports_repeat_what_was_not_acknowledged() {
        let registry = Registry::default();
        registry.opened(7);
        assert_eq!(registry.report(), Some(handles(1, &[7], &[])));
        registry.opened(8);
        assert_eq!(registry.report(), Some(handles(2, &[7, 8], &[])));
        registry.closed(7);
        registry.acknowledge(1);
        assert_eq!(registry.report(), Some(handles(3, &[8], &[7])));
        // The reply to the first one, late: it says nothing of what came after.
        registry.acknowledge(1);
        assert_eq!(registry.everything(), handles(3, &[8], &[7]));
        registry.acknowledge(3);
        assert_eq!(registry.report(), None);
        assert_eq!(registry.everything(), handles(3, &[8], &[]));
    }

    #[test]
    fn a_close_follows_an_open_that_was_perhaps_heard() {
        let registry = Registry::default();
        registry.opened(7);
        registry.report();
        registry.closed(7);
        assert_eq!(registry.report(), Some(handles(2, &[], &[7])));
        assert!(!registry.opened(7), "the owner may have heard of the close");
        assert_eq!(registry.report(), Some(handles(3, &[7], &[])));
    }

    #[test]
    fn what_the_owner_was_not_told_to_be_closed_is_open_still() {
        let registry = Registry::default();
        registry.created(7);
        assert_eq!(registry.report(), None);
        registry.closed(7);
        assert!(registry.opened(7));
        assert_eq!(registry.report(), None);
        registry.closed(7);
        assert_eq!(registry.report(), Some(handles(2, &[], &[7])));
        registry.acknowledge(2);
        assert!(!registry.opened(7));
    }
}
