//! What the daemon reports of its mounts.

use crate::{Daemon, Mount};
use lazarette_fuse::statistics::OperationSnapshot;
use lazarette_telemetry::Registry;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

#[derive(Debug)]
struct Mounts(Daemon);

impl Collector for Mounts {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let mounts = self.0.mounts();
        let alive = mounts.iter().filter(|mount| mount.is_alive()).count();
        let dirty: u64 = mounts.iter().map(|mount| mount.volume().dirty_bytes()).sum();
        let lost: u64 = mounts.iter().map(Mount::lost_sessions).sum();
        let gauges = [
            ("mounts", "Volumes mounted.", alive),
            (
                "dead_mounts",
                "Mounts of volumes that were deleted.",
                mounts.len() - alive,
            ),
            (
                "lost_sessions",
                "Sessions of these mounts that the owner has ended, with what was open in them.",
                lost as usize,
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
        requests(&mut encoder, &mounts)
    }
}

/// A figure of one kind of request.
type Figure = fn(&OperationSnapshot) -> f64;

/// What the kernel asked for, by mount and operation.
fn requests(encoder: &mut DescriptorEncoder, mounts: &[Mount]) -> Result<(), std::fmt::Error> {
    let figures: [(&str, &str, Figure); 3] = [
        ("requests", "Requests of the kernel.", |operation| {
            operation.requests as f64
        }),
        ("request_errors", "Requests answered with an error.", |operation| {
            operation.errors as f64
        }),
        ("request_seconds", "Time to the answers, in all.", |operation| {
            operation.total.as_secs_f64()
        }),
    ];
    let snapshots: Vec<_> = mounts.iter().map(|mount| (mount, mount.requests())).collect();
    for (name, help, figure) in figures {
        let name = format!("lazarette_mount_{name}");
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
        for (mount, snapshot) in &snapshots {
            let folder = mount.target().to_string_lossy();
            for operation in &snapshot.operations {
                let labels = [("mount", folder.as_ref()), ("operation", operation.opcode.name())];
                ConstCounter::new(figure(operation)).encode(family.encode_family(&labels)?)?;
            }
        }
    }
    Ok(())
}

impl Daemon {
    /// Adds the daemon's metrics to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(Mounts(self.clone())));
    }
}
