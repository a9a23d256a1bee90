//! Counters, and histograms where wanted.

use crate::abi::{OPCODES, Opcode};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Buckets of a histogram; bucket i counts what took less than 2ⁱ microseconds and not less than
/// half of that, the last one everything longer.
pub const BUCKETS: usize = 26;

#[derive(Default)]
struct Operation {
    requests: AtomicU64,
    errors: AtomicU64,
}

#[derive(Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    nanoseconds: AtomicU64,
}

/// What happened in a session so far.
pub(crate) struct Statistics {
    operations: [Operation; OPCODES],
    /// Empty when histograms are off.
    histograms: Vec<Histogram>,
    pub(crate) malformed: AtomicU64,
    pub(crate) panics: AtomicU64,
    pub(crate) interrupts: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) abandoned: AtomicU64,
    pub(crate) resent: AtomicU64,
    pub(crate) unsent: AtomicU64,
}

/// One operation's part of a [`Snapshot`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperationSnapshot {
    /// The operation.
    pub opcode: Opcode,
    /// Requests read.
    pub requests: u64,
    /// Those answered with an error.
    pub errors: u64,
    /// Time to the answer; see [`BUCKETS`]. None when histograms are off.
    pub latency: Option<[u64; BUCKETS]>,
    /// Sum of the times to the answer; zero when histograms are off.
    pub total: Duration,
}

/// A session's counters at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Operations that occurred.
    pub operations: Vec<OperationSnapshot>,
    /// Requests that were not what the protocol says.
    pub malformed: u64,
    /// Handlers that panicked.
    pub panics: u64,
    /// Interrupts received.
    pub interrupts: u64,
    /// Handlers that were dropped for an interrupt.
    pub cancelled: u64,
    /// Handlers that were dropped without an answer, for the next server to get the request again.
    pub abandoned: u64,
    /// Requests that came again.
    pub resent: u64,
    /// Answers the kernel no longer wanted.
    pub unsent: u64,
}

impl Statistics {
    pub(crate) fn new(histograms: bool) -> Self {
        Self {
            operations: std::array::from_fn(|_| Operation::default()),
            histograms: if histograms {
                (0..OPCODES).map(|_| Histogram::default()).collect()
            } else {
                Vec::new()
            },
            malformed: AtomicU64::new(0),
            panics: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            resent: AtomicU64::new(0),
            unsent: AtomicU64::new(0),
        }
    }

    pub(crate) fn request(&self, opcode: Opcode) {
        self.operations[opcode as usize].requests.fetch_add(1, Relaxed);
    }

    pub(crate) fn error(&self, opcode: Opcode) {
        self.operations[opcode as usize].errors.fetch_add(1, Relaxed);
    }

    pub(crate) fn latency(&self, opcode: Opcode, elapsed: impl FnOnce() -> Duration) {
        if let Some(histogram) = self.histograms.get(opcode as usize) {
            let elapsed = elapsed();
            let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
            let bucket = (u64::BITS - micros.leading_zeros()) as usize;
            histogram.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Relaxed);
            histogram
                .nanoseconds
                .fetch_add(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let operations = Opcode::ALL.iter().filter_map(|opcode| {
            let operation = &self.operations[*opcode as usize];
            let requests = operation.requests.load(Relaxed);
            let histogram = self.histograms.get(*opcode as usize);
            (requests > 0).then(|| OperationSnapshot {
                opcode: *opcode,
                requests,
                errors: operation.errors.load(Relaxed),
                latency: histogram.map(|histogram| std::array::from_fn(|index| histogram.buckets[index].load(Relaxed))),
                total: Duration::from_nanos(histogram.map_or(0, |histogram| histogram.nanoseconds.load(Relaxed))),
            })
        });
        Snapshot {
            operations: operations.collect(),
            malformed: self.malformed.load(Relaxed),
            panics: self.panics.load(Relaxed),
            interrupts: self.interrupts.load(Relaxed),
            cancelled: self.cancelled.load(Relaxed),
            abandoned: self.abandoned.load(Relaxed),
            resent: self.resent.load(Relaxed),
            unsent: self.unsent.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_powers_of_two() {
        let statistics = Statistics::new(true);
        for micros in [0, 1, 2, 3, 1000, u64::MAX / 2000] {
            statistics.request(Opcode::Read);
            statistics.latency(Opcode::Read, || Duration::from_micros(micros));
        }
        let snapshot = statistics.snapshot();
        assert_eq!(snapshot.operations.len(), 1);
        let latency = snapshot.operations[0].latency.unwrap();
        assert_eq!(
            (latency[0], latency[1], latency[2], latency[10], latency[BUCKETS - 1]),
            (1, 1, 2, 1, 1)
        );
    }

    #[test]
    fn histograms_can_be_off() {
        let statistics = Statistics::new(false);
        statistics.request(Opcode::Read);
        statistics.latency(Opcode::Read, || panic!("the clock was read"));
        assert_eq!(statistics.snapshot().operations[0].latency, None);
    }
}
