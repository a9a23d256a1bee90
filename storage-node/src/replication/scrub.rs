//! Verifies this node's copies, all of them again and again: their checksums, and as primary the
//! versions that the other members have. What is wrong is replaced by a good copy.

use super::context::Context;
use super::tenure::{Standing, Tenure};
use super::{Replicas, ReplicationError};
use crate::chunk::{ChunkError, ChunkSummary, DAMAGED};
use lazarette_metastore::ScrubRecord;
use lazarette_types::{ChunkId, ErrorCode, NodeId, ReplicaSetId, Version};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// What verifying a chunk costs at least, in bytes read.
const CHUNK_COST: u64 = 4096;
/// Attempts to have a damaged copy replaced before the next pass finds it again.
const ATTEMPTS: usize = 5;
/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// What became of a damaged copy.
enum Remedy {
    /// It was replaced, or has become a good one meanwhile.
    Replaced,
    /// There is no good copy in sync.
    None,
    /// Not now: the set is being changed, or a member does not answer.
    Later,
}

/// Scrubs for as long as the node runs, from where its last process was.
pub(super) async fn run(replicas: &Replicas) {
    let ctx = &*replicas.ctx;
    if ctx.config.scrub_rate == 0 {
        return;
    }
    loop {
        let resuming = state(ctx).next.is_some();
        if !resuming {
            let due = state(ctx).began + ctx.config.scrub_every.as_secs();
            tokio::time::sleep(Duration::from_secs(due.saturating_sub(now()))).await;
        }
        match pass(replicas, resuming).await {
            Ok(()) => {
                let mut state = state(ctx);
                state.next = None;
                state.last_pass = now();
            }
            Err(error) => tracing::warn!(%error, "scrubbing was interrupted"),
        }
        // Also a short pause where the next pass is due at once.
        tokio::time::sleep(PAUSE).await;
    }
}

fn state(ctx: &Context) -> MutexGuard<'_, ScrubRecord> {
    ctx.scrub.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

async fn pass(replicas: &Replicas, resuming: bool) -> Result<(), ChunkError> {
    let ctx = &*replicas.ctx;
    let sets = ctx.chunks.replica_sets().await?;
    if !resuming {
        let mut total = 0;
        for set in &sets {
            let list = ctx.chunks.list(*set).await?;
            total += list.iter().map(|summary| u64::from(summary.length)).sum::<u64>();
        }
        let mut state = state(ctx);
        state.began = now();
        state.total_bytes = total;
        state.verified_bytes = 0;
    }
    let from = state(ctx).next.unwrap_or(ReplicaSetId(0));
    // Those that this node leads as well: all of its own copies may be gone.
    let led = replicas.leading().into_iter().map(|(set, _)| set);
    let sets: BTreeSet<_> = sets.into_iter().chain(led).filter(|set| *set >= from).collect();
    for set in sets {
        state(ctx).next = Some(set);
        for summary in ctx.chunks.list(set).await? {
            verify(replicas, set, summary).await?;
        }
        if let Some(tenure) = replicas.tenure(set) {
            tenure.compare().await;
        }
    }
    Ok(())
}

async fn verify(replicas: &Replicas, set: ReplicaSetId, summary: ChunkSummary) -> Result<(), ChunkError> {
    let ctx = &*replicas.ctx;
    let started = Instant::now();
    let found = ctx.chunks.fetch(set, summary.chunk).await;
    let bytes = u64::from(summary.length);
    ctx.counters.scrubbed_bytes.add(bytes);
    state(ctx).verified_bytes += bytes;
    match found {
        Ok(_) => {}
        Err(ChunkError::Corrupt { .. }) if involved(ctx, set) => {
            ctx.counters.scrub_found.inc();
            match remedy(replicas, set, summary.chunk).await {
                Remedy::Replaced => ctx.counters.scrub_repaired.inc(),
                Remedy::None => ctx.counters.scrub_lost.inc(),
                Remedy::Later => {
                    tracing::warn!(replica_set = %set, chunk = %summary.chunk, "damaged copy is left for the next pass");
                }
            }
        }
        Err(ChunkError::Corrupt { .. }) => {}
        Err(error) => return Err(error),
    }
    let cost = Duration::from_secs_f64(bytes.max(CHUNK_COST) as f64 / ctx.config.scrub_rate as f64);
    tokio::time::sleep_until(started + cost).await;
    Ok(())
}

fn involved(ctx: &Context, set: ReplicaSetId) -> bool {
    ctx.known(set).is_some_and(|known| known.record.involves(&ctx.node))
}

async fn remedy(replicas: &Replicas, set: ReplicaSetId, chunk: ChunkId) -> Remedy {
    let ctx = &*replicas.ctx;
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        let asked = match (replicas.tenure(set), ctx.known(set)) {
            (Some(tenure), _) => tenure.heal_in_turn(chunk).await,
            (None, Some(known)) if known.record.in_sync.contains(&ctx.node) => {
                let record = known.record;
                ctx.links
                    .restore(&record.primary, set, record.epoch, chunk, &ctx.node)
                    .await
            }
            // Repair compares versions only, so it waits until this copy counts.
            (None, _) => continue,
        };
        if let Err(error) = asked {
            if error.code() == ErrorCode::Corrupt {
                return Remedy::None;
            }
            tracing::warn!(replica_set = %set, %chunk, %error, "damaged copy is not replaced yet");
            continue;
        }
        if ctx.chunks.fetch(set, chunk).await.is_ok() {
            return Remedy::Replaced;
        }
    }
    Remedy::Later
}

impl Tenure {
    /// Replaces this node's copy of a chunk if it is damaged still.
    async fn heal_in_turn(self: &Arc<Self>, chunk: ChunkId) -> Result<(), ReplicationError> {
        self.check_open()?;
        let _turn = self.turn_to_read(chunk).await;
        match self.ctx.chunks.fetch(self.set, chunk).await {
            Err(ChunkError::Corrupt { .. }) => self.heal(chunk).await,
            other => Ok(other.map(drop)?),
        }
    }

    /// Compares the versions that the members in sync have with this node's own.
    async fn compare(self: &Arc<Self>) {
        let peers: Vec<_> = {
            let state = self.state();
            let in_sync = state.peers.iter().filter(|(_, p)| p.standing == Standing::InSync);
            in_sync.map(|(node, _)| node.clone()).collect()
        };
        for node in peers {
            if let Err(error) = self.compare_with(&node).await {
                tracing::debug!(replica_set = %self.set, %node, %error, "versions not compared");
            }
        }
    }

    async fn compare_with(self: &Arc<Self>, node: &NodeId) -> Result<(), ReplicationError> {
        let theirs = self.ctx.links.list(node, self.set, self.epoch()).await?;
        let ours = self.ctx.chunks.list(self.set).await?;
        let mut differ: BTreeMap<ChunkId, Version> = theirs.into_iter().map(|s| (s.chunk, s.version)).collect();
        for summary in ours {
            match differ.get(&summary.chunk) {
                Some(version) if *version == summary.version => {
                    differ.remove(&summary.chunk);
                }
                Some(_) => {}
                None => {
                    differ.insert(summary.chunk, Version::NONE);
                }
            }
        }
        // Most of these were on their way when the lists were made.
        for chunk in differ.into_keys() {
            self.settle_difference(node, chunk).await?;
        }
        Ok(())
    }

    /// Makes a member's copy equal to this node's if they differ while nothing is on its way.
    async fn settle_difference(self: &Arc<Self>, node: &NodeId, chunk: ChunkId) -> Result<(), ReplicationError> {
        self.check_open()?;
        let _turn = self.turn_to_read(chunk).await;
        self.arrived(chunk).await;
        let theirs = match self.ctx.links.fetch(node, self.set, self.epoch(), chunk).await {
            Ok(contents) => contents.version,
            Err(error) if error.code() == ErrorCode::Corrupt => DAMAGED,
            Err(error) => return Err(error),
        };
        let ours = match self.ctx.chunks.version(self.set, chunk).await {
            // Its own verification finds it.
            Err(ChunkError::Corrupt { .. }) => return Ok(()),
            other => other?,
        };
        let in_sync = self.state().peers.get(node).map(|p| p.standing) == Some(Standing::InSync);
        if theirs == ours || !in_sync {
            return Ok(());
        }
        self.ctx.counters.scrub_found.inc();
        if theirs != DAMAGED && theirs > ours {
            // A member in sync is never ahead of its primary, unless this node has lost something. A
            // recovery finds the newest copy of everything.
            tracing::error!(replica_set = %self.set, %node, %chunk, "this primary has lost a change that a member has");
            self.close("a member in sync is ahead");
            self.ctx.counters.scrub_repaired.inc();
            return Ok(());
        }
        tracing::warn!(replica_set = %self.set, %node, %chunk, "a member in sync has another version");
        self.equalize(node, chunk, theirs).await?;
        self.ctx.counters.scrub_repaired.inc();
        Ok(())
    }
}
