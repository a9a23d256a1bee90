//! Bringing a member back: compare, copy what differs, forward what is new meanwhile, admit.

use super::ReplicationError;
use super::configuration::with;
use super::tenure::{PeerState, Reconfigured, Standing, Tenure};
use crate::chunk::ChunkError;
use futures::StreamExt;
use lazarette_types::{ChunkId, NodeId, Version};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What is still to be copied to members of a set that come back.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    pub(crate) chunks: AtomicU64,
    pub(crate) bytes: AtomicU64,
}

/// Takes its part out of the backlog when the repair ends.
struct Share<'a> {
    backlog: &'a Backlog,
    chunks: AtomicU64,
    bytes: AtomicU64,
}

impl Share<'_> {
    fn add(&self, bytes: u64) {
        self.chunks.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.backlog.chunks.fetch_add(1, Ordering::Relaxed);
        self.backlog.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn done(&self, bytes: u64) {
        let one = self.chunks.load(Ordering::Relaxed).min(1);
        let bytes = self.bytes.load(Ordering::Relaxed).min(bytes);
        self.chunks.fetch_sub(one, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.backlog.chunks.fetch_sub(one, Ordering::Relaxed);
        self.backlog.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.backlog.chunks.fetch_sub(*self.chunks.get_mut(), Ordering::Relaxed);
        self.backlog.bytes.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

/// Takes the learner out again unless it was admitted.
struct Learning<'a> {
    tenure: &'a Tenure,
    node: &'a NodeId,
}

impl Drop for Learning<'_> {
    fn drop(&mut self) {
        let mut state = self.tenure.state();
        if let Some(p) = state.peers.get(self.node)
            && matches!(p.standing, Standing::Learner | Standing::Admitting)
        {
            p.peer.gone.cancel();
            state.peers.remove(self.node);
        }
        drop(state);
        self.tenure.changed.notify_waiters();
    }
}

impl Tenure {
    /// Brings one member back. Whether that went well.
    pub(crate) async fn repair(self: Arc<Self>, node: &NodeId) -> bool {
        let started = Instant::now();
        tracing::info!(replica_set = %self.set, %node, "bringing a member back");
        match self.try_repair(node).await {
            Ok(copied) => {
                self.ctx.counters.members_admitted.inc();
                tracing::info!(
                    replica_set = %self.set, %node, copied, millis = started.elapsed().as_millis() as u64,
                    "member is in sync"
                );
                true
            }
            Err(error) => {
                tracing::warn!(replica_set = %self.set, %node, %error, "bringing a member back failed");
                false
            }
        }
    }

    async fn try_repair(self: &Arc<Self>, node: &NodeId) -> Result<usize, ReplicationError> {
        // Nothing that was sent to it in another configuration reaches it after this.
        self.ctx.links.prepare(node, self.set, self.epoch()).await?;
        let gone = {
            let mut guard = self.state();
            let state = &mut *guard;
            let mut learner = PeerState::new(&self.ctx, node, Standing::Learner);
            // Changes under way do not reach it: look at their chunks when they are over.
            learner.dirty = state.slots.keys().copied().collect();
            let gone = learner.peer.gone.clone();
            state.peers.insert(node.clone(), learner);
            gone
        };
        let _learning = Learning { tenure: self, node };
        tokio::select! {
            result = self.catch_up(node) => result,
            () = gone.cancelled() => Err(ReplicationError::unreachable(node, "given up")),
            () = self.closed.cancelled() => Err(ReplicationError::NotPrimary(self.set)),
        }
    }

    async fn catch_up(self: &Arc<Self>, node: &NodeId) -> Result<usize, ReplicationError> {
        // Both lists are made after the learner was told to get all new changes. So where they
        // agree it follows, and where a change slips between it is marked dirty.
        let theirs = self.ctx.links.list(node, self.set, self.epoch()).await?;
        let ours = self.ctx.chunks.list(self.set).await?;
        let mut differ: BTreeMap<ChunkId, (Version, u64)> = theirs
            .into_iter()
            .map(|summary| (summary.chunk, (summary.version, 0)))
            .collect();
        for summary in &ours {
            match differ.get_mut(&summary.chunk) {
                Some((theirs, _)) if *theirs == summary.version => {
                    differ.remove(&summary.chunk);
                }
                Some((_, bytes)) => *bytes = u64::from(summary.length),
                None => {
                    differ.insert(summary.chunk, (Version::NONE, u64::from(summary.length)));
                }
            }
        }
        drop(ours);
        let share = Share {
            backlog: &self.backlog,
            chunks: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        };
        for (_, bytes) in differ.values() {
            share.add(*bytes);
        }
        let mut copied = 0;
        loop {
            for chunk in self.take_dirty(node) {
                differ.entry(chunk).or_insert_with(|| {
                    share.add(0);
                    (Version::NONE, 0)
                });
            }
            if differ.is_empty() {
                break;
            }
            let batch = std::mem::take(&mut differ);
            copied += batch.len();
            let share = &share;
            let mut copies = futures::stream::iter(batch)
                .map(|(chunk, (version, bytes))| async move {
                    let copied = self.copy(node, chunk, version).await;
                    share.done(bytes);
                    copied
                })
                .buffer_unordered(self.ctx.config.repair_in_flight.max(1));
            while let Some(result) = copies.next().await {
                result?;
            }
        }
        self.admit(node).await?;
        Ok(copied)
    }

    fn take_dirty(&self, node: &NodeId) -> Vec<ChunkId> {
        let mut state = self.state();
        let dirty = state.peers.get_mut(node).map(|p| std::mem::take(&mut p.dirty));
        dirty.unwrap_or_default().into_iter().collect()
    }

    async fn copy(self: &Arc<Self>, node: &NodeId, chunk: ChunkId, present: Version) -> Result<(), ReplicationError> {
        let Ok(_permit) = self.ctx.repairs.acquire().await else {
            return Err(ReplicationError::NotPrimary(self.set));
        };
        let bytes = {
            // No change begins meanwhile, and those that began have reached the learner or failed
            // to: so what follows builds on what is copied now.
            let _turn = self.turn_to_read(chunk).await;
            self.arrived_at(node, chunk).await;
            match self.equalize(node, chunk, present).await {
                Ok(bytes) => bytes,
                // Counted where it was found. The other chunks still deserve their copies.
                Err(ReplicationError::NoGoodCopy(_)) => 0,
                Err(error) => return Err(error),
            }
        };
        self.ctx.counters.chunks_repaired.inc();
        self.ctx.counters.bytes_repaired.add(bytes);
        self.pace(bytes).await;
        Ok(())
    }

    /// Puts this node's copy of a chunk in the place of a member's damaged one.
    pub(crate) async fn restore(self: &Arc<Self>, node: &NodeId, chunk: ChunkId) -> Result<(), ReplicationError> {
        self.check_open()?;
        // A learner gets its copies by its repair, anyone else none.
        let standing = self.state().peers.get(node).map(|p| p.standing);
        if !matches!(standing, Some(Standing::InSync | Standing::Ejecting)) {
            return Err(ReplicationError::unreachable(node, "not in sync"));
        }
        let Ok(_permit) = self.ctx.repairs.acquire().await else {
            return Err(ReplicationError::NotPrimary(self.set));
        };
        let bytes = {
            let _turn = self.turn_to_read(chunk).await;
            self.arrived_at(node, chunk).await;
            let present = match self.ctx.chunks.version(self.set, chunk).await {
                Ok(present) => present,
                Err(ChunkError::Corrupt { .. }) => {
                    self.heal(chunk).await?;
                    self.ctx.chunks.version(self.set, chunk).await?
                }
                Err(error) => return Err(error.into()),
            };
            // Everything has arrived, so the member has this version too, or a damaged header: in
            // both cases the copy is replaced.
            self.equalize(node, chunk, present).await?
        };
        self.pace(bytes).await;
        Ok(())
    }

    /// Waits for the deliveries of a chunk to one peer.
    async fn arrived_at(&self, node: &NodeId, chunk: ChunkId) {
        let tail = {
            let state = self.state();
            state.slots.get(&chunk).and_then(|slot| slot.tails.get(node).cloned())
        };
        if let Some(tail) = tail {
            tail.cancelled().await;
        }
    }

    /// Keeps all repairs of this node together within the rate.
    async fn pace(&self, bytes: u64) {
        let cost = Duration::from_secs_f64(bytes as f64 / self.ctx.config.repair_rate.max(1) as f64);
        let until = {
            let mut next = self.ctx.repair_pace.lock().await;
            let until = next.unwrap_or_else(Instant::now).max(Instant::now()) + cost;
            *next = Some(until);
            until
        };
        // Small copies may run ahead a little: timers are coarse.
        if until.saturating_duration_since(Instant::now()) > Duration::from_millis(5) {
            tokio::time::sleep_until(until).await;
        }
    }

    /// Adds a member that has everything but what is on its way.
    async fn admit(&self, node: &NodeId) -> Result<(), ReplicationError> {
        let _quiet = self.reconfiguring.lock().await;
        let tails = {
            let mut state = self.state();
            match state.peers.get_mut(node) {
                // From here on a gap is closed at once, as for a member in sync.
                Some(p) if p.dirty.is_empty() => p.standing = Standing::Admitting,
                _ => return Err(ReplicationError::unreachable(node, "fell behind again")),
            }
            state.tails(|of| of == node)
        };
        // What was acknowledged while fewer than `ack` were in sync must be on it, too.
        let arrived = futures::future::join_all(tails.iter().map(CancellationToken::cancelled));
        if tokio::time::timeout(self.ctx.config.debt_age, arrived).await.is_err() {
            return Err(ReplicationError::unreachable(node, "does not keep up"));
        }
        match self.reconfigure(|record| with(record, node)).await {
            Reconfigured::Made => Ok(()),
            // See `State::adopt`.
            Reconfigured::MembersChanged => Err(ReplicationError::unreachable(node, "members were exchanged")),
            Reconfigured::Over => Err(ReplicationError::NotPrimary(self.set)),
        }
    }
}
