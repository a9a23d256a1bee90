//! What the owner has given leases on: attributes and names that may be used without asking it.
//!
//! The kernel's caches are not used for that: a notification that drops a name waits for requests
//! in the same directory, which may wait for the one whose recall it is. Here a recall takes effect at
//! once.

use bytes::Bytes;
use lazarette_proto::meta::{Attr, Recall, Response, request::Op, response};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Inodes remembered at most; then all are forgotten.
const MAX_INODES: usize = 1 << 16;
/// Recalled inodes remembered one by one; then the newest recall counts for all inodes.
const MAX_RECALLED: usize = 1 << 12;

/// The leases of a session.
#[derive(Debug, Default)]
pub(crate) struct Cache(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    inodes: HashMap<u64, Cached>,
    /// The number of an inode's last recall, of those after `floor`.
    recalled: HashMap<u64, u64>,
    floor: u64,
}

#[derive(Debug, Default)]
struct Cached {
    attr: Option<(Attr, Instant)>,
    names: HashMap<Bytes, (u64, Instant)>,
}

impl State {
    /// The inode's place, unless a reply of this age must not be kept.
    fn place(&mut self, ino: u64, as_of: u64) -> Option<&mut Cached> {
        let recalled = self.recalled.get(&ino).copied().unwrap_or(0).max(self.floor);
        if recalled > as_of {
            return None;
        }
        if self.inodes.len() >= MAX_INODES && !self.inodes.contains_key(&ino) {
            self.inodes.clear();
        }
        Some(self.inodes.entry(ino).or_default())
    }

    fn keep_attr(&mut self, attr: &Attr, as_of: u64, until: Instant) {
        if let Some(place) = self.place(attr.ino, as_of) {
            place.attr = Some((*attr, until));
        }
    }

    fn keep_name(&mut self, dir: u64, name: &Bytes, ino: u64, as_of: u64, until: Instant) {
        if let Some(place) = self.place(dir, as_of) {
            place.names.insert(name.clone(), (ino, until));
        }
    }

    fn recall(&mut self, number: u64, inodes: &[u64]) {
        if self.recalled.len() + inodes.len() > MAX_RECALLED {
            self.recalled.clear();
            self.floor = self.floor.max(number);
        }
        for ino in inodes {
            self.inodes.remove(ino);
            let known = self.recalled.entry(*ino).or_default();
            *known = number.max(*known);
        }
    }

    fn attr(&self, ino: u64) -> Option<Attr> {
        let (attr, until) = self.inodes.get(&ino)?.attr.as_ref()?;
        (Instant::now() < *until).then_some(*attr)
    }
}

impl Cache {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An inode's attributes.
    pub(crate) fn attr(&self, ino: u64) -> Option<Attr> {
        self.state().attr(ino)
    }

    /// The attributes of the inode that a name leads to.
    pub(crate) fn lookup(&self, dir: u64, name: &[u8]) -> Option<Attr> {
        let state = self.state();
        let (ino, until) = state.inodes.get(&dir)?.names.get(name)?;
        if Instant::now() >= *until {
            return None;
        }
        state.attr(*ino)
    }

    /// Learns from the reply to a request that was sent at `sent`.
    pub(crate) fn learn(&self, op: &Op, response: &Response, sent: Instant) {
        if response.lease_ms == 0 && response.changed.is_empty() {
            return;
        }
        let mut state = self.state();
        let as_of = response.as_of;
        state.recall(as_of, &response.changed);
        if response.lease_ms == 0 {
            return;
        }
        let until = sent + Duration::from_millis(response.lease_ms.into());
        match &response.result {
            Some(response::Result::Attr(attr)) => {
                state.keep_attr(attr, as_of, until);
                let name = match op {
                    Op::Lookup(op) => Some((op.parent, &op.name)),
                    Op::Create(op) if !op.unnamed => Some((op.parent, &op.name)),
                    Op::Link(op) => Some((op.new_parent, &op.new_name)),
                    _ => None,
                };
                if let Some((dir, name)) = name {
                    state.keep_name(dir, name, attr.ino, as_of, until);
                }
            }
            Some(response::Result::ReadDir(listing)) => {
                let Op::ReadDir(op) = op else { return };
                for entry in &listing.entries {
                    if let Some(attr) = &entry.attr {
                        state.keep_attr(attr, as_of, until);
                        state.keep_name(op.ino, &entry.name, attr.ino, as_of, until);
                    }
                }
            }
            _ => {}
        }
    }

    /// Carries out a recall.
    pub(crate) fn recall(&self, recall: &Recall) {
        self.state().recall(recall.number, &recall.inodes);
    }

    /// Forgets everything, as recalls may have been missed.
    pub(crate) fn clear(&self) {
        self.state().inodes.clear();
    }

    /// Forgets everything, and takes nothing from replies that are older than the count.
    pub(crate) fn forget_before(&self, as_of: u64) {
        let mut state = self.state();
        state.inodes.clear();
        state.floor = state.floor.max(as_of);
    }

    /// Forgets everything; another owner counts recalls from the start.
    pub(crate) fn start_over(&self) {
        *self.state() = State::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazarette_proto::meta::{GetAttr, Lookup};

    const DIR: u64 = 1;

    fn reply(ino: u64, as_of: u64, changed: Vec<u64>) -> Response {
        Response {
            lease_ms: 600_000,
            as_of,
            changed,
            result: Some(response::Result::Attr(Attr { ino, ..Attr::default() })),
            ..Response::default()
        }
    }

    fn look_up(cache: &Cache, name: &'static str, ino: u64, as_of: u64) {
        let name = Bytes::from_static(name.as_bytes());
        let op = Op::Lookup(Lookup { parent: DIR, name });
        cache.learn(&op, &reply(ino, as_of, Vec::new()), Instant::now());
    }

    fn recall(cache: &Cache, number: u64, inodes: &[u64]) {
        cache.recall(&Recall {
            number,
            inodes: inodes.to_vec(),
        });
    }

    #[test]
    fn names_and_attributes_are_known_until_recalled() {
        let cache = Cache::default();
        look_up(&cache, "f", 7, 0);
        assert_eq!(cache.lookup(DIR, b"f").unwrap().ino, 7);
        assert_eq!((cache.lookup(DIR, b"g"), cache.attr(8)), (None, None));
        recall(&cache, 1, &[7]);
        assert_eq!((cache.lookup(DIR, b"f"), cache.attr(7)), (None, None));
        look_up(&cache, "f", 7, 1);
        recall(&cache, 2, &[DIR]);
        assert_eq!(cache.lookup(DIR, b"f"), None);
        assert!(cache.attr(7).is_some());
    }

    #[test]
    fn a_reply_that_a_recall_overtook_is_not_kept() {
        let cache = Cache::default();
        recall(&cache, 5, &[7]);
        look_up(&cache, "f", 7, 4);
        assert_eq!((cache.lookup(DIR, b"f"), cache.attr(7)), (None, None));
        look_up(&cache, "f", 7, 5);
        assert!(cache.lookup(DIR, b"f").is_some());
    }

    #[test]
    fn ones_own_change_makes_older_replies_void() {
        let cache = Cache::default();
        look_up(&cache, "f", 7, 0);
        let op = Op::GetAttr(GetAttr { ino: 7 });
        cache.learn(&op, &reply(7, 1, vec![7, DIR]), Instant::now());
        assert_eq!(cache.lookup(DIR, b"f"), None);
        assert!(cache.attr(7).is_some(), "what the change itself said");
        look_up(&cache, "f", 7, 0);
        assert_eq!(cache.lookup(DIR, b"f"), None);
    }

    #[test]
    fn forgetting_single_recalls_forgets_nothing_stale() {
        let cache = Cache::default();
        recall(&cache, 1, &[7]);
        for number in 2..2 * MAX_RECALLED as u64 {
            recall(&cache, number, &[1_000_000 + number]);
        }
        look_up(&cache, "f", 7, 0);
        assert_eq!(cache.attr(7), None);
        assert!(cache.state().recalled.len() <= MAX_RECALLED);
    }

    #[test]
    fn leases_run_out_and_a_new_owner_counts_anew() {
        let cache = Cache::default();
        let past = Instant::now() - Duration::from_secs(601);
        cache.learn(&Op::GetAttr(GetAttr { ino: 7 }), &reply(7, 3, Vec::new()), past);
        assert_eq!(cache.attr(7), None);
        recall(&cache, 9, &[7]);
        cache.start_over();
        look_up(&cache, "f", 7, 0);
        assert!(cache.attr(7).is_some());
    }
}
