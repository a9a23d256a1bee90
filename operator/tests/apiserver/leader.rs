//! Leader election on a real Lease.

use crate::world::{PATIENCE, RELEASE_NAMESPACE, World};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use lazarette_operator::{Leadership, Timing};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::timeout;

/// The name that the chart's rights allow.
const LEASE: &str = "lazarette-operator";

fn candidate(world: &World, identity: &str) -> Leadership {
    let timing = Timing {
        duration: Duration::from_secs(8),
        deadline: Duration::from_secs(7),
        retry: Duration::from_millis(200),
    };
    let client = world.plane.service_account(RELEASE_NAMESPACE, "lazarette-operator");
    Leadership::new(client, RELEASE_NAMESPACE, LEASE, identity.to_owned(), timing)
}

/// Waits until the Lease was renewed so many times.
async fn renewals(world: &World, count: usize) {
    let leases: Api<Lease> = Api::namespaced(world.client.clone(), RELEASE_NAMESPACE);
    let mut seen = BTreeSet::new();
    while seen.len() <= count {
        let spec = leases.get(LEASE).await.unwrap().spec.unwrap();
        assert_eq!(spec.holder_identity.as_deref(), Some("first"));
        seen.insert(spec.renew_time.unwrap().0);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn one_leads_until_it_releases_or_dies() {
    let world = World::new().await;
    let mut first = candidate(&world, "first");
    timeout(PATIENCE, first.acquire()).await.unwrap();

    // While the first renews, the second waits.
    let mut second = candidate(&world, "second");
    tokio::select! {
        () = second.acquire() => panic!("two leaders"),
        () = first.hold() => panic!("lost leadership without cause"),
        () = renewals(&world, 5) => {}
    }
    first.release().await;
    timeout(PATIENCE, second.acquire()).await.unwrap();

    // The second dies without a word: the first takes over.
    timeout(PATIENCE, first.acquire()).await.unwrap();
    // It comes back and notices.
    timeout(PATIENCE, second.hold()).await.unwrap();
}
