use crate::backoff::Backoff;
use crate::cache::Cache;
use crate::cluster::Cluster;
use crate::flush::Scope;
use crate::inode::{Inode, Totals};
use crate::map::Map;
use crate::ops::Ops;
use crate::readahead::BLOCKS_PER_VOLUME;
use crate::registry::Registry;
use crate::session::{self, Lease};
use crate::{Error, Result, flush};
use lazarette_proto::clock::Clocks;
use lazarette_proto::cluster::VolumeMap;
use lazarette_proto::meta::{self, Request, Response, request::Op};
use lazarette_types::{ErrorCode, SessionId, VolumeId};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// One attempt at an operation; then it is sent again, with the same id.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Truncation answers when the chunks are gone.
const SLOW_ATTEMPT: Duration = Duration::from_secs(60);

/// How a volume is mounted.
#[derive(Clone, Debug)]
pub struct VolumeOptions {
    /// Names this client in the cluster's status, for people: host and folder for example.
    pub client: String,
    /// Bytes that writers may have unflushed over all files before they wait.
    pub dirty_bytes: usize,
    /// Data requests in flight at a time; one of several MiB counts as so many.
    pub in_flight: usize,
    /// Age at which unflushed bytes are flushed without being asked.
    pub flush_after: Duration,
}

impl Default for VolumeOptions {
    fn default() -> Self {
        Self {
            client: String::new(),
            dirty_bytes: 64 << 20,
            in_flight: 16,
            flush_after: Duration::from_secs(1),
        }
    }
}

/// A mounted volume: a session at its owner, kept alive until [`Volume::close`] or drop of the
/// last clone. Cheap to clone.
#[derive(Clone)]
pub struct Volume {
    pub(crate) inner: Arc<Inner>,
    _guard: Arc<StopOnDrop>,
}

struct StopOnDrop(CancellationToken);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

pub(crate) struct Inner {
    pub(crate) cluster: Cluster,
    pub(crate) id: VolumeId,
    pub(crate) session: SessionId,
    pub(crate) client: String,
    pub(crate) maps: watch::Sender<Arc<Map>>,
    /// Asks for a look-up of the map.
    pub(crate) refresh: Notify,
    pub(crate) lease: Lease,
    /// Of the primaries, by their addresses.
    pub(crate) clocks: Clocks,
    pub(crate) ops: Ops,
    pub(crate) cache: Cache,
    /// The terms of what is in the cache have changed.
    pub(crate) new_terms: Notify,
    pub(crate) registry: Registry,
    pub(crate) totals: Arc<Totals>,
    pub(crate) free: flush::Free,
    /// Numbers for handles.
    pub(crate) handles: AtomicU64,
    /// Held by a writer while the volume is nearly full.
    pub(crate) last_bytes: tokio::sync::Mutex<()>,
    inodes: Mutex<HashMap<u64, Arc<Inode>>>,
    /// Room for unflushed bytes.
    pub(crate) room: Semaphore,
    pub(crate) options: VolumeOptions,
    /// Data requests in flight.
    pub(crate) in_flight: Semaphore,
    /// Room for blocks read ahead.
    pub(crate) read_ahead: Arc<Semaphore>,
    pub(crate) flusher: flush::Flusher,
    /// Work that must end before the session is closed.
    pub(crate) work: TaskTracker,
    stop: CancellationToken,
}

impl Volume {
    /// Mounts a volume: waits for a map and an owner as long as it takes, fails at once if the
    /// volume does not exist.
    pub async fn mount(cluster: &Cluster, id: VolumeId, options: VolumeOptions) -> Result<Self> {
        let map = Map::merge(None, cluster.map(id).await?)?;
        let stop = CancellationToken::new();
        let inner = Arc::new(Inner {
            cluster: cluster.clone(),
            id,
            session: SessionId(rand::random_range(1..=u64::MAX)),
            client: options.client.clone(),
            maps: watch::Sender::new(Arc::new(map)),
            refresh: Notify::new(),
            lease: Lease::default(),
            clocks: Clocks::default(),
            ops: Ops::new(),
            cache: Cache::default(),
            new_terms: Notify::new(),
            registry: Registry::default(),
            totals: Arc::default(),
            free: flush::Free::default(),
            handles: AtomicU64::default(),
            last_bytes: tokio::sync::Mutex::default(),
            inodes: Mutex::default(),
            room: Semaphore::new(options.dirty_bytes),
            in_flight: Semaphore::new(options.in_flight),
            read_ahead: Arc::new(Semaphore::new(BLOCKS_PER_VOLUME)),
            flusher: flush::Flusher::default(),
            options,
            work: TaskTracker::new(),
            stop: stop.clone(),
        });
        let guard = Arc::new(StopOnDrop(stop));
        inner.spawn_until_stopped(session::keep_map(inner.clone()));
        session::open(&inner).await?;
        inner.spawn_until_stopped(session::keep_alive(inner.clone()));
        inner.spawn_until_stopped(session::keep_reporting(inner.clone()));
        inner.spawn_until_stopped(session::keep_recalls(inner.clone()));
        inner.spawn_until_stopped(flush::in_background(inner.clone()));
        Ok(Self { inner, _guard: guard })
    }

    /// The volume's id.
    pub fn id(&self) -> VolumeId {
        self.inner.id
    }

    /// The session's id.
    pub fn session(&self) -> SessionId {
        self.inner.session
    }

    /// Bytes written by applications and not yet flushed.
    pub fn dirty_bytes(&self) -> u64 {
        let room = self.inner.room.available_permits();
        self.inner.options.dirty_bytes.saturating_sub(room) as u64
    }

    /// Changes whenever attributes read before may be out of date, by what this client did or learnt.
    pub fn news(&self) -> u64 {
        self.inner.totals.news.load(Ordering::Relaxed)
    }

    /// An error if the session has ended: nothing will work any more.
    pub fn check(&self) -> Result<()> {
        self.inner.lease.check()
    }

    /// Resolves when the session has ended, with what [`check`](Self::check) says then.
    pub async fn ended(&self) -> Error {
        self.inner.lease.ended().await
    }

    /// Flushes all files; the first error is returned, all files are tried.
    pub async fn flush_all(&self) -> Result<()> {
        let inodes: Vec<_> = self.inner.inodes().values().cloned().collect();
        let mut result = Ok(());
        for inode in inodes {
            let flushed = self.inner.flush(&inode, Scope::All).await;
            if result.is_ok() {
                result = flushed;
            }
        }
        result
    }

    /// Flushes everything, waits for work under way, ends the session and stops its tasks. The
    /// session is ended also if flushing fails; the error is returned.
    pub async fn close(&self) -> Result<()> {
        let flushed = self.flush_all().await;
        self.inner.work.close();
        self.inner.work.wait().await;
        session::close(&self.inner).await;
        self.stop();
        flushed
    }

    /// Ends everything at once without flushing: calls under way and later ones fail.
    pub fn abort(&self) {
        self.stop();
    }

    fn stop(&self) {
        self.inner
            .lease
            .kill(Error::new(ErrorCode::Stale, "the volume is unmounted"));
        self.inner.stop.cancel();
    }
}

impl Inner {
    fn spawn_until_stopped(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        tokio::spawn(async move {
            stop.run_until_cancelled(task).await;
        });
    }

    pub(crate) fn map(&self) -> Arc<Map> {
        self.maps.borrow().clone()
    }

    pub(crate) fn learn_map(&self, map: VolumeMap) {
        let addresses: Vec<String> = map
            .replica_sets
            .iter()
            .flat_map(|set| set.members.iter().map(|member| member.address.clone()))
            .chain([map.owner_address.clone()])
            .collect();
        self.cluster.learn(addresses.iter().map(String::as_str));
        let present = self.map();
        match Map::merge(Some(&present), map) {
            Ok(merged) => {
                self.maps.send_if_modified(|present| {
                    let newer = **present != merged;
                    if newer {
                        *present = Arc::new(merged);
                    }
                    newer
                });
            }
            Err(error) => tracing::warn!(%error, "ignoring a malformed map"),
        }
    }

    /// After a retryable failure: asks for a newer map and waits for it, but not for long.
    pub(crate) async fn pause(&self, seen: &Arc<Map>, backoff: &mut Backoff) {
        let mut maps = self.maps.subscribe();
        if !Arc::ptr_eq(&*maps.borrow(), seen) {
            // It is newer than what the failed request went by. A minimal pause all the same: a
            // map may change often without being the cure.
            tokio::time::sleep(Duration::from_millis(2)).await;
            return;
        }
        self.refresh.notify_one();
        let same = seen.clone();
        let newer = maps
            .wait_for(|map| map.owner_epoch != same.owner_epoch || map.owner != same.owner || map.sets != same.sets);
        let _ = tokio::time::timeout(backoff.delay(), newer).await;
    }

    pub(crate) fn inodes(&self) -> MutexGuard<'_, HashMap<u64, Arc<Inode>>> {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn inode(&self, ino: u64) -> Option<Arc<Inode>> {
        self.inodes().get(&ino).cloned()
    }

    fn learn(&self, op: &Op, reply: &Response, sent: Instant, repeated: bool) {
        let before = self.cache.terms();
        self.cache.learn(op, reply, sent, repeated);
        if self.cache.terms() != before {
            self.new_terms.notify_one();
        }
        for attr in &reply.also {
            if let Some(inode) = self.inode(attr.ino) {
                inode.state().learn(*attr, self.cache.sole());
            }
        }
    }

    /// One operation at the owner, repeated until it has an answer that is not retryable.
    /// Dropping the future is safe: the operation then happens once or not at all.
    pub(crate) async fn call(&self, op: Op) -> Result<Response> {
        if needs_id(&op) {
            let id = self.lease.unless_dead(self.ops.begin()).await?;
            self.call_as(id.get(), op).await
        } else {
            self.call_as(0, op).await
        }
    }

    /// The same with an id from [`Ops`], whose guard the caller holds (0: none).
    pub(crate) async fn call_as(&self, op_id: u64, op: Op) -> Result<Response> {
        let limit = match &op {
            Op::Lock(meta::Lock { wait_ms, .. }) | Op::AppendBegin(meta::AppendBegin { wait_ms, .. }) => {
                ATTEMPT + Duration::from_millis(u64::from(*wait_ms))
            }
            Op::SetAttr(meta::SetAttr { size: Some(_), .. }) | Op::Reserve(_) => SLOW_ATTEMPT,
            _ => ATTEMPT,
        };
        let mut backoff = Backoff::new();
        let mut maps = self.maps.subscribe();
        let mut first = true;
        loop {
            self.lease.check()?;
            let map = maps.borrow_and_update().clone();
            let error = match &map.owner {
                None => Error::new(ErrorCode::Unavailable, "the volume has no owner"),
                Some(owner) => {
                    let mut client = self.cluster.channels().meta(owner)?;
                    let handles = self.registry.report();
                    let reported = handles.as_ref().map(|handles| handles.number);
                    let request = Request {
                        volume: self.id.0,
                        session: self.session.0,
                        op_id,
                        ack_below: self.ops.ack_below(),
                        handles,
                        op: Some(op.clone()),
                    };
                    let sent = Instant::now();
                    let attempt = async {
                        tokio::select! {
                            reply = client.call(request) => reply.map_err(Error::from),
                            () = tokio::time::sleep(limit) => Err(Error::new(ErrorCode::Unavailable, "no answer in time")),
                            () = session::owner_changed(&mut maps, &map) => Err(Error::new(ErrorCode::NotOwner, "the owner has changed")),
                        }
                    };
                    match self.lease.unless_dead(attempt).await? {
                        Ok(reply) => {
                            let reply = reply.into_inner();
                            if let Some(number) = reported {
                                self.registry.acknowledge(number);
                            }
                            // An earlier attempt may have changed things and its answer been lost.
                            self.learn(&op, &reply, sent, !first && op_id > 0);
                            self.free.learn(reply.free_bytes, sent);
                            if op_id > 0 {
                                self.totals.note_news();
                            }
                            return Ok(reply);
                        }
                        Err(error) => error,
                    }
                }
            };
            if error.code() == ErrorCode::SessionExpired {
                tracing::error!(
                    volume = self.id.0,
                    session = self.session.0,
                    "the owner has ended this session"
                );
                self.lease.kill(error.clone());
            }
            if !error.retryable() {
                self.cache.failed(&op);
                return Err(error);
            }
            tracing::debug!(%error, "metadata operation is tried again");
            first = false;
            self.lease.unless_dead(self.pause(&map, &mut backoff)).await?;
        }
    }
}

/// Whether an operation changes something, and needs an id so that it happens once.
fn needs_id(op: &Op) -> bool {
    match op {
        Op::Lookup(_)
        | Op::GetAttr(_)
        | Op::ReadLink(_)
        | Op::ReadDir(_)
        | Op::StatFs(_)
        | Op::GetXattr(_)
        | Op::ListXattr(_)
        | Op::TestLock(_)
        | Op::Report(_) => false,
        Op::Create(_)
        | Op::Unlink(_)
        | Op::RmDir(_)
        | Op::Rename(_)
        | Op::Link(_)
        | Op::SetAttr(_)
        | Op::Reserve(_)
        | Op::Extend(_)
        | Op::SetXattr(_)
        | Op::RemoveXattr(_)
        | Op::Lock(_)
        | Op::AppendBegin(_)
        | Op::AppendEnd(_) => true,
    }
}
