use lazarette_metastore::{
    Event, KeyValue, Keys, LivenessRecord, MetaStore, NodeRecord, OwnerRecord, ReplicaSetRecord, Revision, StoreError,
    VolumeRecord, WatchBatch, decode,
};
use lazarette_types::{NodeId, ReplicaSetId, VolumeId};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_stream::StreamExt;

/// A record and the revision to compare-and-swap it against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<T> {
    /// The record.
    pub record: T,
    /// The key's `mod_revision`.
    pub mod_revision: Revision,
}

/// What this node knows of the cluster: a copy of the small keys, kept by a watch.
///
/// It may lag behind the store, so decisions made from it are compare-and-swaps.
#[derive(Clone, Debug, Default)]
pub struct ClusterView {
    /// The store's revision that this shows.
    pub revision: Revision,
    /// All storage nodes ever registered.
    pub nodes: BTreeMap<NodeId, NodeRecord>,
    /// Those that run now.
    pub live: BTreeMap<NodeId, LivenessRecord>,
    /// All volumes, also those being deleted.
    pub volumes: BTreeMap<VolumeId, VolumeRecord>,
    /// Owners of volumes' metadata.
    pub owners: BTreeMap<VolumeId, OwnerRecord>,
    /// All replica sets.
    pub replica_sets: BTreeMap<ReplicaSetId, Versioned<ReplicaSetRecord>>,
    /// The elected coordinator.
    pub coordinator: Option<NodeId>,
}

impl ClusterView {
    /// Reads the view and follows it in a task, until all receivers are gone. A lost watch is read
    /// anew after a short pause; the view then simply jumps ahead.
    pub async fn follow(store: Arc<dyn MetaStore>, keys: Keys) -> Result<watch::Receiver<Arc<Self>>, StoreError> {
        let (view, from) = Self::load(&*store, &keys).await?;
        let (sender, receiver) = watch::channel(Arc::new(view));
        tokio::spawn(async move {
            let mut from = from;
            loop {
                tokio::select! {
                    error = follow_once(&*store, &keys, from, &sender) => {
                        tracing::warn!(%error, "watch of the cluster's state lost");
                    }
                    () = sender.closed() => return,
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                match Self::load(&*store, &keys).await {
                    Ok((view, next)) => {
                        from = next;
                        sender.send_replace(Arc::new(view));
                    }
                    Err(error) => tracing::warn!(%error, "cluster's state cannot be read"),
                }
            }
        });
        Ok(receiver)
    }

    async fn load(store: &dyn MetaStore, keys: &Keys) -> Result<(Self, Revision), StoreError> {
        let mut view = Self::default();
        let mut oldest = Revision::MAX;
        // One range for each kind: the shards' journals and pages share the cluster's prefix and
        // may be large. A change between two of them is delivered again by the watch.
        for prefix in [
            keys.nodes(),
            keys.live(),
            keys.volumes(),
            keys.owners(),
            keys.replica_sets(),
        ] {
            let (found, revision) = store.range(&prefix).await?;
            oldest = oldest.min(revision);
            for kv in found {
                view.put(keys, &kv);
            }
        }
        if let Some(kv) = store.get(&keys.coordinator()).await? {
            view.put(keys, &kv);
        }
        view.revision = oldest;
        Ok((view, oldest + 1))
    }

    /// Takes one change in. Keys of other kinds are ignored; a record that cannot be read is
    /// reported and leaves the old one in place.
    fn put(&mut self, keys: &Keys, kv: &KeyValue) {
        if let Some(node) = Keys::suffix(&kv.key, &keys.nodes()) {
            take(kv, |record| self.nodes.insert(NodeId(node.into()), record));
        } else if let Some(node) = Keys::suffix(&kv.key, &keys.live()) {
            take(kv, |record| self.live.insert(NodeId(node.into()), record));
        } else if let Some(id) = Keys::suffix(&kv.key, &keys.volumes()).and_then(hex) {
            take(kv, |record| self.volumes.insert(VolumeId(id), record));
        } else if let Some(id) = Keys::suffix(&kv.key, &keys.owners()).and_then(hex) {
            take(kv, |record| self.owners.insert(VolumeId(id), record));
        } else if let Some(id) = Keys::suffix(&kv.key, &keys.replica_sets()).and_then(hex) {
            take(kv, |record| {
                let mod_revision = kv.mod_revision;
                self.replica_sets
                    .insert(ReplicaSetId(id as u32), Versioned { record, mod_revision })
            });
        } else if kv.key == keys.coordinator() {
            take(kv, |record: lazarette_metastore::CoordinatorRecord| {
                self.coordinator = Some(record.node);
            });
        }
    }

    fn delete(&mut self, keys: &Keys, key: &[u8]) {
        if let Some(node) = Keys::suffix(key, &keys.nodes()) {
            self.nodes.remove(&NodeId(node.into()));
        } else if let Some(node) = Keys::suffix(key, &keys.live()) {
            self.live.remove(&NodeId(node.into()));
        } else if let Some(id) = Keys::suffix(key, &keys.volumes()).and_then(hex) {
            self.volumes.remove(&VolumeId(id));
        } else if let Some(id) = Keys::suffix(key, &keys.owners()).and_then(hex) {
            self.owners.remove(&VolumeId(id));
        } else if let Some(id) = Keys::suffix(key, &keys.replica_sets()).and_then(hex) {
            self.replica_sets.remove(&ReplicaSetId(id as u32));
        } else if key == keys.coordinator() {
            self.coordinator = None;
        }
    }

    fn apply(&mut self, keys: &Keys, batch: &WatchBatch) {
        for event in &batch.events {
            match event {
                Event::Put(kv) => self.put(keys, kv),
                Event::Delete(key) => self.delete(keys, key),
            }
        }
        self.revision = batch.revision;
    }
}

async fn follow_once(
    store: &dyn MetaStore,
    keys: &Keys,
    from: Revision,
    sender: &watch::Sender<Arc<ClusterView>>,
) -> StoreError {
    // A watch of its own for each kind would deliver one transaction's changes in pieces, and a
    // watch of the whole prefix would deliver the journals: these prefixes are few and quiet.
    let mut streams = tokio_stream::StreamMap::new();
    let prefixes = [
        keys.nodes(),
        keys.live(),
        keys.volumes(),
        keys.owners(),
        keys.replica_sets(),
        keys.coordinator(),
    ];
    for (index, prefix) in prefixes.iter().enumerate() {
        match store.watch(prefix, from).await {
            Ok(stream) => streams.insert(index, stream),
            Err(error) => return error,
        };
    }
    loop {
        match streams.next().await {
            Some((_, Ok(batch))) => sender.send_modify(|view| Arc::make_mut(view).apply(keys, &batch)),
            Some((_, Err(error))) => return error,
            None => return StoreError::Unavailable("watch ended".into()),
        }
        if streams.len() < prefixes.len() {
            return StoreError::Unavailable("watch ended".into());
        }
    }
}

fn take<T: DeserializeOwned, R>(kv: &KeyValue, insert: impl FnOnce(T) -> R) {
    match decode(&kv.value) {
        Ok(record) => {
            insert(record);
        }
        Err(error) => {
            tracing::error!(key = %String::from_utf8_lossy(&kv.key), %error, "unreadable record ignored");
        }
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}
