use super::configuration::same_but_members;
use super::context::{Context, Step};
use super::operation::{Operation, Progress};
use super::repair::Backlog;
use super::{Member, ReplicationError};
use crate::chunk::{ChunkError, Contents, DAMAGED};
use crate::membership::Versioned;
use lazarette_metastore::ReplicaSetRecord;
use lazarette_types::{ChunkId, NodeId, ReplicaSetId, Version};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// This node's time as primary of a replica set: from the end of a recovery until another primary
/// is made, or this node gives up. One process, unbroken, so that what is on its way to the
/// backups is known.
pub(crate) struct Tenure {
    pub(crate) ctx: Arc<Context>,
    pub(crate) set: ReplicaSetId,
    pub(crate) member: Arc<Member>,
    /// The epoch in which this node was made primary; clients' requests of it and later are good.
    pub(crate) since: u64,
    /// Ends everything that this tenure has under way.
    pub(crate) closed: CancellationToken,
    /// Taking no more requests, to be handed over.
    pub(crate) draining: AtomicBool,
    /// Held during each change of configuration.
    pub(crate) reconfiguring: tokio::sync::Mutex<()>,
    /// Signalled when waiting for room, members or the end of deliveries may be over.
    pub(crate) changed: Notify,
    /// What repair has still to copy.
    pub(crate) backlog: Backlog,
    state: Mutex<State>,
}

/// How far a member's answers count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// In sync: counts for acknowledgements.
    InSync,
    /// In sync by the record, but about to be removed: does not count any more.
    Ejecting,
    /// Coming back: gets every new change, counts for nothing.
    Learner,
    /// Coming back and complete but for what is on its way; about to be in sync.
    Admitting,
}

/// Another member that gets the changes.
pub(crate) struct Peer {
    pub(crate) node: NodeId,
    /// It gets nothing any more.
    pub(crate) gone: CancellationToken,
    /// Its disk was full at the last change.
    pub(crate) full: AtomicBool,
    /// Bytes on their way to its node, over all sets.
    pub(crate) debt: Arc<AtomicUsize>,
}

pub(crate) struct PeerState {
    pub(crate) peer: Arc<Peer>,
    pub(crate) standing: Standing,
    /// Changes on their way: since when, by sequence.
    pub(crate) pending: BTreeMap<u64, Instant>,
    /// Of a learner: chunks to look at again.
    pub(crate) dirty: BTreeSet<ChunkId>,
}

impl PeerState {
    /// How long the oldest change has been on its way.
    pub(crate) fn oldest(&self) -> Duration {
        // Sequences are given in order of time.
        self.pending
            .first_key_value()
            .map_or(Duration::ZERO, |(_, since)| since.elapsed())
    }
}

/// A chunk that is in use now.
#[derive(Default)]
pub(crate) struct Slot {
    lock: Arc<RwLock<()>>,
    users: usize,
    /// For each peer the end of the last delivery, which the next one waits for.
    pub(crate) tails: HashMap<NodeId, CancellationToken>,
}

pub(crate) struct State {
    pub(crate) record: Versioned<ReplicaSetRecord>,
    pub(crate) sequence: u64,
    pub(crate) peers: BTreeMap<NodeId, PeerState>,
    pub(crate) slots: HashMap<ChunkId, Slot>,
    /// Changes that wait for their acknowledgement.
    pub(crate) waiting: HashMap<u64, Arc<Operation>>,
    /// Chunks without a good copy in sync: refused until deleted.
    pub(crate) lost: BTreeSet<ChunkId>,
    /// Since when the configuration and the deliveries have been undisturbed.
    pub(crate) calm_since: Instant,
}

/// The right to change a chunk: no other change, and no read.
pub(crate) struct WriteTurn {
    _guard: OwnedRwLockWriteGuard<()>,
    _user: SlotUser,
}

/// The right to read a chunk: no change meanwhile.
pub(crate) struct ReadTurn {
    _guard: OwnedRwLockReadGuard<()>,
    _user: SlotUser,
}

struct SlotUser {
    tenure: Arc<Tenure>,
    chunk: ChunkId,
}

impl Drop for SlotUser {
    fn drop(&mut self) {
        let mut state = self.tenure.state();
        if let Some(slot) = state.slots.get_mut(&self.chunk) {
            slot.users -= 1;
        }
        state.release(self.chunk);
    }
}

impl State {
    /// Forgets a chunk that nobody uses.
    pub(crate) fn release(&mut self, chunk: ChunkId) {
        if let Some(slot) = self.slots.get(&chunk)
            && slot.users == 0
            && slot.tails.is_empty()
        {
            self.slots.remove(&chunk);
        }
    }

    /// The ends of all deliveries under way to peers of these standings.
    pub(crate) fn tails(&self, of: impl Fn(&NodeId) -> bool) -> Vec<CancellationToken> {
        self.slots
            .values()
            .flat_map(|slot| &slot.tails)
            .filter(|(node, _)| of(node))
            .map(|(_, tail)| tail.clone())
            .collect()
    }

    /// Whether no change is under way, nor on its way to a peer.
    pub(crate) fn quiet(&self) -> bool {
        self.waiting.is_empty() && self.slots.values().all(|slot| slot.tails.is_empty())
    }

    /// Takes over a record in which the coordinator has, or may have, exchanged members.
    pub(crate) fn adopt(&mut self, record: Versioned<ReplicaSetRecord>) {
        // A learner may have been struck off and put back unnoticed, and have dropped its copies in
        // between, even if the members are the same again. So what it was seen to have counts for
        // nothing.
        for p in self.peers.values() {
            if matches!(p.standing, Standing::Learner | Standing::Admitting) {
                p.peer.gone.cancel();
            }
        }
        self.record = record;
    }

    /// Members in sync that count for acknowledgements, and hold a change by its progress.
    fn holders(&self, progress: &Progress) -> usize {
        let others = progress
            .acked
            .iter()
            .filter(|node| self.peers.get(node).is_some_and(|p| p.standing == Standing::InSync))
            .count();
        others + usize::from(progress.local_done())
    }
}

/// What became of a step of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reconfigured {
    /// It was made.
    Made,
    /// Not made: the coordinator has exchanged members meanwhile. Decide again.
    MembersChanged,
    /// The tenure is over.
    Over,
}

/// What is known of a change that waits.
pub(crate) enum Settled {
    /// Keep waiting.
    NotYet,
    /// Durable on `ack` members that stay in sync.
    Acknowledged,
    /// On all that are in sync, but these are fewer than `ack`: it stays, but must not be
    /// acknowledged.
    Short,
    /// Too few members can make it.
    Refused,
}

impl Tenure {
    pub(crate) fn new(
        ctx: Arc<Context>,
        member: Arc<Member>,
        since: u64,
        record: Versioned<ReplicaSetRecord>,
    ) -> Arc<Self> {
        let peers = record
            .record
            .in_sync
            .iter()
            .filter(|node| **node != ctx.node)
            .map(|node| (node.clone(), PeerState::new(&ctx, node, Standing::InSync)))
            .collect();
        Arc::new(Self {
            set: record.record.id,
            closed: ctx.stopped.child_token(),
            ctx,
            member,
            since,
            draining: AtomicBool::new(false),
            reconfiguring: tokio::sync::Mutex::default(),
            changed: Notify::new(),
            backlog: Backlog::default(),
            state: Mutex::new(State {
                record,
                sequence: 0,
                peers,
                slots: HashMap::new(),
                waiting: HashMap::new(),
                lost: BTreeSet::new(),
                calm_since: Instant::now(),
            }),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present epoch.
    pub(crate) fn epoch(&self) -> u64 {
        self.state().record.record.epoch
    }

    /// Fails if nothing may be served now.
    pub(crate) fn check_open(&self) -> Result<(), ReplicationError> {
        if self.closed.is_cancelled() {
            return Err(ReplicationError::NotPrimary(self.set));
        }
        if !self.ctx.lease.valid() {
            return Err(ReplicationError::NoLease);
        }
        Ok(())
    }

    /// Ends the tenure. What is under way fails.
    pub(crate) fn close(&self, why: &str) {
        if !self.closed.is_cancelled() {
            tracing::info!(replica_set = %self.set, why, "no longer primary");
            self.closed.cancel();
            self.changed.notify_waiters();
        }
    }

    fn user(self: &Arc<Self>, chunk: ChunkId) -> (SlotUser, Arc<RwLock<()>>) {
        let mut state = self.state();
        let slot = state.slots.entry(chunk).or_default();
        slot.users += 1;
        let user = SlotUser {
            tenure: Arc::clone(self),
            chunk,
        };
        (user, Arc::clone(&slot.lock))
    }

    pub(crate) async fn turn_to_write(self: &Arc<Self>, chunk: ChunkId) -> WriteTurn {
        let (user, lock) = self.user(chunk);
        WriteTurn {
            _guard: lock.write_owned().await,
            _user: user,
        }
    }

    pub(crate) async fn turn_to_read(self: &Arc<Self>, chunk: ChunkId) -> ReadTurn {
        let (user, lock) = self.user(chunk);
        ReadTurn {
            _guard: lock.read_owned().await,
            _user: user,
        }
    }

    /// Whether a change may be acknowledged. Decided under the state's lock, so that a member
    /// which stops counting is either seen here, or sees this change as one to be drained.
    pub(crate) fn settled(&self, operation: &Operation) -> Settled {
        let state = self.state();
        let progress = operation.progress();
        if !progress.local_done() {
            return Settled::NotYet;
        }
        let record = &state.record.record;
        let ack = record.replication.ack as usize;
        let holders = state.holders(&progress);
        // A deleted chunk leaves no version by which a recovery could tell that it is newer, so
        // no member in sync may still have it.
        let need = if operation.everywhere() {
            record.in_sync.len()
        } else {
            ack.min(record.in_sync.len())
        };
        if holders >= need {
            return if holders >= ack {
                Settled::Acknowledged
            } else {
                Settled::Short
            };
        }
        let able = 1 + state
            .peers
            .values()
            .filter(|p| p.standing == Standing::InSync && !progress.refused.contains(&p.peer.node))
            .count();
        if able < ack.min(record.in_sync.len()) && !progress.refused.is_empty() {
            return Settled::Refused;
        }
        Settled::NotYet
    }

    /// Replaces the configuration by one step of this tenure. The caller holds `reconfiguring`.
    pub(crate) async fn reconfigure(&self, step: impl FnOnce(&ReplicaSetRecord) -> ReplicaSetRecord) -> Reconfigured {
        let old = self.state().record.clone();
        let next = step(&old.record);
        let (record, exchanged) = match self.ctx.swap_until_known(&old, &next, &self.closed).await {
            Some(Step::Made(record)) => (record, false),
            Some(Step::Found(record)) => (record, true),
            Some(Step::Lost(Some(found))) if same_but_members(&found.record, &old.record) => {
                self.state().adopt(found);
                return Reconfigured::MembersChanged;
            }
            Some(Step::Lost(_)) => {
                self.close("another configuration was made");
                return Reconfigured::Over;
            }
            None => return Reconfigured::Over,
        };
        let mut state = self.state();
        state.calm_since = Instant::now();
        let removed: Vec<_> = state
            .peers
            .iter()
            .filter(|(node, p)| p.standing == Standing::Ejecting && !next.in_sync.contains(node))
            .map(|(node, _)| node.clone())
            .collect();
        for node in removed {
            if let Some(p) = state.peers.remove(&node) {
                p.peer.gone.cancel();
            }
        }
        for (node, p) in &mut state.peers {
            if next.in_sync.contains(node) && p.standing == Standing::Admitting {
                p.standing = Standing::InSync;
            }
        }
        if exchanged {
            state.adopt(record);
        } else {
            state.record = record;
        }
        for operation in state.waiting.values() {
            operation.wake.notify_one();
        }
        drop(state);
        self.changed.notify_waiters();
        Reconfigured::Made
    }

    /// Puts a good copy in the place of this node's damaged one of a chunk.
    pub(crate) async fn heal(&self, chunk: ChunkId) -> Result<(), ReplicationError> {
        let present = match self.ctx.chunks.version(self.set, chunk).await {
            Ok(version) => Some(version),
            // Not even its version can be read.
            Err(ChunkError::Corrupt { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let peers: Vec<_> = {
            let state = self.state();
            state
                .peers
                .values()
                .filter(|p| matches!(p.standing, Standing::InSync | Standing::Ejecting))
                .map(|p| p.peer.node.clone())
                .collect()
        };
        if present.is_none() {
            // Then the highest version elsewhere is taken for the right one: let all arrive.
            self.arrived(chunk).await;
        }
        let mut unreachable = None;
        let mut best: Option<Contents> = None;
        for node in peers {
            match self.ctx.links.fetch(&node, self.set, self.epoch(), chunk).await {
                Ok(contents) if present.is_none_or(|version| version == contents.version) => {
                    if best.as_ref().is_none_or(|b| b.version < contents.version) {
                        best = Some(contents);
                    }
                    if present.is_some() {
                        break;
                    }
                }
                // It lags behind, so it is no copy of what is damaged here.
                Ok(_) => {}
                Err(error) if error.code().retryable() => unreachable = Some(error),
                Err(error) => {
                    tracing::warn!(replica_set = %self.set, %chunk, %error, "no good copy of a damaged chunk")
                }
            }
        }
        // Without a version of one's own, the highest of *all* is the right one.
        if present.is_none()
            && let Some(error) = unreachable.take()
        {
            return Err(error);
        }
        match (best, unreachable) {
            (Some(contents), _) => {
                let expected = present.unwrap_or(DAMAGED);
                let Contents { version, data, crc } = contents;
                let now = self
                    .member
                    .install(self.epoch(), chunk, expected, version, data, crc)
                    .await?;
                if now == version {
                    self.ctx.counters.chunks_healed.inc();
                    tracing::warn!(replica_set = %self.set, %chunk, "damaged chunk replaced by a good copy");
                }
                Ok(())
            }
            (None, Some(error)) => Err(error),
            (None, None) => {
                self.ctx.counters.chunks_without_good_copy.inc();
                tracing::error!(replica_set = %self.set, %chunk, "damaged chunk has no good copy in sync");
                Err(ReplicationError::NoGoodCopy(chunk))
            }
        }
    }

    /// Whether a version was made in this tenure.
    pub(crate) fn is_own(&self, version: Version) -> bool {
        version.epoch > self.since
    }
}

impl PeerState {
    pub(crate) fn new(ctx: &Context, node: &NodeId, standing: Standing) -> Self {
        Self {
            peer: Arc::new(Peer {
                node: node.clone(),
                gone: CancellationToken::new(),
                full: AtomicBool::new(false),
                debt: ctx.links.debt(node),
            }),
            standing,
            pending: BTreeMap::new(),
            dirty: BTreeSet::new(),
        }
    }

    /// Whether new changes must wait for it.
    pub(crate) fn overdue(&self, ctx: &Context) -> bool {
        self.standing != Standing::Ejecting
            && (self.peer.debt.load(Ordering::Relaxed) > ctx.config.debt_bytes && !self.pending.is_empty()
                || self.oldest() > ctx.config.debt_age)
    }
}
