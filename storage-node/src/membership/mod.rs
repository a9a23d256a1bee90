//! This storage node's place in the cluster: its lease and registration, and its view of the rest.

mod join;
mod lease;
#[cfg(test)]
mod tests;
mod view;

pub use join::{JoinError, Registration, ensure_cluster};
pub use lease::Lease;
pub use view::{ClusterView, Versioned};
