//! The operator on a real kube-apiserver with a real etcd, with the rights that the chart gives it.
//! There are no controllers and no kubelets: the tests play their part by writing status.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "clippy knows functions with #[test] only, not those that they share"
)]

mod chart;
mod control_plane;
mod crd;
mod day_two;
mod deletion;
mod etcd;
mod leader;
mod reconcile;
mod storage;
mod world;
