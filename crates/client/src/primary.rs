//! Calls to the primary of a chunk's replica set.

use crate::backoff::Backoff;
use crate::session;
use crate::volume::Inner;
use crate::{Error, Result};
use lazarette_proto::chunk::ChunkId;
use lazarette_proto::chunk::chunk_client::ChunkClient;
use lazarette_types::ErrorCode;
use std::time::Duration;
use tonic::transport::Channel;

/// A chunk of a file, and by whom the map says it is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) chunk: ChunkId,
    pub(crate) replica_set: u32,
    pub(crate) epoch: u64,
}

impl Inner {
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
