//! GlusterFS: one daemon, three bricks, replica 3, no volume options set.

use super::place::{ADDRESS, Place};
use anyhow::{Context, Result};
use lazarette_e2e::cmd;
use std::fs;

pub(super) const PACKAGES: &[&str] = &["glusterfs-server", "glusterfs-client"];
pub(super) const FSYNC: &str = "on all three bricks before it returns; creates, renames and unlinks are not synced";

const VOLUME: &str = "bench";
const PORT: u16 = 24007;

pub(super) async fn start(place: &Place) -> Result<()> {
    let data = place.data.display();
    for folder in ["glusterd", "run"] {
        fs::create_dir_all(place.data.join(folder))?;
    }
    // Bricks log there whatever the configuration says.
    fs::create_dir_all("/var/log/glusterfs/bricks")?;
    let config = place.data.join("glusterd.vol");
    let text = format!(
        "volume management\n    type mgmt/glusterd\n    option working-directory {data}/glusterd\n    \
         option run-directory {data}/run\n    option transport-type socket\n    \
         option transport.socket.bind-address {ADDRESS}\n    option transport.socket.listen-port {PORT}\n    \
         option ping-timeout 0\n    option event-threads 1\n    option max-port 60999\nend-volume\n"
    );
    fs::write(&config, text)?;
    let daemon = place.daemon("glusterd", "glusterd").args(["-N", "-f"]).arg(&config);
    let log = format!("{data}/logs/glusterd-itself.log");
    daemon
        .args(["-p", &format!("{data}/glusterd.pid"), "-l", &log])
        .start()
        .await?;
    place
        .wait("glusterd", || async {
            gluster(&["pool", "list"]).await?;
            Ok(true)
        })
        .await?;
    let bricks = [1, 2, 3].map(|number| format!("{ADDRESS}:{data}/brick-{number}/content"));
    for number in 1..=3 {
        fs::create_dir_all(place.data.join(format!("brick-{number}")))?;
    }
    let mut create = vec!["volume", "create", VOLUME, "replica", "3"];
    create.extend(bricks.iter().map(String::as_str));
    create.push("force");
    gluster(&create).await?;
    gluster(&["volume", "start", VOLUME]).await?;
    place
        .wait("three bricks", || async {
            let status = gluster(&["volume", "status", VOLUME, "detail"]).await?;
            let online = |line: &&str| line.starts_with("Online") && line.trim_end().ends_with(" Y");
            Ok(status.lines().filter(online).count() == 3)
        })
        .await
}

pub(super) async fn mount(place: &Place) -> Result<()> {
    let target = place.mountpoint.to_str().context("a mount point of this name")?;
    let log = format!("{}/logs/mount.log", place.data.display());
    let server = format!("--volfile-server={ADDRESS}");
    let port = format!("--volfile-server-port={PORT}");
    let volume = format!("--volfile-id={VOLUME}");
    place
        .mount("glusterfs", &["-N", &server, &port, &volume, "-l", &log, target])
        .await
}

async fn gluster(arguments: &[&str]) -> Result<String> {
    cmd!["gluster", "--mode=script"].args(arguments).run().await
}
