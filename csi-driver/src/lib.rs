//! Lazarette's CSI driver: the Controller service that the provisioner and resizer sidecars call,
//! the Node service that a kubelet calls, and registration with the kubelet.
//!
//! Both services keep no state of their own. The controller asks the storage nodes; the node asks
//! the kernel (`/proc/self/mountinfo`) and the mount daemon. Either may be killed and restarted at
//! any time, and no mount depends on them.

pub mod capability;
pub mod cluster;
pub mod context;
pub mod controller;
pub mod deadline;
pub mod error;
pub mod handle;
pub mod identity;
pub mod in_flight;
pub mod metrics;
pub mod node;
pub mod parameters;
pub mod registration;
pub mod run;
pub mod server;
pub mod size;

/// The driver's name in StorageClasses, PersistentVolumes and the CSIDriver object.
pub const DRIVER_NAME: &str = "csi.lazarette.io";

/// Where a cluster's storage nodes are reached when nothing else is configured.
pub const DEFAULT_ENDPOINT_TEMPLATE: &str = "http://{cluster}-storage.{namespace}.svc:7400";
