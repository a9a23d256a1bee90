//! Reading: chunk files with the overlay on top, verified; and the index.

use super::disk::{DiskFile, Mode, is_transient};
use super::engine::{BLOCK, Engine};
use super::format::{Key, block_offset, block_sum, blocks, chunk_path, table_offset};
use super::record::Block;
use super::state::Entry;
use crate::chunk::{BLOCK_SIZE, ChunkError, ChunkSummary, Contents, Usage};
use bytes::Bytes;
use lazarette_types::{ChunkId, ReplicaSetId, Version, VolumeId};
use std::cell::OnceCell;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;

/// What a read needs to know of a chunk.
struct View {
    entry: Entry,
    base: u32,
    /// Changed blocks of the range, ascending.
    pending: Vec<(u32, Block)>,
    /// The chunk's file, once something was read from it.
    file: OnceCell<Arc<dyn DiskFile>>,
    /// How it is opened.
    mode: Mode,
}

/// Where a block is read from.
enum Source {
    /// The chunk file; with its checksum if the file's table does not have it yet.
    File(Option<u32>),
    /// The overlay, or nowhere: zeros.
    Elsewhere,
}

impl Engine {
    fn view(&self, key: Key, range: std::ops::Range<u32>, mode: Mode) -> Option<View> {
        let state = self.state();
        let entry = state.entry(key)?;
        let mut view = View {
            entry,
            base: blocks(entry.length),
            pending: Vec::new(),
            file: OnceCell::new(),
            mode,
        };
        if let Some(overlay) = state.overlay(key) {
            view.base = overlay.base;
            view.pending = overlay
                .blocks
                .range(range)
                .map(|(index, pending)| (*index, pending.block.clone()))
                .collect();
        }
        Some(view)
    }

    /// Whole blocks `first..last` of the view's range, verified. The caller shares the file lock.
    fn read_view(&self, key: Key, view: &View, first: u32, last: u32) -> Result<Vec<u8>, ChunkError> {
        let corrupt = |reason: String| ChunkError::Corrupt { chunk: key.1, reason };
        let mut buffer = vec![0; (last - first) as usize * BLOCK];
        let place = |block: u32| (block - first) as usize * BLOCK;
        let pending = &view.pending[view.pending.partition_point(|(index, _)| *index < first)..];
        let pending = &pending[..pending.partition_point(|(index, _)| *index < last)];
        // Which blocks the file has, with their checksum where the overlay knows better.
        let mut changed = pending.iter().peekable();
        let sources: Vec<Source> = (first..last)
            .map(|block| match changed.next_if(|(index, _)| *index == block) {
                Some((_, Block::Image(_))) => Source::Elsewhere,
                Some((_, Block::InFile(sum))) => Source::File(Some(*sum)),
                None if block < view.base => Source::File(None),
                None => Source::Elsewhere,
            })
            .collect();
        let in_file = |source: &Source| matches!(source, Source::File(_));
        if let (Some(low), Some(high)) = (sources.iter().position(in_file), sources.iter().rposition(in_file)) {
            let mut table = vec![0; (high + 1 - low) * 4];
            let span = low * BLOCK..(high + 1) * BLOCK;
            self.read_file(key, view, first + low as u32, &mut table, &mut buffer[span])
                .map_err(|error| {
                    if is_transient(&error) {
                        ChunkError::Io(format!("reading a chunk file: {error}"))
                    } else {
                        corrupt(error.to_string())
                    }
                })?;
            for (at, source) in sources.iter().enumerate().take(high + 1).skip(low) {
                let bytes = &mut buffer[at * BLOCK..(at + 1) * BLOCK];
                let Source::File(sum) = source else {
                    bytes.fill(0);
                    continue;
                };
                let stored = &table[(at - low) * 4..];
                let stored = u32::from_le_bytes([stored[0], stored[1], stored[2], stored[3]]);
                if block_sum(bytes) != sum.unwrap_or(stored) {
                    return Err(corrupt(format!("block {} fails its checksum", first + at as u32)));
                }
            }
        }
        for (index, block) in pending {
            if let Block::Image(image) = block {
                buffer[place(*index)..place(*index) + BLOCK].copy_from_slice(image);
            }
        }
        Ok(buffer)
    }

    /// Reads blocks and their part of the checksum table; what the file lacks stays zeros.
    fn read_file(&self, key: Key, view: &View, first: u32, table: &mut [u8], data: &mut [u8]) -> io::Result<()> {
        let file = match view.file.get() {
            Some(file) => file,
            None => {
                let file = self.disk.open(&chunk_path(key, view.entry.file), view.mode)?;
                view.file.get_or_init(|| file)
            }
        };
        file.read_at(table, table_offset(first))?;
        file.read_at(data, block_offset(first))?;
        Ok(())
    }

    /// Whole blocks `first..last` of a chunk that exists. The caller has its change lock.
    pub(super) fn read_blocks(&self, key: Key, first: u32, last: u32) -> Result<Vec<u8>, ChunkError> {
        let _file = self.share_file(key);
        match self.view(key, first..last, Mode::Read) {
            Some(view) if first < last => self.read_view(key, &view, first, last),
            _ => Ok(Vec::new()),
        }
    }

    /// Single blocks of a chunk that exists. The caller has its change lock.
    pub(super) fn read_scattered(&self, key: Key, list: &[u32]) -> Result<HashMap<u32, Vec<u8>>, ChunkError> {
        let ([first, ..], [.., last]) = (list, list) else {
            return Ok(HashMap::new());
        };
        let _file = self.share_file(key);
        let Some(view) = self.view(key, *first..last + 1, Mode::Read) else {
            return Ok(HashMap::new());
        };
        let read = |&index: &u32| Ok((index, self.read_view(key, &view, index, index + 1)?));
        list.iter().map(read).collect()
    }

    pub(super) fn read(&self, key: Key, offset: u32, length: u32) -> Result<Contents, ChunkError> {
        let _file = self.share_file(key);
        self.read_shared(key, offset, length, Mode::Read)
    }

    /// Reads what is in memory. None: that would take its time or fails, which [`read`](Self::read) is for.
    pub(super) fn read_cached(&self, key: Key, offset: u32, length: u32) -> Option<Contents> {
        let _file = self.try_share_file(key)?;
        self.read_shared(key, offset, length, Mode::ReadCached).ok()
    }

    /// The caller shares the file lock.
    fn read_shared(&self, key: Key, offset: u32, length: u32, mode: Mode) -> Result<Contents, ChunkError> {
        self.poison.check()?;
        let first = offset / BLOCK_SIZE;
        let Some(mut view) = self.view(key, first..blocks(offset.saturating_add(length)), mode) else {
            return Ok(Contents::new(Version::NONE, Bytes::new()));
        };
        if view.entry.is_damaged() {
            return Err(damaged(key.1));
        }
        let end = offset.saturating_add(length).min(view.entry.length);
        if offset >= end {
            return Ok(Contents::new(view.entry.version, Bytes::new()));
        }
        let last = blocks(end);
        view.pending.retain(|(index, _)| *index < last);
        let buffer = Bytes::from(self.read_view(key, &view, first, last)?);
        let skip = (offset % BLOCK_SIZE) as usize;
        let data = buffer.slice(skip..skip + (end - offset) as usize);
        Ok(Contents::new(view.entry.version, data))
    }

    pub(super) fn version(&self, key: Key) -> Result<Version, ChunkError> {
        self.poison.check()?;
        match self.state().entry(key) {
            None => Ok(Version::NONE),
            Some(entry) if entry.is_damaged() => Err(damaged(key.1)),
            Some(entry) => Ok(entry.version),
        }
    }

    pub(super) fn list(&self, rs: ReplicaSetId) -> Result<Vec<ChunkSummary>, ChunkError> {
        self.poison.check()?;
        let mut list: Vec<_> = self
            .state()
            .chunks(rs)
            .map(|(chunk, entry)| ChunkSummary {
                chunk,
                version: entry.version,
                length: entry.length,
            })
            .collect();
        list.sort_unstable_by_key(|summary| summary.chunk);
        Ok(list)
    }

    pub(super) fn volumes(&self) -> Result<Vec<VolumeId>, ChunkError> {
        self.poison.check()?;
        let state = self.state();
        let ids: BTreeSet<_> = state
            .sets()
            .flat_map(|(_, set)| set.keys().map(|chunk| chunk.volume))
            .collect();
        Ok(ids.into_iter().collect())
    }

    pub(super) fn replica_sets(&self) -> Result<Vec<ReplicaSetId>, ChunkError> {
        self.poison.check()?;
        let ids: BTreeSet<_> = self.state().sets().map(|(rs, _)| rs).collect();
        Ok(ids.into_iter().collect())
    }

    pub(super) fn usage(&self) -> Result<Usage, ChunkError> {
        let space = self.space()?;
        let taken = self.state().overlay_cost() + self.limits.headroom;
        Ok(Usage {
            capacity: space.capacity,
            used: space.capacity - space.free,
            available: space.available.saturating_sub(taken),
        })
    }
}

fn damaged(chunk: ChunkId) -> ChunkError {
    ChunkError::Corrupt {
        chunk,
        reason: "its header is damaged or its file is missing".into(),
    }
}
