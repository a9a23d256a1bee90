//! Lazarette on a real Kubernetes: the lab's. A lab that is already up is used and left up.
#![allow(clippy::unwrap_used)]

use lazarette_e2e::kubernetes::{self, Installation};
use lazarette_e2e::lab::{Lab, LabConfig};
use lazarette_e2e::story::Quiet;

#[tokio::test]
async fn the_story() {
    let config = LabConfig::default();
    let was_up = Lab::attach(config.clone()).await.is_ok();
    let lab = Lab::up(config.clone()).await.unwrap();
    let result = async {
        let installation = Installation::up(lab, &Quiet).await?;
        kubernetes::play(&installation, &Quiet).await
    };
    let result = result.await;
    if !was_up && result.is_ok() {
        Lab::down(&config).await.unwrap();
        assert_eq!(Lab::leftovers(&config).unwrap(), Vec::<String>::new());
    }
    result.unwrap();
}
