//! How long operations take, and how they fail.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Kinds of operations that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Kind {
    Open,
    Read,
    Write,
    Fsync,
    Truncate,
    Append,
    LockedAppend,
    Create,
    Mkdir,
    Link,
    Rename,
    Unlink,
    Rmdir,
    Stat,
    List,
}

impl Kind {
    /// Whether it is about names and folders.
    pub fn is_of_names(self) -> bool {
        use Kind::{Create, Link, List, Mkdir, Rename, Rmdir, Stat, Unlink};
        matches!(self, Create | Mkdir | Link | Rename | Unlink | Rmdir | Stat | List)
    }
}

/// An operation that an application saw fail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What was done.
    pub kind: Kind,
    /// Through which mount.
    pub mount: usize,
    /// The error's number.
    pub errno: i32,
}

/// Operations between two looks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stalls {
    /// By mount and kind: how many ended, and the longest in milliseconds, also one under way.
    pub longest: BTreeMap<usize, BTreeMap<Kind, (u64, u64)>>,
    /// What failed, with how often.
    pub failures: Vec<(Failure, u64)>,
}

impl Stalls {
    /// The longest operation of some mounts.
    pub fn longest_of(&self, mounts: impl Fn(usize) -> bool) -> Duration {
        let kinds = self
            .longest
            .iter()
            .filter(|(mount, _)| mounts(**mount))
            .flat_map(|(_, kinds)| kinds.values());
        Duration::from_millis(kinds.map(|(_, longest)| *longest).max().unwrap_or(0))
    }

    /// Operations that ended.
    pub fn operations(&self) -> u64 {
        self.longest
            .values()
            .flat_map(BTreeMap::values)
            .map(|(count, _)| count)
            .sum()
    }
}

impl fmt::Display for Stalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: BTreeMap<Kind, (u64, u64)> = BTreeMap::new();
        for (kind, (count, longest)) in self.longest.values().flatten() {
            let sum = kinds.entry(*kind).or_default();
            *sum = (sum.0 + count, sum.1.max(*longest));
        }
        write!(f, "{} operations; longest in seconds:", self.operations())?;
        for (kind, (_, longest)) in kinds {
            write!(f, " {kind:?} {:.1}", longest as f64 / 1e3)?;
        }
        Ok(())
    }
}

/// The clock that all workers use.
#[derive(Debug, Default)]
pub(super) struct Clock {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    seen: Stalls,
    /// Since the start, by mount.
    ended: BTreeMap<usize, u64>,
    since: Option<Instant>,
    under_way: BTreeMap<u32, (Kind, usize, Instant)>,
}

impl Clock {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, worker: u32, kind: Kind, mount: usize) {
        self.state().under_way.insert(worker, (kind, mount, Instant::now()));
    }

    pub(super) fn end(&self, worker: u32, failed: Option<i32>) {
        let mut state = self.state();
        let Some((kind, mount, begun)) = state.under_way.remove(&worker) else {
            return;
        };
        let took = state.age(begun);
        let entry = state.seen.longest.entry(mount).or_default().entry(kind).or_default();
        *entry = (entry.0 + 1, entry.1.max(took));
        if failed.is_none() {
            *state.ended.entry(mount).or_default() += 1;
        }
        if let Some(errno) = failed {
            let failure = Failure { kind, mount, errno };
            match state.seen.failures.iter_mut().find(|(known, _)| *known == failure) {
                Some((_, count)) => *count += 1,
                None => state.seen.failures.push((failure, 1)),
            }
        }
    }

    /// Operations that succeeded through a mount since the start.
    pub(super) fn ended(&self, mount: usize) -> u64 {
        self.state().ended.get(&mount).copied().unwrap_or(0)
    }

    /// What was seen since the last call.
    pub(super) fn take(&self) -> Stalls {
        let mut state = self.state();
        let mut seen = std::mem::take(&mut state.seen);
        for (kind, mount, begun) in state.under_way.values() {
            let entry = seen.longest.entry(*mount).or_default().entry(*kind).or_default();
            entry.1 = entry.1.max(state.age(*begun));
        }
        state.since = Some(Instant::now());
        seen
    }
}

impl State {
    /// Milliseconds since then, but no longer than this measurement.
    fn age(&self, begun: Instant) -> u64 {
        let begun = self.since.map_or(begun, |since| since.max(begun));
        begun.elapsed().as_millis() as u64
    }
}
