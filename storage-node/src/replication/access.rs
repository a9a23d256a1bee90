use super::{Replicas, ReplicationError, wire};
use crate::chunk::Change;
use lazarette_proto::chunk as pb;
use lazarette_types::{ChunkId, ReplicaSetId};
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

    /// Cuts a chunk to at most `length` bytes. Waits as long as the set cannot take it; drop the
    /// future to give up.
    pub async fn truncate(&self, set: ReplicaSetId, chunk: ChunkId, length: u32) -> Result<(), ReplicationError> {
        self.change(set, chunk, Change::Truncate(length)).await
    }

    /// Removes a chunk. Waits as [`ChunkAccess::truncate`] does.
    pub async fn delete(&self, set: ReplicaSetId, chunk: ChunkId) -> Result<(), ReplicationError> {
        self.change(set, chunk, Change::Delete).await
    }

    async fn change(&self, set: ReplicaSetId, chunk: ChunkId, change: Change) -> Result<(), ReplicationError> {
        let mut view = self.replicas.ctx.view.clone();
        let mut pause = Duration::from_millis(10);
        loop {
            view.mark_unchanged();
            match self.try_once(set, chunk, &change).await {
                Err(error) if error.code().retryable() => {
                    tracing::debug!(replica_set = %set, %chunk, %error, "chunk not changed, trying again");
                }
                result => return result,
            }
            // A change of configuration may be what it waits for.
            let _ = tokio::time::timeout(pause, view.changed()).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    async fn try_once(&self, set: ReplicaSetId, chunk: ChunkId, change: &Change) -> Result<(), ReplicationError> {
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
            return tenure.change(chunk, change.clone()).await;
        }
        let mut client = ctx.links.primary(&record.primary)?;
        let (replica_set, epoch, id) = (set.0, record.epoch, wire::chunk_to(chunk));
        // It waits for room itself; this is for a primary that has vanished.
        let limit = ctx.config.patience * 2;
        let call = async {
            match change {
                Change::Write { offset, data, crc } => {
                    let request = pb::WriteRequest {
                        replica_set,
                        epoch,
                        chunk: id,
                        offset: *offset,
                        data: data.clone(),
                        crc: *crc,
                    };
                    client.write(request).await.map(drop)
                }
                Change::Truncate(length) => {
                    let request = pb::TruncateRequest {
                        replica_set,
                        epoch,
                        chunk: id,
                        length: *length,
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
            Ok(Err(status)) => Err(ReplicationError::from_peer(&record.primary, &status)),
            Err(_) => Err(ReplicationError::unreachable(&record.primary, "no answer")),
        }
    }
}
