//! Owning a shard: claiming it, recovering its state, serving it until the ownership ends.

mod actor;
mod claim;
mod fold;
mod leases;
#[cfg(test)]
mod tests;

pub use claim::{Claim, ClaimError, RecoverError, claim};
pub use leases::Stream;

use super::chunks::ChunkRemover;
use super::journal::Fence;
use super::namespace::{Fault, Limits};
use crate::membership::Lease;
use actor::{Actor, Call, Control};
use lazarette_metastore::{Condition, Keys, MetaStore, Op, Txn, UsageRecord};
use lazarette_proto::meta::{Handles, Request, Response};
use lazarette_types::{ErrorCode, NodeId, SessionId, VolumeId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Without KeepAlive for so long a session ends.
pub const SESSION_TTL: Duration = Duration::from_secs(10);
/// How long a client may use an answer: on its own while its session is the only one, else unless it
/// is recalled.
pub const CACHE_TTL: Duration = Duration::from_millis(1000);

/// What tests set otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// See [`SESSION_TTL`].
    pub session_ttl: Duration,
    /// See [`CACHE_TTL`].
    pub cache_ttl: Duration,
    /// A journal of so many bytes is folded into pages.
    pub fold_bytes: usize,
    /// A journal of so many records is.
    pub fold_records: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            session_ttl: SESSION_TTL,
            cache_ttl: CACHE_TTL,
            fold_bytes: 4 << 20,
            fold_records: 1024,
        }
    }
}

/// What a client's rights to know things without asking hang on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Who granted them: the ownership's epoch.
    pub epoch: u64,
    /// How often a sole client got company, since this owner took over.
    pub company: u64,
}

/// Everything that a session holds open.
#[derive(Clone, Debug)]
pub struct Registration {
    /// Since when it has opened nothing by older rights.
    pub terms: Terms,
    /// The open inodes, and others that were closed.
    pub handles: Handles,
}

/// Requests that wait to be executed.
const QUEUE: usize = 1024;

/// What an owner needs of its node.
#[derive(Clone)]
pub struct OwnerContext {
    /// The metadata store.
    pub store: Arc<dyn MetaStore>,
    /// The cluster's keys.
    pub keys: Keys,
    /// This node.
    pub node: NodeId,
    /// `host:port` of this node's gRPC services.
    pub address: String,
    /// The lease that ownership hangs on.
    pub lease: Lease,
    /// Where chunks are removed and cut.
    pub chunks: Arc<dyn ChunkRemover>,
    /// Counters over all shards of this node.
    pub metrics: Arc<Metrics>,
}

/// What the owners of this node did since it started.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests executed.
    pub operations: AtomicU64,
    /// Requests that failed with an error of the file system or of the caller.
    pub failures: AtomicU64,
    /// Journal records committed.
    pub records: AtomicU64,
    /// Their bytes.
    pub record_bytes: AtomicU64,
    /// Pages written.
    pub pages: AtomicU64,
    /// Their bytes.
    pub page_bytes: AtomicU64,
    /// Shards claimed and recovered.
    pub claims: AtomicU64,
    /// Ownerships that ended without having been given back.
    pub losses: AtomicU64,
    /// Sessions ended because they were not renewed.
    pub expired_sessions: AtomicU64,
    /// Recoveries that met a damaged or missing record or page.
    pub damaged: AtomicU64,
    /// Files whose chunks were removed.
    pub removed_files: AtomicU64,
}

impl Metrics {
    pub(super) fn add(counter: &AtomicU64, more: u64) {
        counter.fetch_add(more, Ordering::Relaxed);
    }
}

/// What a shard holds now.
#[derive(Debug, Default)]
struct Gauges {
    bytes: AtomicU64,
    inodes: AtomicU64,
    sessions: AtomicU64,
}

/// A shard that this node owns and serves. Clones are handles to the same one.
#[derive(Clone)]
pub struct Shard {
    volume: VolumeId,
    fence: Fence,
    store: Arc<dyn MetaStore>,
    calls: mpsc::Sender<Call>,
    control: mpsc::UnboundedSender<Control>,
    gauges: Arc<Gauges>,
    ended: watch::Receiver<bool>,
}

impl Shard {
    /// Recovers a claimed shard and serves it in a task of its own.
    pub async fn start(context: &OwnerContext, claim: Claim, limits: Limits) -> Result<Self, RecoverError> {
        Self::start_with(context, claim, limits, Tuning::default()).await
    }

    /// As [`Shard::start`], tuned.
    pub async fn start_with(
        context: &OwnerContext,
        claim: Claim,
        limits: Limits,
        tuning: Tuning,
    ) -> Result<Self, RecoverError> {
        let recovered = claim::recover(context, &claim, limits, actor::now())
            .await
            .inspect_err(|error| {
                if !matches!(error, RecoverError::Store(_)) {
                    Metrics::add(&context.metrics.damaged, 1);
                }
            })?;
        let (calls, calls_in) = mpsc::channel(QUEUE);
        let (control, control_in) = mpsc::unbounded_channel();
        let (end, ended) = watch::channel(false);
        let gauges = Arc::new(Gauges::default());
        let actor = Actor::new(context, &claim, recovered, Arc::clone(&gauges), tuning);
        tokio::spawn(async move {
            actor.run(calls_in, control_in).await;
            end.send_replace(true);
        });
        Metrics::add(&context.metrics.claims, 1);
        Ok(Self {
            volume: claim.volume,
            fence: claim.fence,
            store: Arc::clone(&context.store),
            calls,
            control,
            gauges,
            ended,
        })
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// The epoch under which this node owns it.
    pub fn epoch(&self) -> u64 {
        self.fence.epoch
    }

    /// The proof of ownership.
    pub fn fence(&self) -> &Fence {
        &self.fence
    }

    /// Executes one operation. Dropping the future cancels a wait for a lock; if the lock was
    /// granted at that very moment, the caller learns it by repeating the op id with `wait_ms` 0.
    pub async fn call(&self, request: Request) -> Result<Response, Fault> {
        let (reply, answer) = oneshot::channel();
        let sent = self.calls.send(Call { request, reply }).await;
        sent.map_err(|_| not_owner())?;
        answer.await.map_err(|_| not_owner())?
    }

    /// Opens or re-opens a session. Returns when no other client may use cached answers any more.
    pub async fn open_session(&self, session: SessionId, client: String) -> Result<Terms, Fault> {
        self.ask(|reply| Control::OpenSession { session, client, reply }).await
    }

    /// Renews a session. It has registered what it holds open if the terms returned are those of the
    /// registration.
    pub async fn keep_alive(&self, session: SessionId, registration: Option<Registration>) -> Result<Terms, Fault> {
        self.ask(|reply| Control::KeepAlive {
            session,
            registration,
            reply,
        })
        .await
    }

    /// Opens a session's stream of recalls; without it, the session gets no leases.
    pub fn recalls(&self, session: SessionId, stream: Stream) -> Result<(), Fault> {
        let sent = self.control.send(Control::Recalls { session, stream });
        sent.map_err(|_| not_owner())
    }

    /// Ends a session. Ending one that has ended succeeds.
    pub async fn close_session(&self, session: SessionId) -> Result<(), Fault> {
        let closed = self.ask(|reply| Control::CloseSession { session, reply }).await;
        closed.map(|_| ())
    }

    /// Takes over a changed volume record.
    pub fn set_limits(&self, limits: Limits) {
        let _ = self.control.send(Control::Limits(limits));
    }

    /// Stops serving once everything executed is committed, and keeps the owner's key.
    pub async fn stop(&self) {
        let _ = self.control.send(Control::Stop);
        self.ended().await;
    }

    /// Stops serving and gives the ownership up, so that another node can claim the shard.
    pub async fn resign(&self) {
        self.stop().await;
        self.fence.release(&*self.store).await;
    }

    /// Resolves when the shard is not served any more.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // An error means that the task is gone, which is the same.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Whether the shard is not served any more.
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow() || self.calls.is_closed()
    }

    /// What the volume holds.
    pub fn usage(&self) -> UsageRecord {
        UsageRecord {
            used_bytes: self.gauges.bytes.load(Ordering::Relaxed),
            used_inodes: self.gauges.inodes.load(Ordering::Relaxed),
            sessions: self.gauges.sessions.load(Ordering::Relaxed) as u32,
        }
    }

    async fn ask(
        &self,
        message: impl FnOnce(oneshot::Sender<Result<Terms, Fault>>) -> Control,
    ) -> Result<Terms, Fault> {
        let (reply, answer) = oneshot::channel();
        self.control.send(message(reply)).map_err(|_| not_owner())?;
        answer.await.map_err(|_| not_owner())?
    }
}

/// The answer of a node that does not own the volume's metadata.
pub fn not_owner() -> Fault {
    Fault::new(
        ErrorCode::NotOwner,
        "this node does not own the volume's metadata; refresh the map",
    )
}

/// The conditions under which a volume's owner may change the volume's keys.
pub(super) fn guarded(fence: &Fence, conditions: impl IntoIterator<Item = Condition>, then: Vec<Op>) -> Txn {
    let mut all = vec![fence.condition()];
    all.extend(conditions);
    Txn { conditions: all, then }
}
