use super::*;
use crate::cluster::dereference::Pin;
use k8s_openapi::api::core::v1::{
    HostPathVolumeSource, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, ObjectReference,
    PersistentVolumeSpec, VolumeNodeAffinity,
};
use lazarette_api::cluster_labels;

const HOSTNAME: &str = "kubernetes.io/hostname";

/// Nothing enforces the size of a folder; claim and volume only have to agree.
const SIZE: &str = "1Gi";

/// The name of the PersistentVolume of a claim.
pub fn persistent_volume_name(namespace: &str, claim: &str) -> String {
    format!("lazarette-{namespace}-{claim}")
}

/// The label selector for the PersistentVolumes of a cluster.
pub(in crate::cluster) fn persistent_volume_selector(namespace: &str, cluster: &str) -> String {
    format!("{},{}={namespace}", cluster_labels(cluster), label::NAMESPACE)
}

/// The value of the hostname label to which a PersistentVolume is tied.
pub fn pinned_node(volume: &PersistentVolume) -> Option<&str> {
    let affinity = volume.spec.as_ref()?.node_affinity.as_ref()?;
    affinity
        .required
        .as_ref()?
        .node_selector_terms
        .iter()
        .flat_map(|term| term.match_expressions.iter().flatten())
        .find(|expression| expression.key == HOSTNAME)?
        .values
        .as_ref()?
        .first()
        .map(String::as_str)
}

/// Binds to the one volume that names the claim: the empty class has no provisioner.
pub(super) fn claim_template(labels: BTreeMap<String, String>) -> PersistentVolumeClaim {
    claim(
        labels,
        BTreeMap::new(),
        PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            resources: Some(size_request(SIZE)),
            storage_class_name: Some(String::new()),
            ..PersistentVolumeClaimSpec::default()
        },
    )
}

/// A volume for each pod that is newly tied to a node.
pub(super) fn persistent_volumes(cluster: &ValidCluster, known: &Dereferenced) -> Vec<PersistentVolume> {
    let new = known.pins.iter().filter(|pin| !pin.exists);
    new.filter_map(|pin| persistent_volume(cluster, pin)).collect()
}

fn persistent_volume(cluster: &ValidCluster, pin: &Pin) -> Option<PersistentVolume> {
    let host = pin.component.storage(cluster).host_path.as_ref()?;
    let claim = pin.component.claim(cluster, pin.ordinal);
    let namespace = &cluster.namespace;
    let mut labels = component_labels(&cluster.name, pin.component.label());
    labels.insert(label::NAMESPACE.to_owned(), namespace.clone());
    let requirement = NodeSelectorRequirement {
        key: HOSTNAME.to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![pin.hostname.clone()]),
    };
    let term = NodeSelectorTerm {
        match_expressions: Some(vec![requirement]),
        ..NodeSelectorTerm::default()
    };
    Some(PersistentVolume {
        metadata: ObjectMeta {
            name: Some(persistent_volume_name(namespace, &claim)),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            capacity: size_request(SIZE).requests,
            claim_ref: Some(ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("PersistentVolumeClaim".to_owned()),
                namespace: Some(namespace.clone()),
                name: Some(claim.clone()),
                ..ObjectReference::default()
            }),
            host_path: Some(HostPathVolumeSource {
                path: format!("{}/{namespace}/{claim}", host.path.trim_end_matches('/')),
                type_: Some("DirectoryOrCreate".to_owned()),
            }),
            node_affinity: Some(VolumeNodeAffinity {
                required: Some(NodeSelector {
                    node_selector_terms: vec![term],
                }),
            }),
            persistent_volume_reclaim_policy: Some("Retain".to_owned()),
            storage_class_name: Some(String::new()),
            ..PersistentVolumeSpec::default()
        }),
        ..PersistentVolume::default()
    })
}
