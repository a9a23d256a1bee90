use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What replication on this node has done since the process started.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: Counter,)*
        }

        impl Counters {
            /// All counters by name, for metrics.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
            }
        }
    };
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The present value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn inc(&self) {
        self.add(1);
    }
}

counters! {
    /// Changes acknowledged to clients as primary.
    changes_acknowledged,
    /// Reads answered as primary.
    reads_served,
    /// Requests refused because they make no sense.
    malformed_requests,
    /// Requests refused because they are of an old epoch, or for another node.
    stale_requests,
    /// In-sync backups that had another version of a chunk than they should.
    version_mismatches,
    /// Chunks replaced here by another member's good copy.
    chunks_healed,
    /// Chunks found without any good copy in sync.
    chunks_without_good_copy,
    /// Members removed from a configuration by this primary.
    members_ejected,
    /// Members brought back into a configuration by this primary.
    members_admitted,
    /// Members let go by this primary because others have taken their place.
    members_exchanged,
    /// Chunks copied (or removed) at members that come back.
    chunks_repaired,
    /// Bytes copied to members that come back.
    bytes_repaired,
    /// Bytes of copies verified by scrubbing.
    scrubbed_bytes,
    /// Chunks that scrubbing found damaged, or different from the primary's.
    scrub_found,
    /// Those of them that were replaced by a good copy.
    scrub_repaired,
    /// Those of them without a good copy in sync.
    scrub_lost,
    /// Times that this node became primary of a set.
    takeovers,
    /// Sets handed back to their first member.
    hand_backs,
    /// Changes undone because too few members could make them.
    changes_undone,
}
