//! Every order of events of a small replica set: the steps of [`configuration`] together with the
//! rules for when a primary may take them lose nothing that was acknowledged.
//!
//! Breadth-first search over all states. Nodes are a, b, c; changes are numbered; a member holds
//! all changes of a prefix of its log, as changes of one chunk are delivered in order. A member's
//! copy is a list of versions (epoch, change), so that a change of a deposed primary differs from
//! the same number of its successor.

use crate::replication::configuration::{claim, fail_over, quorum, recovered, with, without};
use lazarette_metastore::ReplicaSetRecord;
use lazarette_types::{NodeId, ReplicaSetId, ReplicationPolicy};
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};

const NAMES: [&str; 3] = ["a", "b", "c"];
/// Changes made in a run.
const CHANGES: u8 = 2;
/// Epochs after which no more faults happen.
const EPOCHS: u64 = 4;

fn node(i: usize) -> NodeId {
    NodeId(NAMES[i].into())
}

fn index(node: &NodeId) -> usize {
    NAMES.iter().position(|name| *name == node.0).unwrap()
}

/// The changes in a copy, oldest first, with the epochs of their versions.
type Log = Vec<(u64, u8)>;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    epoch: u64,
    in_sync: BTreeSet<usize>,
    primary: usize,
    recovering: bool,
    quorum: u32,
    alive: [bool; 3],
    copies: [Log; 3],
    /// The epoch that a member has promised.
    promised: [u64; 3],
    /// The process that serves, by the epochs of its tenure; None: nobody.
    tenure: Option<usize>,
    /// A recovery under way: which members are reconciled in the present claim.
    gathered: Option<BTreeSet<usize>>,
    begun: u8,
    /// Changes acknowledged.
    acknowledged: BTreeSet<u8>,
    /// Members that no longer count.
    ejecting: BTreeSet<usize>,
    crashes: u8,
}

impl State {
    fn start(ack: u32) -> (Self, u32) {
        let state = Self {
            epoch: 1,
            in_sync: (0..3).collect(),
            primary: 0,
            recovering: false,
            quorum: 0,
            alive: [true; 3],
            copies: Default::default(),
            promised: [1; 3],
            tenure: Some(0),
            gathered: None,
            begun: 0,
            acknowledged: BTreeSet::new(),
            ejecting: BTreeSet::new(),
            crashes: 0,
        };
        (state, ack)
    }

    fn record(&self, ack: u32) -> ReplicaSetRecord {
        ReplicaSetRecord {
            id: ReplicaSetId(1),
            epoch: self.epoch,
            replication: ReplicationPolicy { copies: 3, ack },
            members: (0..3).map(node).collect(),
            in_sync: self.in_sync.iter().map(|i| node(*i)).collect(),
            primary: node(self.primary),
            recovering: self.recovering,
            recovery_quorum: self.quorum,
        }
    }

    fn adopt(&self, record: &ReplicaSetRecord) -> Self {
        let mut next = self.clone();
        next.epoch = record.epoch;
        next.in_sync = record.in_sync.iter().map(index).collect();
        next.primary = index(&record.primary);
        next.recovering = record.recovering;
        next.quorum = record.recovery_quorum;
        next
    }

    fn holds(&self, member: usize, change: u8) -> bool {
        self.copies[member].iter().any(|(_, c)| *c == change)
    }

    /// Everything that can happen next.
    fn next(&self, ack: u32) -> Vec<Self> {
        let mut all = Vec::new();
        let record = self.record(ack);
        if let Some(primary) = self.tenure {
            self.serve(primary, ack, &mut all);
            self.reconfigure(primary, ack, &record, &mut all);
        }
        self.recover(&record, &mut all);
        for i in 0..3 {
            if self.alive[i] && self.crashes < 2 && self.epoch < EPOCHS {
                let mut next = self.clone();
                next.alive[i] = false;
                next.crashes += 1;
                next.stop(i);
                all.push(next);
            }
            if !self.alive[i] {
                let mut next = self.clone();
                next.alive[i] = true;
                next.promised[i] = self.epoch;
                all.push(next);
            }
        }
        // The coordinator: only when the primary is dead by its lease.
        if !self.alive[self.primary]
            && let Some(record) = fail_over(&record, |n| self.alive[index(n)], &BTreeMap::new())
        {
            let mut next = self.adopt(&record);
            next.tenure = None;
            next.gathered = None;
            next.ejecting.clear();
            all.push(next);
        }
        all
    }

    /// What ends with a process.
    fn stop(&mut self, i: usize) {
        if self.tenure == Some(i) {
            self.tenure = None;
            self.ejecting.clear();
        }
        if self.primary == i {
            self.gathered = None;
        }
    }

    fn serve(&self, primary: usize, ack: u32, all: &mut Vec<Self>) {
        // One change after the other: the next one begins when the last one is acknowledged.
        let idle = self.copies[primary]
            .last()
            .is_none_or(|(_, last)| self.acknowledged.contains(last));
        if self.begun < CHANGES && self.in_sync.len() >= ack as usize && idle {
            let mut next = self.clone();
            next.begun += 1;
            next.copies[primary].push((self.epoch, next.begun));
            all.push(next);
        }
        // Deliveries, in order, on top of what the change follows. To the dead as well: sent
        // before, made before they died. They are those of the in-sync, or of a learner.
        for member in (0..3).filter(|m| *m != primary && self.alive[*m]) {
            let (mine, theirs) = (&self.copies[primary], &self.copies[member]);
            if self.promised[member] <= self.epoch && mine.len() > theirs.len() && mine.starts_with(theirs) {
                let mut next = self.clone();
                next.copies[member].push(mine[theirs.len()]);
                next.promised[member] = self.epoch;
                all.push(next);
            }
        }
        for change in 1..=self.begun {
            let holders = (0..3)
                .filter(|m| self.in_sync.contains(m) && !self.ejecting.contains(m) && self.holds(*m, change))
                .count();
            if self.holds(primary, change) && !self.acknowledged.contains(&change) && holders >= ack as usize {
                let mut next = self.clone();
                next.acknowledged.insert(change);
                all.push(next);
            }
        }
    }

    fn reconfigure(&self, primary: usize, ack: u32, record: &ReplicaSetRecord, all: &mut Vec<Self>) {
        if self.epoch >= EPOCHS {
            return;
        }
        for member in self.in_sync.iter().copied().filter(|m| *m != primary) {
            if !self.ejecting.contains(&member) {
                let mut next = self.clone();
                next.ejecting.insert(member);
                all.push(next);
            }
        }
        let drained = self
            .in_sync
            .iter()
            .filter(|m| !self.ejecting.contains(m))
            .all(|m| self.acknowledged.iter().all(|c| self.holds(*m, *c)));
        if !self.ejecting.is_empty() && drained {
            let ejected: Vec<_> = self.ejecting.iter().map(|i| node(*i)).collect();
            let mut next = self.adopt(&without(record, &ejected));
            next.ejecting.clear();
            all.push(next);
        }
        let _ = ack;
        for member in (0..3).filter(|m| !self.in_sync.contains(m) && self.alive[*m]) {
            if self.copies[member] == self.copies[primary] {
                all.push(self.adopt(&with(record, &node(member))));
            } else {
                // Repair: a whole copy, in the present epoch.
                let mut next = self.clone();
                next.copies[member] = self.copies[primary].clone();
                next.promised[member] = self.epoch;
                all.push(next);
            }
        }
    }

    fn recover(&self, record: &ReplicaSetRecord, all: &mut Vec<Self>) {
        let primary = self.primary;
        if self.tenure.is_some() || !self.alive[primary] {
            return;
        }
        match &self.gathered {
            // A new process, or a new attempt.
            None => {
                let mut next = self.adopt(&claim(record));
                next.gathered = Some(BTreeSet::new());
                all.push(next);
            }
            Some(gathered) => {
                for member in self.in_sync.iter().copied().filter(|m| self.alive[*m]) {
                    if !gathered.contains(&member) {
                        let mut next = self.clone();
                        next.promised[member] = self.epoch;
                        next.gathered.as_mut().unwrap().insert(member);
                        all.push(next);
                    }
                }
                let nodes: Vec<_> = gathered.iter().map(|i| node(*i)).collect();
                if gathered.iter().all(|m| self.alive[*m])
                    && let Some(record) = recovered(record, &nodes)
                {
                    // The highest version wins everywhere. Installed one by one, a crash between
                    // leaves some with it: as if they had held it before.
                    let best = gathered
                        .iter()
                        .map(|m| self.copies[*m].clone())
                        .max_by_key(|log| log.last().copied());
                    let mut next = self.adopt(&record);
                    for member in gathered {
                        next.copies[*member] = best.clone().unwrap();
                    }
                    next.tenure = Some(primary);
                    next.gathered = None;
                    all.push(next);
                }
            }
        }
    }

    fn check(&self, ack: u32) {
        if let Some(primary) = self.tenure {
            for change in &self.acknowledged {
                assert!(
                    self.holds(primary, *change),
                    "acknowledged change {change} is lost: {self:?}"
                );
            }
        }
        let record = self.record(ack);
        let need = quorum(&record);
        for change in &self.acknowledged {
            let holders = self.in_sync.iter().filter(|m| self.holds(**m, *change)).count();
            let others = self.in_sync.len() - holders;
            assert!(others < need, "a quorum of {need} without change {change}: {self:?}");
        }
    }
}

fn explore(ack: u32) -> usize {
    let (start, ack) = State::start(ack);
    let mut seen = HashSet::from([start.clone()]);
    let mut queue = VecDeque::from([start]);
    let mut served_again = 0;
    while let Some(state) = queue.pop_front() {
        state.check(ack);
        served_again += usize::from(state.tenure.is_some_and(|p| p != 0) && !state.acknowledged.is_empty());
        for next in state.next(ack) {
            if seen.insert(next.clone()) {
                queue.push_back(next);
            }
        }
    }
    // With ack 1 the primary may be the only holder, so nobody ever takes its place.
    assert_eq!(served_again > 0, ack > 1, "another primary served acknowledged changes");
    seen.len()
}

#[test]
fn no_order_of_events_loses_an_acknowledged_change() {
    for ack in [1, 2, 3] {
        let states = explore(ack);
        assert!(states > 1000, "only {states} states with ack {ack}");
        println!("ack {ack}: {states} states");
    }
}
