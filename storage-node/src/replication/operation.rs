use crate::chunk::Change;
use lazarette_types::{ChunkId, NodeId, Version};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// One change of one chunk on its way to the members.
pub(crate) struct Operation {
    pub(crate) chunk: ChunkId,
    pub(crate) previous: Version,
    pub(crate) version: Version,
    pub(crate) change: Change,
    /// Wakes the one who waits for the acknowledgement.
    pub(crate) wake: Notify,
    /// Cancelled when this node's own part is over, well or not.
    pub(crate) local_over: CancellationToken,
    progress: Mutex<Progress>,
}

/// Where a change stands.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) local: Local,
    /// Other members where it is durable.
    pub(crate) acked: Vec<NodeId>,
    /// Other members whose disk is full.
    pub(crate) refused: Vec<NodeId>,
}

/// This node's own part of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Local {
    /// Under way.
    #[default]
    Pending,
    /// Durable.
    Done,
    /// Not made, or taken back: what is ordered instead comes next.
    Undone,
}

impl Progress {
    pub(crate) fn local_done(&self) -> bool {
        self.local == Local::Done
    }
}

impl Operation {
    pub(crate) fn new(chunk: ChunkId, previous: Version, version: Version, change: Change) -> Self {
        Self {
            chunk,
            previous,
            version,
            change,
            wake: Notify::new(),
            local_over: CancellationToken::new(),
            progress: Mutex::default(),
        }
    }

    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that it holds in memory, at least 1.
    pub(crate) fn bytes(&self) -> usize {
        match &self.change {
            Change::Write(parts) => parts.bytes(),
            Change::Truncate(_) | Change::Delete => 1,
        }
    }

    /// Whether every member in sync must have it before the acknowledgement.
    pub(crate) fn everywhere(&self) -> bool {
        self.change == Change::Delete
    }

    /// The version that a member has when it has made this change.
    pub(crate) fn after(&self) -> Version {
        if self.change == Change::Delete {
            Version::NONE
        } else {
            self.version
        }
    }

    pub(crate) fn set_local(&self, local: Local) {
        self.progress().local = local;
        self.local_over.cancel();
        self.wake.notify_one();
    }

    pub(crate) fn acked_by(&self, node: &NodeId) {
        let mut progress = self.progress();
        if !progress.acked.contains(node) {
            progress.acked.push(node.clone());
        }
        progress.refused.retain(|n| n != node);
        drop(progress);
        self.wake.notify_one();
    }

    pub(crate) fn refused_by(&self, node: &NodeId) {
        let mut progress = self.progress();
        if !progress.refused.contains(node) {
            progress.refused.push(node.clone());
        }
        drop(progress);
        self.wake.notify_one();
    }

    pub(crate) fn undone(&self) -> bool {
        self.progress().local == Local::Undone
    }
}
