//! Leader election on a real Lease.

use crate::world::{PATIENCE, RELEASE_NAMESPACE, World};
use lazarette_operator::{Leadership, Timing};
use std::time::Duration;
use tokio::time::timeout;

/// The name that the chart's rights allow.
const LEASE: &str = "lazarette-operator";

fn candidate(world: &World, identity: &str) -> Leadership {
    let timing = Timing {
        duration: Duration::from_secs(3),
        deadline: Duration::from_secs(2),
        retry: Duration::from_millis(200),
    };
    let client = world.plane.service_account(RELEASE_NAMESPACE, "lazarette-operator");
    Leadership::new(client, RELEASE_NAMESPACE, LEASE, identity.to_owned(), timing)
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
        () = tokio::time::sleep(Duration::from_secs(5)) => {}
    }
    first.release().await;
    timeout(PATIENCE, second.acquire()).await.unwrap();

    // The second dies without a word: the first takes over.
    timeout(PATIENCE, first.acquire()).await.unwrap();
    // It comes back and notices.
    timeout(PATIENCE, second.hold()).await.unwrap();
}
