//! Lazarette on a real Kubernetes: the lab's, which stays up; `cargo xtask test` takes it down.
#![allow(clippy::unwrap_used)]

use lazarette_e2e::kubernetes::{self, Installation};
use lazarette_e2e::lab::{Lab, LabConfig};
use lazarette_e2e::story::Quiet;
use tokio::sync::{Mutex, MutexGuard};

/// Installs Lazarette on the lab, for one test at a time. The fourth node is for scaling out.
async fn installation() -> (MutexGuard<'static, ()>, Installation) {
    static ONE: Mutex<()> = Mutex::const_new(());
    let one = ONE.lock().await;
    let lab = Lab::up(LabConfig::default().nodes(4)).await.unwrap();
    (one, Installation::up(lab, &Quiet).await.unwrap())
}

#[tokio::test]
async fn the_story() {
    let (_one, installation) = installation().await;
    kubernetes::play(&installation, &Quiet).await.unwrap();
}

#[tokio::test]
async fn applications_work_in_pods() {
    let (_one, installation) = installation().await;
    kubernetes::run_applications(&installation, &Quiet).await.unwrap();
}

#[tokio::test]
async fn everything_can_be_changed_while_an_application_writes() {
    let (_one, installation) = installation().await;
    kubernetes::change_everything(&installation, &Quiet).await.unwrap();
}

#[tokio::test]
async fn a_machine_that_is_cut_off_hurts_nobody_else() {
    let (_one, installation) = installation().await;
    kubernetes::cut_a_machine_off(&installation, &Quiet).await.unwrap();
}
