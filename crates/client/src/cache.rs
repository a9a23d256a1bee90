//! What the client may use without asking the owner: attributes, names, and that names are missing.
//!
//! Two kinds of rights let it. A *sole* client may use everything it was told while it is the only one,
//! which each reply says for a while; the right ends for all of it at once when another client comes.
//! With several clients single inodes are *leased*, until a recall.
//!
//! All of it is under the terms of one owner's epoch and one count of company: what came under older terms
//! is void, and replies that were made under older terms teach nothing.
//!
//! The kernel's caches are not used for leases: a notification that drops a name waits for requests
//! in the same directory, which may wait for the one whose recall it is. Here a recall takes effect at
//! once.

use bytes::Bytes;
use lazarette_proto::meta::{Attr, Kind, Recall, Rename, Response, request::Op, response};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Inodes remembered at most, and names in all directories; then all are forgotten.
const MAX_INODES: usize = 1 << 16;
const MAX_NAMES: usize = 1 << 17;
/// What is told to the kernel takes time to get there, and counts from then on.
const MARGIN: Duration = Duration::from_millis(50);
/// Recalled inodes remembered one by one; then the newest recall counts for all inodes.
const MAX_RECALLED: usize = 1 << 12;

/// What a session knows by right.
#[derive(Debug, Default)]
pub(crate) struct Cache(Mutex<State>);

/// What rights hang on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Terms {
    /// The owner's epoch.
    pub(crate) epoch: u64,
    /// How often a sole client got company under this owner.
    pub(crate) company: u64,
}

/// What a name leads to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Named {
    /// An inode, and for how long the kernel may use that.
    Attr(Attr, Duration),
    /// Nothing.
    Missing(Duration),
}

#[derive(Debug, Default)]
struct State {
    terms: Terms,
    /// Until then this client is surely the only one.
    sole_until: Option<Instant>,
    inodes: HashMap<u64, Cached>,
    /// Names in all inodes.
    names: usize,
    /// The number of an inode's last recall, of those after `floor`.
    recalled: HashMap<u64, u64>,
    /// Nothing is learnt from replies that are older.
    floor: u64,
    /// The count of the newest reply.
    newest: u64,
    /// Operations under way here that may take an inode's last name.
    removals: usize,
}

/// How long something may be used.
#[derive(Clone, Copy, Debug)]
enum Right {
    /// As long as this client is alone.
    Sole,
    Lease(Instant),
}

#[derive(Debug, Default)]
struct Cached {
    attr: Option<(Attr, Right)>,
    /// The count at which the attributes were told, or became void.
    as_of: u64,
    names: HashMap<Bytes, Name>,
    /// Since which count the names are all that there are, for a sole client.
    complete: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Name {
    /// None: there is no such name.
    ino: Option<u64>,
    as_of: u64,
    right: Right,
}

impl State {
    fn sole(&self) -> Option<Duration> {
        let left = self.sole_until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Whether a right holds, and for how long the kernel may use it, too.
    fn holds(&self, right: Right) -> Option<Duration> {
        match right {
            Right::Sole => self.sole(),
            Right::Lease(until) => (Instant::now() < until).then_some(Duration::ZERO),
        }
    }

    fn attr(&self, ino: u64) -> Option<(Attr, Duration)> {
        let (attr, right) = self.inodes.get(&ino)?.attr.as_ref()?;
        Some((*attr, self.holds(*right)?))
    }

    fn lookup(&self, dir: u64, name: &[u8]) -> Option<Named> {
        let dir = self.inodes.get(&dir)?;
        let Some(name) = dir.names.get(name) else {
            dir.complete?;
            return self.sole().map(Named::Missing);
        };
        let ttl = self.holds(name.right)?;
        let Some(ino) = name.ino else {
            return Some(Named::Missing(ttl));
        };
        let (attr, attr_ttl) = self.attr(ino)?;
        Some(Named::Attr(attr, ttl.min(attr_ttl)))
    }

    fn forget_all(&mut self) {
        self.inodes.clear();
        self.names = 0;
    }

    fn forget(&mut self, ino: u64) {
        if let Some(cached) = self.inodes.remove(&ino) {
            self.names -= cached.names.len();
        }
    }

    /// Takes the terms of a reply. False if they are out of date.
    fn meet(&mut self, terms: Terms) -> bool {
        if terms.epoch > self.terms.epoch {
            // Another owner counts recalls from the start.
            *self = Self {
                terms,
                removals: self.removals,
                ..Self::default()
            };
        } else if terms > self.terms {
            self.terms = terms;
            self.sole_until = None;
            self.forget_all();
            self.floor = self.floor.max(self.newest);
        }
        terms == self.terms
    }

    /// The inode's place, unless a reply of this age must not be kept.
    fn place(&mut self, ino: u64, as_of: u64) -> Option<&mut Cached> {
        let recalled = self.recalled.get(&ino).copied().unwrap_or(0).max(self.floor);
        if recalled > as_of {
            return None;
        }
        let full = self.inodes.len() >= MAX_INODES && !self.inodes.contains_key(&ino);
        if full || self.names >= MAX_NAMES {
            self.forget_all();
            // What is forgotten may be newer than a reply to come.
            self.floor = self.newest;
            if as_of < self.floor {
                return None;
            }
        }
        Some(self.inodes.entry(ino).or_default())
    }

    fn keep_attr(&mut self, attr: &Attr, as_of: u64, right: Right) {
        if let Some(place) = self.place(attr.ino, as_of)
            && as_of >= place.as_of
        {
            place.attr = Some((*attr, right));
            place.as_of = as_of;
        }
    }

    fn keep_name(&mut self, dir: u64, name: &Bytes, ino: Option<u64>, as_of: u64, right: Right) {
        let Some(place) = self.place(dir, as_of) else { return };
        let known = place.names.get(name).map_or(place.complete, |known| Some(known.as_of));
        if known.is_some_and(|known| known > as_of) {
            return;
        }
        let new = place.names.insert(name.clone(), Name { ino, as_of, right }).is_none();
        self.names += usize::from(new);
    }

    /// Whether a name is there has to be asked.
    fn doubt_name(&mut self, dir: u64, name: &Bytes) {
        let Some(place) = self.inodes.get_mut(&dir) else { return };
        let right = Right::Lease(Instant::now());
        let unknown = Name {
            ino: None,
            as_of: place.complete.unwrap_or(0),
            right,
        };
        match place.names.get_mut(name) {
            Some(known) => known.right = right,
            None if place.complete.is_some() => {
                place.names.insert(name.clone(), unknown);
                self.names += 1;
            }
            None => {}
        }
    }

    /// Attributes are void from this count on.
    fn void_attr(&mut self, ino: u64, as_of: u64) {
        if let Some(place) = self.place(ino, as_of)
            && as_of > place.as_of
        {
            place.attr = None;
            place.as_of = as_of;
        }
    }

    fn recall(&mut self, number: u64, inodes: &[u64]) {
        if self.recalled.len() + inodes.len() > MAX_RECALLED {
            self.recalled.clear();
            self.floor = self.floor.max(number);
        }
        for ino in inodes {
            self.forget(*ino);
            let known = self.recalled.entry(*ino).or_default();
            *known = number.max(*known);
        }
    }

    /// What a change of a sole client's own has brought about.
    fn apply(&mut self, op: &Op, response: &Response) {
        let as_of = response.as_of;
        for ino in &response.changed {
            self.void_attr(*ino, as_of);
        }
        for attr in &response.also {
            self.keep_attr(attr, as_of, Right::Sole);
        }
        let changed = |ino: u64| response.changed.contains(&ino);
        match op {
            Op::Unlink(op) if changed(op.parent) => self.keep_name(op.parent, &op.name, None, as_of, Right::Sole),
            Op::RmDir(op) if changed(op.parent) => {
                self.keep_name(op.parent, &op.name, None, as_of, Right::Sole);
                if let Some(response::Result::Attr(removed)) = &response.result
                    && let Some(dir) = self.inodes.get_mut(&removed.ino)
                {
                    self.names -= dir.names.len();
                    (dir.names, dir.complete) = (HashMap::new(), None);
                }
            }
            Op::Rename(op) if changed(op.parent) => self.renamed(op, response),
            _ => {}
        }
    }

    fn renamed(&mut self, op: &Rename, response: &Response) {
        let Some(response::Result::Attr(attr)) = &response.result else {
            return;
        };
        let as_of = response.as_of;
        self.keep_name(op.new_parent, &op.new_name, Some(attr.ino), as_of, Right::Sole);
        if !op.exchange {
            return self.keep_name(op.parent, &op.name, None, as_of, Right::Sole);
        }
        // What the other name leads to is not in the answer.
        if let Some(dir) = self.inodes.get_mut(&op.parent) {
            dir.complete = None;
            self.names -= usize::from(dir.names.remove(&op.name).is_some());
        }
    }

    /// Keeps what a reply says.
    fn keep(&mut self, op: &Op, response: &Response, right: Right) {
        let as_of = response.as_of;
        match &response.result {
            Some(response::Result::Attr(attr)) => {
                if matches!(op, Op::RmDir(_)) {
                    return;
                }
                self.keep_attr(attr, as_of, right);
                let name = match op {
                    Op::Lookup(op) => Some((op.parent, &op.name)),
                    Op::Create(op) if !op.unnamed => Some((op.parent, &op.name)),
                    Op::Link(op) => Some((op.new_parent, &op.new_name)),
                    _ => None,
                };
                if let Some((dir, name)) = name {
                    self.keep_name(dir, name, Some(attr.ino), as_of, right);
                }
                if matches!(op, Op::Create(_)) && attr.kind() == Kind::Directory {
                    // It is new, so it is empty.
                    self.complete(attr.ino, as_of, right);
                }
            }
            Some(response::Result::Missing(_)) => {
                if let Op::Lookup(op) = op {
                    self.keep_name(op.parent, &op.name, None, as_of, right);
                }
            }
            Some(response::Result::ReadDir(listing)) => {
                let Op::ReadDir(op) = op else { return };
                for entry in &listing.entries {
                    if let Some(attr) = &entry.attr {
                        self.keep_attr(attr, as_of, right);
                        self.keep_name(op.ino, &entry.name, Some(attr.ino), as_of, right);
                    }
                }
                let dir = self.inodes.get(&op.ino);
                let known = |name: &Bytes| dir.is_some_and(|dir| dir.names.contains_key(name));
                let kept = listing.entries.iter().all(|entry| known(&entry.name));
                if op.after == 0 && listing.end && kept {
                    self.complete(op.ino, as_of, right);
                }
            }
            _ => {}
        }
    }

    /// A directory has no names but those that were kept at this count, or changed since.
    fn complete(&mut self, dir: u64, as_of: u64, right: Right) {
        if !matches!(right, Right::Sole) {
            return;
        }
        let Some(place) = self.place(dir, as_of) else { return };
        if place.complete.is_none_or(|known| known <= as_of) {
            let before = place.names.len();
            place.names.retain(|_, name| name.as_of >= as_of);
            place.complete = Some(as_of);
            self.names -= before - place.names.len();
        }
    }
}

/// Held while an operation is under way that may take an inode's last name.
pub(crate) struct Removal<'a>(&'a Cache);

impl Drop for Removal<'_> {
    fn drop(&mut self) {
        self.0.state().removals -= 1;
    }
}

impl Cache {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An inode's attributes, and for how long the kernel may use them.
    pub(crate) fn attr(&self, ino: u64) -> Option<(Attr, Duration)> {
        self.state().attr(ino)
    }

    /// What a name leads to.
    pub(crate) fn lookup(&self, dir: u64, name: &[u8]) -> Option<Named> {
        self.state().lookup(dir, name)
    }

    /// The attributes of a file that may be opened before the owner hears of it. The caller has noted
    /// before that it is open: whoever could take its last name either is this client, which says so in the
    /// same request, or comes later, and then the owner waits to hear of it.
    pub(crate) fn open(&self, ino: u64) -> Option<(Attr, Duration)> {
        let state = self.state();
        if state.removals > 0 {
            return None;
        }
        let found = state.attr(ino).filter(|(attr, _)| attr.nlink > 0);
        found.filter(|(_, ttl)| !ttl.is_zero())
    }

    /// Begins an operation that may take an inode's last name. Until it is done nothing is opened without
    /// asking.
    pub(crate) fn removal(&self) -> Removal<'_> {
        self.state().removals += 1;
        Removal(self)
    }

    /// How long this client is surely the only one yet, which is how long the kernel may use what it is told.
    pub(crate) fn sole(&self) -> Duration {
        self.state().sole().unwrap_or_default()
    }

    /// The present terms.
    pub(crate) fn terms(&self) -> Terms {
        self.state().terms
    }

    /// Takes the terms that an owner has told. False if they are out of date.
    pub(crate) fn meet(&self, terms: Terms) -> bool {
        self.state().meet(terms)
    }

    /// Learns from the reply to a request that was sent at `sent`. `repeated`: it may be what an earlier
    /// attempt has come to, a while ago.
    pub(crate) fn learn(&self, op: &Op, response: &Response, sent: Instant, repeated: bool) {
        let mut state = self.state();
        let terms = Terms {
            epoch: response.owner_epoch,
            company: response.company,
        };
        if !state.meet(terms) {
            return;
        }
        let as_of = response.as_of;
        state.newest = state.newest.max(as_of);
        if response.cache_ttl_ms > 0 {
            let until = sent + Duration::from_millis(response.cache_ttl_ms.into()).saturating_sub(MARGIN);
            state.sole_until = state.sole_until.max(Some(until));
        }
        if repeated {
            state.forget_all();
            state.floor = state.floor.max(state.newest);
            return;
        }
        if response.cache_ttl_ms > 0 {
            state.apply(op, response);
            return state.keep(op, response, Right::Sole);
        }
        state.recall(as_of, &response.changed);
        if response.lease_ms > 0 {
            let until = sent + Duration::from_millis(response.lease_ms.into());
            state.keep(op, response, Right::Lease(until));
        }
    }

    /// A change has failed: what it met may be newer than what is known, as the reply to another one may be on
    /// its way.
    pub(crate) fn failed(&self, op: &Op) {
        let mut state = self.state();
        match op {
            Op::Create(op) => state.doubt_name(op.parent, &op.name),
            Op::Link(op) => state.doubt_name(op.new_parent, &op.new_name),
            Op::Unlink(op) => state.doubt_name(op.parent, &op.name),
            Op::RmDir(op) => state.doubt_name(op.parent, &op.name),
            Op::Rename(op) => {
                state.doubt_name(op.parent, &op.name);
                state.doubt_name(op.new_parent, &op.new_name);
            }
            _ => {}
        }
    }

    /// Carries out a recall.
    pub(crate) fn recall(&self, recall: &Recall) {
        let mut state = self.state();
        if recall.owner_epoch > state.terms.epoch || recall.company > 0 {
            state.meet(Terms {
                epoch: recall.owner_epoch,
                company: recall.company,
            });
        }
        if recall.owner_epoch == state.terms.epoch {
            state.recall(recall.number, &recall.inodes);
        }
    }

    /// Forgets what is leased, as recalls may have been missed.
    pub(crate) fn end_leases(&self) {
        let mut state = self.state();
        if state.sole_until.is_none() {
            state.forget_all();
        }
    }
}

#[cfg(test)]
mod tests;
