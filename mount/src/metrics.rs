//! What the daemon reports of its mounts.

use crate::Daemon;
use lazarette_telemetry::Registry;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;

#[derive(Debug)]
struct Mounts(Daemon);

impl Collector for Mounts {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let mounts = self.0.mounts();
        let alive = mounts.iter().filter(|mount| mount.is_alive()).count();
        let dirty: u64 = mounts.iter().map(|mount| mount.volume().dirty_bytes()).sum();
        let gauges = [
            ("mounts", "Volumes mounted.", alive),
            (
                "dead_mounts",
                "Mounts whose session was ended by the owner.",
                mounts.len() - alive,
            ),
            (
                "dirty_bytes",
                "Bytes acknowledged to applications and not yet flushed to storage nodes.",
                dirty as usize,
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value as i64);
            let name = format!("lazarette_mount_{name}");
            gauge.encode(encoder.encode_descriptor(&name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}

impl Daemon {
    /// Adds the daemon's metrics to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(Mounts(self.clone())));
    }
}
