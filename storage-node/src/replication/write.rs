//! The primary's write path: order, deliver, acknowledge.

use super::operation::{Local, Operation};
use super::tenure::{Peer, PeerState, Settled, Standing, State, Tenure, WriteTurn};
use super::{Member, ReplicationError};
use crate::chunk::{Change, ChunkError, Contents, DAMAGED, MAX_CHUNK_LENGTH, check_parts};
use lazarette_proto::clock::boot_ms;
use lazarette_types::{ChunkId, ErrorCode, NodeId, Version};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long after it could not be taken back a change that others have no space for is looked at again.
const TAKE_BACK_AGAIN: Duration = Duration::from_millis(100);

impl Tenure {
    /// Makes a change and returns when it is durable on `ack` members that stay in sync. A change that has
    /// not got its turn at `until`, on [`boot_ms`], is not made: somebody else may have the right to the chunk
    /// by then, and whoever gets a turn later is ordered behind those who had one before.
    ///
    /// A caller that leaves while the change waits for its turn takes it back: so a client that
    /// gives up and tries again is not overtaken by its own former attempt. Once begun it goes on
    /// without the caller: a half-made change is nobody's.
    pub(crate) async fn change(
        self: &Arc<Self>,
        chunk: ChunkId,
        change: Change,
        until: Option<u64>,
    ) -> Result<(), ReplicationError> {
        if let Change::Write(parts) = &change {
            check_parts(chunk, parts)?;
        }
        self.room().await?;
        let turn = self.turn_to_write(chunk).await;
        if until.is_some_and(|until| boot_ms() >= until) {
            return Err(ReplicationError::Late);
        }
        let tenure = Arc::clone(self);
        tokio::spawn(async move { tenure.change_in_turn(chunk, change, turn).await })
            .await
            .unwrap_or_else(|error| Err(ReplicationError::Internal(error.to_string())))
    }

    async fn change_in_turn(
        self: Arc<Self>,
        chunk: ChunkId,
        change: Change,
        turn: WriteTurn,
    ) -> Result<(), ReplicationError> {
        if change == Change::Delete {
            // A deletion leaves no version behind. If it came to an end half-way, and a member had
            // not even got the change before, a recovery would take that member's older copy for
            // the newest. So all that went before arrives first.
            self.arrived(chunk).await;
        }
        let Some(operation) = self.begin(chunk, change).await? else {
            return Ok(());
        };
        let _resolved = Resolved {
            tenure: &self,
            operation: &operation,
        };
        let result = self.carry_out(&operation).await;
        self.state().waiting.remove(&operation.version.sequence);
        drop(turn);
        if result.is_ok() {
            self.ctx.counters.changes_acknowledged.inc();
        }
        result
    }

    /// Waits until the set can take a change: enough members in sync, none of them overdue.
    async fn room(&self) -> Result<(), ReplicationError> {
        let deadline = Instant::now() + self.ctx.config.patience;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            self.check_open()?;
            let reason = {
                let state = self.state();
                let record = &state.record.record;
                let overdue = state.peers.values().find(|p| p.overdue(&self.ctx));
                if self.draining.load(Ordering::Acquire) {
                    "it is being handed over"
                } else if record.in_sync.len() < record.replication.ack as usize {
                    "fewer members are in sync than must acknowledge"
                } else if let Some(p) = overdue {
                    // A full disk does not recover soon. If the set can do without the member it
                    // is about to be ejected.
                    let needed = record.in_sync.len() <= record.replication.ack as usize;
                    if p.standing == Standing::InSync && p.peer.full.load(Ordering::Relaxed) && needed {
                        return Err(ChunkError::NoSpace.into());
                    }
                    "a backup is behind"
                } else {
                    return Ok(());
                }
            };
            if Instant::now() >= deadline {
                return Err(ReplicationError::NotNow { set: self.set, reason });
            }
            // Age comes without a signal.
            let _ = tokio::time::timeout(Duration::from_millis(50), changed).await;
        }
    }

    /// Waits for all deliveries of a chunk under way: until they are made, or their peers are gone.
    pub(crate) async fn arrived(&self, chunk: ChunkId) {
        let tails: Vec<_> = {
            let state = self.state();
            let slot = state.slots.get(&chunk);
            slot.map(|slot| slot.tails.values().cloned().collect())
                .unwrap_or_default()
        };
        futures::future::join_all(tails.iter().map(CancellationToken::cancelled)).await;
    }

    /// Gives the change its place and starts its delivery. None: nothing to do.
    async fn begin(
        self: &Arc<Self>,
        chunk: ChunkId,
        change: Change,
    ) -> Result<Option<Arc<Operation>>, ReplicationError> {
        let previous = match self.ctx.chunks.version(self.set, chunk).await {
            Ok(version) => version,
            Err(ChunkError::Corrupt { .. }) if change == Change::Delete => DAMAGED,
            Err(ChunkError::Corrupt { .. }) => {
                self.heal(chunk).await?;
                self.ctx.chunks.version(self.set, chunk).await?
            }
            Err(error) => return Err(error.into()),
        };
        let mut guard = self.state();
        let state = &mut *guard;
        self.check_open()?;
        if self.draining.load(Ordering::Acquire) {
            return Err(ReplicationError::NotNow {
                set: self.set,
                reason: "it is being handed over",
            });
        }
        let record = &state.record.record;
        if record.in_sync.len() < record.replication.ack as usize {
            return Err(ReplicationError::NotNow {
                set: self.set,
                reason: "fewer members are in sync than must acknowledge",
            });
        }
        let is_lost = state.lost.contains(&chunk);
        match change {
            // Every member in sync has what this one has, so nobody has it.
            Change::Delete | Change::Truncate(_) if previous == Version::NONE && !is_lost => return Ok(None),
            Change::Delete => {}
            _ if is_lost => return Err(ReplicationError::NoGoodCopy(chunk)),
            _ => {}
        }
        Ok(Some(self.order(state, chunk, previous, change)))
    }

    /// Gives a change the next version and starts its delivery.
    fn order(self: &Arc<Self>, state: &mut State, chunk: ChunkId, previous: Version, change: Change) -> Arc<Operation> {
        state.sequence += 1;
        let sequence = state.sequence;
        let version = Version {
            epoch: state.record.record.epoch,
            sequence,
        };
        let operation = Arc::new(Operation::new(chunk, previous, version, change));
        state.waiting.insert(sequence, Arc::clone(&operation));
        let slot = state.slots.entry(chunk).or_default();
        for (node, p) in &mut state.peers {
            let tail = CancellationToken::new();
            let before = slot.tails.insert(node.clone(), tail.clone());
            p.pending.insert(sequence, Instant::now());
            p.peer.debt.fetch_add(operation.bytes(), Ordering::Relaxed);
            let delivery = Delivery {
                tenure: Arc::clone(self),
                peer: Arc::clone(&p.peer),
                operation: Arc::clone(&operation),
                tail,
            };
            tokio::spawn(delivery.run(before));
        }
        operation
    }

    /// Makes the change here and waits for the others.
    async fn carry_out(self: &Arc<Self>, operation: &Arc<Operation>) -> Result<(), ReplicationError> {
        if let Err(error) = self.apply_here(operation).await {
            operation.set_local(Local::Undone);
            self.ctx.counters.changes_undone.inc();
            if matches!(error, ReplicationError::Chunk(ChunkError::Poisoned(_))) {
                // It may be there or not after a restart; only a recovery can tell.
                self.close("the chunk store has failed");
            }
            self.supersede(operation, None).await?;
            return Err(error);
        }
        operation.set_local(Local::Done);
        loop {
            match self.settled(operation) {
                Settled::NotYet => {}
                Settled::Acknowledged => {
                    if operation.everywhere() {
                        self.state().lost.remove(&operation.chunk);
                    }
                    // Another primary can only have been made after this node's lease has ended.
                    return self.check_open();
                }
                Settled::Short => {
                    return Err(ReplicationError::NotNow {
                        set: self.set,
                        reason: "fewer members are in sync than must acknowledge",
                    });
                }
                Settled::Refused => {
                    if let Some(before) = self.contents_before(operation).await {
                        operation.set_local(Local::Undone);
                        self.ctx.counters.changes_undone.inc();
                        self.supersede(operation, Some(before)).await?;
                        return Err(ChunkError::NoSpace.into());
                    }
                    // It can be neither made nor denied now.
                    tokio::time::sleep(TAKE_BACK_AGAIN).await;
                    self.check_open()?;
                    continue;
                }
            }
            tokio::select! {
                () = operation.wake.notified() => {}
                () = self.closed.cancelled() => return Err(ReplicationError::NotPrimary(self.set)),
            }
        }
    }

    /// Takes a change back that this node or too many others cannot make: orders what was there before as a
    /// new version, and returns when all members that count have that. Until then nobody reads the chunk and
    /// nobody hears that the change is refused, as it may have been made by some, or be on its way to them: a
    /// later primary would take it for the newest, or they would make it after all if they were merely brought
    /// back to the version that it follows. `before` are the contents to go back to, if this node has made it.
    async fn supersede(
        self: &Arc<Self>,
        refused: &Operation,
        before: Option<Contents>,
    ) -> Result<(), ReplicationError> {
        self.check_open()?;
        // Changes nothing but the version, and needs no space. What did not exist is empty then.
        let length = if refused.previous == Version::NONE {
            0
        } else {
            MAX_CHUNK_LENGTH
        };
        let change = Change::Truncate(length);
        let operation = self.order(&mut self.state(), refused.chunk, refused.previous, change);
        let _resolved = Resolved {
            tenure: self,
            operation: &operation,
        };
        let made = match before {
            None => self.apply_here(&operation).await,
            Some(before) => self.install_here(refused, &operation, before).await,
        };
        let result = match made {
            Ok(()) => {
                operation.set_local(Local::Done);
                self.arrived(operation.chunk).await;
                self.check_open()
            }
            Err(error) => {
                operation.set_local(Local::Undone);
                tracing::warn!(replica_set = %self.set, chunk = %operation.chunk, %error, "a refused change cannot be taken back");
                // A recovery makes it everywhere, or nowhere.
                self.close("a refused change cannot be taken back");
                Err(ReplicationError::NotPrimary(self.set))
            }
        };
        self.state().waiting.remove(&operation.version.sequence);
        result
    }

    async fn apply_here(&self, operation: &Operation) -> Result<(), ReplicationError> {
        let mut healed = false;
        loop {
            let (previous, version) = (operation.previous, operation.version);
            let epoch = self.epoch();
            let change = operation.change.clone();
            match self
                .member
                .apply(epoch, operation.chunk, previous, version, change)
                .await
            {
                Ok(present) if present == operation.after() => return Ok(()),
                Ok(_) => {
                    // Only a primary in its tenure changes its own copy.
                    self.close("its own copy of a chunk was changed by another");
                    return Err(ReplicationError::NotPrimary(self.set));
                }
                Err(ReplicationError::Chunk(ChunkError::Corrupt { .. })) if !healed => {
                    self.heal(operation.chunk).await?;
                    healed = true;
                }
                // This node's own change of configuration was quicker than this change.
                Err(ReplicationError::StaleEpoch { .. }) if !self.closed.is_cancelled() && self.epoch() > epoch => {}
                Err(ReplicationError::StaleEpoch { .. }) => {
                    self.close("a newer primary has prepared this member");
                    return Err(ReplicationError::NotPrimary(self.set));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// What a chunk was before a change that others have no space for, from one of them.
    async fn contents_before(&self, operation: &Operation) -> Option<Contents> {
        if operation.previous == Version::NONE {
            return Some(Contents::new(Version::NONE, bytes::Bytes::new()));
        }
        let refused = operation.progress().refused.clone();
        for node in refused {
            let fetched = self
                .ctx
                .links
                .fetch(&node, self.set, self.epoch(), operation.chunk)
                .await;
            if let Ok(contents) = fetched
                && contents.version == operation.previous
            {
                return Some(contents);
            }
        }
        tracing::warn!(replica_set = %self.set, chunk = %operation.chunk, "a change that backups have no space for waits");
        None
    }

    /// Puts contents under the version of an operation in the place of a change that was made here.
    async fn install_here(
        &self,
        made: &Operation,
        operation: &Operation,
        contents: Contents,
    ) -> Result<(), ReplicationError> {
        let present = self
            .member
            .install(
                self.epoch(),
                operation.chunk,
                made.after(),
                operation.version,
                contents.data,
                contents.crc,
            )
            .await?;
        if present == operation.version {
            return Ok(());
        }
        Err(ReplicationError::Internal(
            "its own copy of a chunk was changed by another".into(),
        ))
    }

    /// Makes a member's copy of a chunk equal to this node's. `present` is the version it has, as
    /// far as known. The caller knows that nobody else sends it this chunk meanwhile.
    pub(crate) async fn equalize(
        &self,
        node: &NodeId,
        chunk: ChunkId,
        present: Version,
    ) -> Result<u64, ReplicationError> {
        let contents = match self.ctx.chunks.fetch(self.set, chunk).await {
            Ok(contents) => contents,
            Err(ChunkError::Corrupt { .. }) => {
                self.heal(chunk).await?;
                self.ctx.chunks.fetch(self.set, chunk).await?
            }
            Err(error) => return Err(error.into()),
        };
        let member: &Member = &self.member;
        self.ctx
            .install(member, node, self.epoch(), chunk, present, &contents)
            .await?;
        Ok(contents.data.len() as u64)
    }
}

/// A change whose task ended without telling what became of it (a bug) must not be built upon.
struct Resolved<'a> {
    tenure: &'a Tenure,
    operation: &'a Operation,
}

impl Drop for Resolved<'_> {
    fn drop(&mut self) {
        if !self.operation.local_over.is_cancelled() {
            self.tenure.close("a change ended without a result");
        }
    }
}

/// One change on its way to one peer. Its drop ends it, however it went.
struct Delivery {
    tenure: Arc<Tenure>,
    peer: Arc<Peer>,
    operation: Arc<Operation>,
    tail: CancellationToken,
}

impl Drop for Delivery {
    fn drop(&mut self) {
        let (node, chunk) = (&self.peer.node, self.operation.chunk);
        let mut state = self.tenure.state();
        // It may have been removed and come back as another peer meanwhile.
        if let Some(p) = state.peers.get_mut(node)
            && Arc::ptr_eq(&p.peer, &self.peer)
        {
            p.pending.remove(&self.operation.version.sequence);
        }
        self.peer.debt.fetch_sub(self.operation.bytes(), Ordering::Relaxed);
        self.tail.cancel();
        if let Some(slot) = state.slots.get_mut(&chunk) {
            // All that are over: also those of peers that are gone.
            slot.tails.retain(|_, tail| !tail.is_cancelled());
        }
        state.release(chunk);
        drop(state);
        self.tenure.changed.notify_waiters();
    }
}

impl Delivery {
    async fn run(self, before: Option<CancellationToken>) {
        let gone = self.peer.gone.clone();
        let closed = self.tenure.closed.clone();
        tokio::select! {
            () = self.deliver(before) => {}
            () = gone.cancelled() => {}
            () = closed.cancelled() => {}
        }
    }

    async fn deliver(&self, before: Option<CancellationToken>) {
        if let Some(before) = before {
            before.cancelled().await;
        }
        let mut pause = Duration::from_millis(10);
        let mut told = false;
        loop {
            match self.try_once().await {
                Ok(()) => return,
                Err(error) => {
                    let full = error.code() == ErrorCode::NoSpace;
                    self.peer.full.store(full, Ordering::Relaxed);
                    if full {
                        self.operation.refused_by(&self.peer.node);
                    }
                    if !told {
                        tracing::warn!(replica_set = %self.tenure.set, chunk = %self.operation.chunk, %error, "change not delivered, trying again");
                        told = true;
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(300));
        }
    }

    async fn try_once(&self) -> Result<(), ReplicationError> {
        let (tenure, operation, node) = (&self.tenure, &*self.operation, &self.peer.node);
        if operation.undone() {
            // What was ordered instead comes next.
            return Ok(());
        }
        let sent = tenure
            .ctx
            .links
            .apply(
                node,
                tenure.set,
                tenure.epoch(),
                operation.chunk,
                (operation.previous, operation.version),
                &operation.change,
            )
            .await;
        let present = match sent {
            Ok(present) => present,
            // Its copy is damaged, so whatever it has is to be replaced.
            Err(error) if error.code() == ErrorCode::Corrupt => {
                tracing::warn!(replica_set = %tenure.set, chunk = %operation.chunk, %error, "a backup's copy is damaged");
                return self.replace(operation.previous).await;
            }
            Err(error) => return Err(error),
        };
        let made = match operation.change {
            Change::Delete => present == Version::NONE,
            // A later version of this tenure contains this change: the copy was replaced.
            _ => present == operation.version || (present > operation.version && tenure.is_own(present)),
        };
        if !made {
            return self.replace(present).await;
        }
        self.peer.full.store(false, Ordering::Relaxed);
        operation.acked_by(node);
        // What follows builds on what this node has: only now is that certain.
        operation.local_over.cancelled().await;
        Ok(())
    }

    /// The peer has another version than the change follows.
    async fn replace(&self, present: Version) -> Result<(), ReplicationError> {
        let (tenure, operation, node) = (&self.tenure, &*self.operation, &self.peer.node);
        {
            let mut state = tenure.state();
            if let Some(PeerState {
                standing: Standing::Learner,
                dirty,
                ..
            }) = state.peers.get_mut(node)
            {
                // Repair comes to it.
                dirty.insert(operation.chunk);
                return Ok(());
            }
        }
        tenure.ctx.counters.version_mismatches.inc();
        operation.local_over.cancelled().await;
        if operation.undone() {
            return Ok(());
        }
        tenure.equalize(node, operation.chunk, present).await?;
        operation.acked_by(node);
        Ok(())
    }
}
