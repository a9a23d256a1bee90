use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes of a record.
const RECORD: usize = 4096;
/// Files that the records go to in turn: on several replica sets, so that each of them is in use all
/// the time.
const FILES: u64 = 8;

/// What a steady writer did. Times in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Records whose fsync returned success.
    pub acknowledged: u64,
    /// Errors that the writer got, as text.
    pub errors: Vec<String>,
    /// Longest time of one record: write, fsync and rename.
    pub longest_ms: u64,
    /// Median time of one record.
    pub median_ms: u64,
}

/// Writes numbered records in `dir`, one after the other, each followed by fsync, and for every
/// 16th also creates and renames a file, until `stop` returns true. Never gives up on an error: it
/// is reported and the next record is tried.
pub fn steady(dir: &Path, mut stop: impl FnMut() -> bool) -> Result<Report> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let mut report = Report::default();
    let mut times = Vec::new();
    let options = OpenOptions::new().create(true).truncate(false).write(true).clone();
    let files = open_files(dir, &options)?;
    let mut number = 0;
    while !stop() {
        let started = Instant::now();
        match write(dir, number, &files) {
            Ok(()) => report.acknowledged = number + 1,
            Err(error) => {
                report.errors.push(format!("record {number}: {error:#}"));
                // A record that was refused leaves a hole that `verify` would take for a loss.
                break;
            }
        }
        times.push(started.elapsed());
        number += 1;
    }
    times.sort();
    let millis = |time: Option<&Duration>| time.map_or(0, |time| time.as_millis() as u64);
    report.longest_ms = millis(times.last());
    report.median_ms = millis(times.get(times.len() / 2));
    Ok(report)
}

fn open_files(dir: &Path, options: &OpenOptions) -> Result<Vec<File>> {
    let open = |index| {
        let path = dir.join(format!("data-{index}"));
        options.open(&path).with_context(|| format!("open {}", path.display()))
    };
    (0..FILES).map(open).collect()
}

/// The file that holds a record, and the record's offset in it.
fn place(files: &[File], number: u64) -> (&File, u64) {
    (&files[(number % FILES) as usize], number / FILES * RECORD as u64)
}

fn write(dir: &Path, number: u64, files: &[File]) -> Result<()> {
    let (file, offset) = place(files, number);
    file.write_all_at(&record(number), offset).context("write")?;
    file.sync_all().context("fsync")?;
    if number.is_multiple_of(16) {
        let (new, final_path) = marker_paths(dir, number);
        File::create_new(&new).context("create")?;
        fs::rename(&new, &final_path).context("rename")?;
    }
    Ok(())
}

/// Checks that everything is there that [`steady`] was told is safe.
pub fn verify(dir: &Path, acknowledged: u64) -> Result<()> {
    let files = open_files(dir, OpenOptions::new().read(true))?;
    let mut found = vec![0; RECORD];
    for number in 0..acknowledged {
        let (file, offset) = place(&files, number);
        file.read_exact_at(&mut found, offset)
            .with_context(|| format!("read record {number}"))?;
        ensure!(found == record(number), "record {number} is damaged");
        if number.is_multiple_of(16) {
            let (new, final_path) = marker_paths(dir, number);
            ensure!(final_path.exists(), "file {} is lost", final_path.display());
            ensure!(!new.exists(), "file {} is back", new.display());
        }
    }
    Ok(())
}

fn marker_paths(dir: &Path, number: u64) -> (PathBuf, PathBuf) {
    (dir.join(format!("new-{number}")), dir.join(format!("marker-{number}")))
}

/// Content that tells its number in every 8 bytes.
fn record(number: u64) -> Vec<u8> {
    let word = |at: u64| (number << 16 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    (0..RECORD as u64 / 8).flat_map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_acknowledged_is_verified() {
        let dir = tempfile::tempdir().unwrap();
        let mut left = 300;
        let report = steady(dir.path(), || {
            left -= 1;
            left < 0
        })
        .unwrap();
        assert_eq!((report.acknowledged, report.errors.len()), (300, 0));
        verify(dir.path(), 300).unwrap();
        assert!(verify(dir.path(), 301).is_err());
        fs::remove_file(dir.path().join("marker-16")).unwrap();
        assert!(verify(dir.path(), 300).unwrap_err().to_string().contains("marker-16"));
        verify(dir.path(), 16).unwrap();
        let data = OpenOptions::new().write(true).open(dir.path().join("data-5")).unwrap();
        data.write_all_at(b"?", RECORD as u64 + 17).unwrap();
        assert!(verify(dir.path(), 16).unwrap_err().to_string().contains("record 13"));
    }
}
