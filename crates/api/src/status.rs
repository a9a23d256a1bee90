use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operator and the storage nodes know about a storage cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StorageClusterStatus {
    /// The generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Available: all volumes can be served. Progressing: the cluster is not yet as the spec wants
    /// it. Degraded: something is broken or missing. Paused: spec.paused or spec.stopped is set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The identity that the storage nodes gave the cluster; also on every disk of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// The etcd members.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etcd: Option<CountStatus>,
    /// The storage nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_nodes: Option<CountStatus>,
    /// The replica sets: groups of storage nodes that hold the same data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica_sets: Option<ReplicaSetsStatus>,
    /// Storage nodes that hand over what they hold before they are removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub draining: Vec<String>,
    /// What verifying the copies has found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubStatus>,
    /// Number of volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<i64>,
    /// Size of all disks, before replication.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<String>,
    /// How much of the capacity is in use, rounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<String>,
    /// While the cluster is being deleted: volumes that exist and hold the deletion up. At most 20
    /// are listed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocking_volumes: Vec<String>,
}

/// How many pods there are of those wanted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CountStatus {
    /// Pods that are ready.
    pub ready: i32,
    /// Pods that the spec asks for.
    pub wanted: i32,
    /// Both as one text, such as 2/3.
    pub summary: String,
}

impl CountStatus {
    /// A count with its summary.
    pub fn new(ready: i32, wanted: i32) -> Self {
        Self {
            ready,
            wanted,
            summary: format!("{ready}/{wanted}"),
        }
    }
}

/// How well the data is protected.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaSetsStatus {
    /// All replica sets.
    pub total: i64,
    /// Those with fewer up-to-date copies than wanted.
    pub degraded: i64,
    /// Those that cannot take writes now.
    pub unavailable: i64,
    /// Copies that are missing, over all replica sets.
    #[serde(default)]
    pub copies_missing: i64,
    /// Those with a copy that is being moved to another storage node.
    #[serde(default)]
    pub moving: i64,
    /// What is still to be copied to restore or move copies, rounded.
    #[serde(default)]
    pub to_copy: String,
}

/// What verifying the copies has found since the storage nodes' processes started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScrubStatus {
    /// Copies of chunks found damaged.
    pub damaged: i64,
    /// Those of them that were replaced by a good copy.
    pub repaired: i64,
    /// Those without a good copy.
    pub lost: i64,
}

/// Bytes as a Kubernetes quantity with at most three digits that count: `1.5Gi`, `931Mi`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    // 1023.7 would be shown as 1024.
    if value.round() >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = if value >= 99.95 || unit == 0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    };
    format!("{}{}", text.strip_suffix(".0").unwrap_or(&text), UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::human_bytes;

    #[test]
    fn bytes_read_well() {
        let shown = [
            0,
            1023,
            1024,
            1536,
            (1 << 30) - 1,
            12 << 30,
            1_234_567_890_123,
            u64::MAX,
        ]
        .map(human_bytes);
        assert_eq!(shown, ["0", "1023", "1Ki", "1.5Ki", "1Gi", "12Gi", "1.1Ti", "16Ei"]);
    }
}
