//! When a storage cluster may go: not while volumes exist, as pods would hang on them.

use super::status::DeletionHold;
use super::storage::StorageError;
use kube::ResourceExt;
use lazarette_api::{StorageCluster, annotation};
use lazarette_proto::cluster::Volume;

/// Holds up the deletion of storage clusters.
pub const FINALIZER: &str = "lazarette.io/storage-cluster";

/// What to do with a cluster that shall be deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Let it go; the reason is for people.
    Release(&'static str),
    /// Keep it and everything of it running.
    Hold(DeletionHold),
}

/// Whether the annotation asks for deletion without further questions.
pub(super) fn is_forced(cluster: &StorageCluster) -> bool {
    cluster.annotations().get(annotation::FORCE_DELETE).map(String::as_str) == Some("true")
}

/// Decides from what the storage nodes answered. `ready` is the number of ready storage nodes.
pub(super) fn decide(cluster: &StorageCluster, ready: i32, volumes: Result<Vec<Volume>, StorageError>) -> Decision {
    if is_forced(cluster) {
        return Decision::Release("forced by annotation, volumes were not looked for");
    }
    match volumes {
        Ok(volumes) if volumes.is_empty() => Decision::Release("no volume exists"),
        Ok(volumes) => Decision::Hold(DeletionHold::Volumes(volumes.iter().map(describe).collect())),
        // Nothing can be on a cluster that never came up; this gets rid of failed attempts.
        Err(_) if ready == 0 && !was_up(cluster) => Decision::Release("the storage nodes never started"),
        Err(_) if cluster.spec.stopped => Decision::Hold(DeletionHold::Unknown(
            "the cluster is stopped, set spec.stopped to false".to_owned(),
        )),
        Err(error) => Decision::Hold(DeletionHold::Unknown(error.to_string())),
    }
}

fn was_up(cluster: &StorageCluster) -> bool {
    cluster
        .status
        .as_ref()
        .is_some_and(|status| status.cluster_id.is_some())
}

/// A volume's name, and whose it is where its labels say so.
fn describe(volume: &Volume) -> String {
    let label = |name: &str| {
        let mut labels = volume.labels.iter();
        labels.find_map(|(key, value)| key.ends_with(name).then_some(value.as_str()))
    };
    match (label("pvc/namespace"), label("pvc/name")) {
        (Some(namespace), Some(name)) => format!("{} ({namespace}/{name})", volume.name),
        _ => volume.name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::sample;

    fn unreachable() -> Result<Vec<Volume>, StorageError> {
        Err(StorageError::Timeout("x:7400".to_owned()))
    }

    fn once_up() -> StorageCluster {
        let mut cluster = sample();
        cluster.status.get_or_insert_default().cluster_id = Some("id".to_owned());
        cluster
    }

    #[test]
    fn volumes_hold_the_cluster_and_are_named() {
        let volume = Volume {
            name: "pvc-1".to_owned(),
            labels: [
                ("csi.storage.k8s.io/pvc/name".to_owned(), "data".to_owned()),
                ("csi.storage.k8s.io/pvc/namespace".to_owned(), "shop".to_owned()),
            ]
            .into(),
            ..Volume::default()
        };
        let bare = Volume {
            name: "v".to_owned(),
            ..Volume::default()
        };
        assert_eq!(
            decide(&once_up(), 3, Ok(vec![volume, bare])),
            Decision::Hold(DeletionHold::Volumes(vec![
                "pvc-1 (shop/data)".to_owned(),
                "v".to_owned()
            ]))
        );
        assert!(matches!(decide(&once_up(), 3, Ok(Vec::new())), Decision::Release(_)));
    }

    #[test]
    fn silence_is_not_consent() {
        assert!(matches!(decide(&once_up(), 0, unreachable()), Decision::Hold(_)));
        assert!(matches!(decide(&sample(), 1, unreachable()), Decision::Hold(_)));
        let mut stopped = once_up();
        stopped.spec.stopped = true;
        assert_eq!(
            decide(&stopped, 0, unreachable()),
            Decision::Hold(DeletionHold::Unknown(
                "the cluster is stopped, set spec.stopped to false".to_owned()
            ))
        );
    }

    #[test]
    fn a_failed_first_start_can_be_deleted() {
        assert!(matches!(decide(&sample(), 0, unreachable()), Decision::Release(_)));
    }

    #[test]
    fn only_true_forces() {
        let mut cluster = once_up();
        let mut set = |value: &str| {
            cluster
                .annotations_mut()
                .insert(annotation::FORCE_DELETE.to_owned(), value.to_owned());
            decide(&cluster, 0, unreachable())
        };
        assert!(matches!(set("false"), Decision::Hold(_)));
        assert!(matches!(set("true"), Decision::Release(_)));
    }
}
