//! Changes of one chunk's bytes: through the log, or to a file first and then to the log.

use super::disk::{DiskFile, Mode};
use super::engine::{BLOCK, Engine};
use super::format::{
    HEADER_BYTES, Header, Key, STAGING, block_offset, block_sum, blocks, chunk_path, staging_path, volume_dir,
};
use super::record::{BLOCK_OVERHEAD, Block, ChangeRecord, RECORD_OVERHEAD, Record, ReplaceRecord};
use super::state::Entry;
use crate::chunk::{BLOCK_SIZE, ChunkError, Part, Parts, admit_install};
use bytes::Bytes;
use lazarette_types::Version;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// Whole blocks that follow each other: the number of the first one, and their bytes.
type Run = (u32, Bytes);

/// How many blocks a write changes.
pub(super) fn touched(parts: &Parts) -> u64 {
    let mut next = 0;
    let mut count = 0;
    for part in parts.iter() {
        let first = next.max(part.offset / BLOCK_SIZE);
        next = blocks(part.end());
        count += u64::from(next.saturating_sub(first));
    }
    count
}

/// Upper bound of the record of a change of so many blocks, all of them in it.
pub(super) fn record_bytes(blocks: u64) -> u64 {
    RECORD_OVERHEAD + blocks * (u64::from(BLOCK_SIZE) + BLOCK_OVERHEAD)
}

impl Engine {
    /// Makes a write. The caller has the chunk's change lock and room for [`record_bytes`] in the log.
    pub(super) fn write(
        &self,
        key: Key,
        entry: Option<Entry>,
        version: Version,
        parts: &Parts,
    ) -> Result<(), ChunkError> {
        let old = entry.map_or(0, |e| e.length);
        let length = old.max(parts.end());
        let touched = touched(parts);
        self.check_space((touched + 2) * u64::from(BLOCK_SIZE))?;
        if let Some(entry) = entry
            && self.extends(key, old, parts)
        {
            return self.extend(key, entry, version, parts);
        }
        let most = parts.bytes() >= self.limits.direct && parts.bytes() >= length as usize / 2;
        if most || record_bytes(touched) > self.log.max_record() {
            let all = parts.touch() && parts[0].offset == 0 && parts.end() == length;
            let old = if all { 0 } else { old };
            let runs = self.complete(key, old, self.compose(key, old, parts)?)?;
            return self.replace(key, entry, version, length, &runs);
        }
        let runs = self.compose(key, old, parts)?;
        let blocks = runs.iter().flat_map(images).collect();
        self.commit_change(key, entry, version, length, blocks)
    }

    /// The whole blocks that parts change, as they will be, in order. What is whole already shares the
    /// parts' memory.
    fn compose(&self, key: Key, old: u32, parts: &[Part]) -> Result<Vec<Run>, ChunkError> {
        let mut runs = Vec::new();
        // Pieces of blocks, with their place in the block.
        let mut pieces: BTreeMap<u32, Vec<(usize, &[u8])>> = BTreeMap::new();
        for part in parts {
            let end = part.end();
            let head = part.offset.next_multiple_of(BLOCK_SIZE).min(end);
            let tail = (end / BLOCK_SIZE * BLOCK_SIZE).max(head);
            let range = |from: u32, to: u32| (from - part.offset) as usize..(to - part.offset) as usize;
            for (from, to) in [(part.offset, head), (tail, end)] {
                if from < to {
                    let piece = ((from % BLOCK_SIZE) as usize, &part.data[range(from, to)]);
                    pieces.entry(from / BLOCK_SIZE).or_default().push(piece);
                }
            }
            if head < tail {
                runs.push((head / BLOCK_SIZE, part.data.slice(range(head, tail))));
            }
        }
        let needed: Vec<u32> = pieces
            .iter()
            .filter(|(index, pieces)| {
                // Of what is there, something may be left.
                let kept = old.saturating_sub(**index * BLOCK_SIZE).min(BLOCK_SIZE) as usize;
                kept > 0 && !matches!(pieces[..], [(0, piece)] if piece.len() >= kept)
            })
            .map(|(index, _)| *index)
            .collect();
        let mut present = self.read_scattered(key, &needed)?;
        for (index, pieces) in pieces {
            let mut block = present.remove(&index).unwrap_or_else(|| vec![0; BLOCK]);
            for (at, piece) in pieces {
                block[at..at + piece.len()].copy_from_slice(piece);
            }
            runs.push((index, block.into()));
        }
        runs.sort_unstable_by_key(|(first, _)| *first);
        Ok(runs)
    }

    /// Adds the other blocks of a chunk of this length.
    fn complete(&self, key: Key, length: u32, runs: Vec<Run>) -> Result<Vec<Run>, ChunkError> {
        let mut whole = Vec::with_capacity(2 * runs.len() + 1);
        let mut next = 0;
        // The last one stands for the end.
        for (first, data) in runs.into_iter().chain([(u32::MAX, Bytes::new())]) {
            let gap_end = first.min(blocks(length));
            if next < gap_end {
                whole.push((next, self.read_blocks(key, next, gap_end)?.into()));
            }
            next = first.saturating_add((data.len() / BLOCK) as u32);
            if !data.is_empty() {
                whole.push((first, data));
            }
        }
        Ok(whole)
    }

    /// Whether a write does little but continue the chunk, by so much that it should go to the file.
    fn extends(&self, key: Key, old: u32, parts: &Parts) -> bool {
        let (first, last) = (parts[0].offset / BLOCK_SIZE, blocks(parts.end()));
        let old = blocks(old);
        parts.touch()
            && first <= old
            && first + 1 >= old
            && (last - first.max(old)) as usize * BLOCK >= self.limits.direct
            && self.is_extendable(key)
    }

    /// Whether the chunk's file durably exists, so that blocks may be put behind the chunk's end.
    fn is_extendable(&self, key: Key) -> bool {
        let state = self.state();
        state.overlay(key).is_none_or(|o| !o.fresh)
    }

    /// Puts the blocks that lie beyond the chunk's present ones into its file, where nobody looks
    /// before the record says so; only the first block, if the chunk ends within it, is logged.
    fn extend(&self, key: Key, entry: Entry, version: Version, parts: &Parts) -> Result<(), ChunkError> {
        let direct = blocks(entry.length);
        let mut list = Vec::new();
        let mut beyond = Vec::new();
        for (first, data) in self.compose(key, entry.length, parts)? {
            let logged = (direct.saturating_sub(first) as usize * BLOCK).min(data.len());
            // Copied: it may stay in memory for long, and must not keep all of the write there.
            let block = Bytes::copy_from_slice(&data[..logged]);
            list.extend(images(&(first, block)));
            let (first, data) = (first.max(direct), data.slice(logged..));
            let sums = data.chunks_exact(BLOCK).map(|block| Block::InFile(block_sum(block)));
            list.extend((first..).zip(sums));
            beyond.push((first, data));
        }
        let doing = "writing a chunk file";
        let file = self
            .disk
            .open(&chunk_path(key, entry.file), Mode::Write)
            .map_err(|error| self.missing(key, doing, &error))?;
        if let Err(error) = write_runs(&*file, &beyond) {
            // Gives the room back; what stays is beyond the chunk's end and counts for nothing.
            let _ = file.set_len(block_offset(blocks(entry.length)));
            return Err(self.failed(doing, &error));
        }
        file.sync()
            .map_err(|error| self.poison.set("syncing a chunk file", &error))?;
        let length = entry.length.max(parts.end());
        self.commit_change(key, Some(entry), version, length, list)
    }

    /// Commits that a chunk has this length and these blocks from now on; a new one gets a file.
    fn commit_change(
        &self,
        key: Key,
        entry: Option<Entry>,
        version: Version,
        length: u32,
        blocks: Vec<(u32, Block)>,
    ) -> Result<(), ChunkError> {
        self.commit(Record::Change(ChangeRecord {
            key,
            version,
            length,
            previous_length: entry.map_or(0, |e| e.length),
            file: entry.map_or_else(|| self.new_file(), |e| e.file),
            fresh: entry.is_none(),
            blocks,
        }))
    }

    pub(super) fn truncate(
        &self,
        key: Key,
        entry: Option<Entry>,
        version: Version,
        length: u32,
    ) -> Result<(), ChunkError> {
        let old = entry.map_or(0, |e| e.length);
        let length = length.min(old);
        let within = (length % BLOCK_SIZE) as usize;
        let mut list = Vec::new();
        if length < old && within != 0 {
            let index = length / BLOCK_SIZE;
            let mut block = self.read_blocks(key, index, index + 1)?;
            block[within..].fill(0);
            list.push((index, Block::Image(block.into())));
        }
        self.commit_change(key, entry, version, length, list)
    }

    /// Writes a whole chunk into a new file, which then takes the place of the old. Blocks that are in no
    /// run are zeros; the last one is in a run.
    fn replace(
        &self,
        key: Key,
        old: Option<Entry>,
        version: Version,
        length: u32,
        runs: &[Run],
    ) -> Result<(), ChunkError> {
        let file = self.new_file();
        self.check_space(u64::from(length) + 3 * u64::from(BLOCK_SIZE))?;
        let staged = staging_path(file);
        let header = Header {
            rs: key.0,
            chunk: key.1,
            version,
            length,
        };
        if let Err(error) = self.stage(key, &staged, &header, runs) {
            let _ = self.disk.remove_file(&staged);
            return Err(error);
        }
        let record = Record::Replace(ReplaceRecord {
            key,
            version,
            length,
            file,
        });
        let durable = match self.log.append(&record) {
            Ok(durable) => durable,
            Err(error) => {
                // After any other failure the record may yet be found in the log.
                if matches!(error, ChunkError::NoSpace) {
                    let _ = self.disk.remove_file(&staged);
                }
                return Err(error);
            }
        };
        let _file = self.lock_file(key);
        self.state().redo(record, durable.lsn);
        self.disk
            .rename(&staged, &chunk_path(key, file))
            .map_err(|error| self.poison.set("renaming a chunk file", &error))?;
        let dir = volume_dir(key.0, key.1.volume);
        self.state().dirty_dirs.insert(dir);
        match old {
            Some(old) => self.unlink(key, old.file),
            None => Ok(()),
        }
    }

    fn stage(&self, key: Key, path: &str, header: &Header, runs: &[Run]) -> Result<(), ChunkError> {
        let doing = "writing a new chunk file";
        let count = blocks(header.length);
        let write = || -> io::Result<Arc<dyn DiskFile>> {
            self.ensure_dir(key)?;
            let file = self.disk.open(path, Mode::Create)?;
            let mut start = Vec::with_capacity(HEADER_BYTES + count as usize * 4);
            header.encode(&mut start);
            for (first, data) in runs {
                start.resize(HEADER_BYTES + *first as usize * 4, 0);
                for block in data.chunks_exact(BLOCK) {
                    start.extend_from_slice(&block_sum(block).to_le_bytes());
                }
            }
            start.resize(HEADER_BYTES + count as usize * 4, 0);
            file.write_at(&start, 0)?;
            write_runs(&*file, runs)?;
            Ok(file)
        };
        let file = write().map_err(|error| self.failed(doing, &error))?;
        file.sync()
            .and_then(|()| self.disk.sync_dir(STAGING))
            .map_err(|error| self.poison.set("syncing a new chunk file", &error))
    }

    pub(super) fn install(&self, key: Key, version: Version, data: &Bytes, crc: u32) -> Result<(), ChunkError> {
        admit_install(key.1, version, data, crc)?;
        let length = data.len() as u32;
        let bound = record_bytes(u64::from(blocks(length))).min(self.log.max_record());
        let _room = self.reserve(bound)?;
        let _change = self.lock_change(key);
        let old = self.state().entry(key);
        if version == Version::NONE {
            return self.remove(key, old);
        }
        let part = Part {
            offset: 0,
            data: data.clone(),
            crc,
        };
        let runs = if data.is_empty() {
            Vec::new()
        } else {
            self.compose(key, 0, &[part])?
        };
        if data.len() >= self.limits.direct || bound == self.log.max_record() {
            return self.replace(key, old, version, length, &runs);
        }
        if !data.is_empty() {
            self.check_space(data.len() as u64 + 3 * u64::from(BLOCK_SIZE))?;
        }
        let record = Record::Change(ChangeRecord {
            key,
            version,
            length,
            previous_length: 0,
            file: self.new_file(),
            fresh: true,
            blocks: runs.iter().flat_map(images).collect(),
        });
        let durable = self.log.append(&record)?;
        let _file = self.lock_file(key);
        self.state().redo(record, durable.lsn);
        match old {
            Some(old) => self.unlink(key, old.file),
            None => Ok(()),
        }
    }
}

fn write_runs(file: &dyn DiskFile, runs: &[Run]) -> io::Result<()> {
    for (first, data) in runs {
        if !data.is_empty() {
            file.write_at(data, block_offset(*first))?;
        }
    }
    Ok(())
}

/// A run's blocks, sharing its memory.
fn images((first, data): &Run) -> impl Iterator<Item = (u32, Block)> + '_ {
    let count = data.len() / BLOCK;
    let image = |i: usize| Block::Image(data.slice(i * BLOCK..(i + 1) * BLOCK));
    (*first..).zip((0..count).map(image))
}
