//! What a storage node counts, in OpenMetrics.

use crate::chunk::FileChunkStore;
use crate::meta::owner;
use crate::replication::Replicas;
use lazarette_telemetry::Registry;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

/// Collects the counters of the node's parts once they exist.
#[derive(Clone, Default)]
pub(crate) struct NodeMetrics {
    parts: Arc<OnceLock<Parts>>,
}

struct Parts {
    replicas: Replicas,
    owners: Arc<owner::Metrics>,
    chunks: Arc<FileChunkStore>,
}

impl fmt::Debug for NodeMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeMetrics").finish_non_exhaustive()
    }
}

impl NodeMetrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(self.clone()));
    }

    pub(crate) fn observe(&self, replicas: Replicas, owners: Arc<owner::Metrics>, chunks: Arc<FileChunkStore>) {
        // Joining happens once in a process.
        let _ = self.parts.set(Parts {
            replicas,
            owners,
            chunks,
        });
    }
}

impl Collector for NodeMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(parts) = self.parts.get() else { return Ok(()) };
        let mut counter = |name: &str, help: &str, value: u64| {
            let metric = ConstCounter::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        for (name, value) in parts.replicas.counters().all() {
            counter(&format!("replication_{name}"), "See docs/operations.md", value)?;
        }
        let owners = &parts.owners;
        for (name, help, value) in [
            ("meta_operations", "Metadata requests executed", &owners.operations),
            ("meta_failures", "Metadata requests that failed", &owners.failures),
            ("meta_records", "Journal records committed", &owners.records),
            ("meta_record_bytes", "Bytes of journal records", &owners.record_bytes),
            ("meta_pages", "Pages written", &owners.pages),
            ("meta_page_bytes", "Bytes of pages", &owners.page_bytes),
            ("meta_claims", "Volumes' metadata taken over", &owners.claims),
            ("meta_losses", "Ownerships lost", &owners.losses),
            (
                "meta_expired_sessions",
                "Clients' sessions that ran out",
                &owners.expired_sessions,
            ),
            (
                "meta_damaged",
                "Recoveries of a volume that met damaged or missing metadata",
                &owners.damaged,
            ),
            (
                "meta_removed_files",
                "Deleted files whose chunks were removed",
                &owners.removed_files,
            ),
        ] {
            counter(name, help, value.load(Ordering::Relaxed))?;
        }
        let chunks = parts.chunks.stats();
        counter("chunk_damaged", "Calls that met a damaged chunk", chunks.damaged)?;
        counter("chunk_refused", "Malformed calls of the chunk store", chunks.refused)?;
        let backlog = parts.replicas.repair_backlog();
        for (name, help, value) in [
            (
                "repair_backlog_chunks",
                "Chunks still to be copied by this node",
                backlog.chunks,
            ),
            (
                "repair_backlog_bytes",
                "Bytes still to be copied by this node",
                backlog.bytes,
            ),
            (
                "leading_replica_sets",
                "Replica sets of which this node is primary",
                parts.replicas.leading().len() as u64,
            ),
            (
                "chunk_log_bytes",
                "Bytes of the chunk store's log not yet folded",
                chunks.log_bytes,
            ),
        ] {
            let metric = ConstGauge::new(value as i64);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)?;
        }
        Ok(())
    }
}
