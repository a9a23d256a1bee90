use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

/// What [`check_appended`] found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appended {
    /// Complete lines.
    pub lines: u64,
    /// Writers seen.
    pub writers: u64,
}

/// Appends `lines` numbered lines to a log that other writers append to as well, each line under
/// an exclusive flock of its own. Lines differ in length, so that a torn one shows.
pub fn append(log: &Path, writer: &str, lines: u64) -> Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("open {}", log.display()))?;
    for number in 0..lines {
        flock(&file, FlockOperation::LockExclusive).context("lock")?;
        let filler = "x".repeat((number * 37 % 200) as usize);
        // One write: whether two of it are one after the other is what is tested.
        let line = format!("{writer} {number} {} {filler}\n", filler.len());
        file.write_all(line.as_bytes()).context("append")?;
        flock(&file, FlockOperation::Unlock).context("unlock")?;
    }
    file.sync_all().context("fsync")
}

/// Checks that a log holds `lines` lines of each of `writers` writers, each writer's in order,
/// none lost, doubled or torn.
pub fn check_appended(log: &Path, writers: u64, lines: u64) -> Result<Appended> {
    let file = File::open(log).with_context(|| format!("open {}", log.display()))?;
    let mut next: BTreeMap<String, u64> = BTreeMap::new();
    let mut found = 0;
    for (at, line) in BufReader::new(file).lines().enumerate() {
        let line = line.with_context(|| format!("line {}", at + 1))?;
        let fields: Vec<_> = line.splitn(4, ' ').collect();
        let [writer, number, length, filler] = fields[..] else {
            anyhow::bail!("line {} is torn: {line:?}", at + 1);
        };
        ensure!(
            length.parse() == Ok(filler.len()) && filler.bytes().all(|b| b == b'x'),
            "line {} is torn: {line:?}",
            at + 1
        );
        let expected = next.entry(writer.to_owned()).or_default();
        ensure!(
            number.parse() == Ok(*expected),
            "line {}: writer {writer} has {number}, expected {expected}",
            at + 1
        );
        *expected += 1;
        found += 1;
    }
    ensure!(
        next.len() as u64 == writers,
        "lines of {} writers, expected {writers}",
        next.len()
    );
    for (writer, count) in &next {
        ensure!(*count == lines, "writer {writer} has {count} lines, expected {lines}");
    }
    Ok(Appended { lines: found, writers })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_take_turns_and_damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::thread::scope(|scope| {
            for writer in ["a", "b"] {
                let log = &log;
                scope.spawn(move || append(log, writer, 50).unwrap());
            }
        });
        assert_eq!(check_appended(&log, 2, 50).unwrap().lines, 100);
        assert!(check_appended(&log, 3, 50).is_err());

        let text = std::fs::read_to_string(&log).unwrap();
        std::fs::write(&log, text.replacen("b 7 ", "b 8 ", 1)).unwrap();
        assert!(check_appended(&log, 2, 50).is_err());
        std::fs::write(&log, &text[..text.len() - 3]).unwrap();
        assert!(check_appended(&log, 2, 50).is_err());
    }
}
