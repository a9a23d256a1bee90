//! The two logs that all workers append to.

use super::content::{RECORD, record_of};
use super::files::{path_of_log, read_at, shared_folder};
use super::journal::Model;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// The logs begin a little before a chunk's border, so that they soon go across it.
fn before_border(chunk: u64, bytes: u64) -> u64 {
    chunk - bytes
}

/// Where the first appended record is.
pub(super) fn append_start(chunk: u64) -> u64 {
    before_border(chunk, 10_100)
}

/// Where a record of the locked log is. Its first eight bytes are the number of records.
pub(super) fn locked_place(chunk: u64, number: u64) -> u64 {
    before_border(chunk, 1_100) + number * RECORD as u64
}

pub(super) const APPENDED: &str = "appended";
pub(super) const LOCKED: &str = "locked";

/// Makes the logs, unless another process has.
pub(super) fn prepare(mount: &Path, worker: u32, chunk: u64) -> Result<()> {
    let folder = shared_folder(mount);
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    for (name, size) in [(APPENDED, append_start(chunk)), (LOCKED, 8)] {
        let new = folder.join(format!("{name}-{worker}"));
        let file = File::create(&new).with_context(|| format!("create {}", new.display()))?;
        file.set_len(size)?;
        file.sync_all()?;
        match fs::hard_link(&new, path_of_log(mount, name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("create {name}"));
            }
            _ => fs::remove_file(&new)?,
        }
    }
    Ok(())
}

/// What this process knows about the locked log.
#[derive(Debug, Default)]
pub(super) struct Locked {
    /// Records that are acknowledged, at least.
    pub(super) count: u64,
    /// Whose record is acknowledged at a place.
    places: BTreeMap<u64, (u32, u64)>,
}

impl Locked {
    /// A worker's record was acknowledged at a place, which must be its alone.
    pub(super) fn acknowledged(&mut self, place: u64, worker: u32, seq: u64) -> Result<(), String> {
        self.count = self.count.max(place + 1);
        match self.places.insert(place, (worker, seq)) {
            None => Ok(()),
            Some((other, before)) => Err(format!(
                "locked log: place {place} was given to worker {other} for {before} and to worker {worker} for {seq}"
            )),
        }
    }
}

/// Judges the log of O_APPEND. The models are by worker.
pub(super) fn judge_appended(mount: &Path, chunk: u64, models: &BTreeMap<u32, Model>) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let (start, file) = (append_start(chunk), open(mount, APPENDED)?);
    let size = file.metadata()?.len();
    let content = read_at(&file, start, size.saturating_sub(start) as usize)?;
    if size < start || content.len() % RECORD != 0 {
        problems.push(format!("appended log: {size} bytes are no whole records"));
    }
    let mut last: BTreeMap<u32, u64> = BTreeMap::new();
    let mut found: BTreeMap<(u32, u64), u64> = BTreeMap::new();
    for (number, record) in content.chunks_exact(RECORD).enumerate() {
        match whose(record, models, |model, seq| model.appended.contains_key(&seq)) {
            Err(problem) => problems.push(format!("appended log: record {number} {problem}")),
            Ok((worker, seq)) => {
                *found.entry((worker, seq)).or_default() += 1;
                if last.insert(worker, seq).is_some_and(|before| before >= seq) {
                    problems.push(format!(
                        "appended log: record {number}, {seq} of worker {worker}, comes too late or twice"
                    ));
                }
            }
        }
    }
    for (worker, model) in models {
        let sure = model.appended.iter().filter(|(_, record)| record.sure);
        for (seq, _) in sure.filter(|(seq, _)| !found.contains_key(&(*worker, **seq))) {
            problems.push(format!("appended log: record {seq} of worker {worker} is lost"));
        }
    }
    Ok(problems)
}

/// Judges the log that is written under flock.
pub(super) fn judge_locked(mount: &Path, chunk: u64, models: &BTreeMap<u32, Model>) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let file = open(mount, LOCKED)?;
    let count = count(&file)?;
    let mut places: BTreeMap<(u32, u64), u64> = BTreeMap::new();
    for place in 0..count {
        let record = read_at(&file, locked_place(chunk, place), RECORD)?;
        match whose(&record, models, |model, seq| model.locked.contains_key(&seq)) {
            Err(problem) => problems.push(format!("locked log: record {place} {problem}")),
            Ok(writer) => {
                if let Some(before) = places.insert(writer, place) {
                    problems.push(format!("locked log: record {place} is also record {before}"));
                }
            }
        }
    }
    for (worker, model) in models {
        for (seq, place) in &model.locked {
            let found = places.get(&(*worker, *seq)).copied();
            if place.is_some() && found != *place {
                problems.push(format!(
                    "locked log: record {seq} of worker {worker} is at {found:?} of {count}, expected {place:?}"
                ));
            }
        }
    }
    Ok(problems)
}

/// The number of records in the locked log.
pub(super) fn count(file: &File) -> io::Result<u64> {
    let count = read_at(file, 0, 8)?;
    Ok(u64::from_le_bytes(count.try_into().unwrap_or_default()))
}

fn whose(
    record: &[u8],
    models: &BTreeMap<u32, Model>,
    issued: impl Fn(&Model, u64) -> bool,
) -> Result<(u32, u64), String> {
    let (writer, seq) = record_of(record)?;
    let worker = (writer - 1) as u32;
    match models.get(&worker) {
        Some(model) if issued(model, seq) => Ok((worker, seq)),
        _ => Err(format!("is {seq} of worker {worker}, which was never written")),
    }
}

fn open(mount: &Path, name: &str) -> Result<File> {
    let path = path_of_log(mount, name);
    File::open(&path).with_context(|| format!("open {}", path.display()))
}
