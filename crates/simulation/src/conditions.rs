//! What is wrong with the world at the moment, and what has happened in it.

use crate::bugs::Bug;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Shared by everything that is simulated. One thread runs it all, so no lock is ever waited for.
pub(crate) struct World {
    pub(crate) bug: Option<Bug>,
    rng: Mutex<StdRng>,
    conditions: Mutex<Conditions>,
    record: Mutex<Record>,
    moments: AtomicU64,
}

/// Everything is well by default.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conditions {
    /// Hosts that do not reach etcd.
    pub(crate) without_etcd: BTreeSet<String>,
    /// Of requests to etcd, and between hosts.
    pub(crate) etcd: Odds,
    pub(crate) messages: Odds,
    /// Nodes whose disks take no more data.
    pub(crate) full: BTreeSet<String>,
    /// Nodes whose disks are slow, up to a second for a sync.
    pub(crate) slow: BTreeSet<String>,
    /// No more faults come; the workloads end.
    pub(crate) ending: bool,
}

/// Of a thousand requests each.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Odds {
    pub(crate) lost: u32,
    pub(crate) answer_lost: u32,
    pub(crate) late: u32,
    /// Nothing is heard of them, and yet they come, late.
    pub(crate) ghost: u32,
    pub(crate) twice: u32,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Fine,
    Lost,
    AnswerLost,
    Late(Duration),
    Ghost(Duration),
    /// Comes once more after so long.
    Twice(Duration),
}

#[derive(Default)]
struct Record {
    hash: u64,
    events: u64,
    lines: Vec<String>,
    violations: Vec<String>,
    print: bool,
}

/// Lines kept of what has happened.
const LINES: usize = 4000;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    pub(crate) fn new(seed: u64, bug: Option<Bug>, print: bool) -> Self {
        Self {
            bug,
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
            conditions: Mutex::default(),
            record: Mutex::new(Record {
                hash: 0xcbf2_9ce4_8422_2325,
                print,
                ..Record::default()
            }),
            moments: AtomicU64::new(1),
        }
    }

    /// A moment after all that were given before: what happens one after the other.
    pub(crate) fn moment(&self) -> u64 {
        self.moments.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn rng(&self) -> MutexGuard<'_, StdRng> {
        locked(&self.rng)
    }

    pub(crate) fn conditions(&self) -> MutexGuard<'_, Conditions> {
        locked(&self.conditions)
    }

    /// A random time up to `most`.
    pub(crate) fn some_ms(&self, most: u64) -> Duration {
        Duration::from_millis(self.rng().random_range(0..=most))
    }

    pub(crate) fn fate_of_message(&self) -> Fate {
        let odds = self.conditions().messages;
        self.fate(odds, 4000)
    }

    /// Draws by odds; what is late is so by up to `late` milliseconds.
    pub(crate) fn fate(&self, odds: Odds, late: u64) -> Fate {
        let mut rng = self.rng();
        let mut draw = rng.random_range(0..1000);
        // Most are late by little.
        let time = Duration::from_millis((late as f64 * rng.random::<f64>().powi(3)) as u64);
        for (chance, fate) in [
            (odds.lost, Fate::Lost),
            (odds.answer_lost, Fate::AnswerLost),
            (odds.late, Fate::Late(time)),
            (odds.ghost, Fate::Ghost(time)),
            (odds.twice, Fate::Twice(time)),
        ] {
            if draw < chance {
                return fate;
            }
            draw -= chance;
        }
        Fate::Fine
    }

    /// Notes what has happened. All of it is part of the hash by which two runs are compared.
    pub(crate) fn note(&self, who: &str, what: impl std::fmt::Display) {
        let now = turmoil::sim_elapsed().unwrap_or_default();
        self.note_at(now, who, what);
    }

    pub(crate) fn note_at(&self, now: Duration, who: &str, what: impl std::fmt::Display) {
        let line = format!("{:>7.3} {who:<7} {what}", now.as_secs_f64());
        let mut record = locked(&self.record);
        for byte in line.bytes() {
            record.hash = (record.hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        record.events += 1;
        if record.print {
            println!("{line}");
        }
        if record.lines.len() < LINES {
            record.lines.push(line);
        }
    }

    /// Notes that something is not as it must be.
    pub(crate) fn violation(&self, who: &str, what: String) {
        self.note(who, format_args!("VIOLATION: {what}"));
        locked(&self.record).violations.push(what);
    }

    pub(crate) fn first_violation(&self) -> Option<String> {
        locked(&self.record).violations.first().cloned()
    }

    /// The hash of everything noted, and how much that was.
    pub(crate) fn trace(&self) -> (u64, u64) {
        let record = locked(&self.record);
        (record.hash, record.events)
    }
}
