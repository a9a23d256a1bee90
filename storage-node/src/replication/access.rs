use super::{Replicas, ReplicationError, wire};
use crate::chunk::Change;
use lazarette_proto::chunk as pb;
use lazarette_proto::clock::boot_ms;
use lazarette_proto::{code_of, is_answer};
use lazarette_types::{ChunkId, ErrorCode, ReplicaSetId};
use std::time::Duration;

/// Changes chunks of any replica set from within this process, for the owner of metadata: finds
/// the primary, here or on another node, and tries again while that may help.
#[derive(Clone)]
pub struct ChunkAccess {
    replicas: Replicas,
}

impl ChunkAccess {
    pub(crate) fn new(replicas: Replicas) -> Self {
        Self { replicas }
    }

    /// Cuts a chunk to at most `length` bytes, within `time` and as long as this node holds its lease.
    /// After that nothing comes of it any more, however it has ended.
    pub async fn truncate(
        &self,
        set: ReplicaSetId,
        chunk: ChunkId,
        length: u32,
        time: Duration,
    ) -> Result<(), ReplicationError> {
        let until = boot_ms() + time.as_millis() as u64;
        let until = until.min(self.replicas.ctx.lease.proven_until_ms());
        let cut = self.change(set, chunk, Change::Truncate(length), Some(until));
        let left = || Duration::from_millis(until.saturating_sub(boot_ms()));
        match tokio::time::timeout(left(), cut).await {
            Ok((result, true)) => result,
            Ok((result, false)) => {
                tokio::time::sleep(left()).await;
                result
            }
            Err(_) => Err(ReplicationError::NotNow {
                set,
                reason: "no answer in time",
            }),
        }
    }

    /// Removes a chunk. Waits as long as the set cannot take it; drop the future to give up.
    pub async fn delete(&self, set: ReplicaSetId, chunk: ChunkId) -> Result<(), ReplicationError> {
        self.change(set, chunk, Change::Delete, None).await.0
    }

    /// Also gives whether all attempts were answered: one that was not may still be on its way.
    async fn change(
        &self,
        set: ReplicaSetId,
        chunk: ChunkId,
        change: Change,
        until: Option<u64>,
    ) -> (Result<(), ReplicationError>, bool) {
        let mut view = self.replicas.ctx.view.clone();
        let mut pause = Duration::from_millis(10);
        let mut answered = true;
        loop {
            view.mark_unchanged();
            match self.try_once(set, chunk, &change, until, &mut answered).await {
                Err(error) if error.code().retryable() => {
                    tracing::debug!(replica_set = %set, %chunk, %error, "chunk not changed, trying again");
                }
                result => return (result, answered),
            }
            // A change of configuration may be what it waits for.
            let _ = tokio::time::timeout(pause, view.changed()).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    async fn try_once(
        &self,
        set: ReplicaSetId,
        chunk: ChunkId,
        change: &Change,
        until: Option<u64>,
        answered: &mut bool,
    ) -> Result<(), ReplicationError> {
        let ctx = &self.replicas.ctx;
        let record = match ctx.known(set) {
            Some(known) => known.record,
            // The view may lag behind the volume that names it.
            None => {
                return Err(ReplicationError::NotNow {
                    set,
                    reason: "this node has not heard of it",
                });
            }
        };
        if record.primary == ctx.node {
            let tenure = self.replicas.leader_of(set, record.epoch).await?;
            return tenure.change(chunk, change.clone(), until).await;
        }
        let mut client = ctx.links.primary(&record.primary)?;
        let (replica_set, epoch, id) = (set.0, record.epoch, wire::chunk_to(chunk));
        // It waits for room itself; this is for a primary that has vanished.
        let limit = ctx.config.patience * 2;
        let call = async {
            let deadline = match until {
                Some(until) => Some(ctx.clocks.deadline(&record.primary.0, &mut client, until).await?),
                None => None,
            };
            match change {
                Change::Write(parts) => {
                    let request = pb::WriteRequest {
                        replica_set,
                        epoch,
                        chunk: id,
                        parts: wire::parts_to(parts),
                        deadline,
                    };
                    client.write(request).await.map(drop)
                }
                Change::Truncate(length) => {
                    let request = pb::TruncateRequest {
                        replica_set,
                        epoch,
                        chunk: id,
                        length: *length,
                        deadline,
                    };
                    client.truncate(request).await.map(drop)
                }
                Change::Delete => {
                    let request = pb::DeleteRequest {
                        replica_set,
                        epoch,
                        chunk: id,
                    };
                    client.delete(request).await.map(drop)
                }
            }
        };
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => {
                *answered &= is_answer(&status);
                if code_of(&status) == ErrorCode::Late {
                    ctx.clocks.forget(&record.primary.0);
                }
                Err(ReplicationError::from_peer(&record.primary, &status))
            }
            Err(_) => {
                *answered = false;
                Err(ReplicationError::unreachable(&record.primary, "no answer"))
            }
        }
    }
}
