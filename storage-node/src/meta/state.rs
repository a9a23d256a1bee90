//! A shard's rows in memory, with the indexes that operations need and the marks that journal
//! and pages need.

use super::rows::{Dentry, Garbage, Held, Inode, Key, Part, Reach, Row, Truncate};
use lazarette_proto::meta::Kind;
use lazarette_types::{InodeId, SessionId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

/// What a volume holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The sizes of all files, in bytes.
    pub bytes: u64,
    /// Inodes, the root included.
    pub inodes: u64,
}

/// All rows of a shard. Indexes follow from the rows, so replaying rows rebuilds everything.
#[derive(Debug, Default)]
pub struct State {
    rows: BTreeMap<Key, Row>,
    names: HashMap<InodeId, HashMap<Arc<[u8]>, u64>>,
    orphans: BTreeSet<InodeId>,
    locked: HashMap<SessionId, BTreeSet<InodeId>>,
    usage: Usage,
    /// Rows changed since the last record was cut, with an estimate of their encoded size.
    changed: BTreeSet<Key>,
    changed_bytes: usize,
    /// Rows changed since they were last written to pages.
    dirty: BTreeSet<Key>,
    /// The record in which an inode was last changed, kept until that record is committed.
    marks: HashMap<InodeId, u64>,
    /// Inodes of which attributes or names have changed since [`State::take_touched`].
    touched: BTreeSet<InodeId>,
    /// The record that takes up changes now.
    open_record: u64,
}

impl State {
    /// No rows; the next record is `open_record`.
    pub fn new(open_record: u64) -> Self {
        Self {
            open_record,
            ..Self::default()
        }
    }

    /// Takes a row from a page: it is in the pages and needs no record.
    pub fn load_page_row(&mut self, key: Key, row: Row) {
        self.set(key, Some(row));
    }

    /// Redoes a change from the journal: it is committed and not yet in the pages.
    pub fn redo(&mut self, key: Key, row: Option<Row>) {
        self.dirty.insert(key.clone());
        self.set(key, row);
    }

    /// Says where the journal goes on.
    pub fn set_open_record(&mut self, lsn: u64) {
        self.open_record = lsn;
    }

    /// The record that takes up changes now.
    pub fn open_record(&self) -> u64 {
        self.open_record
    }

    /// Sets a row.
    pub fn put(&mut self, key: Key, row: Row) {
        self.changed_bytes += extra_bytes(&row);
        self.note(&key);
        self.set(key, Some(row));
    }

    /// Removes a row.
    pub fn remove(&mut self, key: Key) {
        if self.rows.contains_key(&key) {
            self.note(&key);
            self.set(key, None);
        }
    }

    /// Changes an inode's attributes in place. Does nothing if there is no such inode.
    pub fn update(&mut self, ino: InodeId, change: impl FnOnce(&mut Inode)) {
        let key = Key::attributes(ino);
        let Some(Row::Inode(inode)) = self.rows.get_mut(&key) else {
            return;
        };
        let size_before = counted(inode);
        change(inode);
        inode.change += 1;
        let (size, orphan) = (counted(inode), inode.nlink == 0);
        self.usage.bytes = self.usage.bytes.wrapping_sub(size_before).wrapping_add(size);
        self.mark_orphan(ino, orphan);
        self.note(&key);
    }

    fn note(&mut self, key: &Key) {
        if let Some(ino) = key.inode() {
            self.marks.insert(ino, self.open_record);
        }
        if let Key::Inode(ino, Part::Attributes | Part::Dentry(_)) = key {
            self.touched.insert(*ino);
        }
        self.dirty.insert(key.clone());
        if self.changed.insert(key.clone()) {
            self.changed_bytes += match key {
                Key::Inode(_, Part::Xattr(name)) => 16 + name.len(),
                _ => 48,
            };
        }
    }

    fn mark_orphan(&mut self, ino: InodeId, orphan: bool) {
        if orphan {
            self.orphans.insert(ino);
        } else {
            self.orphans.remove(&ino);
        }
    }

    fn set(&mut self, key: Key, row: Option<Row>) {
        if let Some(old) = self.rows.remove(&key) {
            self.index(&key, &old, false);
        }
        if let Some(row) = row {
            self.index(&key, &row, true);
            self.rows.insert(key, row);
        }
    }

    fn index(&mut self, key: &Key, row: &Row, present: bool) {
        match (key, row) {
            (Key::Inode(ino, _), Row::Inode(inode)) => {
                let size = counted(inode);
                if present {
                    self.usage.bytes = self.usage.bytes.wrapping_add(size);
                    self.usage.inodes += 1;
                } else {
                    self.usage.bytes = self.usage.bytes.wrapping_sub(size);
                    self.usage.inodes -= 1;
                }
                self.mark_orphan(*ino, present && inode.nlink == 0);
            }
            (Key::Inode(dir, Part::Dentry(cookie)), Row::Dentry(dentry)) => {
                if present {
                    let names = self.names.entry(*dir).or_default();
                    names.insert(Arc::clone(&dentry.name), *cookie);
                } else if let Some(names) = self.names.get_mut(dir) {
                    // While rows are replayed a name may already be under another cookie.
                    if names.get(&dentry.name) == Some(cookie) {
                        names.remove(&dentry.name);
                    }
                    if names.is_empty() {
                        self.names.remove(dir);
                    }
                }
            }
            (Key::Inode(ino, _), Row::Locks(held)) => {
                for lock in held.iter() {
                    let inodes = self.locked.entry(lock.session).or_default();
                    if present {
                        inodes.insert(*ino);
                    } else {
                        inodes.remove(ino);
                        if inodes.is_empty() {
                            self.locked.remove(&lock.session);
                        }
                    }
                }
            }
            _ => {}
        }
    }

    /// Removes a session's results with an op id below `below`.
    pub fn remove_results(&mut self, session: SessionId, below: u64) {
        let range = Key::Result(session, 0)..Key::Result(session, below);
        let forgotten: Vec<Key> = self.rows.range(range).map(|(key, _)| key.clone()).collect();
        for key in forgotten {
            self.remove(key);
        }
    }

    /// A row.
    pub fn get(&self, key: &Key) -> Option<&Row> {
        self.rows.get(key)
    }

    /// All rows with `from <= key < to`, in order.
    pub fn range(&self, from: &Key, to: Option<&Key>) -> impl Iterator<Item = (&Key, &Row)> {
        let to = to.map_or(Bound::Unbounded, Bound::Excluded);
        self.rows.range((Bound::Included(from), to))
    }

    /// All rows.
    pub fn rows(&self) -> &BTreeMap<Key, Row> {
        &self.rows
    }

    /// An inode's attributes.
    pub fn inode(&self, ino: InodeId) -> Option<&Inode> {
        match self.rows.get(&Key::attributes(ino)) {
            Some(Row::Inode(inode)) => Some(inode),
            _ => None,
        }
    }

    /// The entry of a name: its cookie and the inode.
    pub fn entry(&self, dir: InodeId, name: &[u8]) -> Option<(u64, InodeId)> {
        let cookie = *self.names.get(&dir)?.get(name)?;
        match self.rows.get(&Key::dentry(dir, cookie)) {
            Some(Row::Dentry(dentry)) => Some((cookie, dentry.ino)),
            _ => None,
        }
    }

    /// Whether a directory has no entries.
    pub fn is_empty_dir(&self, dir: InodeId) -> bool {
        !self.names.contains_key(&dir)
    }

    /// A directory's entries with a cookie greater than `after`, in order.
    pub fn entries(&self, dir: InodeId, after: u64) -> impl Iterator<Item = (u64, &Dentry)> {
        let from = Bound::Excluded(Key::dentry(dir, after));
        let to = Bound::Included(Key::dentry(dir, u64::MAX));
        self.rows.range((from, to)).filter_map(|(key, row)| match (key, row) {
            (Key::Inode(_, Part::Dentry(cookie)), Row::Dentry(dentry)) => Some((*cookie, dentry)),
            _ => None,
        })
    }

    /// The names and values of an inode's extended attributes.
    pub fn xattrs(&self, ino: InodeId) -> impl Iterator<Item = (&[u8], &[u8])> {
        let (from, to) = (Key::xattr(ino, b""), Key::dentry(ino, 0));
        self.rows.range(from..to).filter_map(|(key, row)| match (key, row) {
            (Key::Inode(_, Part::Xattr(name)), Row::Xattr(value)) => Some((&**name, &**value)),
            _ => None,
        })
    }

    /// The locks held on an inode.
    pub fn locks(&self, ino: InodeId) -> &[Held] {
        match self.rows.get(&Key::locks(ino)) {
            Some(Row::Locks(held)) => held,
            _ => &[],
        }
    }

    /// Sets the locks held on an inode.
    pub fn set_locks(&mut self, ino: InodeId, held: Vec<Held>) {
        if held.is_empty() {
            self.remove(Key::locks(ino));
        } else {
            self.put(Key::locks(ino), Row::Locks(Box::new(held)));
        }
    }

    /// Inodes on which a session holds locks.
    pub fn locked_by(&self, session: SessionId) -> Vec<InodeId> {
        self.locked.get(&session).into_iter().flatten().copied().collect()
    }

    /// What may lie beyond a file's end.
    pub fn reach(&self, ino: InodeId) -> Reach {
        match self.rows.get(&Key::reach(ino)) {
            Some(Row::Reach(reach)) => *reach,
            _ => Reach::default(),
        }
    }

    /// A pending cut of a file's chunks.
    pub fn truncate(&self, ino: InodeId) -> Option<Truncate> {
        match self.rows.get(&Key::Truncate(ino)) {
            Some(Row::Truncate(truncate)) => Some(*truncate),
            _ => None,
        }
    }

    /// All pending cuts.
    pub fn truncates(&self) -> impl Iterator<Item = (InodeId, Truncate)> {
        let range = Key::Truncate(InodeId(0))..=Key::Truncate(InodeId(u64::MAX));
        self.rows.range(range).filter_map(|(key, row)| match (key, row) {
            (Key::Truncate(ino), Row::Truncate(truncate)) => Some((*ino, *truncate)),
            _ => None,
        })
    }

    /// All inodes whose chunks are to be removed.
    pub fn garbage(&self) -> impl Iterator<Item = (InodeId, Garbage)> {
        let range = Key::Garbage(InodeId(0))..=Key::Garbage(InodeId(u64::MAX));
        self.rows.range(range).filter_map(|(key, row)| match (key, row) {
            (Key::Garbage(ino), Row::Garbage(garbage)) => Some((*ino, *garbage)),
            _ => None,
        })
    }

    /// The results that are kept: session and op id.
    pub fn results(&self) -> impl Iterator<Item = (SessionId, u64)> {
        let range = Key::Result(SessionId(0), 0)..=Key::Result(SessionId(u64::MAX), u64::MAX);
        self.rows.range(range).filter_map(|(key, _)| match key {
            Key::Result(session, id) => Some((*session, *id)),
            _ => None,
        })
    }

    /// All sessions.
    pub fn sessions(&self) -> impl Iterator<Item = SessionId> {
        let range = Key::Session(SessionId(0))..=Key::Session(SessionId(u64::MAX));
        self.rows.range(range).filter_map(|(key, _)| match key {
            Key::Session(session) => Some(*session),
            _ => None,
        })
    }

    /// Inodes without a name.
    pub fn orphans(&self) -> &BTreeSet<InodeId> {
        &self.orphans
    }

    /// What the volume holds.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Estimated size of the record that takes up changes now, in bytes; 0 if it has none.
    pub fn changed_bytes(&self) -> usize {
        if self.changed.is_empty() {
            0
        } else {
            self.changed_bytes.max(1)
        }
    }

    /// Closes the open record: its number and the changed keys. The next change goes to the next.
    pub fn cut(&mut self) -> (u64, BTreeSet<Key>) {
        let lsn = self.open_record;
        self.open_record += 1;
        self.changed_bytes = 0;
        (lsn, std::mem::take(&mut self.changed))
    }

    /// Forgets which inodes were last changed by this now committed record.
    pub fn committed(&mut self, lsn: u64, keys: &BTreeSet<Key>) {
        for ino in keys.iter().filter_map(Key::inode) {
            if self.marks.get(&ino) == Some(&lsn) {
                self.marks.remove(&ino);
            }
        }
    }

    /// The record that must be committed before anybody may hear about this inode; 0 for none.
    pub fn mark(&self, ino: InodeId) -> u64 {
        self.marks.get(&ino).copied().unwrap_or(0)
    }

    /// Inodes of which attributes or names have changed since the last call.
    pub fn take_touched(&mut self) -> BTreeSet<InodeId> {
        std::mem::take(&mut self.touched)
    }

    /// Whether a row was changed since [`State::take_dirty`].
    pub fn is_dirty(&self, key: &Key) -> bool {
        self.dirty.contains(key)
    }

    /// Rows that the pages do not have; they are the caller's to write from here on.
    pub fn take_dirty(&mut self) -> BTreeSet<Key> {
        std::mem::take(&mut self.dirty)
    }
}

/// How much longer a row may be than the usual one, in bytes.
fn extra_bytes(row: &Row) -> usize {
    match row {
        Row::Inode(inode) => inode.target.len(),
        Row::Locks(held) => 32 * held.len(),
        Row::Xattr(value) => value.len(),
        Row::Dentry(dentry) => dentry.name.len(),
        Row::Session(session) => session.client.len(),
        _ => 0,
    }
}

/// Bytes that count against the quota.
fn counted(inode: &Inode) -> u64 {
    if inode.kind == Kind::File { inode.size } else { 0 }
}
