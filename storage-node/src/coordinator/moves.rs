//! Which members replica sets shall have: pure functions of the cluster's view.
//!
//! A plan exchanges members only; the sets' primaries copy the data and let the old members go.

use crate::membership::{ClusterView, Versioned};
use crate::replication::configuration::exchanged;
use lazarette_metastore::ReplicaSetRecord;
use lazarette_types::{NodeId, ReplicaSetId};
use std::collections::{BTreeMap, BTreeSet};

/// Sets that are moved at the same time without need, per node that can take some.
const MOVES_PER_NODE: usize = 1;
/// A node may have so many sets more than its share before some are moved away.
const TOLERANCE: u64 = 2;
/// Nodes fuller than this, in percent, are filled further only if there is no other.
const FULL_PERCENT: u128 = 90;

/// Nodes that have been away from their sets for too long.
#[derive(Clone, Debug, Default)]
pub(super) struct Away {
    /// Long enough to give up their copies.
    pub(super) for_good: BTreeSet<NodeId>,
    /// Long enough not to wait for them where nothing depends on their copies.
    pub(super) for_now: BTreeSet<NodeId>,
}

/// One set's next members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Exchange {
    pub(super) set: ReplicaSetId,
    pub(super) next: ReplicaSetRecord,
    /// The one that is replaced, if it must still be away when this is done.
    pub(super) absent: Option<NodeId>,
    pub(super) why: &'static str,
}

/// What each node has, with the exchanges planned so far counted in.
struct Plan<'a> {
    view: &'a ClusterView,
    away: &'a Away,
    /// Membership of each set as planned.
    sets: BTreeMap<ReplicaSetId, ReplicaSetRecord>,
    exchanges: Vec<Exchange>,
}

/// The exchanges to be made now, at most one for each set. Empty when all is as it should be.
pub(super) fn plan(view: &ClusterView, away: &Away) -> Vec<Exchange> {
    let sets = view.replica_sets.iter();
    let mut plan = Plan {
        view,
        away,
        sets: sets.map(|(id, set)| (*id, set.record.clone())).collect(),
        exchanges: Vec::new(),
    };
    plan.replace_lost();
    plan.drain();
    // Restoring copies comes first, also those that are only late.
    let whole = view.replica_sets.values().all(|set| plan.is_whole(set));
    if plan.exchanges.is_empty() && whole {
        plan.spread();
        plan.spread_primaries();
    }
    plan.exchanges
}

impl Plan<'_> {
    /// Members that are gone get a successor.
    fn replace_lost(&mut self) {
        for (id, set) in &self.view.replica_sets {
            // Without a primary nobody could bring another in, and the copies of those that are away
            // may be all that is left.
            if !self.is_served(set) {
                continue;
            }
            let record = &set.record;
            let enough = record.in_sync.len() >= record.replication.copies as usize;
            let gone = record.lacking().find(|node| {
                let returns = self.view.live.contains_key(*node) || !self.draining(node);
                self.away.for_good.contains(*node) || enough && self.away.for_now.contains(*node) || !returns
            });
            if let Some(gone) = gone.cloned() {
                self.exchange(*id, &gone, Some(&gone), "away for too long");
            }
        }
    }

    /// Nodes that are to leave give their copies to others.
    fn drain(&mut self) {
        for (id, set) in &self.view.replica_sets {
            if self.moving() >= self.moves() {
                return;
            }
            let draining = set.record.members.iter().find(|node| self.draining(node));
            if let Some(draining) = draining.cloned()
                && self.is_served(set)
                && set.record.settled()
            {
                self.exchange(*id, &draining, None, "draining");
            }
        }
    }

    /// Nodes with more than their share give to those with less.
    fn spread(&mut self) {
        while self.moving() < self.moves() {
            let mut nodes = self.takers();
            nodes.sort_by_key(|node| (self.load(node, 0), node.clone()));
            let Some(most) = nodes.last().cloned() else { return };
            let found = nodes.iter().find_map(|least| {
                let surplus = self.load(&most, 0) > self.load(least, TOLERANCE);
                if !surplus || self.full(least) && !self.full(&most) {
                    return None;
                }
                self.one_to_move(&most, least).map(|set| (set, least.clone()))
            });
            let Some((set, least)) = found else { return };
            self.put(set, &most, &least, None, "spreading the load");
        }
    }

    /// The set of `from` that suits `to` best.
    fn one_to_move(&self, from: &NodeId, to: &NodeId) -> Option<ReplicaSetId> {
        let lead_more = self.lead(to) < self.lead(from);
        let fits = |set: &&ReplicaSetRecord| {
            set.settled()
                && set.members.contains(from)
                && !set.involves(to)
                && self
                    .view
                    .replica_sets
                    .get(&set.id)
                    .is_some_and(|known| self.is_whole(known))
                && self.crowd(set, from, to) <= self.crowd(set, from, from)
        };
        let best = self.sets.values().filter(fits).min_by_key(|set| {
            let leads = set.members.first() == Some(from);
            (leads != lead_more, self.together(set, from, to), set.id)
        })?;
        Some(best.id)
    }

    /// First members are spread evenly, by swapping places.
    fn spread_primaries(&mut self) {
        if !self.exchanges.is_empty() || self.moving() > 0 {
            return;
        }
        let nodes = self.takers();
        let Some(most) = nodes.iter().max_by_key(|node| self.lead(node)) else {
            return;
        };
        let swap = self
            .sets
            .values()
            .filter(|set| set.members.first() == Some(most))
            .flat_map(|set| (1..set.members.len()).map(move |place| (set, place)))
            .filter(|(set, place)| nodes.contains(&set.members[*place]))
            .min_by_key(|(set, place)| (self.lead(&set.members[*place]), set.id, *place));
        let Some((set, place)) = swap else { return };
        if self.lead(most) < self.lead(&set.members[place]) + 2 {
            return;
        }
        let mut next = set.clone();
        next.members.swap(0, place);
        self.exchanges.push(Exchange {
            set: next.id,
            next,
            absent: None,
            why: "spreading the primaries",
        });
    }

    /// Plans a successor of a member, if there is one.
    fn exchange(&mut self, set: ReplicaSetId, from: &NodeId, absent: Option<&NodeId>, why: &'static str) {
        let record = &self.sets[&set];
        // One that is leaving has all copies still: back with it, if it may stay.
        let leaving = record
            .leaving()
            .find(|node| self.view.live.contains_key(*node) && !self.draining(node))
            .cloned();
        let place = record.members.iter().position(|member| member == from);
        let spare = leaving.or_else(|| {
            let takers = self.takers().into_iter().filter(|node| !record.involves(node));
            takers.min_by_key(|node| {
                let leads = if place == Some(0) { self.lead(node) } else { 0 };
                (
                    self.full(node),
                    self.crowd(record, from, node),
                    self.load(node, 1),
                    leads,
                    self.together(record, from, node),
                    node.clone(),
                )
            })
        });
        match spare {
            Some(spare) => self.put(set, from, &spare, absent, why),
            None => tracing::debug!(replica_set = %set, %from, "no other storage node can take its place"),
        }
    }

    fn put(&mut self, set: ReplicaSetId, from: &NodeId, to: &NodeId, absent: Option<&NodeId>, why: &'static str) {
        let Some(next) = self.sets.get(&set).and_then(|record| exchanged(record, from, to)) else {
            return;
        };
        self.sets.insert(set, next.clone());
        self.exchanges.push(Exchange {
            set,
            next,
            absent: absent.cloned(),
            why,
        });
    }

    /// Whether a primary serves that can bring in members.
    fn is_served(&self, set: &Versioned<ReplicaSetRecord>) -> bool {
        !set.record.recovering && self.view.live.contains_key(&set.record.primary)
    }

    /// Whether all copies are there, and served.
    fn is_whole(&self, set: &Versioned<ReplicaSetRecord>) -> bool {
        let running = set
            .record
            .in_sync
            .iter()
            .filter(|node| self.view.live.contains_key(*node));
        self.is_served(set) && running.count() >= set.record.replication.copies as usize
    }

    fn draining(&self, node: &NodeId) -> bool {
        self.view.nodes.get(node).is_some_and(|node| node.draining)
    }

    /// Nodes that can get copies.
    fn takers(&self) -> Vec<NodeId> {
        let live = self.view.live.keys();
        live.filter(|node| self.view.nodes.contains_key(*node) && !self.draining(node))
            .cloned()
            .collect()
    }

    fn moves(&self) -> usize {
        MOVES_PER_NODE * self.takers().len()
    }

    /// Sets whose members are being exchanged.
    fn moving(&self) -> usize {
        self.sets.values().filter(|set| !set.settled()).count()
    }

    /// How many sets a node is a member of, and so many more, in relation to its disk.
    fn load(&self, node: &NodeId, more: u64) -> u128 {
        let sets = self.sets.values().filter(|set| set.members.contains(node)).count() as u64;
        let capacity = self.view.live.get(node).map_or(1, |live| live.capacity_bytes.max(1));
        (u128::from(sets + more) << 64) / u128::from(capacity)
    }

    /// Of how many sets a node is the first member.
    fn lead(&self, node: &NodeId) -> usize {
        self.sets
            .values()
            .filter(|set| set.members.first() == Some(node))
            .count()
    }

    fn full(&self, node: &NodeId) -> bool {
        self.view.live.get(node).is_some_and(|live| {
            live.capacity_bytes > 0
                && u128::from(live.used_bytes) * 100 > u128::from(live.capacity_bytes) * FULL_PERCENT
        })
    }

    /// How many of a set's other members are in the failure domain of `to`, were it in the place of
    /// `from`.
    fn crowd(&self, set: &ReplicaSetRecord, from: &NodeId, to: &NodeId) -> usize {
        let domain = |node: &NodeId| self.view.nodes.get(node).map(|node| &node.failure_domain);
        let others = set.members.iter().filter(|node| *node != from);
        others.filter(|node| domain(node) == domain(to)).count()
    }

    /// In how many sets `to` is with a set's other members already: its loss should burden all alike.
    fn together(&self, set: &ReplicaSetRecord, from: &NodeId, to: &NodeId) -> usize {
        let others: Vec<_> = set.members.iter().filter(|node| *node != from).collect();
        self.sets
            .values()
            .filter(|other| other.members.contains(to))
            .map(|other| others.iter().filter(|node| other.members.contains(node)).count())
            .sum()
    }
}

#[cfg(test)]
mod tests;
