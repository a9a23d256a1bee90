//! What the store knows in memory: the index of all chunks, and the overlay of changes that are
//! durable in the log but not yet in the chunk files.

use super::format::{FileId, Key, blocks};
use super::log::Lsn;
use super::record::{Block, ChangeRecord, Record};
use crate::chunk::{BLOCK_SIZE, DAMAGED};
use lazarette_types::{ChunkId, ReplicaSetId, Version};
use std::collections::{BTreeMap, HashMap, HashSet};

/// A chunk in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// [`DAMAGED`] if its header is unreadable.
    pub(super) version: Version,
    pub(super) file: FileId,
    pub(super) length: u32,
}

impl Entry {
    pub(super) fn is_damaged(&self) -> bool {
        self.version == DAMAGED
    }
}

/// A changed block.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    lsn: Lsn,
    pub(super) block: Block,
}

/// Changes of one chunk that the log holds.
#[derive(Clone, Debug)]
pub(super) struct Overlay {
    /// Changed blocks: what the file has of them does not count, or for [`Block::InFile`] has no
    /// entry in the checksum table yet.
    pub(super) blocks: BTreeMap<u32, Pending>,
    /// Of the other blocks, those below this are valid in the file; the rest are zeros.
    pub(super) base: u32,
    /// The file may not exist, or not durably.
    pub(super) fresh: bool,
    /// Frames from here on hold records that the file does not have.
    pub(super) first: Lsn,
    last: Lsn,
    images: u64,
}

impl Overlay {
    fn new(base: u32, lsn: Lsn) -> Self {
        Self {
            blocks: BTreeMap::new(),
            base,
            fresh: false,
            first: lsn,
            last: lsn,
            images: 0,
        }
    }

    /// Bytes on the disk that folding this into the file may newly take.
    fn cost(&self) -> u64 {
        let header = if self.fresh { 2 } else { 1 };
        (self.images + header) * u64::from(BLOCK_SIZE)
    }

    fn truncate(&mut self, length: u32) {
        let dropped = self.blocks.split_off(&blocks(length));
        self.images -= count_images(&dropped);
    }

    fn put(&mut self, index: u32, block: Block, lsn: Lsn) {
        self.images += u64::from(matches!(block, Block::Image(_)));
        let old = self.blocks.insert(index, Pending { lsn, block });
        let replaced = old.is_some_and(|p| matches!(p.block, Block::Image(_)));
        self.images -= u64::from(replaced);
    }
}

fn count_images(blocks: &BTreeMap<u32, Pending>) -> u64 {
    let images = blocks.values().filter(|p| matches!(p.block, Block::Image(_)));
    images.count() as u64
}

/// Index and overlays. [`redo`](Self::redo) is the only way to change which chunks there are, both
/// when the store runs and when it recovers.
#[derive(Debug, Default)]
pub(super) struct State {
    sets: HashMap<ReplicaSetId, HashMap<ChunkId, Entry>>,
    overlays: HashMap<Key, Overlay>,
    overlay_cost: u64,
    /// Folders whose names must be made durable before the log may forget why they changed.
    pub(super) dirty_dirs: HashSet<String>,
    /// Folders known to exist.
    pub(super) known_dirs: HashSet<String>,
}

impl State {
    pub(super) fn entry(&self, (rs, chunk): Key) -> Option<Entry> {
        self.sets.get(&rs)?.get(&chunk).copied()
    }

    pub(super) fn set(&mut self, (rs, chunk): Key, entry: Entry) {
        self.sets.entry(rs).or_default().insert(chunk, entry);
    }

    fn unset(&mut self, (rs, chunk): Key) {
        if let Some(set) = self.sets.get_mut(&rs) {
            set.remove(&chunk);
            if set.is_empty() {
                self.sets.remove(&rs);
            }
        }
    }

    pub(super) fn sets(&self) -> impl Iterator<Item = (ReplicaSetId, &HashMap<ChunkId, Entry>)> {
        self.sets.iter().map(|(rs, set)| (*rs, set))
    }

    pub(super) fn chunks(&self, rs: ReplicaSetId) -> impl Iterator<Item = (ChunkId, Entry)> {
        self.sets
            .get(&rs)
            .into_iter()
            .flatten()
            .map(|(chunk, entry)| (*chunk, *entry))
    }

    pub(super) fn overlay(&self, key: Key) -> Option<&Overlay> {
        self.overlays.get(&key)
    }

    pub(super) fn overlays(&self) -> impl Iterator<Item = (Key, &Overlay)> {
        self.overlays.iter().map(|(key, overlay)| (*key, overlay))
    }

    /// Bytes on the disk that folding all overlays may newly take.
    pub(super) fn overlay_cost(&self) -> u64 {
        self.overlay_cost
    }

    fn drop_overlay(&mut self, key: Key) {
        if let Some(overlay) = self.overlays.remove(&key) {
            self.overlay_cost -= overlay.cost();
        }
    }

    fn edit(&mut self, key: Key, new: impl FnOnce() -> Overlay, edit: impl FnOnce(&mut Overlay)) {
        let overlay = match self.overlays.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => {
                self.overlay_cost -= entry.get().cost();
                entry.into_mut()
            }
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(new()),
        };
        edit(overlay);
        self.overlay_cost += overlay.cost();
    }

    /// Makes the effects of a durable record visible.
    pub(super) fn redo(&mut self, record: Record, lsn: Lsn) {
        match record {
            Record::Change(change) => self.change(change, lsn),
            Record::Replace(replace) => {
                self.drop_overlay(replace.key);
                let entry = Entry {
                    version: replace.version,
                    file: replace.file,
                    length: replace.length,
                };
                self.set(replace.key, entry);
            }
            Record::Remove { key, below: _ } => {
                self.drop_overlay(key);
                self.unset(key);
            }
            Record::DropVolume { volume, below: _ } => {
                self.remove_where(|(_, chunk)| chunk.volume == volume);
            }
            Record::DropReplicaSet { rs, below: _ } => self.remove_where(|(of, _)| of == rs),
        }
    }

    fn change(&mut self, change: ChangeRecord, lsn: Lsn) {
        let key = change.key;
        if change.fresh {
            self.drop_overlay(key);
        }
        let new = || Overlay::new(blocks(change.previous_length), lsn);
        self.edit(key, new, |overlay| {
            if change.fresh {
                overlay.base = 0;
                overlay.fresh = true;
            }
            if blocks(change.length) < blocks(change.previous_length) {
                overlay.base = overlay.base.min(blocks(change.length));
                overlay.truncate(change.length);
            }
            // Blocks are put into a file only once it durably exists. On recovery, the record that
            // made the file may still be in the log.
            if change.blocks.iter().any(|(_, block)| matches!(block, Block::InFile(_))) {
                overlay.fresh = false;
            }
            for (index, block) in change.blocks {
                overlay.put(index, block, lsn);
            }
            overlay.last = lsn;
        });
        let entry = Entry {
            version: change.version,
            file: change.file,
            length: change.length,
        };
        self.set(key, entry);
    }

    fn remove_where(&mut self, gone: impl Fn(Key) -> bool) {
        for (rs, set) in &mut self.sets {
            set.retain(|chunk, _| !gone((*rs, *chunk)));
        }
        self.sets.retain(|_, set| !set.is_empty());
        let keys: Vec<_> = self.overlays.keys().copied().filter(|k| gone(*k)).collect();
        for key in keys {
            self.drop_overlay(key);
        }
    }

    /// The chunk cannot be read: what the log has of it does not help.
    pub(super) fn damaged(&mut self, key: Key, entry: Entry) {
        self.drop_overlay(key);
        self.set(key, entry);
    }

    /// The chunk's file now has all that the overlay has, though not durably yet.
    pub(super) fn written(&mut self, key: Key) {
        let length = self.entry(key).map_or(0, |e| e.length);
        if let Some(overlay) = self.overlays.get_mut(&key) {
            overlay.base = blocks(length);
        }
    }

    /// The chunk's file durably has what records before `lsn` brought.
    pub(super) fn folded(&mut self, key: Key, file: FileId, lsn: Lsn) {
        if self.entry(key).is_none_or(|e| e.file != file) {
            return;
        }
        let Some(overlay) = self.overlays.get(&key) else {
            return;
        };
        if overlay.last < lsn {
            self.drop_overlay(key);
            return;
        }
        self.edit(
            key,
            || Overlay::new(0, lsn),
            |overlay| {
                overlay.fresh = false;
                overlay.blocks.retain(|_, pending| pending.lsn >= lsn);
                overlay.images = count_images(&overlay.blocks);
                overlay.first = overlay.first.max(lsn);
            },
        );
    }

    /// Where recovery must begin if records up to `visible` are in the overlays.
    pub(super) fn recovery_start(&self, visible: Lsn) -> Lsn {
        let first = self.overlays.values().map(|overlay| overlay.first).min();
        first.map_or(visible, |first| first.min(visible))
    }
}
