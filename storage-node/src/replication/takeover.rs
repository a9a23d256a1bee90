//! How a node becomes primary: claim an epoch, reconcile the in-sync members, serve.

use super::configuration::{claim, quorum, recovered};
use super::context::{Context, Swap};
use super::tenure::Tenure;
use super::{Member, ReplicationError};
use crate::chunk::{ChunkSummary, DAMAGED};
use crate::membership::Versioned;
use futures::{StreamExt, TryStreamExt};
use lazarette_metastore::ReplicaSetRecord;
use lazarette_types::{ChunkId, NodeId, Version};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Chunks that a recovery copies at once.
const IN_FLIGHT: usize = 16;
/// How long members that are not needed for a quorum may hold up a recovery.
const STRAGGLERS: Duration = Duration::from_millis(1500);

/// Tries until this node serves as primary, or is no longer the one to do so (None).
///
/// Every attempt claims an epoch of its own. Cancel-safe: dropping it leaves a claim behind, which
/// the next attempt replaces.
pub(crate) async fn take_over(
    ctx: &Arc<Context>,
    member: &Arc<Member>,
    mut current: Versioned<ReplicaSetRecord>,
) -> Option<Arc<Tenure>> {
    let since = current.record.epoch;
    let set = current.record.id;
    let mut pause = Duration::from_millis(50);
    loop {
        if current.record.primary != ctx.node {
            return None;
        }
        // With a failed disk this node could not recover anything; the process is about to end.
        let able = ctx.lease.valid() && ctx.chunks.health().is_ok();
        if able && enough_run(ctx, &current.record) {
            match attempt(ctx, member, &mut current, since).await {
                Ok(Some(tenure)) => return Some(tenure),
                // The record has changed: look at it and go on at once.
                Ok(None) => continue,
                Err(error) => tracing::warn!(replica_set = %set, %error, "becoming primary failed, trying again"),
            }
        }
        // Whoever is missing may have come back.
        let mut view = ctx.view.clone();
        view.mark_unchanged();
        tokio::time::sleep(Duration::from_millis(20)).await;
        let _ = tokio::time::timeout(pause, view.changed()).await;
        pause = (pause * 2).min(Duration::from_secs(1));
        match ctx.read_record(set).await {
            Ok(Some(found)) => current = found,
            Ok(None) => return None,
            Err(error) => tracing::warn!(replica_set = %set, %error, "configuration cannot be read"),
        }
    }
}

/// Whether a quorum runs: else an attempt would only raise the epoch.
fn enough_run(ctx: &Context, record: &ReplicaSetRecord) -> bool {
    let view = ctx.view.borrow();
    let running = record
        .in_sync
        .iter()
        .filter(|node| **node == ctx.node || view.live.contains_key(node));
    running.count() >= quorum(record)
}

/// One attempt. None: the record was changed by another, `current` is the new one.
async fn attempt(
    ctx: &Arc<Context>,
    member: &Arc<Member>,
    current: &mut Versioned<ReplicaSetRecord>,
    since: u64,
) -> Result<Option<Arc<Tenure>>, ReplicationError> {
    let started = std::time::Instant::now();
    let claimed = match ctx.swap(current, &claim(&current.record)).await? {
        Swap::Made(claimed) => claimed,
        Swap::Lost(Some(found)) => {
            *current = found;
            return Ok(None);
        }
        Swap::Lost(None) => return Err(ReplicationError::NotMember(current.record.id)),
    };
    *current = claimed.clone();
    let record = &claimed.record;
    let lists = gather(ctx, member, record).await?;
    let nodes: Vec<_> = lists.keys().cloned().collect();
    let (copied, lost) = reconcile(ctx, member, record.epoch, lists).await?;
    // Fails only if fewer than a quorum were gathered.
    let next = recovered(record, &nodes).ok_or(ReplicationError::NotNow {
        set: record.id,
        reason: "too few members could be reconciled",
    })?;
    let served = match ctx.swap(&claimed, &next).await {
        Ok(Swap::Made(served)) => served,
        Ok(Swap::Lost(Some(found))) => {
            *current = found;
            return Ok(None);
        }
        Ok(Swap::Lost(None)) => return Err(ReplicationError::NotMember(record.id)),
        Err(error) => return Err(error.into()),
    };
    ctx.counters.takeovers.inc();
    tracing::info!(
        replica_set = %record.id, epoch = record.epoch, in_sync = next.in_sync.len(), copied,
        millis = started.elapsed().as_millis() as u64, "primary"
    );
    let tenure = Tenure::new(Arc::clone(ctx), Arc::clone(member), since, served);
    tenure.state().lost = lost;
    Ok(Some(tenure))
}

/// Prepares and lists the in-sync members: all that answer within a moment, at least a quorum.
async fn gather(
    ctx: &Context,
    member: &Member,
    record: &ReplicaSetRecord,
) -> Result<BTreeMap<NodeId, Vec<ChunkSummary>>, ReplicationError> {
    let mut asked: futures::stream::FuturesUnordered<_> = record
        .in_sync
        .iter()
        .map(|node| async move {
            let listed = async {
                ctx.prepare(member, node, record.epoch).await?;
                ctx.list(member, node, record.epoch).await
            };
            (node, listed.await)
        })
        .collect();
    let mut lists = BTreeMap::new();
    let mut failure = None;
    let give_up_stragglers = tokio::time::sleep(STRAGGLERS);
    tokio::pin!(give_up_stragglers);
    let need = quorum(record);
    loop {
        tokio::select! {
            answer = asked.next() => match answer {
                Some((node, Ok(list))) => { lists.insert(node.clone(), list); }
                Some((node, Err(error))) if *node == ctx.node => return Err(error),
                Some((_, Err(error))) => failure = Some(error),
                None => break,
            },
            () = &mut give_up_stragglers, if lists.len() >= need && lists.contains_key(&ctx.node) => break,
        }
    }
    match failure {
        Some(error) if lists.len() < need => Err(error),
        _ => Ok(lists),
    }
}

/// Gives every member the highest version of each chunk. Returns how many copies that took, and
/// the chunks of which no good copy of the highest version was found.
async fn reconcile(
    ctx: &Context,
    member: &Member,
    epoch: u64,
    lists: BTreeMap<NodeId, Vec<ChunkSummary>>,
) -> Result<(usize, BTreeSet<ChunkId>), ReplicationError> {
    let nodes: Vec<NodeId> = lists.keys().cloned().collect();
    let mut chunks: BTreeMap<ChunkId, Vec<Version>> = BTreeMap::new();
    for (place, list) in lists.into_values().enumerate() {
        for summary in list {
            chunks
                .entry(summary.chunk)
                .or_insert_with(|| vec![Version::NONE; nodes.len()])[place] = summary.version;
        }
    }
    chunks.retain(|_, versions| versions.iter().any(|v| *v != versions[0]) || versions[0] == DAMAGED);
    let nodes = &nodes;
    let outcomes: Vec<_> = futures::stream::iter(chunks)
        .map(|(chunk, versions)| async move {
            reconcile_chunk(ctx, member, epoch, chunk, nodes, &versions)
                .await
                .map(|copied| (chunk, copied))
        })
        .buffer_unordered(IN_FLIGHT)
        .try_collect()
        .await?;
    let copied = outcomes.iter().filter_map(|(_, copied)| *copied).sum();
    let lost = outcomes
        .into_iter()
        .filter(|(_, copied)| copied.is_none())
        .map(|(chunk, _)| chunk)
        .collect();
    Ok((copied, lost))
}

/// None: no good copy of the highest version.
async fn reconcile_chunk(
    ctx: &Context,
    member: &Member,
    epoch: u64,
    chunk: ChunkId,
    nodes: &[NodeId],
    versions: &[Version],
) -> Result<Option<usize>, ReplicationError> {
    let best = versions.iter().copied().max().unwrap_or(Version::NONE);
    let mut found = None;
    // One's own copy first: it costs no transfer.
    let mut holders: Vec<_> = (0..nodes.len()).filter(|&i| versions[i] == best).collect();
    holders.sort_by_key(|&i| nodes[i] != ctx.node);
    for i in holders {
        match ctx.fetch(member, &nodes[i], epoch, chunk).await {
            Ok(contents) if contents.version == best => {
                found = Some(contents);
                break;
            }
            Ok(_) => {}
            Err(error) if error.code() == lazarette_types::ErrorCode::Corrupt => {
                tracing::warn!(chunk = %chunk, %error, "damaged copy found in recovery");
            }
            Err(error) => return Err(error),
        }
    }
    let Some(contents) = found else {
        ctx.counters.chunks_without_good_copy.inc();
        tracing::error!(chunk = %chunk, "no good copy of a chunk's newest version is in sync");
        return Ok(None);
    };
    let mut copied = 0;
    for (i, node) in nodes.iter().enumerate() {
        if versions[i] != best {
            ctx.install(member, node, epoch, chunk, versions[i], &contents).await?;
            copied += 1;
        }
    }
    Ok(Some(copied))
}
