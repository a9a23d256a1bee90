use crate::chunk::ChunkError;
use std::sync::{Arc, OnceLock};

/// Set once the store cannot vouch for its disk any more: after that no call may succeed.
#[derive(Clone, Debug, Default)]
pub(super) struct Poison(Arc<OnceLock<String>>);

impl Poison {
    pub(super) fn check(&self) -> Result<(), ChunkError> {
        match self.0.get() {
            None => Ok(()),
            Some(reason) => Err(ChunkError::Poisoned(reason.clone())),
        }
    }

    /// Poisons the store; returns the error for the present call.
    pub(super) fn set(&self, doing: &str, error: &dyn std::fmt::Display) -> ChunkError {
        let reason = self.0.get_or_init(|| {
            tracing::error!(doing, %error, "the chunk store has failed");
            format!("{doing}: {error}")
        });
        ChunkError::Poisoned(reason.clone())
    }
}
