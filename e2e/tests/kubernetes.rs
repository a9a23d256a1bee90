//! Lazarette on a real Kubernetes: the lab's, which stays up; `cargo xtask test` takes it down.
#![allow(clippy::unwrap_used)]

use lazarette_e2e::kubernetes::{self, Installation};
use lazarette_e2e::lab::{Lab, LabConfig};
use lazarette_e2e::story::Quiet;

#[tokio::test]
async fn the_story() {
    let lab = Lab::up(LabConfig::default()).await.unwrap();
    let installation = Installation::up(lab, &Quiet).await.unwrap();
    kubernetes::play(&installation, &Quiet).await.unwrap();
}
