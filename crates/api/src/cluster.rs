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

// The operator chooses the nodes of pods with host paths, and knows nodeSelector only: hence the
// rules on affinity.
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
    doc = "A cluster of storage nodes with an etcd, which serves shared volumes to pods.",
    printcolumn = r#"{"name":"Available","type":"string","jsonPath":".status.conditions[?(@.type==\"Available\")].status","description":"Whether all volumes can be served."}"#,
    printcolumn = r#"{"name":"Nodes","type":"string","jsonPath":".status.storageNodes.summary","description":"Storage nodes that are ready, of those wanted."}"#,
    printcolumn = r#"{"name":"Volumes","type":"integer","jsonPath":".status.volumes","description":"Number of volumes."}"#,
    printcolumn = r#"{"name":"Capacity","type":"string","jsonPath":".status.capacity","description":"Size of all disks, before replication."}"#,
    printcolumn = r#"{"name":"Used","type":"string","jsonPath":".status.used","description":"How much of the capacity is in use."}"#,
    printcolumn = r#"{"name":"Missing","type":"integer","priority":1,"jsonPath":".status.replicaSets.copiesMissing","description":"Copies that are missing."}"#,
    printcolumn = r#"{"name":"Degraded","type":"string","priority":1,"jsonPath":".status.conditions[?(@.type==\"Degraded\")].message","description":"What is broken or missing."}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    rule(
        "self.replication.copies <= self.storageNodes.count",
        "spec.replication.copies is more than there are storage nodes: lower it or raise spec.storageNodes.count",
    ),
    rule(
        "!has(self.etcd.storage) || !has(self.etcd.storage.hostPath) || !has(self.etcd.affinity) || \
         !has(self.etcd.affinity.nodeAffinity)",
        "spec.etcd.affinity.nodeAffinity does not work together with hostPath: use nodeSelector",
    ),
    rule(
        "!has(self.storageNodes.storage.hostPath) || !has(self.storageNodes.affinity) || \
         !has(self.storageNodes.affinity.nodeAffinity)",
        "spec.storageNodes.affinity.nodeAffinity does not work together with hostPath: use nodeSelector",
    ),
    // The nodes to be removed must run, to hand over what they hold.
    rule(
        "self.storageNodes.count >= oldSelf.storageNodes.count || !(self.stopped || oldSelf.stopped)",
        "spec.storageNodes.count cannot be lowered while spec.stopped is set: set stopped to false first",
    ),
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
    /// How lost copies are restored and damage is found.
    #[serde(default)]
    pub repair: RepairSpec,
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

/// The etcd cluster: one of the operator's own, or one that exists.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    rule(
        "has(self.storage) != has(self.external)",
        "spec.etcd must have exactly one of storage, for an etcd of its own, and external: set one and remove the other",
    ),
    rule(
        "has(self.external) == has(oldSelf.external)",
        "spec.etcd cannot change between an etcd of its own and an external one, the metadata would stay behind: \
         keep the kind",
    ),
    rule(
        "!has(self.external) || !(has(self.image) || has(self.resources) || has(self.nodeSelector) || \
         has(self.tolerations) || has(self.affinity) || has(self.priorityClassName))",
        "spec.etcd.image, resources, nodeSelector, tolerations, affinity and priorityClassName are of an etcd that the \
         operator runs: remove them, or spec.etcd.external",
    ),
]))]
pub struct EtcdSpec {
    /// Number of members that the operator runs: 1 for tests, 3 to survive the loss of one. It can
    /// be raised later, but not lowered.
    #[serde(default = "default_members")]
    #[schemars(extend("x-kubernetes-validations" = [
        rule(
            "self in [1, 3]",
            "spec.etcd.members must be 1, for tests, or 3, to survive the loss of a member",
        ),
        rule(
            "self >= oldSelf",
            "spec.etcd.members cannot be lowered: keep or raise it",
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = storage_rules("spec.etcd.storage")))]
    pub storage: Option<StorageSource>,
    /// An etcd that exists and that others look after. Never the one of Kubernetes itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalEtcd>,
    /// CPU and memory of each member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// Where the members may run.
    #[serde(flatten)]
    pub placement: Placement,
}

/// An etcd that exists, of version 3.6 or newer. Several StorageClusters can share it: their keys begin
/// with `/lz/NAMESPACE/NAME/`. It must take transactions of 1,024 operations and requests of 4 MiB:
/// --max-txn-ops=1024 --max-request-bytes=4194304; and pings every second: --grpc-keepalive-min-time=500ms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rule(
    "has(self.tls) ? self.endpoints.all(e, e.startsWith('https://')) : self.endpoints.all(e, e.startsWith('http://'))",
    "spec.etcd.external.endpoints must all begin with https:// if tls is set, and with http:// if not: \
     correct them, or set or remove tls",
)]))]
pub struct ExternalEtcd {
    /// The members, as http://host:port or https://host:port.
    #[schemars(
        length(min = 1, max = 9),
        extend("x-kubernetes-validations" = [rule(
            "self.all(e, e.matches('^https?://([-a-zA-Z0-9.]+|\\\\[[0-9a-fA-F:]+\\\\]):[0-9]{1,5}$'))",
            "spec.etcd.external.endpoints must each be http:// or https:// with host and port: \
             use such as https://etcd-0.example.com:2379",
        )]),
        inner(length(min = 1, max = 300)),
    )]
    pub endpoints: Vec<String>,
    /// Certificates for https:// endpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<EtcdTls>,
}

/// Certificates in Secrets of the StorageCluster's namespace; often all in one. They are read when
/// a storage node starts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rule(
    "has(self.certificate) == has(self.privateKey)",
    "spec.etcd.external.tls needs both certificate and privateKey, or none: set or remove the other one",
)]))]
pub struct EtcdTls {
    /// The authority that signed the members' certificates.
    pub ca: SecretKey,
    /// The storage nodes' own certificate, where etcd wants one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<SecretKey>,
    /// Its private key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_key: Option<SecretKey>,
}

/// A key of a Secret whose value is a PEM file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: String,
    /// The key in it, such as ca.crt, tls.crt or tls.key.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// How lost copies are restored and damage is found. Rates are bytes a second of each storage node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RepairSpec {
    /// How long a storage node may be away before its copies are made anew on others.
    #[serde(default = "default_replace_after")]
    #[schemars(length(max = 8), extend("x-kubernetes-validations" = [duration_rule("spec.repair.replaceAfter", "10m")]))]
    pub replace_after: String,
    /// How fast a storage node copies at most to restore or move copies.
    #[serde(default = "default_repair_bandwidth")]
    #[schemars(length(max = 8), extend("x-kubernetes-validations" = [rule(
        "self.matches('^[1-9][0-9]{0,4}(Mi|Gi)$')",
        "spec.repair.bandwidth must be a whole number of Mi or Gi: use such as 200Mi",
    )]))]
    pub bandwidth: String,
    /// How fast a storage node reads at most to verify its copies. 0 verifies none.
    #[serde(default = "default_scrub_bandwidth")]
    #[schemars(length(max = 8), extend("x-kubernetes-validations" = [rule(
        "self.matches('^(0|[1-9][0-9]{0,4}(Mi|Gi))$')",
        "spec.repair.scrubBandwidth must be 0 or a whole number of Mi or Gi: use such as 16Mi",
    )]))]
    pub scrub_bandwidth: String,
    /// How often all copies are verified at most.
    #[serde(default = "default_scrub_interval")]
    #[schemars(length(max = 8), extend("x-kubernetes-validations" = [duration_rule("spec.repair.scrubInterval", "7d")]))]
    pub scrub_interval: String,
}

fn duration_rule(field: &str, example: &str) -> Value {
    rule(
        "self.matches('^[1-9][0-9]{0,5}(s|m|h|d)$')",
        &format!("{field} must be a whole number of s, m, h or d: use such as {example}"),
    )
}

fn default_replace_after() -> String {
    "10m".to_owned()
}

fn default_repair_bandwidth() -> String {
    "200Mi".to_owned()
}

fn default_scrub_bandwidth() -> String {
    "16Mi".to_owned()
}

fn default_scrub_interval() -> String {
    "7d".to_owned()
}

impl Default for RepairSpec {
    fn default() -> Self {
        Self {
            replace_after: default_replace_after(),
            bandwidth: default_repair_bandwidth(),
            scrub_bandwidth: default_scrub_bandwidth(),
            scrub_interval: default_scrub_interval(),
        }
    }
}

fn default_members() -> i32 {
    3
}

/// The storage nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StorageNodesSpec {
    /// Number of storage nodes, each on a Kubernetes node of its own. When it is lowered, the last
    /// ones are removed once their copies are on others.
    #[serde(default = "default_count")]
    #[schemars(range(min = 1, max = 1000))]
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
