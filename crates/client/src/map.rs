use crate::{Error, Result};
use lazarette_proto::cluster::{Volume, VolumeMap};
use lazarette_types::{Layout, ReplicaSetId};
use std::collections::HashMap;

/// Where the requests of one volume go.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Map {
    pub(crate) volume: Volume,
    pub(crate) layout: Layout,
    /// None while there is no owner.
    pub(crate) owner: Option<String>,
    pub(crate) owner_epoch: u64,
    pub(crate) sets: HashMap<u32, Set>,
}

/// The configuration of a replica set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Set {
    pub(crate) epoch: u64,
    /// None while there is no primary.
    pub(crate) primary: Option<String>,
}

fn some(address: String) -> Option<String> {
    (!address.is_empty()).then_some(address)
}

impl Map {
    /// Checks a map from the wire and merges it with the present one. Storage nodes learn of
    /// changes at different times, so what has an older epoch than we know is not taken.
    pub(crate) fn merge(old: Option<&Map>, new: VolumeMap) -> Result<Map> {
        let volume = new.volume.ok_or_else(|| Error::malformed("map without a volume"))?;
        Layout::validate_chunk_size(volume.chunk_size).map_err(|error| Error::malformed(&error.to_string()))?;
        if volume.replica_sets.is_empty() {
            return Err(Error::malformed("map without replica sets"));
        }
        let layout = Layout {
            chunk_size: volume.chunk_size,
            replica_sets: volume.replica_sets.iter().copied().map(ReplicaSetId).collect(),
        };
        let mut owner = some(new.owner_address);
        let mut owner_epoch = new.owner_epoch;
        let mut sets = HashMap::with_capacity(new.replica_sets.len());
        for set in new.replica_sets {
            let mut taken = Set {
                epoch: set.epoch,
                primary: some(set.primary_address),
            };
            if let Some(known) = old.and_then(|old| old.sets.get(&set.id))
                && known.epoch > taken.epoch
            {
                taken = known.clone();
            }
            sets.insert(set.id, taken);
        }
        if let Some(old) = old
            && old.owner_epoch > owner_epoch
        {
            owner = old.owner.clone();
            owner_epoch = old.owner_epoch;
        }
        Ok(Map {
            volume,
            layout,
            owner,
            owner_epoch,
            sets,
        })
    }

    /// The replica set of a file's chunk, with its epoch and primary while it has one.
    pub(crate) fn primary_of(&self, seed: u32, index: u32) -> (u32, Option<(u64, &String)>) {
        let set = self.layout.replica_set(seed, index).0;
        let primary = self
            .sets
            .get(&set)
            .and_then(|set| Some((set.epoch, set.primary.as_ref()?)));
        (set, primary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazarette_proto::cluster::ReplicaSet;

    fn wire(owner_epoch: u64, set_epoch: u64, tag: &str) -> VolumeMap {
        VolumeMap {
            volume: Some(Volume {
                id: 1,
                chunk_size: 1 << 20,
                replica_sets: vec![7],
                ..Volume::default()
            }),
            owner_address: format!("owner-{tag}"),
            owner_epoch,
            replica_sets: vec![ReplicaSet {
                id: 7,
                epoch: set_epoch,
                primary_address: format!("primary-{tag}"),
                members: Vec::new(),
            }],
        }
    }

    #[test]
    fn older_epochs_are_not_taken() {
        let new = Map::merge(None, wire(5, 5, "new")).unwrap();
        let merged = Map::merge(Some(&new), wire(4, 6, "late")).unwrap();
        assert_eq!(merged.owner.as_deref(), Some("owner-new"));
        assert_eq!(merged.owner_epoch, 5);
        assert_eq!(merged.sets[&7].primary.as_deref(), Some("primary-late"));
        let merged = Map::merge(Some(&merged), wire(6, 5, "mixed")).unwrap();
        assert_eq!(merged.owner.as_deref(), Some("owner-mixed"));
        assert_eq!(merged.sets[&7].primary.as_deref(), Some("primary-late"));
    }

    #[test]
    fn malformed_maps_are_rejected() {
        assert!(Map::merge(None, VolumeMap::default()).is_err());
        let mut map = wire(1, 1, "x");
        map.volume.as_mut().unwrap().chunk_size = 3;
        assert!(Map::merge(None, map).is_err());
        let mut map = wire(1, 1, "x");
        map.volume.as_mut().unwrap().replica_sets.clear();
        assert!(Map::merge(None, map).is_err());
    }
}
