//! Every order of events around the ownership of a shard: requests that come late and again, transactions that
//! etcd makes late, leases that end, nodes that die. With the rules of the owner nothing acknowledged is lost,
//! done twice or hidden by a stale answer; and each rule is needed.
//!
//! Two nodes, two operations. A record is a list of operations; what an owner answers from is the list of all
//! operations in the records it knows of.

use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::BTreeSet;

const NODES: usize = 2;
const OPERATIONS: u8 = 2;
/// Ownerships in a run.
const EPOCHS: u8 = 2;

/// What an owner and its lease keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// A transaction requires the ownership of its author.
    Fenced,
    /// A node takes its lease for ended before etcd does.
    EndsFirst,
    /// An owner answers only while it can prove its lease.
    Proven,
    /// An owner answers when the record is committed.
    Committed,
    /// The results of operations are in the records, so that the next owner knows them again.
    Results,
}

/// The protocol, perhaps without one of its rules.
struct Ownership {
    without: Option<Rule>,
}

/// A record on its way to etcd, where it may be made at any time, or never, or twice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Transaction {
    node: usize,
    epoch: u8,
    lsn: usize,
    operations: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Owner {
    epoch: u8,
    /// It can prove its lease.
    proven: bool,
    recovered: bool,
    /// Records that it knows to be committed.
    records: usize,
    /// The operations in them.
    known: Vec<u8>,
    /// Of these, the ones that it found.
    found: usize,
    /// The record that is being committed.
    committing: Vec<u8>,
    /// The record that is open.
    open: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    /// In etcd: who owns the shard, in which epoch.
    owner: Option<usize>,
    epoch: u8,
    /// In etcd: records, and the epochs of their authors.
    journal: Vec<(u8, Vec<u8>)>,
    transactions: BTreeSet<Transaction>,
    nodes: [Option<Owner>; NODES],
    acknowledged: BTreeSet<u8>,
    /// Owners that have acknowledged something, by epoch.
    answered: BTreeSet<u8>,
}

impl State {
    fn operations(&self) -> impl Iterator<Item = u8> {
        self.journal
            .iter()
            .flat_map(|(_, operations)| operations.iter().copied())
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Event {
    Claim(usize),
    Recover(usize),
    /// A request arrives, for the first time or again.
    Request(usize, u8),
    Commit(usize),
    /// etcd makes a transaction.
    Make(Transaction),
    /// The owner finds out what became of its record.
    Learn(usize),
    Acknowledge(usize, u8),
    /// A node takes its lease for ended.
    LeaseEnds(usize),
    /// etcd ends the lease of the owner.
    Expire,
    Crash(usize),
}

impl Ownership {
    fn has(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    /// Whether an owner may answer, also a request that only reads.
    fn answers(&self, owner: &Owner) -> bool {
        owner.recovered && (owner.proven || !self.has(Rule::Proven))
    }
}

impl Model for Ownership {
    type State = State;
    type Action = Event;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            owner: None,
            epoch: 0,
            journal: Vec::new(),
            transactions: BTreeSet::new(),
            nodes: [None, None],
            acknowledged: BTreeSet::new(),
            answered: BTreeSet::new(),
        }]
    }

    fn actions(&self, state: &State, events: &mut Vec<Event>) {
        events.extend(state.transactions.iter().cloned().map(Event::Make));
        events.push(Event::Expire);
        for node in 0..NODES {
            events.extend([Event::Claim(node), Event::Recover(node), Event::Commit(node)]);
            events.extend([Event::Learn(node), Event::LeaseEnds(node), Event::Crash(node)]);
            for operation in 1..=OPERATIONS {
                events.extend([Event::Request(node, operation), Event::Acknowledge(node, operation)]);
            }
        }
    }

    fn next_state(&self, state: &State, event: Event) -> Option<State> {
        let mut next = state.clone();
        match event {
            Event::Claim(node) => {
                if next.nodes[node].is_some() || next.owner.is_some() || next.epoch == EPOCHS {
                    return None;
                }
                next.epoch += 1;
                next.owner = Some(node);
                next.nodes[node] = Some(Owner {
                    epoch: next.epoch,
                    proven: true,
                    recovered: false,
                    records: 0,
                    known: Vec::new(),
                    found: 0,
                    committing: Vec::new(),
                    open: Vec::new(),
                });
            }
            Event::Recover(node) => {
                let known: Vec<u8> = next.operations().collect();
                let owner = next.nodes[node].as_mut().filter(|owner| !owner.recovered)?;
                owner.recovered = true;
                owner.records = next.journal.len();
                owner.found = known.len();
                owner.known = known;
            }
            Event::Request(node, operation) => {
                let remembers = self.has(Rule::Results);
                let owner = next.nodes[node].as_mut().filter(|owner| owner.recovered)?;
                let results = &owner.known[if remembers { 0 } else { owner.found }..];
                let mut done = results.iter().chain(&owner.committing).chain(&owner.open);
                if done.any(|done| *done == operation) {
                    return None;
                }
                owner.open.push(operation);
            }
            Event::Commit(node) => {
                let owner = next.nodes[node].as_mut()?;
                if !owner.committing.is_empty() || owner.open.is_empty() {
                    return None;
                }
                owner.committing = std::mem::take(&mut owner.open);
                next.transactions.insert(Transaction {
                    node,
                    epoch: owner.epoch,
                    lsn: owner.records,
                    operations: owner.committing.clone(),
                });
            }
            Event::Make(transaction) => {
                let owns = next.owner == Some(transaction.node) && next.epoch == transaction.epoch;
                if next.journal.len() != transaction.lsn || self.has(Rule::Fenced) && !owns {
                    return None;
                }
                next.journal.push((transaction.epoch, transaction.operations));
            }
            Event::Learn(node) => {
                let owner = next.nodes[node].as_mut().filter(|owner| !owner.committing.is_empty())?;
                match next.journal.get(owner.records) {
                    Some((epoch, _)) if *epoch == owner.epoch => {
                        owner.records += 1;
                        owner.known.append(&mut owner.committing);
                    }
                    None if next.owner == Some(node) && next.epoch == owner.epoch => return None,
                    // Lost.
                    _ => next.nodes[node] = None,
                }
            }
            Event::Acknowledge(node, operation) => {
                let owner = next.nodes[node].as_ref().filter(|owner| self.answers(owner))?;
                let early = [&owner.committing, &owner.open].into_iter().flatten();
                let mut done = owner.known.iter().chain(early.filter(|_| !self.has(Rule::Committed)));
                if !done.any(|done| *done == operation) || !next.acknowledged.insert(operation) {
                    return None;
                }
                next.answered.insert(owner.epoch);
            }
            Event::LeaseEnds(node) => {
                let owner = next.nodes[node].as_mut().filter(|owner| owner.proven)?;
                owner.proven = false;
            }
            Event::Expire => {
                let node = next.owner?;
                let proves = |owner: &Owner| owner.proven && owner.epoch == next.epoch;
                if self.has(Rule::EndsFirst) && next.nodes[node].as_ref().is_some_and(proves) {
                    return None;
                }
                next.owner = None;
            }
            Event::Crash(node) => {
                next.nodes[node].take()?;
            }
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing acknowledged is lost", |_, state: &State| {
                let stored: BTreeSet<u8> = state.operations().collect();
                state.acknowledged.is_subset(&stored)
            }),
            Property::always("nothing is done twice", |_, state: &State| {
                let mut seen = BTreeSet::new();
                state.operations().all(|operation| seen.insert(operation))
            }),
            Property::always("nothing stale is answered", |model, state: &State| {
                let mut answering = state.nodes.iter().flatten().filter(|owner| model.answers(owner));
                answering.all(|owner| {
                    state.acknowledged.iter().all(|done| {
                        let early = [&owner.committing, &owner.open].into_iter().flatten();
                        owner.known.iter().chain(early).any(|known| known == done)
                    })
                })
            }),
            Property::always("only the owner adds records", |_, state: &State| {
                let Some(owner) = state.owner.and_then(|node| state.nodes[node].as_ref()) else {
                    return true;
                };
                let added = state.journal.iter().skip(owner.records);
                !owner.recovered || added.into_iter().all(|(epoch, _)| *epoch == owner.epoch)
            }),
            Property::sometimes("a second owner answers", |_, state: &State| state.answered.len() > 1),
        ]
    }
}

#[test]
fn with_all_rules_nothing_goes_wrong() {
    let checker = Ownership { without: None }.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    assert!(
        checker.unique_state_count() > 10_000,
        "{}",
        checker.unique_state_count()
    );
}

#[test]
fn each_rule_is_needed() {
    let needs = [
        (Rule::Fenced, "only the owner adds records"),
        (Rule::EndsFirst, "nothing stale is answered"),
        (Rule::Proven, "nothing stale is answered"),
        (Rule::Committed, "nothing acknowledged is lost"),
        (Rule::Results, "nothing is done twice"),
    ];
    for (rule, broken) in needs {
        let without = Some(rule);
        let found = HasDiscoveries::AnyOf([broken].into());
        let checker = Ownership { without }.checker().finish_when(found).threads(2);
        let checker = checker.spawn_bfs().join();
        assert!(checker.discovery(broken).is_some(), "{broken} also without {rule:?}");
    }
}
