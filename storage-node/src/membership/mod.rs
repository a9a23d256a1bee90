//! This storage node's place in the cluster: its lease and registration, and its view of the rest.

mod lease;
mod view;

pub use lease::Lease;
pub use view::{ClusterView, Versioned};
