//! Calls to the primary of a chunk's replica set.

use crate::backoff::Backoff;
use crate::session;
use crate::volume::Inner;
use crate::{Error, Result};
use lazarette_proto::chunk::chunk_client::ChunkClient;
use lazarette_proto::chunk::{ChunkId, Deadline};
use lazarette_proto::clock::boot_ms;
use lazarette_proto::{code_of, is_answer};
use lazarette_types::ErrorCode;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tonic::Status;
use tonic::transport::Channel;

/// A chunk of a file, and by whom the map says it is kept.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// The primary's address.
    pub(crate) primary: String,
    pub(crate) chunk: ChunkId,
    pub(crate) replica_set: u32,
    pub(crate) epoch: u64,
}

/// A change waits at the primary while too few copies are in sync; after so long it is sent again.
const CHANGE_ATTEMPT: Duration = Duration::from_secs(15);
/// Milliseconds in which a change gets its turn at the primary, or is sent again: nobody can know before that
/// one without an answer comes to nothing.
const BEGIN_WITHIN_MS: u64 = 3000;

impl Inner {
    /// Changes chunk `index` of a file at its primary, sending it until it is acknowledged or refused for good.
    /// Nothing that was sent takes effect after the session's lease has ended, nor after this has returned.
    pub(crate) async fn change_at_primary<F>(
        &self,
        chunk: (u64, u32, u32),
        call: impl Fn(ChunkClient<Channel>, Target, Deadline) -> F,
    ) -> Result<()>
    where
        F: Future<Output = std::result::Result<(), Status>>,
    {
        // Attempts without an answer: at which process, and until when they may begin.
        let unanswered = Mutex::new(Vec::new());
        let open = || unanswered.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self
            .at_primary(chunk, CHANGE_ATTEMPT, |mut client, target| {
                let (call, open) = (&call, &open);
                async move {
                    let until = self.lease.held().await?.min(boot_ms() + BEGIN_WITHIN_MS);
                    let primary = target.primary.clone();
                    let deadline = self.clocks.deadline(&primary, &mut client, until).await?;
                    open().push((deadline.clock, until));
                    let answer = call(client, target, deadline).await;
                    if answer.as_ref().err().is_none_or(is_answer) {
                        open().pop();
                    }
                    if answer.as_ref().is_err_and(|status| code_of(status) == ErrorCode::Late) {
                        self.clocks.forget(&primary);
                    }
                    answer?;
                    Ok(deadline.clock)
                }
            })
            .await;
        let may_come = |clock: u64| result.as_ref().map_or(true, |changed_by| *changed_by == clock);
        let until = open()
            .iter()
            .filter(|(clock, _)| may_come(*clock))
            .map(|(_, until)| *until)
            .max();
        if let Some(until) = until {
            let left = Duration::from_millis(until.saturating_sub(boot_ms()));
            self.lease.unless_dead(tokio::time::sleep(left)).await?;
        }
        result.map(drop)
    }

    /// Calls the primary of chunk `index` of a file, whoever the map says it is, until one answers with
    /// anything but a retryable error. An attempt ends after `limit`, or when the map shows that the
    /// replica set has changed.
    pub(crate) async fn at_primary<T, F>(
        &self,
        (ino, seed, index): (u64, u32, u32),
        limit: Duration,
        mut call: impl FnMut(ChunkClient<Channel>, Target) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let chunk = ChunkId {
            volume: self.id.0,
            ino,
            index,
        };
        let mut backoff = Backoff::new();
        let mut maps = self.maps.subscribe();
        loop {
            let map = maps.borrow_and_update().clone();
            let (replica_set, primary) = map.primary_of(seed, index);
            let error = match primary {
                None => Error::new(
                    ErrorCode::Unavailable,
                    format!("replica set {replica_set} has no primary"),
                ),
                Some((epoch, primary)) => {
                    let target = Target {
                        primary: primary.clone(),
                        chunk,
                        replica_set,
                        epoch,
                    };
                    let answer = call(self.cluster.channels().chunk(primary)?, target);
                    let attempt = async {
                        tokio::select! {
                            answer = answer => answer,
                            () = tokio::time::sleep(limit) => {
                                Err(Error::new(ErrorCode::Unavailable, "no answer in time"))
                            }
                            () = session::set_changed(&mut maps, replica_set, &map) => {
                                Err(Error::new(ErrorCode::WrongEpoch, "the replica set has changed"))
                            }
                        }
                    };
                    match self.lease.unless_dead(attempt).await? {
                        Ok(answer) => return Ok(answer),
                        Err(error) => error,
                    }
                }
            };
            if !error.retryable() {
                return Err(error);
            }
            tracing::debug!(%error, ino, index, "the primary is called again");
            self.lease.unless_dead(self.pause(&map, &mut backoff)).await?;
        }
    }
}
