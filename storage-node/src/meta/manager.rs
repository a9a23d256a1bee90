//! Which volumes' metadata this node owns: claims those without owner, gives up what is too much,
//! drops those that were deleted.

mod destroy;
mod placement;

use super::namespace::Limits;
use super::owner::{ClaimError, OwnerContext, Shard, claim, guarded};
use super::service::Shards;
use crate::membership::ClusterView;
use lazarette_metastore::{Op, UsageRecord, VolumeRecord, VolumeState, encode};
use lazarette_types::VolumeId;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// Each rank waits so much longer than the one before it.
const RANK_DELAY: Duration = Duration::from_millis(300);
/// After a claim whose shard could not be recovered.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Shards recovered at a time. Those that have to wait so long may well go to another node.
const MAX_RECOVERIES: usize = 8;
/// How often usage is reported, if it changed.
const REPORT_EVERY: Duration = Duration::from_secs(2);
/// How long it takes at most to notice a shard that has ended by itself.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Shards that a node which is to leave gives up at a time.
const LEAVE_AT_ONCE: usize = 4;
/// How often one shard may move from this node to one with fewer.
const BALANCE_EVERY: Duration = Duration::from_secs(15);

type View = watch::Receiver<Arc<ClusterView>>;

/// Decides what this node owns. [`Manager::run`] does it.
pub struct Manager {
    context: OwnerContext,
    shards: Arc<Shards>,
    view: View,
    /// Volumes that a task is claiming or giving up.
    busy: HashMap<VolumeId, AbortHandle>,
    tasks: JoinSet<()>,
    /// Since when volumes are without owner.
    ownerless: HashMap<VolumeId, Instant>,
    recoveries: Arc<Semaphore>,
    /// What each volume's limits were set to.
    limits: HashMap<VolumeId, Limits>,
    balance_every: Duration,
}

impl Manager {
    /// Owns shards in `shards` according to `view`.
    pub fn new(context: OwnerContext, shards: Arc<Shards>, view: View) -> Self {
        Self {
            context,
            shards,
            view,
            busy: HashMap::new(),
            tasks: JoinSet::new(),
            ownerless: HashMap::new(),
            recoveries: Arc::new(Semaphore::new(MAX_RECOVERIES)),
            limits: HashMap::new(),
            balance_every: BALANCE_EVERY,
        }
    }

    /// Looks so often whether a shard should move to a node with fewer.
    pub fn balance_every(mut self, interval: Duration) -> Self {
        self.balance_every = interval;
        self
    }

    /// Works until the lease ends or `shutdown` is cancelled; then all shards are given up.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let reports = tokio::spawn(report_usage(self.context.clone(), Arc::clone(&self.shards)));
        let lease = self.context.lease.clone();
        let mut balance = tokio::time::interval(self.balance_every);
        balance.set_missed_tick_behavior(MissedTickBehavior::Delay);
        balance.reset();
        loop {
            let due = self.look();
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = shutdown.cancelled() => break,
                () = lease.ended() => break,
                changed = self.view.changed() => {
                    if changed.is_err() {
                        break;
                    }
                }
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    self.busy.retain(|_, task| !task.is_finished());
                }
                _ = balance.tick() => {
                    self.give_one_up();
                }
            }
        }
        reports.abort();
        self.tasks.shutdown().await;
        self.shards.resign_all().await;
    }

    /// Compares what is with what should be, and starts what is missing. Returns when to look
    /// again at the latest.
    fn look(&mut self) -> Instant {
        let view = Arc::clone(&self.view.borrow_and_update());
        for shard in self.shards.all() {
            let volume = shard.volume();
            if self.busy.contains_key(&volume) {
                continue;
            }
            match view.volumes.get(&volume) {
                Some(record) if record.state == VolumeState::Ready => {
                    if shard.has_ended() {
                        self.shards.remove(volume);
                        self.start(volume, async move { shard.resign().await });
                        continue;
                    }
                    let limits = limits_of(record);
                    if self.limits.insert(volume, limits) != Some(limits) {
                        shard.set_limits(limits);
                    }
                }
                Some(record) => {
                    self.shards.remove(volume);
                    let (context, record) = (self.context.clone(), record.clone());
                    self.start(volume, async move {
                        shard.stop().await;
                        destroy::destroy(&context, shard.fence(), &record).await;
                    });
                }
                None => {
                    self.shards.remove(volume);
                    self.start(volume, async move { shard.resign().await });
                }
            }
        }
        if placement::leaves(&view, &self.context.node) {
            while self.busy.len() < LEAVE_AT_ONCE && self.give_one_up() {}
        }
        let now = Instant::now();
        let mut next = now + LOOK_EVERY;
        let plan = placement::plan(&view);
        self.ownerless
            .retain(|volume, _| !view.owners.contains_key(volume) && view.volumes.contains_key(volume));
        for (volume, ranks) in plan {
            let since = *self.ownerless.entry(volume).or_insert(now);
            let Some(rank) = ranks.iter().position(|node| *node == self.context.node) else {
                continue;
            };
            if self.busy.contains_key(&volume) || self.shards.get(volume).is_some() {
                continue;
            }
            let due = since + RANK_DELAY * rank as u32;
            if due > now {
                next = next.min(due);
                continue;
            }
            self.limits.remove(&volume);
            let (context, shards) = (self.context.clone(), Arc::clone(&self.shards));
            let recoveries = Arc::clone(&self.recoveries);
            self.start(volume, take(context, shards, self.view.clone(), recoveries, volume));
        }
        next
    }

    fn start(&mut self, volume: VolumeId, task: impl Future<Output = ()> + Send + 'static) {
        let handle = self.tasks.spawn(task);
        self.busy.insert(volume, handle);
    }

    /// Gives one shard up if another node has at least two fewer, or this one is to leave. Whether
    /// it did.
    fn give_one_up(&mut self) -> bool {
        let view = Arc::clone(&self.view.borrow());
        let mine: HashSet<VolumeId> = self
            .shards
            .all()
            .iter()
            .map(Shard::volume)
            .filter(|volume| !self.busy.contains_key(volume))
            .collect();
        let Some(volume) = placement::surplus(&view, &self.context.node, &mine) else {
            return false;
        };
        let Some(shard) = self.shards.remove(volume) else {
            return false;
        };
        tracing::info!(%volume, "shard moves to another node");
        self.start(volume, async move {
            shard.resign().await;
            // Leave it to the others first.
            tokio::time::sleep(RANK_DELAY * 2).await;
        });
        true
    }
}

fn limits_of(record: &VolumeRecord) -> Limits {
    Limits {
        size: record.size,
        chunk_size: record.chunk_size,
    }
}

/// Claims a volume and serves it, or drops it if it is deleted.
async fn take(
    context: OwnerContext,
    shards: Arc<Shards>,
    mut view: View,
    recoveries: Arc<Semaphore>,
    volume: VolumeId,
) {
    let settled = |view: &Arc<ClusterView>| view.owners.contains_key(&volume) || !view.volumes.contains_key(&volume);
    let Ok(turn) = recoveries.acquire().await else { return };
    if settled(&view.borrow()) {
        return;
    }
    let won = match claim(&context, volume).await {
        Ok(won) => won,
        Err(ClaimError::Taken | ClaimError::NoVolume) => {
            // The view is about to show it.
            let _ = tokio::time::timeout(RANK_DELAY, view.wait_for(settled)).await;
            return;
        }
        Err(error) => {
            tracing::warn!(%volume, %error, "shard is not claimed");
            tokio::time::sleep(RANK_DELAY).await;
            return;
        }
    };
    let record = view.borrow().volumes.get(&volume).cloned();
    let fence = won.fence.clone();
    match record {
        Some(record) if record.state == VolumeState::Ready => {
            match Shard::start(&context, won, limits_of(&record)).await {
                Ok(shard) => {
                    tracing::info!(%volume, epoch = shard.epoch(), "shard is served");
                    shards.insert(shard);
                }
                Err(error) => {
                    tracing::error!(%volume, %error, "shard cannot be recovered");
                    fence.release(&*context.store).await;
                    drop(turn);
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
        Some(record) => destroy::destroy(&context, &fence, &record).await,
        None => fence.release(&*context.store).await,
    }
}

/// Writes what each volume holds, while it changes.
async fn report_usage(context: OwnerContext, shards: Arc<Shards>) {
    let mut reported: HashMap<(VolumeId, u64), UsageRecord> = HashMap::new();
    let mut tick = tokio::time::interval(REPORT_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let owned = shards.all();
        reported.retain(|(volume, epoch), _| {
            owned
                .iter()
                .any(|shard| shard.volume() == *volume && shard.epoch() == *epoch)
        });
        for shard in owned {
            let usage = shard.usage();
            let place = (shard.volume(), shard.epoch());
            if reported.get(&place) == Some(&usage) {
                continue;
            }
            let put = Op::Put {
                key: context.keys.usage(shard.volume()),
                value: encode(&usage),
                lease: Some(context.lease.id()),
            };
            match context.store.txn(guarded(shard.fence(), [], vec![put])).await {
                Ok(_) => {
                    reported.insert(place, usage);
                }
                Err(error) => tracing::debug!(%error, "usage is not reported"),
            }
        }
    }
}

#[cfg(test)]
mod tests;
