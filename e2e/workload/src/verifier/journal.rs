//! The model's memory: what was issued and what was answered, outside the volume.
//!
//! A line is written before an operation is issued and after it was answered. So whatever is killed
//! when, the file tells what was acknowledged and what is in doubt.

use super::data::{DataFile, DataFiles};
use super::names::Tree;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// An operation, with all that its outcome depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Step {
    /// Creates data file `id`, which `mount` then writes.
    Make { id: u64, mount: usize },
    /// Writes slots `first..end`.
    Write { id: u64, first: u32, end: u32, seq: u64 },
    /// fsync of a data file.
    Sync { id: u64 },
    /// Sets a data file's size.
    Truncate { id: u64, size: u64 },
    /// fsync, after which another mount writes.
    HandOver { id: u64, mount: usize },
    /// Removes data file `id`.
    Drop { id: u64 },
    /// Appends a record with O_APPEND through `mount`.
    Append { seq: u64, mount: usize },
    /// fsync of the appended log through `mount`.
    SyncLog { mount: usize },
    /// Appends a record at the counted end of the locked log.
    Locked { seq: u64 },
    /// Creates a small file.
    Create { path: String, id: u64 },
    /// Creates a folder.
    Mkdir { path: String, id: u64 },
    /// Removes a name.
    Unlink { path: String },
    /// Removes a folder.
    Rmdir { path: String },
    /// Renames, replacing what is there.
    Rename { from: String, to: String },
    /// Adds a name.
    Link { from: String, to: String },
    /// No operation: the mount was lost with what it had not made durable.
    Lost { mount: usize },
}

/// A line of the journal.
#[derive(Debug, Serialize, Deserialize)]
enum Line {
    Do(Step),
    /// Done; with the record's place in the locked log.
    Done(u64),
    /// The error number.
    Failed(i32),
}

/// What one worker's acknowledged and doubtful operations amount to.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    chunk: u64,
    pub(super) data: DataFiles,
    pub(super) tree: Tree,
    pub(super) appended: BTreeMap<u64, Appended>,
    /// Records of the locked log: their place, if acknowledged.
    pub(super) locked: BTreeMap<u64, Option<u64>>,
    /// The highest number or id given to anything.
    pub(super) last: u64,
}

/// An appended record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Appended {
    mount: usize,
    /// Whether it must be there. Else it may be.
    pub(super) sure: bool,
    durable: bool,
}

impl Model {
    pub(super) fn new(chunk: u64) -> Self {
        Self {
            chunk,
            ..Self::default()
        }
    }

    /// An operation is about to be issued.
    pub(super) fn begin(&mut self, step: &Step) {
        match step {
            Step::Make { id, mount } => {
                self.data.insert(*id, DataFile::new(*mount, self.chunk));
            }
            Step::Write { id, first, end, seq } => {
                self.file(*id, |file| file.write_issued(*first..*end, *seq));
            }
            Step::Truncate { id, size } => self.file(*id, |file| file.truncate_issued(*size)),
            Step::Drop { id } => self.file(*id, |file| file.exists = None),
            Step::Append { seq, mount } => {
                let record = Appended {
                    mount: *mount,
                    sure: false,
                    durable: false,
                };
                self.appended.insert(*seq, record);
            }
            Step::Locked { seq } => {
                self.locked.insert(*seq, None);
            }
            _ => {}
        }
        self.last = self.last.max(step.number());
    }

    /// It was answered; `place` is the record's in the locked log. An answer that never came is a
    /// failure.
    pub(super) fn end(&mut self, step: &Step, place: Option<u64>) {
        let ok = place.is_some();
        match step {
            Step::Make { id, .. } => self.file(*id, |file| file.exists = ok.then_some(true)),
            Step::Write { id, first, end, .. } => self.file(*id, |file| file.write_answered(*first..*end, ok)),
            Step::Sync { id } => self.file(*id, |file| file.sync_answered(ok)),
            Step::HandOver { id, mount } => self.file(*id, |file| {
                file.sync_answered(ok);
                if ok {
                    file.mount = *mount;
                }
            }),
            Step::Truncate { id, size } => self.file(*id, |file| file.truncate_answered(*size, ok)),
            Step::Drop { id } => self.file(*id, |file| file.exists = ok.then_some(false)),
            Step::Append { seq, mount } => {
                if let Some(record) = self.appended.get_mut(seq) {
                    record.sure = ok;
                }
                if !ok {
                    self.log_synced(*mount, false);
                }
            }
            Step::SyncLog { mount } => self.log_synced(*mount, ok),
            Step::Locked { seq } => {
                self.locked.insert(*seq, place);
            }
            Step::Lost { mount } => {
                self.log_synced(*mount, false);
                for file in self.data.values_mut().filter(|file| file.mount == *mount) {
                    file.mount_lost();
                }
            }
            _ => self.tree.end(step, ok),
        }
    }

    fn file(&mut self, id: u64, change: impl FnOnce(&mut DataFile)) {
        if let Some(file) = self.data.get_mut(&id) {
            change(file);
        }
    }

    fn log_synced(&mut self, mount: usize, ok: bool) {
        for record in self
            .appended
            .values_mut()
            .filter(|record| record.mount == mount && !record.durable)
        {
            record.durable = ok && record.sure;
            record.sure &= ok;
        }
    }
}

impl Step {
    /// The number or id that the step uses up.
    fn number(&self) -> u64 {
        match self {
            Self::Make { id, .. } | Self::Create { id, .. } | Self::Mkdir { id, .. } => *id,
            Self::Write { seq, .. } | Self::Append { seq, .. } | Self::Locked { seq } => *seq,
            _ => 0,
        }
    }
}

/// The journal of one worker.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
}

impl Journal {
    pub(super) fn open(folder: &Path, worker: u32) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let path = path(folder, worker);
        let options = OpenOptions::new().create(true).append(true).clone();
        let file = options
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        Ok(Self { file })
    }

    pub(super) fn begin(&mut self, step: &Step) -> Result<()> {
        self.line(&Line::Do(step.clone()))
    }

    pub(super) fn end(&mut self, outcome: Result<u64, i32>) -> Result<()> {
        self.line(&outcome.map_or_else(Line::Failed, Line::Done))
    }

    fn line(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        // One write: nothing but the end of the file can be cut off.
        self.file.write_all(text.as_bytes()).context("write the model")
    }
}

fn path(folder: &Path, worker: u32) -> PathBuf {
    folder.join(format!("worker-{worker}.jsonl"))
}

/// The workers that have a journal in the folder.
pub(super) fn workers(folder: &Path) -> Result<Vec<u32>> {
    let mut workers = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("read the model in {}", folder.display()))? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let number = name
            .strip_prefix("worker-")
            .and_then(|name| name.strip_suffix(".jsonl"));
        workers.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    workers.sort_unstable();
    Ok(workers)
}

/// The model of a worker, from its journal; empty if it has none.
pub(super) fn replay(folder: &Path, worker: u32, chunk: u64) -> Result<Model> {
    let mut model = Model::new(chunk);
    let path = path(folder, worker);
    let file = match File::open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(model),
        file => file.with_context(|| format!("open {}", path.display()))?,
    };
    let mut open: Option<Step> = None;
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line?;
        match (serde_json::from_str(&line), open.take()) {
            (Ok(Line::Do(step)), before) => {
                // A worker that was killed and started again.
                if let Some(before) = before {
                    model.end(&before, None);
                }
                model.begin(&step);
                open = Some(step);
            }
            (Ok(Line::Done(place)), Some(step)) => model.end(&step, Some(place)),
            (Ok(Line::Failed(_)), Some(step)) => model.end(&step, None),
            _ => bail!("{} is damaged in line {}", path.display(), number + 1),
        }
    }
    if let Some(step) = open {
        model.end(&step, None);
    }
    Ok(model)
}
