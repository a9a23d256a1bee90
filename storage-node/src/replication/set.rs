use super::context::Context;
use super::links::Links;
use super::takeover::take_over;
use super::tenure::Tenure;
use super::{ChunkAccess, ChunkService, Counters, Dial, Member, ReplicaService, ReplicationConfig, ReplicationError};
use crate::chunk::ChunkStore;
use crate::membership::{ClusterView, Lease};
use lazarette_metastore::{Keys, MetaStore, ScrubRecord};
use lazarette_proto::MAX_MESSAGE_BYTES;
use lazarette_proto::chunk::chunk_server::ChunkServer;
use lazarette_proto::chunk::replica_server::ReplicaServer;
use lazarette_proto::clock::Clocks;
use lazarette_types::{NodeId, ReplicaSetId};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a request of a configuration that this node has not heard of yet is held back.
const HEARSAY: Duration = Duration::from_secs(1);

/// What [`Replicas`] is made of.
pub struct ReplicasParts {
    /// This node.
    pub node: NodeId,
    /// Where the configurations are.
    pub store: Arc<dyn MetaStore>,
    /// Its keys.
    pub keys: Keys,
    /// This node's copies.
    pub chunks: Arc<dyn ChunkStore>,
    /// The lease on which this node's liveness key hangs already.
    pub lease: Lease,
    /// The view of the cluster.
    pub view: watch::Receiver<Arc<ClusterView>>,
    /// How other nodes are reached.
    pub dial: Dial,
    /// Limits and times.
    pub config: ReplicationConfig,
    /// Where the node's last process was with scrubbing.
    pub scrub: ScrubRecord,
}

/// All replica sets that this node is a member of. A cheap handle.
///
/// Made once for each lease, after `live/<node>` was written under it: from then on no other
/// primary can be made in this node's place while the lease lasts.
#[derive(Clone)]
pub struct Replicas {
    pub(crate) ctx: Arc<Context>,
    sets: Arc<Mutex<BTreeMap<ReplicaSetId, Arc<ReplicaSet>>>>,
    /// All sets that this process was ever a member of: what a member has promised, and what is
    /// under way in it, must be known when it becomes one again.
    members: Arc<Mutex<BTreeMap<ReplicaSetId, Arc<Member>>>>,
}

/// Copying that is still to be done by this node for members that come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairBacklog {
    /// Chunks.
    pub chunks: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One set, of which this node is a member.
pub(crate) struct ReplicaSet {
    pub(crate) id: ReplicaSetId,
    pub(crate) member: Arc<Member>,
    tenure: Mutex<Option<Arc<Tenure>>>,
    removed: CancellationToken,
}

impl ReplicaSet {
    pub(crate) fn tenure(&self) -> Option<Arc<Tenure>> {
        let tenure = self.tenure.lock().unwrap_or_else(PoisonError::into_inner);
        tenure.clone().filter(|tenure| !tenure.closed.is_cancelled())
    }

    fn set_tenure(&self, tenure: Option<Arc<Tenure>>) {
        *self.tenure.lock().unwrap_or_else(PoisonError::into_inner) = tenure;
    }

    /// Leads the set whenever the record says so.
    async fn drive(self: Arc<Self>, ctx: Arc<Context>) {
        let mut view = ctx.view.clone();
        loop {
            let known = view.borrow_and_update().replica_sets.get(&self.id).cloned();
            if let Some(known) = known
                && known.record.primary == ctx.node
                && let Some(tenure) = take_over(&ctx, &self.member, known).await
            {
                self.set_tenure(Some(Arc::clone(&tenure)));
                tenure.supervise().await;
                self.set_tenure(None);
                continue;
            }
            if view.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Replicas {
    /// Starts taking part in the replica sets; ends with [`Replicas::stop`].
    pub fn start(parts: ReplicasParts) -> Self {
        let links = Links::new(parts.view.clone(), parts.dial, &parts.config);
        let ctx = Arc::new(Context {
            node: parts.node,
            store: parts.store,
            keys: parts.keys,
            chunks: parts.chunks,
            lease: parts.lease,
            view: parts.view,
            links,
            clocks: Clocks::default(),
            counters: Counters::default(),
            repairs: tokio::sync::Semaphore::new(parts.config.repair_in_flight.max(1)),
            repair_pace: tokio::sync::Mutex::default(),
            scrub: Mutex::new(parts.scrub),
            hand_backs: tokio::sync::Semaphore::new(1),
            stopped: CancellationToken::new(),
            config: parts.config,
        });
        let replicas = Self {
            ctx,
            sets: Arc::default(),
            members: Arc::default(),
        };
        replicas.follow();
        let (members, sweeper, scrubber) = (replicas.clone(), replicas.clone(), replicas.clone());
        let stopped = replicas.ctx.stopped.clone();
        tokio::spawn(
            stopped
                .clone()
                .run_until_cancelled_owned(async move { members.follow_view().await }),
        );
        tokio::spawn(stopped.run_until_cancelled_owned(async move { super::sweep::run(&sweeper).await }));
        let stopped = replicas.ctx.stopped.clone();
        tokio::spawn(stopped.run_until_cancelled_owned(async move { super::scrub::run(&scrubber).await }));
        replicas
    }

    /// Ends all tenures and background work of this node.
    pub fn stop(&self) {
        self.ctx.stopped.cancel();
    }

    /// The services to add to the gRPC server.
    pub fn services(&self) -> (ChunkServer<ChunkService>, ReplicaServer<ReplicaService>) {
        (
            ChunkServer::new(ChunkService::new(self.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
            ReplicaServer::new(ReplicaService::new(self.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        )
    }

    /// A client of all replica sets for use within this process.
    pub fn access(&self) -> ChunkAccess {
        ChunkAccess::new(self.clone())
    }

    /// What this node has done so far.
    pub fn counters(&self) -> &Counters {
        &self.ctx.counters
    }

    /// How far scrubbing is, and what it has found since the process started.
    pub fn scrub(&self) -> ScrubRecord {
        let record = self.ctx.scrub.lock().unwrap_or_else(PoisonError::into_inner).clone();
        ScrubRecord {
            found: self.ctx.counters.scrub_found.get(),
            repaired: self.ctx.counters.scrub_repaired.get(),
            lost: self.ctx.counters.scrub_lost.get(),
            ..record
        }
    }

    /// This node's time as primary of a set, if it is.
    pub(crate) fn tenure(&self, id: ReplicaSetId) -> Option<Arc<Tenure>> {
        let sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        sets.get(&id)?.tenure()
    }

    /// What this node still has to copy, in all.
    pub fn repair_backlog(&self) -> RepairBacklog {
        let mut total = RepairBacklog::default();
        for backlog in self.repair_backlogs().values() {
            total.chunks += backlog.chunks;
            total.bytes += backlog.bytes;
        }
        total
    }

    /// What this node still has to copy, for each set where there is something.
    pub fn repair_backlogs(&self) -> BTreeMap<ReplicaSetId, RepairBacklog> {
        let sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        sets.values()
            .filter_map(|set| {
                let tenure = set.tenure()?;
                let chunks = tenure.backlog.chunks.load(Ordering::Relaxed);
                let bytes = tenure.backlog.bytes.load(Ordering::Relaxed);
                (chunks > 0).then_some((set.id, RepairBacklog { chunks, bytes }))
            })
            .collect()
    }

    /// The sets that this node serves as primary now, with their epochs.
    pub fn leading(&self) -> Vec<(ReplicaSetId, u64)> {
        let sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        sets.values()
            .filter_map(|set| set.tenure().map(|tenure| (set.id, tenure.epoch())))
            .collect()
    }

    async fn follow_view(&self) {
        let mut view = self.ctx.view.clone();
        while view.changed().await.is_ok() {
            self.follow();
        }
    }

    /// Takes up the sets that this node has become a member of and leaves the others.
    fn follow(&self) {
        let view = Arc::clone(&self.ctx.view.borrow());
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        let is_member = |id: &ReplicaSetId| {
            view.replica_sets
                .get(id)
                .is_some_and(|set| set.record.involves(&self.ctx.node))
        };
        sets.retain(|id, set| {
            let stays = is_member(id);
            if !stays {
                set.removed.cancel();
            }
            stays
        });
        for (id, known) in &view.replica_sets {
            if !is_member(id) || sets.contains_key(id) {
                continue;
            }
            let set = Arc::new(ReplicaSet {
                id: *id,
                member: self.member(*id, known.record.epoch),
                tenure: Mutex::default(),
                removed: self.ctx.stopped.child_token(),
            });
            let (driver, ctx) = (Arc::clone(&set), Arc::clone(&self.ctx));
            let removed = set.removed.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = Arc::clone(&driver).drive(ctx) => {}
                    () = removed.cancelled() => {}
                }
                if let Some(tenure) = driver.tenure() {
                    tenure.close("not a member any more, or stopping");
                }
            });
            sets.insert(*id, set);
        }
    }

    /// This node's copy of a set, which is at `epoch` or beyond.
    pub(crate) fn member(&self, id: ReplicaSetId, epoch: u64) -> Arc<Member> {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let member = members.entry(id).or_insert_with(|| {
            let chunks = Arc::clone(&self.ctx.chunks);
            Arc::new(Member::new(id, chunks, epoch))
        });
        Arc::clone(member)
    }

    /// A set that this node is a member of; waits a moment for this node to hear of it.
    pub(crate) async fn member_of(&self, id: ReplicaSetId) -> Result<Arc<ReplicaSet>, ReplicationError> {
        let deadline = Instant::now() + HEARSAY;
        let mut view = self.ctx.view.clone();
        loop {
            view.mark_unchanged();
            let found = {
                let sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
                sets.get(&id).cloned()
            };
            if let Some(set) = found {
                return Ok(set);
            }
            self.follow();
            if self
                .sets
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .contains_key(&id)
            {
                continue;
            }
            let known = view.borrow().replica_sets.contains_key(&id);
            if known || tokio::time::timeout_at(deadline, view.changed()).await.is_err() {
                return Err(ReplicationError::NotMember(id));
            }
        }
    }

    /// The tenure in which a client's request of `epoch` is to be served; waits a moment for this
    /// node to become primary if it is about to.
    pub(crate) async fn leader_of(&self, id: ReplicaSetId, epoch: u64) -> Result<Arc<Tenure>, ReplicationError> {
        let deadline = Instant::now() + HEARSAY;
        let set = self.member_of(id).await?;
        loop {
            let reason = match set.tenure() {
                Some(tenure) => {
                    let present = tenure.epoch();
                    if epoch < tenure.since {
                        return Err(ReplicationError::StaleEpoch {
                            set: id,
                            asked: epoch,
                            present,
                        });
                    }
                    if epoch <= present {
                        return Ok(tenure);
                    }
                    "this node has not heard of the request's epoch"
                }
                None => match self.ctx.known(id) {
                    Some(known) if known.record.primary != self.ctx.node && known.record.epoch >= epoch => {
                        return Err(ReplicationError::NotPrimary(id));
                    }
                    Some(_) => "it has no primary yet",
                    None => return Err(ReplicationError::NotMember(id)),
                },
            };
            if Instant::now() >= deadline {
                return Err(ReplicationError::NotNow { set: id, reason });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
