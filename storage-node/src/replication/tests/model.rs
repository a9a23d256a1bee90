//! Every order of events of a small replica set: the steps of [`configuration`] together with the
//! rules for when a primary may take them lose nothing that was acknowledged.
//!
//! Nodes are a, b, c and, where members are exchanged, d; changes are numbered; a member holds all changes of a
//! prefix of its log, as changes of one chunk are delivered in order. A member's
//! copy is a list of versions (epoch, change), so that a change of a deposed primary differs from
//! the same number of its successor.
//!
//! The coordinator exchanges members whenever it likes, the primary hears of it later, and a node that
//! is not involved drops its copy at any time. A primary admits by what it knows, not by what is.

use crate::replication::configuration::{claim, exchanged, fail_over, handed_over, quorum, recovered, with, without};
use lazarette_metastore::ReplicaSetRecord;
use lazarette_types::{NodeId, ReplicaSetId, ReplicationPolicy};
use stateright::{Checker, Model, Property};
use std::collections::BTreeMap;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// What happens at most in a run.
#[derive(Clone, Copy)]
struct Bounds {
    ack: u32,
    changes: u8,
    crashes: u8,
    exchanges: u8,
    /// Epochs after which no more faults happen.
    epochs: u64,
}

fn node(i: usize) -> NodeId {
    NodeId(NAMES[i].into())
}

fn index(node: &NodeId) -> usize {
    NAMES.iter().position(|name| *name == node.0).unwrap()
}

/// A set of small numbers: there are many states.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
struct Set(u8);

impl Set {
    fn of(numbers: impl IntoIterator<Item = usize>) -> Self {
        let mut set = Self::default();
        numbers.into_iter().for_each(|number| set.insert(number));
        set
    }

    fn insert(&mut self, number: usize) {
        self.0 |= 1 << number;
    }

    fn remove(&mut self, number: usize) {
        self.0 &= !(1 << number);
    }

    fn clear(&mut self) {
        self.0 = 0;
    }

    fn contains(self, number: usize) -> bool {
        self.0 & (1 << number) != 0
    }

    fn iter(self) -> impl Iterator<Item = usize> {
        (0..8).filter(move |number| self.contains(*number))
    }

    fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The changes in a copy, oldest first, with the epochs of their versions.
type Log = Vec<(u64, u8)>;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    epoch: u64,
    members: [usize; 3],
    in_sync: Set,
    primary: usize,
    recovering: bool,
    quorum: u32,
    alive: [bool; 4],
    copies: [Log; 4],
    /// The epoch that a member has promised.
    promised: [u64; 4],
    /// The process that serves, by the epochs of its tenure; None: nobody.
    tenure: Option<usize>,
    /// A recovery under way: which members are reconciled in the present claim.
    gathered: Option<Set>,
    begun: u8,
    /// Changes acknowledged.
    acknowledged: Set,
    /// Members that no longer count.
    ejecting: Set,
    /// Members that the primary has brought up to its own copy, as far as it knows.
    learned: Set,
    /// Those of them that have dropped their copy since.
    dropped: Set,
    /// Members were exchanged, and the primary has not heard of it.
    stale: bool,
    crashes: u8,
    exchanges: u8,
}

impl State {
    fn start() -> Self {
        Self {
            epoch: 1,
            members: [0, 1, 2],
            in_sync: Set::of(0..3),
            primary: 0,
            recovering: false,
            quorum: 0,
            alive: [true; 4],
            copies: Default::default(),
            promised: [1; 4],
            tenure: Some(0),
            gathered: None,
            begun: 0,
            acknowledged: Set::default(),
            ejecting: Set::default(),
            learned: Set::default(),
            dropped: Set::default(),
            stale: false,
            crashes: 0,
            exchanges: 0,
        }
    }

    fn record(&self, ack: u32) -> ReplicaSetRecord {
        ReplicaSetRecord {
            id: ReplicaSetId(1),
            epoch: self.epoch,
            replication: ReplicationPolicy { copies: 3, ack },
            members: self.members.iter().map(|i| node(*i)).collect(),
            in_sync: self.in_sync.iter().map(node).collect(),
            primary: node(self.primary),
            recovering: self.recovering,
            recovery_quorum: self.quorum,
        }
    }

    fn adopt(&self, record: &ReplicaSetRecord) -> Self {
        let mut next = self.clone();
        next.epoch = record.epoch;
        next.members = std::array::from_fn(|place| index(&record.members[place]));
        next.in_sync = Set::of(record.in_sync.iter().map(index));
        next.primary = index(&record.primary);
        next.recovering = record.recovering;
        next.quorum = record.recovery_quorum;
        next
    }

    fn holds(&self, member: usize, change: u8) -> bool {
        self.copies[member].iter().any(|(_, c)| *c == change)
    }

    fn involves(&self, i: usize) -> bool {
        self.members.contains(&i) || self.in_sync.contains(i)
    }

    /// Everything that can happen next.
    fn next(&self, bounds: Bounds) -> Vec<Self> {
        let mut all = Vec::new();
        let record = self.record(bounds.ack);
        if let Some(primary) = self.tenure {
            self.serve(primary, bounds, &mut all);
            self.reconfigure(primary, bounds, &record, &mut all);
        }
        self.recover(&record, &mut all);
        self.exchange(bounds, &record, &mut all);
        for i in (0..4).filter(|i| self.involves(*i)) {
            if self.alive[i] && self.crashes < bounds.crashes && self.epoch < bounds.epochs {
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
            next.end_tenure();
            next.gathered = None;
            all.push(next);
        }
        all
    }

    /// The coordinator wants other members; those that are not involved drop their copies.
    fn exchange(&self, bounds: Bounds, record: &ReplicaSetRecord, all: &mut Vec<Self>) {
        if self.exchanges < bounds.exchanges {
            for (from, to) in (0..4).flat_map(|from| (0..4).map(move |to| (from, to))) {
                if let Some(record) = exchanged(record, &node(from), &node(to)) {
                    let mut next = self.adopt(&record);
                    next.exchanges += 1;
                    next.stale = next.tenure.is_some();
                    all.push(next);
                }
            }
        }
        for i in (0..4).filter(|i| self.alive[*i] && !self.involves(*i) && !self.copies[*i].is_empty()) {
            let mut next = self.clone();
            next.copies[i].clear();
            if next.learned.contains(i) {
                next.dropped.insert(i);
            }
            all.push(next);
        }
    }

    /// What ends with a process.
    fn stop(&mut self, i: usize) {
        if self.tenure == Some(i) {
            self.end_tenure();
        }
        if self.primary == i {
            self.gathered = None;
        }
    }

    fn end_tenure(&mut self) {
        self.tenure = None;
        self.ejecting.clear();
        self.forget_learners();
        self.stale = false;
    }

    fn forget_learners(&mut self) {
        self.learned.clear();
        self.dropped.clear();
    }

    fn serve(&self, primary: usize, bounds: Bounds, all: &mut Vec<Self>) {
        let ack = bounds.ack as usize;
        // One change after the other: the next one begins when the last one is acknowledged.
        let idle = self.copies[primary]
            .last()
            .is_none_or(|(_, last)| self.acknowledged.contains(usize::from(*last)));
        if self.begun < bounds.changes && self.in_sync.len() >= ack && idle {
            let mut next = self.clone();
            next.begun += 1;
            next.copies[primary].push((self.epoch, next.begun));
            all.push(next);
        }
        // Deliveries, in order, on top of what the change follows. To the dead as well: sent
        // before, made before they died. They are those of the in-sync, or of a learner.
        for member in (0..4).filter(|m| *m != primary && self.alive[*m]) {
            let (mine, theirs) = (&self.copies[primary], &self.copies[member]);
            if self.involves(member)
                && self.promised[member] <= self.epoch
                && mine.len() > theirs.len()
                && mine.starts_with(theirs)
            {
                let mut next = self.clone();
                next.copies[member].push(mine[theirs.len()]);
                next.promised[member] = self.epoch;
                all.push(next);
            }
        }
        for change in 1..=self.begun {
            let holders = (0..4)
                .filter(|m| self.in_sync.contains(*m) && !self.ejecting.contains(*m) && self.holds(*m, change))
                .count();
            if self.holds(primary, change) && !self.acknowledged.contains(usize::from(change)) && holders >= ack {
                let mut next = self.clone();
                next.acknowledged.insert(usize::from(change));
                all.push(next);
            }
        }
    }

    fn reconfigure(&self, primary: usize, bounds: Bounds, record: &ReplicaSetRecord, all: &mut Vec<Self>) {
        // It hears of an exchange by itself, or because its step was not made.
        if self.stale {
            let mut next = self.clone();
            next.stale = false;
            next.forget_learners();
            all.push(next);
        }
        // Repair: a whole copy, in the present epoch. It may be of a node that was struck off.
        for member in (0..4).filter(|m| !self.in_sync.contains(*m) && self.alive[*m]) {
            if !self.learned.contains(member) && (self.members.contains(&member) || self.stale) {
                let mut next = self.clone();
                next.copies[member] = self.copies[primary].clone();
                next.promised[member] = self.epoch;
                next.learned.insert(member);
                all.push(next);
            }
        }
        if self.epoch >= bounds.epochs || self.stale {
            return;
        }
        for member in self.in_sync.iter().filter(|m| *m != primary) {
            if !self.ejecting.contains(member) {
                let mut next = self.clone();
                next.ejecting.insert(member);
                all.push(next);
            }
        }
        let drained = self
            .in_sync
            .iter()
            .filter(|m| !self.ejecting.contains(*m))
            .all(|m| self.acknowledged.iter().all(|c| self.holds(m, c as u8)));
        if !self.ejecting.is_empty() && drained {
            let ejected: Vec<_> = self.ejecting.iter().map(node).collect();
            let mut next = self.adopt(&without(record, &ejected));
            next.ejecting.clear();
            all.push(next);
        }
        for member in self.learned.iter().filter(|m| self.alive[*m]) {
            if self.copies[member] == self.copies[primary] || self.dropped.contains(member) {
                let mut next = self.adopt(&with(record, &node(member)));
                next.learned.remove(member);
                all.push(next);
            }
        }
        // To any member in sync, whether or not all is quiet.
        if bounds.exchanges > 0 {
            for to in self
                .members
                .iter()
                .filter(|m| **m != primary && self.in_sync.contains(**m))
            {
                let mut next = self.adopt(&handed_over(record, &node(*to)));
                next.end_tenure();
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
                next.gathered = Some(Set::default());
                all.push(next);
            }
            Some(gathered) => {
                for member in self.in_sync.iter().filter(|m| self.alive[*m]) {
                    if !gathered.contains(member) {
                        let mut next = self.clone();
                        next.promised[member] = self.epoch;
                        next.gathered.as_mut().unwrap().insert(member);
                        all.push(next);
                    }
                }
                let nodes: Vec<_> = gathered.iter().map(node).collect();
                if gathered.iter().all(|m| self.alive[m])
                    && let Some(record) = recovered(record, &nodes)
                {
                    // The highest version wins everywhere. Installed one by one, a crash between
                    // leaves some with it: as if they had held it before.
                    let best = gathered
                        .iter()
                        .map(|m| self.copies[m].clone())
                        .max_by_key(|log| log.last().copied());
                    let mut next = self.adopt(&record);
                    for member in gathered.iter() {
                        next.copies[member] = best.clone().unwrap();
                    }
                    next.tenure = Some(primary);
                    next.gathered = None;
                    all.push(next);
                }
            }
        }
    }

    fn serves_what_was_acknowledged(&self) -> bool {
        let holds_all = |primary| self.acknowledged.iter().all(|change| self.holds(primary, change as u8));
        self.tenure.is_none_or(holds_all)
    }

    fn quorums_know_what_was_acknowledged(&self, ack: u32) -> bool {
        let need = quorum(&self.record(ack));
        self.acknowledged.iter().all(|change| {
            let holders = self.in_sync.iter().filter(|m| self.holds(*m, change as u8)).count();
            self.in_sync.len() - holders < need
        })
    }
}

impl Model for Bounds {
    type State = State;
    /// An event is named by what it leads to.
    type Action = State;

    fn init_states(&self) -> Vec<State> {
        vec![State::start()]
    }

    fn actions(&self, state: &State, next: &mut Vec<State>) {
        next.extend(state.next(*self));
    }

    fn next_state(&self, _: &State, next: State) -> Option<State> {
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SERVED, |_, state: &State| state.serves_what_was_acknowledged()),
            Property::always(HELD, |bounds, state: &State| {
                state.quorums_know_what_was_acknowledged(bounds.ack)
            }),
            Property::sometimes(OTHER_PRIMARY, |_, state: &State| {
                state.tenure.is_some_and(|primary| primary != 0) && !state.acknowledged.is_empty()
            }),
            Property::sometimes(NEW_MEMBER, |bounds, state: &State| {
                state.tenure == Some(3) && state.begun == bounds.changes
            }),
        ]
    }
}

const SERVED: &str = "a primary has every acknowledged change";
const HELD: &str = "every quorum knows of every acknowledged change";
const OTHER_PRIMARY: &str = "another primary serves acknowledged changes";
const NEW_MEMBER: &str = "a new member serves";

/// Goes through all states; gives how many there are.
fn explore(bounds: Bounds) -> usize {
    let checker = bounds.checker().threads(2).spawn_bfs().join();
    checker.assert_no_discovery(SERVED);
    checker.assert_no_discovery(HELD);
    // With ack 1 the primary may be the only holder, so nobody ever takes a dead one's place.
    let replaced = checker.discovery(OTHER_PRIMARY).is_some();
    assert_eq!(replaced, bounds.ack > 1 || bounds.exchanges > 0, "{OTHER_PRIMARY}");
    let moved = checker.discovery(NEW_MEMBER).is_some();
    assert_eq!(moved, bounds.exchanges > 0, "{NEW_MEMBER}");
    checker.unique_state_count()
}

#[test]
fn no_order_of_events_loses_an_acknowledged_change() {
    for ack in [1, 2, 3] {
        let states = explore(Bounds {
            ack,
            changes: 2,
            crashes: 2,
            exchanges: 0,
            epochs: 4,
        });
        assert!(states > 1000, "only {states} states with ack {ack}");
        println!("ack {ack}: {states} states");
    }
}

#[test]
fn no_exchange_of_members_loses_an_acknowledged_change() {
    for (ack, crashes, exchanges) in [(1, 0, 1), (2, 0, 2), (2, 1, 1), (3, 0, 1)] {
        let states = explore(Bounds {
            ack,
            changes: 1,
            crashes,
            exchanges,
            epochs: 3,
        });
        assert!(states > 1000, "only {states} states with ack {ack}");
        println!("ack {ack}, {crashes} crashes, {exchanges} exchanges: {states} states");
    }
}
