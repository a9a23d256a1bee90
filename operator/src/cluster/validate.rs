//! What can be said about a spec without asking anyone. The API server's CEL rules check most of
//! this before; it is checked again because the installed definition may be older than the
//! operator.

use super::Defaults;
use super::build::Component;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource, ResourceExt};
use lazarette_api::{ExternalEtcd, RepairSpec, StorageCluster, StorageClusterSpec, StorageSource};
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
    /// None or both of the kinds of etcd.
    #[error(
        "spec.etcd must have exactly one of storage, for an etcd of its own, and external: set one and remove the other"
    )]
    Etcd,
    /// An endpoint that cannot be used.
    #[error("spec.etcd.external.endpoints has {0:?}: use {1}host:port")]
    Endpoint(String, &'static str),
    /// No endpoint at all.
    #[error("spec.etcd.external.endpoints is empty: name the members")]
    NoEndpoint,
    /// Half of a pair of certificate and key.
    #[error("spec.etcd.external.tls needs both certificate and privateKey, or none: set or remove the other one")]
    TlsPair,
    /// Not a duration or rate.
    #[error("spec.repair.{field} is {value:?}: use such as {example}")]
    Repair {
        /// The field.
        field: &'static str,
        /// As given.
        value: String,
        /// What would do.
        example: &'static str,
    },
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
    /// Where the metadata is.
    pub etcd: Etcd,
    /// Limits of repair and scrubbing.
    pub repair: Repair,
}

/// The etcd of a storage cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Etcd {
    /// The operator runs it.
    Own {
        /// Its image.
        image: String,
        /// Where each member keeps its data.
        storage: Box<StorageSource>,
    },
    /// Others look after it.
    External(ExternalEtcd),
}

/// Limits of repair and scrubbing, as storage nodes take them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// As given.
    pub replace_after: String,
    /// MiB a second.
    pub rate: u32,
    /// MiB a second; 0: nothing is verified.
    pub scrub_rate: u32,
    /// As given.
    pub scrub_every: String,
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

    /// The parts that the operator runs.
    pub fn components(&self) -> &'static [Component] {
        match self.etcd {
            Etcd::Own { .. } => &[Component::Etcd, Component::Storage],
            Etcd::External(_) => &[Component::Storage],
        }
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
    let own = spec.etcd.storage.as_ref();
    let roles = [
        ("spec.etcd", "spec.etcd.storage", own, &spec.etcd.placement),
        (
            "spec.storageNodes",
            "spec.storageNodes.storage",
            Some(&spec.storage_nodes.storage),
            &spec.storage_nodes.placement,
        ),
    ];
    for (role, field, storage, placement) in roles {
        let Some(storage) = storage else { continue };
        check_storage(field, storage, &mut mistakes);
        let node_affinity = placement.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
        if storage.host_path.is_some() && node_affinity.is_some() {
            mistakes.push(Invalid::HostPathAffinity(role));
        }
    }
    let image = spec.image.clone().or_else(|| defaults.image.clone());
    if image.is_none() {
        mistakes.push(Invalid::Image("spec.image"));
    }
    let etcd = etcd(spec, defaults, &mut mistakes);
    let repair = repair(&spec.repair, &mut mistakes);
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
    match (image, etcd, repair, owner) {
        (Some(image), Some(etcd), Some(repair), Some(owner)) if mistakes.is_empty() => Ok(ValidCluster {
            name: cluster.name_any(),
            namespace: cluster.namespace().unwrap_or_default(),
            uid: owner.uid.clone(),
            owner,
            spec: spec.clone(),
            image,
            etcd,
            repair,
        }),
        _ => Err(mistakes),
    }
}

fn etcd(spec: &StorageClusterSpec, defaults: &Defaults, mistakes: &mut Vec<Invalid>) -> Option<Etcd> {
    match (&spec.etcd.storage, &spec.etcd.external) {
        (Some(storage), None) => {
            let image = spec.etcd.image.clone().or_else(|| defaults.etcd_image.clone());
            if image.is_none() {
                mistakes.push(Invalid::Image("spec.etcd.image"));
            }
            Some(Etcd::Own {
                image: image?,
                storage: Box::new(storage.clone()),
            })
        }
        (None, Some(external)) => {
            let scheme = if external.tls.is_some() { "https://" } else { "http://" };
            if external.endpoints.is_empty() {
                mistakes.push(Invalid::NoEndpoint);
            }
            for endpoint in &external.endpoints {
                if !is_endpoint(endpoint, scheme) {
                    mistakes.push(Invalid::Endpoint(endpoint.clone(), scheme));
                }
            }
            let tls = external.tls.as_ref();
            if tls.is_some_and(|tls| tls.certificate.is_some() != tls.private_key.is_some()) {
                mistakes.push(Invalid::TlsPair);
            }
            Some(Etcd::External(external.clone()))
        }
        _ => {
            mistakes.push(Invalid::Etcd);
            None
        }
    }
}

fn is_endpoint(endpoint: &str, scheme: &str) -> bool {
    let port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
    let parts = endpoint.strip_prefix(scheme).and_then(|rest| rest.rsplit_once(':'));
    // A comma would end the endpoint where it is passed on.
    parts.is_some_and(|(host, given)| port(given) && !host.is_empty() && !host.contains(['/', ',', ' ']))
}

fn repair(spec: &RepairSpec, mistakes: &mut Vec<Invalid>) -> Option<Repair> {
    // A new field must be handled here.
    let RepairSpec {
        replace_after,
        bandwidth,
        scrub_bandwidth,
        scrub_interval,
    } = spec;
    let mut bad = |field, value: &str, example| {
        mistakes.push(Invalid::Repair {
            field,
            value: value.to_owned(),
            example,
        });
    };
    for (field, value, example) in [
        ("replaceAfter", replace_after, "10m"),
        ("scrubInterval", scrub_interval, "7d"),
    ] {
        if !is_duration(value) {
            bad(field, value, example);
        }
    }
    let rate = mebibytes(bandwidth).filter(|rate| *rate > 0);
    if rate.is_none() {
        bad("bandwidth", bandwidth, "200Mi");
    }
    let scrub_rate = mebibytes(scrub_bandwidth);
    if scrub_rate.is_none() {
        bad("scrubBandwidth", scrub_bandwidth, "16Mi");
    }
    Some(Repair {
        replace_after: replace_after.clone(),
        rate: rate?,
        scrub_rate: scrub_rate?,
        scrub_every: scrub_interval.clone(),
    })
}

fn is_duration(text: &str) -> bool {
    let number = text.strip_suffix(['s', 'm', 'h', 'd']);
    number.is_some_and(|number| number.parse::<u32>().is_ok_and(|number| number > 0) && !number.starts_with('+'))
}

/// MiB of `200Mi`, `1Gi` or `0`.
fn mebibytes(text: &str) -> Option<u32> {
    let (number, factor) = match (text.strip_suffix("Mi"), text.strip_suffix("Gi")) {
        (Some(number), _) => (number, 1),
        (None, Some(number)) => (number, 1024),
        (None, None) if text == "0" => ("0", 1),
        (None, None) => return None,
    };
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    number.parse::<u32>().ok()?.checked_mul(factor)
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
        assert_eq!(
            mistakes(|c| c.spec.etcd.storage.as_mut().unwrap().host_path = Some(host)),
            [field]
        );
        assert_eq!(
            mistakes(|c| c.spec.etcd.storage = Some(StorageSource::default())),
            [field]
        );
        let up = HostPathSource {
            path: "/x/../y".to_owned(),
        };
        let got = mistakes(|c| {
            c.spec.etcd.storage = Some(StorageSource {
                volume_claim_template: None,
                host_path: Some(up),
            });
        });
        assert_eq!(
            got,
            ["spec.etcd.storage.hostPath.path is \"/x/../y\": use an absolute path without '..'"]
        );
    }

    #[test]
    fn etcd_is_its_own_or_external() {
        let external = |value: serde_json::Value| {
            mistakes(|c| {
                c.spec.etcd.storage = None;
                c.spec.etcd.external = Some(serde_json::from_value(value).unwrap());
            })
        };
        let secret = serde_json::json!({"secretName": "etcd", "key": "x"});
        assert_eq!(
            external(serde_json::json!({"endpoints": ["http://etcd:2379"]})),
            Vec::<String>::new()
        );
        let good = serde_json::json!({"endpoints": ["https://[::1]:2379"], "tls": {"ca": secret}});
        assert_eq!(external(good), Vec::<String>::new());
        assert_eq!(
            external(serde_json::json!({"endpoints": ["https://a:1", "http://a,b:1", "http://a", "http://a:0"]})),
            [
                "spec.etcd.external.endpoints has \"https://a:1\": use http://host:port",
                "spec.etcd.external.endpoints has \"http://a,b:1\": use http://host:port",
                "spec.etcd.external.endpoints has \"http://a\": use http://host:port",
                "spec.etcd.external.endpoints has \"http://a:0\": use http://host:port",
            ]
        );
        let half = serde_json::json!({"endpoints": [], "tls": {"ca": secret, "privateKey": secret}});
        assert_eq!(
            external(half),
            [
                "spec.etcd.external.endpoints is empty: name the members",
                "spec.etcd.external.tls needs both certificate and privateKey, or none: set or remove the other one",
            ]
        );
        let neither = "spec.etcd must have exactly one of storage, for an etcd of its own, and external: \
                       set one and remove the other";
        assert_eq!(mistakes(|c| c.spec.etcd.storage = None), [neither]);
        assert_eq!(
            mistakes(|c| c.spec.etcd.external = Some(ExternalEtcd::default())),
            [neither]
        );
    }

    #[test]
    fn limits_of_repair_are_read() {
        let mut cluster = sample();
        cluster.spec.repair.bandwidth = "2Gi".to_owned();
        cluster.spec.repair.scrub_bandwidth = "0".to_owned();
        let valid = validate(&cluster, &defaults()).unwrap();
        assert_eq!((valid.repair.rate, valid.repair.scrub_rate), (2048, 0));
        assert_eq!(
            mistakes(|c| {
                c.spec.repair = RepairSpec {
                    replace_after: "soon".to_owned(),
                    bandwidth: "0Mi".to_owned(),
                    scrub_bandwidth: "+1Mi".to_owned(),
                    scrub_interval: "0d".to_owned(),
                };
            }),
            [
                "spec.repair.replaceAfter is \"soon\": use such as 10m",
                "spec.repair.scrubInterval is \"0d\": use such as 7d",
                "spec.repair.bandwidth is \"0Mi\": use such as 200Mi",
                "spec.repair.scrubBandwidth is \"+1Mi\": use such as 16Mi",
            ]
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
