//! The session's upkeep: its lease, the map, and what happens when it ends.

use crate::backoff::Backoff;
use crate::cache::Terms;
use crate::map::Map;
use crate::volume::Inner;
use crate::{Error, Result};
use lazarette_proto::clock::boot_ms;
use lazarette_proto::meta::meta_client::MetaClient;
use lazarette_proto::meta::{CloseSessionRequest, Confirm, KeepAliveRequest, OpenSessionRequest, Report, request::Op};
use lazarette_types::ErrorCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

const ATTEMPT: Duration = Duration::from_secs(2);
/// The owner makes a second session wait until what it granted to a sole one has run out.
const OPEN_ATTEMPT: Duration = Duration::from_secs(10);
const CLOSE: Duration = Duration::from_secs(5);
/// Opens and closes that no other request has told the owner of are reported after so long.
const REPORT_AFTER: Duration = Duration::from_millis(500);

/// Until when the owner surely has not ended this session. Counts time in suspend.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    /// In milliseconds of [`boot_ms`].
    until: AtomicU64,
    ttl_ms: AtomicU64,
    renewed: Notify,
    dead: CancellationToken,
    reason: OnceLock<Error>,
}

impl Lease {
    /// The owner has answered a renewal that was sent at `sent`.
    fn renew(&self, sent: u64) {
        let until = sent + self.ttl_ms.load(Ordering::Relaxed);
        self.until.fetch_max(until, Ordering::Relaxed);
        self.renewed.notify_waiters();
    }

    fn ttl(&self) -> Duration {
        Duration::from_millis(self.ttl_ms.load(Ordering::Relaxed).max(30))
    }

    /// Ends the session for this client: every later call fails.
    pub(crate) fn kill(&self, error: Error) {
        if self.reason.set(error).is_ok() {
            self.dead.cancel();
        }
    }

    /// Why the session has ended, if it has.
    pub(crate) fn check(&self) -> Result<()> {
        match self.reason.get() {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Resolves when the session has ended, with the reason.
    pub(crate) async fn ended(&self) -> Error {
        self.dead.cancelled().await;
        let reason = self.reason.get().cloned();
        reason.unwrap_or_else(|| Error::new(ErrorCode::SessionExpired, "the session has ended"))
    }

    /// Runs a future unless the session ends first.
    pub(crate) async fn unless_dead<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            biased;
            reason = self.ended() => Err(reason),
            value = future => Ok(value),
        }
    }

    /// Waits until the session surely exists, and gives until when it does, in milliseconds of
    /// [`boot_ms`]. Data is only changed within: once the owner has ended a session its locks pass to
    /// others, and late writes would overwrite theirs.
    pub(crate) async fn held(&self) -> Result<u64> {
        loop {
            let renewed = self.renewed.notified();
            tokio::pin!(renewed);
            renewed.as_mut().enable();
            self.check()?;
            let until = self.until.load(Ordering::Relaxed);
            if boot_ms() < until {
                return Ok(until);
            }
            self.unless_dead(renewed).await?;
        }
    }
}

/// Opens the session at the owner, waiting for one as long as it takes.
pub(crate) async fn open(inner: &Arc<Inner>) -> Result<()> {
    let mut backoff = Backoff::new();
    loop {
        let map = inner.map();
        if let Some(owner) = &map.owner {
            let sent = boot_ms();
            let mut client = inner.cluster.channels().meta(owner)?;
            let request = OpenSessionRequest {
                volume: inner.id.0,
                session: inner.session.0,
                client: inner.client.clone(),
            };
            let error = match tokio::time::timeout(OPEN_ATTEMPT, client.open_session(request)).await {
                Ok(Ok(reply)) => {
                    let reply = reply.into_inner();
                    inner.lease.ttl_ms.store(u64::from(reply.ttl_ms), Ordering::Relaxed);
                    inner.lease.renew(sent);
                    inner.cache.meet(Terms {
                        epoch: reply.owner_epoch,
                        company: reply.company,
                    });
                    return Ok(());
                }
                Ok(Err(status)) => Error::from(status),
                Err(_) => Error::new(ErrorCode::Unavailable, "no answer in time"),
            };
            if !error.retryable() {
                return Err(error);
            }
            tracing::debug!(%error, owner, "cannot open the session yet");
        }
        inner.pause(&map, &mut backoff).await;
    }
}

/// Renews the session until cancelled, and registers open inodes under each new terms: with a new owner,
/// and when a sole client, which may open files without a word, has got company.
pub(crate) async fn keep_alive(inner: Arc<Inner>) {
    let mut backoff = Backoff::new();
    let mut maps = inner.maps.subscribe();
    let mut registered = Terms::default();
    let mut due = tokio::time::Instant::now();
    loop {
        let map = maps.borrow_and_update().clone();
        if map.owner.is_some() && map.owner_epoch > inner.cache.terms().epoch {
            // Owners count company from 1 on.
            let (epoch, company) = (map.owner_epoch, 1);
            inner.cache.meet(Terms { epoch, company });
        }
        let complete = inner.cache.terms() != registered;
        if !complete && tokio::time::Instant::now() < due {
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = inner.new_terms.notified() => {}
                changed = maps.changed() => if changed.is_err() { return },
            }
            continue;
        }
        let error = match &map.owner {
            None => Error::new(ErrorCode::Unavailable, "the volume has no owner"),
            Some(owner) => match renew(&inner, owner, complete).await {
                Ok(accepted) => {
                    due = tokio::time::Instant::now() + inner.lease.ttl() / 3;
                    let known = accepted.is_some();
                    if let Some(terms) = accepted {
                        registered = terms;
                        backoff = Backoff::new();
                    }
                    if map.owner_epoch < inner.cache.terms().epoch {
                        inner.refresh.notify_one();
                        // The map is behind: wait for it.
                        let _ = tokio::time::timeout(backoff.delay(), maps.changed()).await;
                    } else if !known {
                        // Under terms that were not known yet: tell it again what is open.
                        backoff.wait().await;
                    }
                    continue;
                }
                Err(error) => error,
            },
        };
        if error.code() == ErrorCode::SessionExpired {
            tracing::error!(
                volume = inner.id.0,
                session = inner.session.0,
                "the owner has ended this session; writes that were not flushed are lost"
            );
            inner.lease.kill(error);
            return;
        }
        tracing::debug!(%error, "cannot renew the session yet");
        inner.pause(&map, &mut backoff).await;
    }
}

/// Reports opens and closes that nothing else has told the owner of for a while, until cancelled.
pub(crate) async fn keep_reporting(inner: Arc<Inner>) {
    loop {
        inner.registry.news().await;
        tokio::time::sleep(REPORT_AFTER).await;
        if inner.registry.has_news()
            && let Err(error) = inner.call(Op::Report(Report {})).await
        {
            tracing::debug!(%error, "cannot report open files");
            if inner.lease.check().is_err() {
                return;
            }
        }
    }
}

/// Keeps the stream of recalls open, without which the owner gives no leases.
pub(crate) async fn keep_recalls(inner: Arc<Inner>) {
    let mut backoff = Backoff::new();
    let mut epoch = 0;
    loop {
        let map = inner.map();
        if let Some(owner) = &map.owner
            && let Ok(mut client) = inner.cluster.channels().meta(owner)
        {
            if map.owner_epoch != epoch {
                epoch = map.owner_epoch;
                backoff = Backoff::new();
            }
            if let Err(error) = recalls(&inner, &mut client).await {
                tracing::debug!(%error, "no stream of recalls");
            }
            // Some may have been missed.
            inner.cache.end_leases();
        }
        inner.pause(&map, &mut backoff).await;
    }
}

/// Carries out recalls until the stream ends.
async fn recalls(inner: &Inner, client: &mut MetaClient<Channel>) -> Result<()> {
    let (confirms, receiver) = mpsc::unbounded_channel();
    let confirm = |number| {
        let _ = confirms.send(Confirm {
            volume: inner.id.0,
            session: inner.session.0,
            number,
        });
    };
    confirm(0);
    let mut stream = client
        .recalls(UnboundedReceiverStream::new(receiver))
        .await?
        .into_inner();
    while let Some(recall) = stream.message().await? {
        let before = inner.cache.terms();
        inner.cache.recall(&recall);
        if inner.cache.terms() != before {
            inner.new_terms.notify_one();
        }
        confirm(recall.number);
    }
    Ok(())
}

/// One KeepAlive. With `complete` it says everything that is open; gives the terms under which that was
/// accepted, which without `complete` are the present ones.
async fn renew(inner: &Inner, owner: &str, complete: bool) -> Result<Option<Terms>> {
    let sent = boot_ms();
    // In this order: what is opened after these terms have ended was not opened by them.
    let terms = inner.cache.terms();
    let handles = complete.then(|| inner.registry.everything());
    let number = handles.as_ref().map(|handles| handles.number);
    let mut client = inner.cluster.channels().meta(owner)?;
    let request = KeepAliveRequest {
        volume: inner.id.0,
        session: inner.session.0,
        complete,
        handles,
        owner_epoch: terms.epoch,
        company: terms.company,
    };
    match tokio::time::timeout(ATTEMPT, client.keep_alive(request)).await {
        Ok(Ok(reply)) => {
            inner.lease.renew(sent);
            let reply = reply.into_inner();
            let present = Terms {
                epoch: reply.owner_epoch,
                company: reply.company,
            };
            inner.cache.meet(present);
            if let Some(number) = number.filter(|_| present == terms) {
                inner.registry.acknowledge(number);
            }
            Ok((present == terms).then_some(terms))
        }
        Ok(Err(status)) => Err(status.into()),
        Err(_) => Err(Error::new(ErrorCode::Unavailable, "no answer in time")),
    }
}

/// Ends the session at the owner, trying for a bounded time: the lease ends it otherwise.
pub(crate) async fn close(inner: &Inner) {
    let attempts = async {
        let mut backoff = Backoff::new();
        while inner.lease.check().is_ok() {
            let map = inner.map();
            if let Some(owner) = &map.owner
                && let Ok(mut client) = inner.cluster.channels().meta(owner)
            {
                let request = CloseSessionRequest {
                    volume: inner.id.0,
                    session: inner.session.0,
                };
                match client.close_session(request).await.map_err(Error::from) {
                    Ok(_) => return,
                    Err(error) if !error.retryable() => {
                        tracing::warn!(%error, session = inner.session.0, "cannot close the session");
                        return;
                    }
                    Err(_) => {}
                }
            }
            inner.pause(&map, &mut backoff).await;
        }
    };
    if tokio::time::timeout(CLOSE, attempts).await.is_err() {
        tracing::warn!(
            session = inner.session.0,
            "cannot reach the owner to close the session; it will run out"
        );
    }
}

/// Keeps the map current: a stream of changes, and a look-up whenever a request finds it stale.
pub(crate) async fn keep_map(inner: Arc<Inner>) {
    tokio::join!(follow(&inner), look_up(&inner));
}

async fn follow(inner: &Inner) {
    let mut backoff = Backoff::new();
    loop {
        match inner.cluster.watch_map(inner.id).await {
            Ok(mut stream) => {
                while let Ok(Some(map)) = stream.message().await {
                    backoff = Backoff::new();
                    inner.learn_map(map);
                }
            }
            Err(error) if error.code() == ErrorCode::VolumeNotFound => return volume_gone(inner, error),
            Err(error) => tracing::warn!(%error, "cannot watch the cluster map"),
        }
        backoff.wait().await;
    }
}

async fn look_up(inner: &Inner) {
    /// However many requests wait for a newer map, the cluster is asked this often at most.
    const SPACING: Duration = Duration::from_millis(25);
    loop {
        inner.refresh.notified().await;
        match inner.cluster.map(inner.id).await {
            Ok(map) => inner.learn_map(map),
            Err(error) if error.code() == ErrorCode::VolumeNotFound => return volume_gone(inner, error),
            Err(error) => tracing::warn!(%error, "cannot get the cluster map"),
        }
        tokio::time::sleep(SPACING).await;
    }
}

fn volume_gone(inner: &Inner, error: Error) {
    tracing::error!(volume = inner.id.0, "the volume was deleted while mounted");
    inner.lease.kill(Error::new(ErrorCode::Stale, error.to_string()));
}

/// Resolves when the owner is another than in `seen`.
pub(crate) async fn owner_changed(maps: &mut watch::Receiver<Arc<Map>>, seen: &Map) {
    let changed = maps.wait_for(|map| map.owner_epoch != seen.owner_epoch || map.owner != seen.owner);
    if changed.await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Resolves when the replica set's configuration is another than in `seen`.
pub(crate) async fn set_changed(maps: &mut watch::Receiver<Arc<Map>>, set: u32, seen: &Map) {
    let changed = maps.wait_for(|map| map.sets.get(&set) != seen.sets.get(&set));
    if changed.await.is_err() {
        std::future::pending::<()>().await;
    }
}
