//! The session behind a mount.

use lazarette_client::Volume;
use std::sync::{Arc, PoisonError, RwLock};

/// A volume as this mount has joined it: in one session, and in another one after the owner has ended that.
/// Clones stand for the same.
#[derive(Clone)]
pub(crate) struct Joined(Arc<RwLock<Arc<Volume>>>);

impl Joined {
    pub(crate) fn new(volume: Volume) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(volume))))
    }

    /// In the present session.
    pub(crate) fn present(&self) -> Arc<Volume> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Another session takes the place of one that has ended.
    pub(crate) fn replace(&self, volume: Volume) {
        let mut present = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let ended = std::mem::replace(&mut *present, Arc::new(volume));
        ended.abort();
    }
}
