use super::ReplicationError;
use super::tenure::Tenure;
use crate::chunk::{ChunkError, Contents};
use lazarette_types::ChunkId;
use std::sync::Arc;

impl Tenure {
    /// Reads a part of a chunk from this node's copy: never a change that is not acknowledged yet,
    /// since a later primary might not have it.
    pub(crate) async fn read(
        self: &Arc<Self>,
        chunk: ChunkId,
        offset: u32,
        length: u32,
    ) -> Result<Contents, ReplicationError> {
        self.check_open()?;
        let _turn = self.turn_to_read(chunk).await;
        if self.state().lost.contains(&chunk) {
            return Err(ReplicationError::NoGoodCopy(chunk));
        }
        let contents = match self.ctx.chunks.read(self.set, chunk, offset, length).await {
            Ok(contents) => contents,
            Err(ChunkError::Corrupt { .. }) => {
                self.heal(chunk).await?;
                self.ctx.chunks.read(self.set, chunk, offset, length).await?
            }
            Err(error) => return Err(error.into()),
        };
        // Proven after reading: so nobody else can have acknowledged anything before.
        self.check_open()?;
        self.ctx.counters.reads_served.inc();
        Ok(contents)
    }
}
