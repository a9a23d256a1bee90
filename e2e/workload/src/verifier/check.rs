//! The judgement when all is over.

use super::content::SLOT;
use super::data::{DataFile, SLOTS, offset};
use super::files::{data_folder, names_folder, path_of_data, read_at, walk};
use super::journal::{Model, replay, workers};
use super::logs::{judge_appended, judge_locked};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// What [`check`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// What is lost, back from the dead, torn, doubled or of nobody. Empty if all is well.
    pub problems: Vec<String>,
    /// Names and data files that were looked at.
    pub files: usize,
    /// Records of the shared logs that must be there.
    pub records: usize,
    /// Operations on names whose outcome nobody knows.
    pub doubts: usize,
}

/// Compares a volume with a model. Nothing may write meanwhile.
pub fn check(mount: &Path, model: &Path, chunk: u64) -> Result<Checked> {
    let mut models: BTreeMap<u32, Model> = BTreeMap::new();
    for worker in workers(model)? {
        models.insert(worker, replay(model, worker, chunk)?);
    }
    let mut checked = Checked::default();
    for (worker, model) in &mut models {
        let folder = names_folder(mount, *worker);
        let found = walk(&folder).with_context(|| format!("list {}", folder.display()))?;
        let prefixed = |problem: String| format!("worker {worker}: {problem}");
        checked
            .problems
            .extend(model.tree.judge(&found).into_iter().map(prefixed));
        checked.files += found.len() + model.data.len();
        checked.doubts += model.tree.doubts.len();
        checked.records += model.appended.values().filter(|record| record.sure).count();
        checked.records += model.locked.values().flatten().count();
        let problems = data_files(mount, *worker, model, chunk)?;
        checked.problems.extend(problems.into_iter().map(prefixed));
    }
    checked.problems.extend(judge_appended(mount, chunk, &models)?);
    checked.problems.extend(judge_locked(mount, chunk, &models)?);
    Ok(checked)
}

fn data_files(mount: &Path, worker: u32, model: &mut Model, chunk: u64) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for (id, data) in &mut model.data {
        let path = path_of_data(mount, worker, *id);
        match (File::open(&path), data.exists) {
            (Ok(_), Some(false)) => problems.push(format!("data file {id} is back")),
            (Ok(file), _) => {
                let found = data_file(&file, *id, data, chunk).with_context(|| format!("read {}", path.display()))?;
                problems.extend(found.into_iter().map(|problem| format!("data file {id}: {problem}")));
            }
            (Err(error), Some(true)) if error.kind() == io::ErrorKind::NotFound => {
                problems.push(format!("data file {id} is lost"));
            }
            (Err(error), _) if error.kind() == io::ErrorKind::NotFound => {}
            (Err(error), _) => return Err(error).with_context(|| format!("open {}", path.display())),
        }
    }
    let folder = data_folder(mount, worker);
    for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let id = name.strip_prefix('f').and_then(|id| id.parse().ok());
        if id.is_none_or(|id: u64| !model.data.contains_key(&id)) {
            problems.push(format!("data file {name} was never made"));
        }
    }
    Ok(problems)
}

fn data_file(file: &File, id: u64, data: &mut DataFile, chunk: u64) -> io::Result<Vec<String>> {
    let mut problems = Vec::new();
    let size = file.metadata()?.len();
    if let Some(expected) = data.size().filter(|expected| *expected != size) {
        problems.push(format!("{size} bytes, expected {expected}"));
    }
    let mut end = 0;
    for slot in 0..SLOTS {
        let start = offset(chunk, slot);
        // Beside the regions there is nothing.
        for gap in [end, start.saturating_sub(SLOT as u64)] {
            let between = (end..start).contains(&gap);
            if between && read_at(file, gap, SLOT)?.iter().any(|byte| *byte != 0) {
                problems.push(format!("bytes after {gap} were never written"));
            }
        }
        end = start + SLOT as u64;
        let found = read_at(file, start, SLOT)?;
        let floors = data.floors(slot..slot + 1, false, true);
        problems.extend(data.judge(id, &floors, &found).err());
    }
    Ok(problems)
}
