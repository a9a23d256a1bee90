//! Reads what else the cluster says that the build and status steps need.

use super::ValidCluster;
use super::build::{Component, persistent_volume_name, persistent_volume_selector, pinned_node, pod_selector};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod, Toleration};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use lazarette_api::annotation;
use std::collections::{BTreeMap, BTreeSet};

/// A pod that is tied to a Kubernetes node because its data is in a folder there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// What the pod is.
    pub component: Component,
    /// The pod's number in its StatefulSet.
    pub ordinal: i32,
    /// The node's value of the label `kubernetes.io/hostname`.
    pub hostname: String,
    /// The PersistentVolume is there already.
    pub exists: bool,
}

/// What the cluster said.
#[derive(Clone, Debug, Default)]
pub struct Dereferenced {
    /// Pods with data in folders, and where.
    pub pins: Vec<Pin>,
    /// Things the spec asks for that this Kubernetes cluster does not have; for people.
    pub unsatisfied: Vec<Unsatisfied>,
    /// Pods of storage nodes that exist in any state.
    pub storage_pods: usize,
    /// Storage nodes that the StatefulSet asks for; absent while it does not exist.
    pub storage_replicas: Option<i32>,
    /// etcd has run on at least one of the claims that exist.
    pub etcd_has_run: bool,
    /// Claims of etcd members that do not say so.
    pub etcd_claims_unmarked: Vec<String>,
    /// PersistentVolumes whose claim was deleted, and which wait to be given to the next claim.
    pub released: Vec<String>,
}

/// Something the spec asks for and the cluster does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsatisfied {
    /// For programs.
    pub reason: &'static str,
    /// Names field and remedy.
    pub message: String,
}

/// Asks the API server.
pub(super) async fn dereference(client: &Client, cluster: &ValidCluster) -> Result<Dereferenced, kube::Error> {
    let ValidCluster { namespace, name, .. } = cluster;
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let selector = pod_selector(name, Component::Storage);
    let storage_pods = pods.list_metadata(&ListParams::default().labels(&selector)).await?;
    let nodes = Api::<Node>::all(client.clone())
        .list(&ListParams::default())
        .await?
        .items;
    let sets: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
    let storage = sets.get_opt(&cluster.storage_name()).await?;
    let mut known = Dereferenced {
        storage_pods: storage_pods.items.len(),
        storage_replicas: storage.and_then(|set| set.spec?.replicas),
        ..Dereferenced::default()
    };
    let claims = Api::<PersistentVolumeClaim>::namespaced(client.clone(), namespace)
        .list_metadata(&ListParams::default().labels(&pod_selector(name, Component::Etcd)))
        .await?;
    for claim in claims {
        if claim.annotations().get(annotation::ETCD_HAS_RUN).map(String::as_str) == Some("true") {
            known.etcd_has_run = true;
        } else if claim.metadata.deletion_timestamp.is_none() {
            known.etcd_claims_unmarked.push(claim.name_any());
        }
    }
    let mut components = cluster.components().iter();
    let uses_host_path = components.any(|c| c.storage(cluster).host_path.is_some());
    if uses_host_path {
        let selector = persistent_volume_selector(namespace, name);
        let volumes = Api::<PersistentVolume>::all(client.clone())
            .list(&ListParams::default().labels(&selector))
            .await?
            .items;
        known.pins = pins(cluster, &nodes, &volumes);
        let released = volumes.iter().filter(|volume| {
            let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
            phase == Some("Released")
        });
        known.released = released.map(ResourceExt::name_any).collect();
    }
    known.unsatisfied = missing_nodes(cluster, &nodes, &known.pins);
    known
        .unsatisfied
        .extend(missing_storage_classes(client, cluster).await?);
    Ok(known)
}

/// Whether a pod with these rules could be put on a node, cordons and resources left aside.
fn admits(node: &Node, selector: &BTreeMap<String, String>, tolerations: &[Toleration]) -> bool {
    let labels = node.labels();
    let selected = selector.iter().all(|(key, value)| labels.get(key) == Some(value));
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    // Taints that Kubernetes sets on nodes in trouble pass; the others mean the node is for others.
    let tolerated = taints
        .filter(|taint| taint.effect != "PreferNoSchedule" && !taint.key.starts_with("node.kubernetes.io/"))
        .all(|taint| {
            tolerations.iter().any(|toleration| {
                let exists = toleration.operator.as_deref() == Some("Exists");
                let key = toleration.key.as_deref().unwrap_or_default();
                let effect = toleration.effect.as_deref().unwrap_or_default();
                let key_matches = key == taint.key || (key.is_empty() && exists);
                let value_matches = exists
                    || toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default();
                key_matches && value_matches && (effect.is_empty() || effect == taint.effect)
            })
        });
    selected && tolerated
}

fn hostname(node: &Node) -> Option<&str> {
    node.labels().get("kubernetes.io/hostname").map(String::as_str)
}

fn is_ready(node: &Node) -> bool {
    let cordoned = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True");
    ready && !cordoned
}

/// Ties each pod with a folder to a node: where its PersistentVolume says, or else to a ready node
/// that has no pod of the same component yet. A pod for which there is no node is left out.
fn pins(cluster: &ValidCluster, nodes: &[Node], volumes: &[PersistentVolume]) -> Vec<Pin> {
    let mut all = Vec::new();
    for &component in cluster.components() {
        if component.storage(cluster).host_path.is_none() {
            continue;
        }
        let existing: BTreeMap<i32, String> = (0..component.pods(cluster))
            .filter_map(|ordinal| {
                let name = persistent_volume_name(&cluster.namespace, &component.claim(cluster, ordinal));
                let volume = volumes.iter().find(|v| v.name_any() == name)?;
                Some((ordinal, pinned_node(volume)?.to_owned()))
            })
            .collect();
        let mut taken: BTreeSet<String> = existing.values().cloned().collect();
        let placement = component.placement(cluster);
        let mut free: Vec<&str> = nodes
            .iter()
            .filter(|node| is_ready(node) && admits(node, &placement.node_selector, &placement.tolerations))
            .filter_map(hostname)
            .collect();
        free.sort_unstable();
        for ordinal in 0..component.pods(cluster) {
            if let Some(hostname) = existing.get(&ordinal) {
                all.push(Pin {
                    component,
                    ordinal,
                    hostname: hostname.clone(),
                    exists: true,
                });
            } else if let Some(hostname) = free.iter().find(|h| !taken.contains(**h)) {
                taken.insert((*hostname).to_owned());
                all.push(Pin {
                    component,
                    ordinal,
                    hostname: (*hostname).to_owned(),
                    exists: false,
                });
            }
        }
    }
    all
}

fn missing_nodes(cluster: &ValidCluster, nodes: &[Node], pins: &[Pin]) -> Vec<Unsatisfied> {
    let mut missing = Vec::new();
    for &component in cluster.components() {
        let field = component.field();
        let placement = component.placement(cluster);
        let admitting = nodes
            .iter()
            .filter(|node| admits(node, &placement.node_selector, &placement.tolerations))
            .count();
        let wanted = usize::try_from(component.pods(cluster)).unwrap_or_default();
        let pinned = pins.iter().filter(|pin| pin.component == component).count();
        let host_path = component.storage(cluster).host_path.is_some();
        if admitting < wanted {
            missing.push(Unsatisfied {
                reason: "NotEnoughNodes",
                message: format!(
                    "{field} needs {wanted} Kubernetes nodes and {admitting} match nodeSelector and tolerations: \
                     add nodes or change {field}"
                ),
            });
        } else if host_path && pinned < wanted {
            missing.push(Unsatisfied {
                reason: "NotEnoughNodes",
                message: format!(
                    "{field}: only {pinned} of {wanted} pods could be tied to a Kubernetes node, the other nodes are \
                     not ready or cordoned: make them ready or add nodes"
                ),
            });
        }
    }
    missing
}

async fn missing_storage_classes(client: &Client, cluster: &ValidCluster) -> Result<Vec<Unsatisfied>, kube::Error> {
    let mut missing = Vec::new();
    let classes: Api<StorageClass> = Api::all(client.clone());
    for &component in cluster.components() {
        let field = component.field();
        let Some(template) = &component.storage(cluster).volume_claim_template else {
            continue;
        };
        let field = format!("{field}.storage.volumeClaimTemplate.spec.storageClassName");
        match template.spec.storage_class_name.as_deref() {
            // Static volumes.
            Some("") => {}
            // A class need not exist for static volumes, but then they must.
            Some(class) => {
                if classes.get_metadata_opt(class).await?.is_none() && template.spec.volume_name.is_none() {
                    missing.push(Unsatisfied {
                        reason: "StorageClassNotFound",
                        message: format!("{field} is {class}, which does not exist: create the StorageClass"),
                    });
                }
            }
            None => {
                let all = classes.list_metadata(&ListParams::default()).await?;
                let default = all.items.iter().any(|class| {
                    let annotation = class.annotations().get("storageclass.kubernetes.io/is-default-class");
                    annotation.is_some_and(|value| value == "true")
                });
                if !default {
                    missing.push(Unsatisfied {
                        reason: "NoDefaultStorageClass",
                        message: format!(
                            "{field} is missing and no StorageClass is the default: \
                             make one the default; claims that are waiting then go on"
                        ),
                    });
                }
            }
        }
    }
    Ok(missing)
}

/// What a StatefulSet's status says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rollout {
    /// The object exists.
    pub exists: bool,
    /// Pods that are ready.
    pub ready: i32,
    /// The StatefulSet wants or still makes changes to its pods.
    pub changing: bool,
}

/// Reads a StatefulSet's progress towards the pods that it asks for.
pub(super) fn rollout(set: Option<&StatefulSet>) -> Rollout {
    let Some(set) = set else {
        return Rollout::default();
    };
    let wanted = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or_default();
    let status = set.status.clone().unwrap_or_default();
    let seen = status.observed_generation >= set.metadata.generation;
    Rollout {
        exists: true,
        ready: status.ready_replicas.unwrap_or_default(),
        changing: !seen
            || status.replicas != wanted
            || status.updated_replicas.unwrap_or_default() < wanted
                && status.update_revision != status.current_revision,
    }
}

/// The revision of the template that pods shall have, once the StatefulSet controller has seen it.
pub(super) fn update_revision(set: &StatefulSet) -> Option<String> {
    let status = set.status.as_ref()?;
    let seen = status.observed_generation >= set.metadata.generation;
    status.update_revision.clone().filter(|_| seen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::{host_path_sample, node, valid};
    use lazarette_api::StorageCluster;

    fn pinned(cluster: &StorageCluster, nodes: &[Node], volumes: &[PersistentVolume]) -> Vec<(Component, i32, String)> {
        let pins = pins(&valid(cluster), nodes, volumes);
        pins.into_iter()
            .map(|pin| (pin.component, pin.ordinal, pin.hostname))
            .collect()
    }

    #[test]
    fn pods_are_spread_over_ready_nodes_and_stay_there() {
        let cluster = host_path_sample();
        let mut nodes = vec![node("c", true), node("a", true), node("b", false), node("d", true)];
        let first = pinned(&cluster, &nodes, &[]);
        let expected: Vec<_> = Component::ALL
            .into_iter()
            .flat_map(|component| {
                [(0, "a"), (1, "c"), (2, "d")].map(|(ordinal, host)| (component, ordinal, host.to_owned()))
            })
            .collect();
        assert_eq!(first, expected);

        let valid = valid(&cluster);
        let known = Dereferenced {
            pins: pins(&valid, &nodes, &[]),
            ..Dereferenced::default()
        };
        let volumes = crate::cluster::build(&valid, &known, &crate::cluster::tests::defaults(), 3).persistent_volumes;
        assert_eq!(volumes.len(), 6);
        // Another node becomes ready and one leaves: nobody moves.
        nodes[2] = node("b", true);
        nodes.retain(|node| node.name_any() != "a");
        assert_eq!(pinned(&cluster, &nodes, &volumes), expected);
        // A pod without a volume gets a node that none of its kind is tied to.
        let without_first: Vec<_> = volumes
            .into_iter()
            .filter(|volume| !volume.name_any().ends_with("-storage-0"))
            .collect();
        let again = pinned(&cluster, &nodes, &without_first);
        assert!(again.contains(&(Component::Storage, 0, "b".to_owned())), "{again:?}");
    }

    #[test]
    fn too_few_nodes_are_reported_with_the_field() {
        let cluster = host_path_sample();
        let nodes = [node("a", true), node("b", true), node("c", false)];
        let valid = valid(&cluster);
        let missing = missing_nodes(&valid, &nodes, &pins(&valid, &nodes, &[]));
        assert!(
            missing[0].message.starts_with("spec.etcd: only 2 of 3 pods"),
            "{missing:?}"
        );
        let missing = missing_nodes(&valid, &nodes[..2], &pins(&valid, &nodes[..2], &[]));
        assert!(
            missing[1]
                .message
                .starts_with("spec.storageNodes needs 3 Kubernetes nodes and 2 match"),
            "{missing:?}"
        );
    }

    #[test]
    fn taints_keep_pods_away_unless_tolerated() {
        use k8s_openapi::api::core::v1::Taint;
        let mut tainted = node("a", true);
        tainted.spec.get_or_insert_default().taints = Some(vec![Taint {
            key: "dedicated".to_owned(),
            value: Some("gpu".to_owned()),
            effect: "NoSchedule".to_owned(),
            time_added: None,
        }]);
        let toleration = |value: &str| Toleration {
            key: Some("dedicated".to_owned()),
            value: Some(value.to_owned()),
            ..Toleration::default()
        };
        let everything = Toleration {
            operator: Some("Exists".to_owned()),
            ..Toleration::default()
        };
        let none = BTreeMap::new();
        assert!(!admits(&tainted, &none, &[]));
        assert!(!admits(&tainted, &none, &[toleration("db")]));
        assert!(admits(&tainted, &none, &[toleration("gpu")]));
        assert!(admits(&tainted, &none, &[everything]));
        let selector = [("disk".to_owned(), "ssd".to_owned())].into();
        assert!(!admits(&node("b", true), &selector, &[]));
    }
}
