//! The Kubernetes API of Lazarette: custom resources, conditions and well-known labels.
//!
//! The documentation of the fields is what `kubectl explain` shows. The files under `crds/` are
//! generated from these types: see [`render`].

mod cluster;
mod conditions;
mod labels;
mod render;
mod status;

pub use cluster::{
    ClaimTemplate, ClaimTemplateMetadata, EtcdSpec, EtcdTls, ExternalEtcd, HostPathSource, Placement, RepairSpec,
    ReplicationDefaults, SecretKey, StorageCluster, StorageClusterSpec, StorageNodesSpec, StorageSource,
};
pub use conditions::{ConditionType, Finding, condition, is_true, merge};
pub use labels::{annotation, cluster_labels, component_labels, label, selector};
pub use render::{crds, render};
pub use status::{CountStatus, ReplicaSetsStatus, ScrubStatus, StorageClusterStatus, human_bytes};

/// The API group.
pub const GROUP: &str = "lazarette.io";

/// The name of the CSI driver.
pub const CSI_DRIVER: &str = "csi.lazarette.io";

/// Port of a storage node's gRPC services.
pub const STORAGE_PORT: i32 = 7400;

/// Port of the admin HTTP server (`/livez`, `/readyz`, `/metrics`) of every component.
pub const ADMIN_PORT: i32 = 7401;

/// The `host:port` under which a cluster's storage nodes are reached from within Kubernetes.
pub fn storage_endpoint(namespace: &str, cluster: &str) -> String {
    format!("{cluster}-storage.{namespace}.svc:{STORAGE_PORT}")
}
