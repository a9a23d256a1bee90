//! What must be seen of the volume, whatever happens: acknowledged changes last, nothing stale is seen once a
//! later change is acknowledged or was seen, and everything happens once.
//!
//! The order of events is known, as all clients run in one process: a [`World::moment`] before and after each
//! operation. A change may be seen from before it was begun until the next one has ended; one without a result
//! (its client died, its session ended) may be seen or not, until the next one has ended.

use crate::conditions::World;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

/// Changed by one client at a time.
#[derive(Debug)]
pub(crate) struct Register<T> {
    versions: Vec<Version<T>>,
    /// The oldest version that the reads so far leave possible, and when that was known, each.
    seen: Vec<(u64, usize)>,
}

#[derive(Debug)]
struct Version<T> {
    value: T,
    begun: u64,
    ended: Option<u64>,
}

impl<T: Clone + PartialEq + Debug> Register<T> {
    /// With a value that was always there.
    pub(crate) fn new(value: T) -> Self {
        let (begun, ended) = (0, Some(0));
        Self {
            versions: vec![Version { value, begun, ended }],
            seen: vec![(0, 0)],
        }
    }

    pub(crate) fn begin(&mut self, now: u64, value: T) {
        self.versions.push(Version {
            value,
            begun: now,
            ended: None,
        });
    }

    /// The last change has ended well.
    pub(crate) fn end(&mut self, now: u64) {
        if let Some(last) = self.versions.last_mut() {
            last.ended = Some(now);
        }
    }

    /// The value of the last change, and whether that has ended.
    pub(crate) fn last(&self) -> (T, bool) {
        let last = self.versions.len() - 1;
        (self.versions[last].value.clone(), self.versions[last].ended.is_some())
    }

    /// A read that was begun at `from` and ended at `to`. What it has seen, later reads see, too, or newer.
    pub(crate) fn read(&mut self, from: u64, to: u64, value: &T) -> Result<(), String> {
        let at = self.check(from, to, value)?;
        if self.seen.last().is_none_or(|(_, last)| *last < at) {
            self.seen.push((to, at));
        }
        Ok(())
    }

    /// The same by who has changes that others need not see yet. Gives the oldest version that it may have seen.
    pub(crate) fn check(&self, from: u64, to: u64, value: &T) -> Result<usize, String> {
        let ended = |version: &Version<T>| version.ended.is_some_and(|ended| ended <= from);
        let ended = self.versions.iter().rposition(ended).unwrap_or(0);
        let seen = self.seen.iter().filter(|(known, _)| *known <= from).map(|(_, at)| *at);
        let oldest = ended.max(seen.max().unwrap_or(0));
        let possible = self.versions[oldest..].iter().take_while(|version| version.begun <= to);
        match possible.clone().position(|version| version.value == *value) {
            Some(at) => Ok(oldest + at),
            None => Err(format!(
                "{value:?} was read, {:?} are possible",
                possible.map(|version| &version.value).collect::<Vec<_>>()
            )),
        }
    }
}

/// The inode of a name, before the answer to its creation tells.
pub(crate) const UNKNOWN: u64 = u64::MAX;

impl Register<Option<u64>> {
    /// As [`Register::read`], of a name: any inode may be one that is just being created.
    pub(crate) fn read_name(&mut self, from: u64, to: u64, found: Option<u64>) -> Result<(), String> {
        let known = |value: &Option<u64>| found.is_some() && *value == found;
        let fresh = |version: &Version<_>| version.value == Some(UNKNOWN);
        if found.is_some()
            && !self.versions.iter().any(|version| known(&version.value))
            && self.versions.iter().any(fresh)
        {
            return self.read(from, to, &Some(UNKNOWN));
        }
        self.read(from, to, &found)
    }

    /// The last change, a creation, has ended well and made this inode.
    pub(crate) fn end_as(&mut self, now: u64, value: Option<u64>) {
        if let Some(last) = self.versions.last_mut() {
            last.value = value;
            last.ended = Some(now);
        }
    }
}

/// A file with one number, changed under a lock.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    /// 0: the file is empty.
    value: u64,
    /// What changes without a result would have made it.
    doubt: BTreeSet<u64>,
    issued: u64,
}

impl Counter {
    /// Read by who holds the lock.
    pub(crate) fn read(&mut self, value: u64) -> Result<(), String> {
        if value != self.value && !self.doubt.contains(&value) {
            return Err(format!(
                "{value} was read under the lock, not {} or one of {:?}",
                self.value, self.doubt
            ));
        }
        self.value = value;
        self.doubt.clear();
        Ok(())
    }

    /// A number for the next change.
    pub(crate) fn next(&mut self) -> u64 {
        self.issued += 1;
        self.issued
    }

    pub(crate) fn begin(&mut self, value: u64) {
        self.doubt.insert(value);
    }

    pub(crate) fn end(&mut self, value: u64) {
        self.value = value;
        self.doubt.clear();
    }
}

/// A file to which all append records.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// Acknowledged: when, and which record is there, by offset.
    acknowledged: BTreeMap<u64, (u64, String)>,
    /// All that were begun.
    begun: BTreeSet<String>,
}

impl Log {
    pub(crate) fn begin(&mut self, record: &str) {
        self.begun.insert(record.to_owned());
    }

    pub(crate) fn end(&mut self, now: u64, record: &str, offset: u64) -> Result<(), String> {
        let before = self.acknowledged.insert(offset, (now, record.to_owned()));
        before.map_or(Ok(()), |(_, other)| {
            Err(format!("{other} and {record} both are at {offset}"))
        })
    }

    /// The whole file was read, the read begun at `from`. Records have `length` bytes.
    pub(crate) fn read(&self, from: u64, content: &[u8], length: usize) -> Result<(), String> {
        let mut found = BTreeMap::new();
        for (number, bytes) in content.chunks(length).enumerate() {
            let record = String::from_utf8_lossy(bytes).into_owned();
            let offset = (number * length) as u64;
            if !self.begun.contains(&record) {
                return Err(format!("{record:?} at {offset} was never appended"));
            }
            if let Some(other) = found.insert(record.clone(), offset) {
                return Err(format!("{record} is at {other} and at {offset}"));
            }
        }
        for (offset, (acknowledged, record)) in &self.acknowledged {
            if *acknowledged <= from && found.get(record) != Some(offset) {
                return Err(format!(
                    "{record} was appended at {offset} and is at {:?} of {} bytes",
                    found.get(record),
                    content.len()
                ));
            }
        }
        Ok(())
    }
}

/// A name that several clients try to create at the same time.
#[derive(Debug, Default)]
pub(crate) struct Race {
    winners: Vec<(String, u64)>,
    losers: u32,
    begun: u32,
}

impl Race {
    pub(crate) fn begin(&mut self) {
        self.begun += 1;
    }

    pub(crate) fn won(&mut self, who: &str, ino: u64) -> Result<(), String> {
        self.winners.push((who.to_owned(), ino));
        if self.winners.len() > 1 {
            return Err(format!("created by {:?}", self.winners));
        }
        Ok(())
    }

    pub(crate) fn lost(&mut self) {
        self.losers += 1;
    }

    /// What is there in the end.
    pub(crate) fn finally(&self, found: Option<u64>) -> Result<(), String> {
        let doubt = self.begun > self.losers + self.winners.len() as u32;
        let right = match (self.winners.first(), found) {
            (Some((_, ino)), found) => found == Some(*ino),
            (None, Some(_)) => doubt,
            // Somebody has met it.
            (None, None) => self.losers == 0,
        };
        match right {
            true => Ok(()),
            false => Err(format!("{found:?} is there in the end of {self:?}")),
        }
    }
}

/// Everything.
#[derive(Debug, Default)]
pub(crate) struct Model {
    /// Inodes by names.
    pub(crate) names: BTreeMap<String, Register<Option<u64>>>,
    /// Numbers by file and place in it.
    pub(crate) slots: BTreeMap<(String, u64), Register<u64>>,
    pub(crate) counters: BTreeMap<String, Counter>,
    pub(crate) log: Log,
    pub(crate) races: BTreeMap<String, Race>,
}

/// Notes it if something was not as it must be.
pub(crate) fn judge(world: &World, who: &str, what: impl std::fmt::Display, result: Result<(), String>) {
    if let Err(error) = result {
        world.violation(who, format!("{what}: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_show_neither_old_nor_unknown_values() {
        let mut register = Register::new(0);
        register.begin(10, 1);
        assert!(register.read(1, 5, &1).is_err());
        register.read(5, 12, &0).unwrap();
        register.read(13, 15, &1).unwrap();
        // Seen once, it stays.
        assert!(register.read(16, 17, &0).is_err());
        register.read(14, 17, &0).unwrap();
        register.end(20);
        assert!(register.read(21, 22, &0).is_err());
        // Without a result.
        register.begin(30, 2);
        register.read(40, 41, &1).unwrap();
        register.begin(50, 3);
        register.end(60);
        register.read(55, 61, &2).unwrap();
        assert!(register.read(62, 63, &2).is_err());
    }

    #[test]
    fn records_are_appended_once_and_stay() {
        let mut log = Log::default();
        log.begin("aa");
        log.begin("bb");
        log.end(5, "aa", 0).unwrap();
        log.read(6, b"aa", 2).unwrap();
        log.read(6, b"aabb", 2).unwrap();
        log.read(4, b"", 2).unwrap();
        assert!(log.read(6, b"bbaa", 2).is_err());
        assert!(log.read(6, b"aabbaa", 2).is_err());
        assert!(log.read(6, b"aacc", 2).is_err());
        assert!(log.end(7, "bb", 0).is_err());
    }

    #[test]
    fn one_wins() {
        let mut race = Race::default();
        race.begin();
        race.begin();
        race.lost();
        race.finally(Some(7)).unwrap();
        assert!(race.finally(None).is_err());
        race.won("a", 7).unwrap();
        race.finally(Some(7)).unwrap();
        assert!(race.finally(Some(8)).is_err());
        assert!(race.won("b", 8).is_err());
    }
}
