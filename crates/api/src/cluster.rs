use crate::StorageClusterStatus;
use k8s_openapi::api::core::v1::{
    Affinity, LocalObjectReference, PersistentVolumeClaimSpec, ResourceRequirements, Toleration,
};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;

fn rule(rule: &str, message: &str) -> Value {
    json!({"rule": rule, "message": message})
}

/// The operator chooses the nodes of pods with host paths, and knows nodeSelector only.
fn affinity_rule(role: &str) -> Value {
    rule(
        &format!(
            "!has(self.{role}.storage.hostPath) || !has(self.{role}.affinity) || \
             !has(self.{role}.affinity.nodeAffinity)"
        ),
        &format!("spec.{role}.affinity.nodeAffinity does not work together with hostPath: use nodeSelector"),
    )
}

/// A cluster of storage nodes with an etcd of its own, which serves shared volumes to pods.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "lazarette.io",
    version = "v1alpha1",
    kind = "StorageCluster",
    shortname = "lzc",
    category = "storage",
    namespaced,
    status = "StorageClusterStatus",
    derive = "PartialEq",
    doc = "A cluster of storage nodes with an etcd of its own, which serves shared volumes to pods.",
    printcolumn = r#"{"name":"Available","type":"string","jsonPath":".status.conditions[?(@.type==\"Available\")].status","description":"Whether all volumes can be served."}"#,
    printcolumn = r#"{"name":"Nodes","type":"string","jsonPath":".status.storageNodes.summary","description":"Storage nodes that are ready, of those wanted."}"#,
    printcolumn = r#"{"name":"Volumes","type":"integer","jsonPath":".status.volumes","description":"Number of volumes."}"#,
    printcolumn = r#"{"name":"Capacity","type":"string","jsonPath":".status.capacity","description":"Size of all disks, before replication."}"#,
    printcolumn = r#"{"name":"Used","type":"string","jsonPath":".status.used","description":"How much of the capacity is in use."}"#,
    printcolumn = r#"{"name":"Degraded","type":"string","priority":1,"jsonPath":".status.conditions[?(@.type==\"Degraded\")].message","description":"What is broken or missing."}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    rule(
        "self.replication.copies <= self.storageNodes.count",
        "spec.replication.copies is more than there are storage nodes: lower it or raise spec.storageNodes.count",
    ),
    affinity_rule("etcd"),
    affinity_rule("storageNodes"),
]))]
pub struct StorageClusterSpec {
    /// Container image of the storage nodes. Default: the image of the operator, so that both are
    /// upgraded together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// When the kubelet pulls the images: Always, IfNotPresent or Never.
    #[serde(default = "default_pull_policy")]
    #[schemars(extend("enum" = ["Always", "IfNotPresent", "Never"]))]
    pub image_pull_policy: String,
    /// Secrets of the same namespace with the credentials of the registries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// The etcd cluster that holds the volumes' metadata. It serves nothing else.
    pub etcd: EtcdSpec,
    /// The storage nodes, which serve metadata and hold the data.
    pub storage_nodes: StorageNodesSpec,
    /// How volumes are replicated whose StorageClass does not say it.
    #[serde(default)]
    pub replication: ReplicationDefaults,
    /// The operator leaves everything as it is until this is false again, except that it reports
    /// the status. Volumes stay served.
    #[serde(default)]
    pub paused: bool,
    /// Runs no storage node and no etcd member. Volumes are not served; all data is kept, and
    /// comes back when this is false again.
    #[serde(default)]
    pub stopped: bool,
}

fn default_pull_policy() -> String {
    "IfNotPresent".to_owned()
}

/// The etcd cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EtcdSpec {
    /// Number of members: 1 for tests, 3 to survive the loss of one. Cannot be changed later.
    #[serde(default = "default_members")]
    #[schemars(extend("x-kubernetes-validations" = [
        rule(
            "self in [1, 3]",
            "spec.etcd.members must be 1, for tests, or 3, to survive the loss of a member",
        ),
        rule(
            "self == oldSelf",
            "spec.etcd.members cannot be changed: keep the value, or make another StorageCluster",
        ),
    ]))]
    pub members: i32,
    /// Container image of etcd, version 3.6 or newer. Default: the one that the operator was
    /// installed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// Where each member keeps its data: 10 GiB on a fast disk, as every change of metadata waits
    /// for it.
    #[schemars(extend("x-kubernetes-validations" = storage_rules("spec.etcd.storage")))]
    pub storage: StorageSource,
    /// CPU and memory of each member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// Where the members may run.
    #[serde(flatten)]
    pub placement: Placement,
}

fn default_members() -> i32 {
    3
}

/// The storage nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StorageNodesSpec {
    /// Number of storage nodes, each on a Kubernetes node of its own. It can be raised later, but
    /// not lowered.
    #[serde(default = "default_count")]
    #[schemars(range(min = 1, max = 1000), extend("x-kubernetes-validations" = [rule(
        "self >= oldSelf",
        "spec.storageNodes.count cannot be lowered, the data of the removed nodes would be missing: keep or raise it",
    )]))]
    pub count: i32,
    /// Where each storage node keeps its data.
    #[schemars(extend("x-kubernetes-validations" = storage_rules("spec.storageNodes.storage")))]
    pub storage: StorageSource,
    /// CPU and memory of each storage node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// Where the storage nodes may run.
    #[serde(flatten)]
    pub placement: Placement,
    /// The label of Kubernetes nodes whose value is the failure domain: copies of the same data
    /// are put in different ones where possible. The labels for zone and region need Kubernetes
    /// 1.35 or newer.
    #[serde(default = "default_failure_domain_label")]
    #[schemars(extend("x-kubernetes-validations" = [rule(
        "self in ['kubernetes.io/hostname', 'topology.kubernetes.io/zone', 'topology.kubernetes.io/region']",
        "spec.storageNodes.failureDomainLabel must be kubernetes.io/hostname, topology.kubernetes.io/zone or \
         topology.kubernetes.io/region",
    )]))]
    pub failure_domain_label: String,
}

fn default_count() -> i32 {
    3
}

fn default_failure_domain_label() -> String {
    "kubernetes.io/hostname".to_owned()
}

/// Where pods may run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// Labels that a Kubernetes node must have to run a pod.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of Kubernetes nodes that do not keep the pods away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub tolerations: Vec<Toleration>,
    /// Further rules. The operator adds that two pods of the same kind never share a Kubernetes
    /// node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// PriorityClass of the pods. Default: the one that the operator was installed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
}

/// Where a pod keeps its data: exactly one of the fields.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StorageSource {
    /// A PersistentVolumeClaim per pod. The claims stay when the StorageCluster is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_claim_template: Option<ClaimTemplate>,
    /// A folder on the Kubernetes node. The operator ties each pod to a node by means of a
    /// PersistentVolume. The pods run as root then, as only root can write to such a folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<HostPathSource>,
}

fn storage_rules(field: &str) -> Value {
    json!([
        rule(
            "has(self.volumeClaimTemplate) != has(self.hostPath)",
            &format!("{field} must have exactly one of volumeClaimTemplate and hostPath: set one and remove the other"),
        ),
        rule(
            "has(self.hostPath) == has(oldSelf.hostPath)",
            &format!("{field} cannot change between volumeClaimTemplate and hostPath: keep the kind"),
        ),
        rule(
            "!has(self.hostPath) || !has(oldSelf.hostPath) || self.hostPath == oldSelf.hostPath",
            &format!("{field}.hostPath cannot be changed, the data would stay behind: keep its path"),
        ),
        rule(
            "!has(self.volumeClaimTemplate) || !has(oldSelf.volumeClaimTemplate) || \
             self.volumeClaimTemplate == oldSelf.volumeClaimTemplate",
            &format!(
                "{field}.volumeClaimTemplate cannot be changed: keep it; \
                 to grow, edit the PersistentVolumeClaims themselves"
            ),
        ),
        rule(
            "!has(self.volumeClaimTemplate) || (has(self.volumeClaimTemplate.spec.resources) && \
             has(self.volumeClaimTemplate.spec.resources.requests) && \
             'storage' in self.volumeClaimTemplate.spec.resources.requests)",
            &format!("{field}.volumeClaimTemplate.spec.resources.requests.storage is missing: set it, such as 100Gi"),
        ),
        rule(
            "!has(self.volumeClaimTemplate) || !has(self.volumeClaimTemplate.spec.volumeMode) || \
             self.volumeClaimTemplate.spec.volumeMode == 'Filesystem'",
            &format!("{field}.volumeClaimTemplate.spec.volumeMode must be Filesystem: change or remove it"),
        ),
    ])
}

/// A PersistentVolumeClaim to be made for each pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimTemplate {
    /// Labels and annotations of the claims.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<ClaimTemplateMetadata>,
    /// The claims' spec. accessModes is ReadWriteOnce if missing.
    pub spec: PersistentVolumeClaimSpec,
}

/// Labels and annotations of claims.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimTemplateMetadata {
    /// Labels of the claims.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the claims.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A folder on Kubernetes nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostPathSource {
    /// The absolute path, below which each pod gets a folder NAMESPACE/CLAIM. It is made if
    /// missing.
    #[schemars(length(min = 2, max = 1024), extend("x-kubernetes-validations" = [rule(
        "self.startsWith('/') && !self.contains('/../') && !self.endsWith('/..')",
        "path must be absolute and without '..': use one such as /var/lib/lazarette",
    )]))]
    pub path: String,
}

/// Replication of volumes whose StorageClass does not say it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rule(
    "self.ack <= self.copies",
    "spec.replication.ack is more than copies: lower ack or raise copies",
)]))]
pub struct ReplicationDefaults {
    /// Copies of the data on different storage nodes, 1 to 8.
    #[serde(default = "default_copies")]
    #[schemars(range(min = 1, max = 8))]
    pub copies: i32,
    /// Copies that must be on disk before a write is acknowledged, 1 to copies. With 1, the loss
    /// of one disk can lose acknowledged data.
    #[serde(default = "default_ack")]
    #[schemars(range(min = 1, max = 8))]
    pub ack: i32,
}

fn default_copies() -> i32 {
    3
}

fn default_ack() -> i32 {
    2
}

impl Default for ReplicationDefaults {
    fn default() -> Self {
        Self {
            copies: default_copies(),
            ack: default_ack(),
        }
    }
}
