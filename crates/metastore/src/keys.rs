use lazarette_types::{NodeId, ReplicaSetId, VolumeId};

/// Builds the keys of one cluster, under `/lz/<cluster>/`. Numbers are fixed-width hexadecimal, so
/// that keys sort by number. `docs/formats.md` lists them all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
}

/// The keys of one shard: a part of a volume's metadata with one owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardKey {
    prefix: String,
}

impl Keys {
    /// Keys of the cluster with this name.
    pub fn new(cluster: &str) -> Self {
        Self {
            prefix: format!("/lz/{cluster}/"),
        }
    }

    /// Everything of the cluster.
    pub fn all(&self) -> Vec<u8> {
        self.prefix.clone().into_bytes()
    }

    fn key(&self, rest: std::fmt::Arguments<'_>) -> Vec<u8> {
        format!("{}{rest}", self.prefix).into_bytes()
    }

    /// The cluster's identity and counters: a [`crate::ClusterRecord`].
    pub fn cluster(&self) -> Vec<u8> {
        self.key(format_args!("cluster"))
    }

    /// The coordinator's leased key: a [`crate::CoordinatorRecord`].
    pub fn coordinator(&self) -> Vec<u8> {
        self.key(format_args!("coordinator"))
    }

    /// All storage nodes.
    pub fn nodes(&self) -> Vec<u8> {
        self.key(format_args!("n/"))
    }

    /// A storage node: a [`crate::NodeRecord`].
    pub fn node(&self, node: &NodeId) -> Vec<u8> {
        self.key(format_args!("n/{node}"))
    }

    /// All liveness keys.
    pub fn live(&self) -> Vec<u8> {
        self.key(format_args!("live/"))
    }

    /// A storage node's leased liveness: a [`crate::LivenessRecord`].
    pub fn node_live(&self, node: &NodeId) -> Vec<u8> {
        self.key(format_args!("live/{node}"))
    }

    /// All nodes' background work.
    pub fn activities(&self) -> Vec<u8> {
        self.key(format_args!("work/"))
    }

    /// A storage node's background work: a [`crate::ActivityRecord`].
    pub fn activity(&self, node: &NodeId) -> Vec<u8> {
        self.key(format_args!("work/{node}"))
    }

    /// All replica sets.
    pub fn replica_sets(&self) -> Vec<u8> {
        self.key(format_args!("rs/"))
    }

    /// A replica set: a [`crate::ReplicaSetRecord`].
    pub fn replica_set(&self, id: ReplicaSetId) -> Vec<u8> {
        self.key(format_args!("rs/{:08x}", id.0))
    }

    /// All volumes.
    pub fn volumes(&self) -> Vec<u8> {
        self.key(format_args!("v/"))
    }

    /// A volume: a [`crate::VolumeRecord`].
    pub fn volume(&self, id: VolumeId) -> Vec<u8> {
        self.key(format_args!("v/{:016x}", id.0))
    }

    /// A volume's name, for uniqueness: the id in decimal.
    pub fn volume_name(&self, name: &str) -> Vec<u8> {
        self.key(format_args!("vn/{name}"))
    }

    /// All owners of shards.
    pub fn owners(&self) -> Vec<u8> {
        self.key(format_args!("own/"))
    }

    /// The leased ownership of a volume's shard: a [`crate::OwnerRecord`].
    pub fn owner(&self, volume: VolumeId) -> Vec<u8> {
        self.key(format_args!("own/{:016x}", volume.0))
    }

    /// All volumes' usage.
    pub fn usages(&self) -> Vec<u8> {
        self.key(format_args!("use/"))
    }

    /// What a volume holds, as its owner last reported: a leased [`crate::UsageRecord`].
    pub fn usage(&self, volume: VolumeId) -> Vec<u8> {
        self.key(format_args!("use/{:016x}", volume.0))
    }

    /// The keys of a volume's shard. A volume has one shard so far, with the volume's number.
    pub fn shard(&self, volume: VolumeId) -> ShardKey {
        ShardKey {
            prefix: format!("{}s/{:016x}/", self.prefix, volume.0),
        }
    }

    /// The last part of a key made by one of the functions above, if it is of this cluster and
    /// under `prefix`.
    pub fn suffix<'a>(key: &'a [u8], prefix: &[u8]) -> Option<&'a str> {
        std::str::from_utf8(key.strip_prefix(prefix)?).ok()
    }
}

impl ShardKey {
    /// Everything of the shard.
    pub fn all(&self) -> Vec<u8> {
        self.prefix.clone().into_bytes()
    }

    /// The shard's configuration: a [`crate::ShardRecord`].
    pub fn config(&self) -> Vec<u8> {
        format!("{}cfg", self.prefix).into_bytes()
    }

    /// All journal records.
    pub fn journal(&self) -> Vec<u8> {
        format!("{}j/", self.prefix).into_bytes()
    }

    /// The journal record with this log sequence number.
    pub fn journal_record(&self, lsn: u64) -> Vec<u8> {
        format!("{}j/{lsn:016x}", self.prefix).into_bytes()
    }

    /// All pages.
    pub fn pages(&self) -> Vec<u8> {
        format!("{}p/", self.prefix).into_bytes()
    }

    /// A page.
    pub fn page(&self, id: u64) -> Vec<u8> {
        format!("{}p/{id:016x}", self.prefix).into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_number() {
        let shard = Keys::new("c").shard(VolumeId(7));
        assert!(shard.journal_record(9) < shard.journal_record(16));
        assert!(shard.journal_record(u64::MAX).starts_with(&shard.journal()));
        assert_eq!(shard.config(), b"/lz/c/s/0000000000000007/cfg");
    }
}
