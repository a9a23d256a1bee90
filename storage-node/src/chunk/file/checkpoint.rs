//! Folding the log into the chunk files, so that its room can be used again.

use super::disk::{DiskFile, Mode, is_transient};
use super::engine::Engine;
use super::format::{
    FileId, HEADER_BYTES, Header, Key, block_offset, block_sum, blocks, chunk_path, table_offset, volume_dir,
};
use super::log::Lsn;
use super::record::Block;
use super::state::{Entry, Overlay};
use crate::chunk::{BLOCK_SIZE, ChunkError};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

const BLOCK: usize = BLOCK_SIZE as usize;

/// Chunk files that are written and synced together. Everything at once would keep the disk from others for
/// long, and hold a descriptor for each chunk.
const BATCH: usize = 64;

/// Longest single write, in blocks.
const RUN: usize = 256;

/// A chunk file that has been brought up to date, still open.
type Written = (FileId, Arc<dyn DiskFile>);

impl Engine {
    /// Brings the chunk files up to the log and frees the log's room. Changes go on meanwhile.
    ///
    /// If the disk is full, folds what it can and returns [`ChunkError::NoSpace`]; the rest stays
    /// in the log and is tried again next time.
    pub(super) fn checkpoint(&self) -> Result<(), ChunkError> {
        let _one = self.checkpointing.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, full) = self.fold()?;
        self.log.advance(start, self.next_file.load(Ordering::Relaxed))?;
        self.full.store(full, Ordering::Release);
        if full {
            return Err(ChunkError::NoSpace);
        }
        Ok(())
    }

    /// Makes the chunk files hold what the log has; returns where recovery may begin from now on,
    /// and whether the disk was full.
    pub(super) fn fold(&self) -> Result<(Lsn, bool), ChunkError> {
        self.poison.check()?;
        // From here on, what lies before `visible` is in the overlays and in `dirty_dirs`.
        let visible = self.log.visible();
        let keys: Vec<Key> = {
            let state = self.state();
            let overlays = state.overlays().filter(|(_, o)| o.first < visible);
            overlays.map(|(key, _)| key).collect()
        };
        let mut full = false;
        for batch in keys.chunks(BATCH) {
            full |= self.fold_batch(batch, visible)?;
        }
        // Those of removed files, which no batch has.
        self.sync_dirty_dirs()?;
        Ok((self.state().recovery_start(visible), full))
    }

    /// Makes these chunks' files hold what the log has before `visible`; returns whether the disk was full.
    fn fold_batch(&self, keys: &[Key], visible: Lsn) -> Result<bool, ChunkError> {
        let mut full = false;
        let mut written: Vec<(Key, FileId)> = Vec::with_capacity(keys.len());
        let mut open = Vec::with_capacity(keys.len());
        for &key in keys {
            match self.write_back(key) {
                Ok(None) => {}
                Ok(Some((file, handle))) => {
                    written.push((key, file));
                    open.push(handle);
                }
                Err(ChunkError::NoSpace) => full = true,
                Err(error) => return Err(error),
            }
        }
        self.disk.sync_files(&open).map_err(|error| self.unsynced(&error))?;
        self.sync_dirty_dirs()?;
        let mut state = self.state();
        for (key, file) in written {
            state.folded(key, file, visible);
        }
        Ok(full)
    }

    /// Makes the names durable of files that were made and removed until now.
    fn sync_dirty_dirs(&self) -> Result<(), ChunkError> {
        let dirs = std::mem::take(&mut self.state().dirty_dirs);
        for dir in &dirs {
            match self.disk.sync_dir(dir) {
                // Removed since; then its parent is in the list of this or the next checkpoint,
                // and the record of the removal in the log until that.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    self.state().dirty_dirs.extend(dirs);
                    return Err(self.unsynced(&error));
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn unsynced(&self, error: &io::Error) -> ChunkError {
        if is_transient(error) {
            return ChunkError::Io(format!("syncing chunk files: {error}"));
        }
        self.poison.set("syncing chunk files", error)
    }

    /// Writes a chunk's overlay into its file; not durable yet, and reads still use the overlay.
    fn write_back(&self, key: Key) -> Result<Option<Written>, ChunkError> {
        let _change = self.lock_change(key);
        let (entry, overlay) = {
            let state = self.state();
            match (state.entry(key), state.overlay(key)) {
                (Some(entry), Some(overlay)) => (entry, overlay.clone()),
                _ => return Ok(None),
            }
        };
        let _file = self.lock_file(key);
        let file = self
            .write_overlay(key, entry, &overlay)
            .map_err(|error| self.failed("folding the log into a chunk file", &error))?;
        self.state().written(key);
        Ok(Some((entry.file, file)))
    }

    fn write_overlay(&self, key: Key, entry: Entry, overlay: &Overlay) -> io::Result<Arc<dyn DiskFile>> {
        self.ensure_dir(key)?;
        let mode = if overlay.fresh { Mode::Create } else { Mode::Write };
        let file = self.disk.open(&chunk_path(key, entry.file), mode)?;
        if overlay.fresh {
            let dir = volume_dir(key.0, key.1.volume);
            self.state().dirty_dirs.insert(dir);
        }
        let count = blocks(entry.length);
        let keep = if overlay.fresh { 0 } else { overlay.base.min(count) };
        let mut table = vec![0; count as usize * 4];
        file.read_at(&mut table[..keep as usize * 4], table_offset(0))?;

        let mut set = |index: u32, sum: u32| {
            let at = index as usize * 4;
            table[at..at + 4].copy_from_slice(&sum.to_le_bytes());
        };
        let mut runs: Vec<(u32, Vec<u8>)> = Vec::new();
        for (&index, pending) in &overlay.blocks {
            match &pending.block {
                Block::InFile(sum) => set(index, *sum),
                Block::Image(image) => {
                    set(index, block_sum(image));
                    match runs.last_mut() {
                        Some((first, run))
                            if *first as usize + run.len() / BLOCK == index as usize && run.len() < RUN * BLOCK =>
                        {
                            run.extend_from_slice(image);
                        }
                        _ => runs.push((index, image.to_vec())),
                    }
                }
            }
        }
        // What the file has beyond its valid part, and nobody has written since, reads as zeros.
        let length = file.len()?;
        let physical = length.saturating_sub(block_offset(0)).div_ceil(BLOCK as u64);
        for index in overlay.base..count.min(physical as u32) {
            if !overlay.blocks.contains_key(&index) {
                file.write_at(&[0; BLOCK], block_offset(index))?;
            }
        }
        for (index, run) in &runs {
            file.write_at(run, block_offset(*index))?;
        }
        if length != block_offset(count) {
            file.set_len(block_offset(count))?;
        }
        let header = Header {
            rs: key.0,
            chunk: key.1,
            version: entry.version,
            length: entry.length,
        };
        let mut start = Vec::with_capacity(HEADER_BYTES + table.len());
        header.encode(&mut start);
        start.extend_from_slice(&table);
        file.write_at(&start, 0)?;
        Ok(file)
    }

    /// Folds whenever asked, and every `interval`, until told to stop.
    pub(super) fn fold_in_background(&self, interval: std::time::Duration) {
        loop {
            {
                let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
                let idle = |wake: &mut super::engine::Wake| !wake.wanted && !wake.stop;
                let (mut wake, _) = self
                    .woken
                    .wait_timeout_while(wake, interval, idle)
                    .unwrap_or_else(PoisonError::into_inner);
                if wake.stop {
                    return;
                }
                // Whoever asked during the last checkpoint has what it wants.
                let asked = std::mem::take(&mut wake.wanted);
                if asked && !self.wants_checkpoint() && !self.full.load(Ordering::Acquire) {
                    continue;
                }
            }
            let outcome = self.checkpoint();
            self.woken.notify_all();
            match outcome {
                Ok(()) => {}
                Err(ChunkError::Poisoned(_)) => return,
                Err(error) => {
                    tracing::warn!(%error, "the log cannot be folded now");
                    // Full or short of something: another attempt at once would find the same.
                    let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
                    let pause = std::time::Duration::from_millis(200);
                    let going = |wake: &mut super::engine::Wake| !wake.stop;
                    drop(self.woken.wait_timeout_while(wake, pause, going));
                }
            }
        }
    }
}
