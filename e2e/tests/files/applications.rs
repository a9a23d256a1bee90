use super::{mounted, printed};
use lazarette_e2e::applications;
use std::fs;

/// The same in pods is in `tests/kubernetes.rs`.
#[tokio::test]
async fn applications_work() {
    let (cluster, mounts) = mounted("applications", 2).await;
    for application in applications::ALL {
        fs::create_dir(mounts.path(0, application.name)).unwrap();
        for (client, script) in [application.work, application.check].into_iter().enumerate() {
            let folder = mounts.path(client, application.name);
            printed("sh", &["-ec", script, "sh", folder.to_str().unwrap()]);
        }
    }
    cluster.down().await;
}
