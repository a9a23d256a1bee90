use lazarette_metastore::{LeaseId, MetaStore, StoreError};
use lazarette_proto::clock;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// How long the store keeps this node's keys without a renewal.
const TTL: Duration = Duration::from_secs(3);
/// How often it is renewed.
const RENEW_EVERY: Duration = Duration::from_millis(700);
/// Serving stops so long before the store could give the lease up: covers the difference in speed
/// of two machines' clocks over one TTL and the time between a check and the reply.
const MARGIN: Duration = Duration::from_millis(300);

/// The lease on which everything hangs that this node is in the cluster: liveness, ownership of
/// shards, coordination.
///
/// Its validity is proven by this node's own clock: a renewal counts from when it was *sent*, on a
/// clock that goes on while the machine is suspended. So a node that was stopped and continued
/// finds its lease invalid before the store has told it.
#[derive(Clone, Debug)]
pub struct Lease {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: LeaseId,
    ttl: Duration,
    /// Nanoseconds on the boot clock until which the lease is proven.
    proven_until: AtomicU64,
    ended: AtomicBool,
    end: watch::Sender<bool>,
}

impl Lease {
    /// Acquires a lease and keeps it in a task until it ends.
    pub async fn acquire(store: Arc<dyn MetaStore>) -> Result<Self, StoreError> {
        Self::acquire_for(store, TTL).await
    }

    /// As [`Lease::acquire`], with another time to live.
    pub async fn acquire_for(store: Arc<dyn MetaStore>, ttl: Duration) -> Result<Self, StoreError> {
        let sent = boot_nanos();
        let id = store.grant(ttl).await?;
        let inner = Arc::new(Inner {
            id,
            ttl,
            proven_until: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            end: watch::channel(false).0,
        });
        inner.prove(sent);
        tokio::spawn(keep(store, Arc::clone(&inner)));
        Ok(Self { inner })
    }

    /// The id to attach keys to.
    pub fn id(&self) -> LeaseId {
        self.inner.id
    }

    /// Whether the store provably still holds the lease at this instant.
    pub fn valid(&self) -> bool {
        !self.inner.ended.load(Ordering::Acquire) && boot_nanos() < self.inner.proven_until.load(Ordering::Acquire)
    }

    /// Until when it is proven so far, in milliseconds of
    /// [`boot_ms`](lazarette_proto::clock::boot_ms).
    pub fn proven_until_ms(&self) -> u64 {
        self.inner.proven_until.load(Ordering::Acquire) / 1_000_000
    }

    /// Resolves when the lease is lost for good. The node must then start anew.
    pub async fn ended(&self) {
        let mut end = self.inner.end.subscribe();
        // The sender lives in `inner`, so this cannot fail while `self` is there.
        let _ = end.wait_for(|ended| *ended).await;
    }

    /// Stops serving and gives the lease back, so that others take over at once.
    pub async fn resign(&self, store: &dyn MetaStore) -> Result<(), StoreError> {
        self.inner.finish();
        store.revoke(self.inner.id).await
    }
}

impl Inner {
    fn prove(&self, sent: u64) {
        let until = sent + (self.ttl.saturating_sub(MARGIN)).as_nanos() as u64;
        self.proven_until.fetch_max(until, Ordering::AcqRel);
    }

    fn finish(&self) {
        self.ended.store(true, Ordering::Release);
        self.end.send_replace(true);
    }
}

async fn keep(store: Arc<dyn MetaStore>, lease: Arc<Inner>) {
    let mut tick = tokio::time::interval(RENEW_EVERY.min(lease.ttl / 4));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !lease.ended.load(Ordering::Acquire) {
        tick.tick().await;
        let sent = boot_nanos();
        // A renewal that hangs must not keep the next one from being tried on another member.
        match tokio::time::timeout(lease.ttl / 3, store.keep_alive(lease.id)).await {
            Ok(Ok(())) => lease.prove(sent),
            Ok(Err(StoreError::LeaseExpired(_))) => {
                tracing::error!("lease has ended");
                lease.finish();
            }
            Ok(Err(error)) => tracing::warn!(%error, "lease not renewed"),
            Err(_) => tracing::warn!("lease not renewed: no answer"),
        }
    }
}

/// Nanoseconds since boot, suspended time included.
fn boot_nanos() -> u64 {
    clock::boot().as_nanos() as u64
}
