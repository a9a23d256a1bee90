//! What can be said about a spec without asking anyone. The API server's CEL rules check most of
//! this before; it is checked again because the installed definition may be older than the
//! operator.

use super::Defaults;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource, ResourceExt};
use lazarette_api::{StorageCluster, StorageClusterSpec, StorageSource};
use lazarette_types::ReplicationPolicy;
use std::collections::BTreeMap;

/// What is wrong with a storage cluster; the message names field and remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// `members` is neither 1 nor 3.
    #[error("spec.etcd.members is {0}: use 1, for tests, or 3")]
    Members(i32),
    /// `count` below 1.
    #[error("spec.storageNodes.count is {0}: use 1 or more")]
    Count(i32),
    /// More copies than storage nodes.
    #[error(
        "spec.replication.copies is {copies}, but there are {count} storage nodes: lower it or raise spec.storageNodes.count"
    )]
    Copies {
        /// As given.
        copies: i32,
        /// As given.
        count: i32,
    },
    /// The policy is impossible in itself.
    #[error("spec.replication: {0}")]
    Replication(String),
    /// None or both of the kinds of storage.
    #[error("{0} must have exactly one of volumeClaimTemplate and hostPath: set one and remove the other")]
    Storage(&'static str),
    /// A claim without a size.
    #[error("{0}.volumeClaimTemplate.spec.resources.requests.storage is missing: set it, such as 100Gi")]
    ClaimSize(&'static str),
    /// A path that is not absolute.
    #[error("{field}.hostPath.path is {path:?}: use an absolute path without '..'")]
    HostPath {
        /// The field.
        field: &'static str,
        /// As given.
        path: String,
    },
    /// Node affinity together with a host path.
    #[error("{0}.affinity.nodeAffinity does not work together with hostPath: use nodeSelector")]
    HostPathAffinity(&'static str),
    /// The operator has no default for an image and the spec names none.
    #[error("{0} is missing and the operator was installed without a default: set it")]
    Image(&'static str),
    /// An object without a name, namespace or uid; not from an API server.
    #[error("metadata.{0} is missing")]
    Metadata(&'static str),
}

/// A storage cluster that can be built.
#[derive(Clone, Debug)]
pub struct ValidCluster {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.uid`.
    pub uid: String,
    /// Goes on every object made for the cluster.
    pub owner: OwnerReference,
    /// As given.
    pub spec: StorageClusterSpec,
    /// Image of the storage nodes.
    pub image: String,
    /// Image of etcd.
    pub etcd_image: String,
}

impl ValidCluster {
    /// The StatefulSet of the storage nodes.
    pub fn storage_name(&self) -> String {
        format!("{}-storage", self.name)
    }

    /// The StatefulSet of etcd and its Service.
    pub fn etcd_name(&self) -> String {
        format!("{}-etcd", self.name)
    }
}

/// Checks a storage cluster; returns all mistakes at once.
pub fn validate(cluster: &StorageCluster, defaults: &Defaults) -> Result<ValidCluster, Vec<Invalid>> {
    let spec = &cluster.spec;
    let mut mistakes = Vec::new();
    if ![1, 3].contains(&spec.etcd.members) {
        mistakes.push(Invalid::Members(spec.etcd.members));
    }
    let count = spec.storage_nodes.count;
    if count < 1 {
        mistakes.push(Invalid::Count(count));
    }
    let (copies, ack) = (spec.replication.copies, spec.replication.ack);
    let policy = ReplicationPolicy {
        copies: u32::try_from(copies).unwrap_or_default(),
        ack: u32::try_from(ack).unwrap_or_default(),
    };
    match policy.validate() {
        Err(error) => mistakes.push(Invalid::Replication(error.to_string())),
        Ok(_) if copies > count => mistakes.push(Invalid::Copies { copies, count }),
        Ok(_) => {}
    }
    let roles = [
        (
            "spec.etcd",
            "spec.etcd.storage",
            &spec.etcd.storage,
            &spec.etcd.placement,
        ),
        (
            "spec.storageNodes",
            "spec.storageNodes.storage",
            &spec.storage_nodes.storage,
            &spec.storage_nodes.placement,
        ),
    ];
    for (role, field, storage, placement) in roles {
        check_storage(field, storage, &mut mistakes);
        let node_affinity = placement.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
        if storage.host_path.is_some() && node_affinity.is_some() {
            mistakes.push(Invalid::HostPathAffinity(role));
        }
    }
    let image = spec.image.clone().or_else(|| defaults.image.clone());
    let etcd_image = spec.etcd.image.clone().or_else(|| defaults.etcd_image.clone());
    if image.is_none() {
        mistakes.push(Invalid::Image("spec.image"));
    }
    if etcd_image.is_none() {
        mistakes.push(Invalid::Image("spec.etcd.image"));
    }
    let owner = cluster.controller_owner_ref(&()).map(|owner| OwnerReference {
        // With it, a foreground deletion would take the objects away while the finalizer still
        // holds the cluster because of its volumes.
        block_owner_deletion: None,
        ..owner
    });
    for (field, there) in [
        ("name", cluster.metadata.name.is_some()),
        ("namespace", cluster.metadata.namespace.is_some()),
        ("uid", owner.is_some()),
    ] {
        if !there {
            mistakes.push(Invalid::Metadata(field));
        }
    }
    match (image, etcd_image, owner) {
        (Some(image), Some(etcd_image), Some(owner)) if mistakes.is_empty() => Ok(ValidCluster {
            name: cluster.name_any(),
            namespace: cluster.namespace().unwrap_or_default(),
            uid: owner.uid.clone(),
            owner,
            spec: spec.clone(),
            image,
            etcd_image,
        }),
        _ => Err(mistakes),
    }
}

fn check_storage(field: &'static str, storage: &StorageSource, mistakes: &mut Vec<Invalid>) {
    match (&storage.volume_claim_template, &storage.host_path) {
        (Some(template), None) => {
            let requests: Option<&BTreeMap<_, _>> = template.spec.resources.as_ref().and_then(|r| r.requests.as_ref());
            if !requests.is_some_and(|r| r.contains_key("storage")) {
                mistakes.push(Invalid::ClaimSize(field));
            }
        }
        (None, Some(host)) => {
            if !host.path.starts_with('/') || host.path.split('/').any(|part| part == "..") {
                mistakes.push(Invalid::HostPath {
                    field,
                    path: host.path.clone(),
                });
            }
        }
        _ => mistakes.push(Invalid::Storage(field)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::{defaults, sample};
    use lazarette_api::HostPathSource;

    fn mistakes(change: impl FnOnce(&mut StorageCluster)) -> Vec<String> {
        let mut cluster = sample();
        change(&mut cluster);
        match validate(&cluster, &defaults()) {
            Ok(_) => Vec::new(),
            Err(mistakes) => mistakes.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn the_sample_is_valid() {
        assert_eq!(mistakes(|_| {}), Vec::<String>::new());
    }

    #[test]
    fn mistakes_name_field_and_remedy() {
        assert_eq!(
            mistakes(|c| {
                c.spec.etcd.members = 2;
                c.spec.storage_nodes.count = 2;
            }),
            [
                "spec.etcd.members is 2: use 1, for tests, or 3",
                "spec.replication.copies is 3, but there are 2 storage nodes: lower it or raise spec.storageNodes.count",
            ]
        );
        assert_eq!(
            mistakes(|c| c.spec.replication.ack = 4),
            ["spec.replication: ack is 4; use 1 to copies (3)"]
        );
        assert_eq!(
            mistakes(|c| c.spec.replication.copies = -1),
            ["spec.replication: copies is 0; use 1 to 8"]
        );
    }

    #[test]
    fn storage_is_exactly_one_kind() {
        let field =
            "spec.etcd.storage must have exactly one of volumeClaimTemplate and hostPath: set one and remove the other";
        let host = HostPathSource { path: "/x".to_owned() };
        assert_eq!(mistakes(|c| c.spec.etcd.storage.host_path = Some(host)), [field]);
        assert_eq!(mistakes(|c| c.spec.etcd.storage = StorageSource::default()), [field]);
        let up = HostPathSource {
            path: "/x/../y".to_owned(),
        };
        let got = mistakes(|c| {
            c.spec.etcd.storage = StorageSource {
                volume_claim_template: None,
                host_path: Some(up),
            };
        });
        assert_eq!(
            got,
            ["spec.etcd.storage.hostPath.path is \"/x/../y\": use an absolute path without '..'"]
        );
    }

    #[test]
    fn images_come_from_somewhere() {
        let bare = Defaults::default();
        let Err(mistakes) = validate(&sample(), &bare) else {
            panic!("accepted");
        };
        assert_eq!(
            mistakes,
            [Invalid::Image("spec.image"), Invalid::Image("spec.etcd.image")]
        );
    }
}
