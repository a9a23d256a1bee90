//! What a primary does besides serving: ejects members that do not answer, brings back those that
//! do, gives the set back to its first member.

use super::configuration::{handed_over, same_but_members, without};
use super::tenure::{Reconfigured, Standing, Tenure};
use crate::membership::ClusterView;
use lazarette_types::NodeId;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How often deliveries' ages are looked at while there are any.
const TICK: Duration = Duration::from_millis(100);
/// How often the set is looked at while nothing happens.
const IDLE_TICK: Duration = Duration::from_millis(500);
/// Longest pause between two attempts to bring a member back.
const REPAIR_PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long a set must be undisturbed before a primary that is to leave it hands it over.
const LEAVE_AFTER: Duration = Duration::from_secs(1);
/// How long the deliveries under way may hold up a hand-back before it is given up.
const DRAIN: Duration = Duration::from_secs(1);

/// Attempts to bring one member back.
struct Repair {
    running: tokio::task::JoinHandle<bool>,
    failures: u32,
    retry_at: Option<Instant>,
}

impl Tenure {
    /// Works until the tenure ends.
    pub(crate) async fn supervise(self: &Arc<Self>) {
        let mut view = self.ctx.view.clone();
        let mut dead_since: BTreeMap<NodeId, Instant> = BTreeMap::new();
        let mut repairs: BTreeMap<NodeId, Repair> = BTreeMap::new();
        loop {
            let tick = if self.busy() { TICK } else { IDLE_TICK };
            tokio::select! {
                () = self.closed.cancelled() => break,
                () = tokio::time::sleep(tick) => {}
                changed = view.changed() => if changed.is_err() { break },
            }
            let now = Arc::clone(&view.borrow_and_update());
            self.check_known(&now);
            if !self.ctx.lease.valid() {
                continue;
            }
            self.note_deaths(&now, &mut dead_since);
            let unresponsive = self.unresponsive(&dead_since);
            if !unresponsive.is_empty() && self.eject(unresponsive.clone(), &mut dead_since).await {
                self.ctx.counters.members_ejected.add(unresponsive.len() as u64);
                let in_sync = self.state().record.record.in_sync.len();
                tracing::warn!(
                    replica_set = %self.set, epoch = self.epoch(), nodes = ?unresponsive, in_sync, "members ejected"
                );
            }
            self.give_up_learners(&dead_since);
            self.repair_members(&now, &mut repairs);
            self.let_go(&now, &mut dead_since).await;
            self.hand_back(&now).await;
        }
        self.close("supervision ended");
        for repair in repairs.values() {
            repair.running.abort();
        }
    }

    /// Whether changes are on their way, or members are missing.
    fn busy(&self) -> bool {
        let state = self.state();
        let record = &state.record.record;
        !record.settled() || state.peers.values().any(|p| !p.pending.is_empty())
    }

    /// Ends the tenure if another configuration is known than this tenure made.
    fn check_known(&self, view: &ClusterView) {
        // Under way: the store may be ahead of what this tenure knows to have made.
        let Ok(_quiet) = self.reconfiguring.try_lock() else {
            return;
        };
        let mut state = self.state();
        match view.replica_sets.get(&self.set) {
            Some(known) if known.mod_revision <= state.record.mod_revision => {}
            Some(known) if same_but_members(&known.record, &state.record.record) => {
                tracing::info!(replica_set = %self.set, members = ?known.record.members, "members exchanged");
                state.adopt(known.clone());
                state.calm_since = Instant::now();
            }
            Some(_) => self.close("another configuration was made"),
            None => self.close("the replica set is gone"),
        }
    }

    fn note_deaths(&self, view: &ClusterView, dead_since: &mut BTreeMap<NodeId, Instant>) {
        let state = self.state();
        for node in state.peers.keys() {
            if view.live.contains_key(node) {
                dead_since.remove(node);
            } else {
                dead_since.entry(node.clone()).or_insert_with(Instant::now);
            }
        }
    }

    /// In-sync members that are to be ejected.
    fn unresponsive(&self, dead_since: &BTreeMap<NodeId, Instant>) -> Vec<NodeId> {
        let config = &self.ctx.config;
        let state = self.state();
        let record = &state.record.record;
        let mut remain = record.in_sync.len();
        let mut found = Vec::new();
        for (node, p) in &state.peers {
            if !matches!(p.standing, Standing::InSync | Standing::Ejecting) {
                continue;
            }
            let dead = dead_since
                .get(node)
                .is_some_and(|since| p.oldest() > config.eject_dead || since.elapsed() > config.dead_grace);
            // Ejecting a running member must at least let writes go on.
            let full = p.peer.full.load(Ordering::Relaxed) && p.oldest() > config.eject_dead;
            let slow = (p.oldest() > config.eject_slow || full) && remain > record.replication.ack as usize;
            if dead || slow || p.standing == Standing::Ejecting {
                remain -= 1;
                found.push(node.clone());
            }
        }
        found
    }

    /// Ends repairs of members that do not keep up, so that they do not hold up the others.
    fn give_up_learners(&self, dead_since: &BTreeMap<NodeId, Instant>) {
        for (node, p) in &self.state().peers {
            // One that is being admitted has a limit of its own, and its record may be written.
            if p.standing == Standing::Learner
                && (dead_since.contains_key(node)
                    || p.oldest() > self.ctx.config.eject_slow
                    || p.peer.full.load(Ordering::Relaxed))
            {
                p.peer.gone.cancel();
            }
        }
    }

    /// Removes members from the configuration.
    ///
    /// From the first moment they count no more for acknowledgements. Then everything that was
    /// acknowledged with their help is delivered to those that remain; only then is the record
    /// changed. So *Held* is true of the old and of the new configuration at every moment. Whether
    /// it was changed.
    async fn eject(&self, mut nodes: Vec<NodeId>, dead_since: &mut BTreeMap<NodeId, Instant>) -> bool {
        let _quiet = self.reconfiguring.lock().await;
        loop {
            let tails = {
                let mut state = self.state();
                for node in &nodes {
                    if let Some(p) = state.peers.get_mut(node)
                        && p.standing == Standing::InSync
                    {
                        p.standing = Standing::Ejecting;
                    }
                }
                let state = &*state;
                state.tails(|node| state.peers.get(node).is_some_and(|p| p.standing == Standing::InSync))
            };
            if self.drained(&tails, TICK).await {
                break;
            }
            if self.closed.is_cancelled() {
                return false;
            }
            let view = Arc::clone(&self.ctx.view.borrow());
            self.note_deaths(&view, dead_since);
            for node in self.unresponsive(dead_since) {
                if !nodes.contains(&node) {
                    nodes.push(node);
                }
            }
        }
        loop {
            match self.reconfigure(|record| without(record, &nodes)).await {
                Reconfigured::Made => return true,
                // Whom the coordinator wants as members makes no difference to who can be counted on.
                Reconfigured::MembersChanged => {}
                Reconfigured::Over => return false,
            }
        }
    }

    /// Lets nodes go that shall not hold the copies any more, once all that shall do and run.
    async fn let_go(&self, view: &ClusterView, dead_since: &mut BTreeMap<NodeId, Instant>) {
        let record = self.state().record.record.clone();
        let leaving: Vec<_> = record
            .leaving()
            .filter(|node| **node != self.ctx.node)
            .cloned()
            .collect();
        if leaving.is_empty()
            || record.lacking().next().is_some()
            || !record.members.iter().all(|node| view.live.contains_key(node))
        {
            return;
        }
        if self.eject(leaving.clone(), dead_since).await {
            self.ctx.counters.members_exchanged.add(leaving.len() as u64);
            tracing::info!(replica_set = %self.set, epoch = self.epoch(), ?leaving, "copies moved");
        }
    }

    /// Waits for deliveries, for at most so long.
    async fn drained(&self, tails: &[CancellationToken], limit: Duration) -> bool {
        let all = futures::future::join_all(tails.iter().map(CancellationToken::cancelled));
        tokio::select! {
            _ = all => !self.closed.is_cancelled(),
            () = tokio::time::sleep(limit) => false,
            () = self.closed.cancelled() => false,
        }
    }

    /// Starts to bring back members that run and are not in sync.
    fn repair_members(self: &Arc<Self>, view: &ClusterView, repairs: &mut BTreeMap<NodeId, Repair>) {
        let record = self.state().record.record.clone();
        repairs.retain(|node, repair| record.members.contains(node) || !repair.running.is_finished());
        for node in &record.members {
            if record.in_sync.contains(node) || !view.live.contains_key(node) {
                if let Some(repair) = repairs.get(node)
                    && repair.running.is_finished()
                {
                    repairs.remove(node);
                }
                continue;
            }
            let mut failures = 0;
            if let Some(repair) = repairs.get_mut(node) {
                if !repair.running.is_finished() {
                    continue;
                }
                let retry_at = *repair.retry_at.get_or_insert_with(|| {
                    let pause = Duration::from_millis(200) * 2u32.saturating_pow(repair.failures.min(10));
                    Instant::now() + pause.min(REPAIR_PAUSE_MAX)
                });
                if Instant::now() < retry_at {
                    continue;
                }
                failures = repair.failures + 1;
            }
            let (tenure, node_id) = (Arc::clone(self), node.clone());
            let running = tokio::spawn(async move { tenure.repair(&node_id).await });
            repairs.insert(
                node.clone(),
                Repair {
                    running,
                    failures,
                    retry_at: None,
                },
            );
        }
    }

    /// Gives the set to its first member, which was chosen so that the primaries are spread evenly,
    /// once all has been well for a while; sooner if this node is to leave the set.
    async fn hand_back(&self, view: &ClusterView) {
        let (record, calm) = {
            let state = self.state();
            (state.record.record.clone(), state.calm_since.elapsed())
        };
        let Some(first) = record.members.first() else { return };
        let wait = if record.members.contains(&self.ctx.node) {
            self.ctx.config.hand_back_after
        } else {
            self.ctx.config.hand_back_after.min(LEAVE_AFTER)
        };
        if *first == self.ctx.node
            || calm < wait
            || record.lacking().next().is_some()
            || !record.members.iter().all(|node| view.live.contains_key(node))
        {
            return;
        }
        let Ok(_turn) = self.ctx.hand_backs.try_acquire() else {
            return;
        };
        let Ok(_quiet) = self.reconfiguring.try_lock() else {
            return;
        };
        self.draining.store(true, Ordering::Release);
        let until = Instant::now() + DRAIN;
        // Reads need not end: what they find once the tenure is over is not answered.
        let idle = loop {
            if self.state().quiet() {
                break true;
            }
            if Instant::now() > until {
                break false;
            }
            let _ = tokio::time::timeout(Duration::from_millis(20), self.changed.notified()).await;
        };
        if !idle {
            self.state().calm_since = Instant::now();
            self.draining.store(false, Ordering::Release);
            self.changed.notify_waiters();
            return;
        }
        // Whatever comes of it, this tenure is over: if the record stays, the next one claims.
        self.close("handed back to the first member");
        let old = self.state().record.clone();
        match self.ctx.swap(&old, &handed_over(&old.record, first)).await {
            Ok(_) => self.ctx.counters.hand_backs.inc(),
            Err(error) => tracing::warn!(replica_set = %self.set, %error, "handing back not answered"),
        }
    }
}
