//! MooseFS: one master, three chunk servers, three copies. As shipped apart from addresses, paths and
//! the nice level; or with the master's log synced at every change and chunks when they are closed.

use super::place::{ADDRESS, Place};
use anyhow::{Context, Result};
use lazarette_e2e::cmd;
use std::fs;

pub(super) const PACKAGES: &[&str] = &["moosefs-master", "moosefs-chunkserver", "moosefs-client", "moosefs-cli"];

const FOR_SERVERS: u16 = 19420;
const FOR_CLIENTS: u16 = 19421;
const METALOGGERS: u16 = 19422;
const FIRST_CHUNK_SERVER: u16 = 19431;
const COPIES: u16 = 3;

pub(super) fn fsync(sync: bool) -> &'static str {
    if sync {
        "the master's log is synced at every change, chunks only when they are closed \
         (CHANGELOG_SAVE_MODE=2, HDD_FSYNC_BEFORE_CLOSE=1)"
    } else {
        "in the page caches of three chunk servers; the master's log is written later and not synced (as shipped)"
    }
}

pub(super) async fn start(place: &Place, sync: bool) -> Result<()> {
    let data = place.data.display();
    let master = place.data.join("master");
    fs::create_dir_all(&master)?;
    fs::write(master.join("metadata.mfs"), "MFSM NEW")?;
    fs::write(place.data.join("exports.cfg"), "* / rw,alldirs,admin,maproot=0:0\n")?;
    fs::write(place.data.join("topology.cfg"), "")?;
    let common = "WORKING_USER = root\nWORKING_GROUP = root\nNICE_LEVEL = 0\n";
    let config = place.data.join("master.cfg");
    let text = format!(
        "{common}DATA_PATH = {data}/master\nEXPORTS_FILENAME = {data}/exports.cfg\n\
         TOPOLOGY_FILENAME = {data}/topology.cfg\nREPLICATIONS_DELAY_INIT = 5\nCHANGELOG_SAVE_MODE = {}\n\
         MATOML_LISTEN_HOST = {ADDRESS}\nMATOML_LISTEN_PORT = {METALOGGERS}\n\
         MATOCS_LISTEN_HOST = {ADDRESS}\nMATOCS_LISTEN_PORT = {FOR_SERVERS}\n\
         MATOCL_LISTEN_HOST = {ADDRESS}\nMATOCL_LISTEN_PORT = {FOR_CLIENTS}\n",
        if sync { 2 } else { 0 }
    );
    fs::write(&config, text)?;
    let master = place.daemon("mfsmaster", "mfsmaster");
    master
        .args(["-f", "-a", "-c"])
        .arg(&config)
        .arg("start")
        .start()
        .await?;
    place.wait_for_port("the master", FOR_CLIENTS).await?;
    for number in 0..COPIES {
        let name = format!("chunks-{number}");
        fs::create_dir_all(place.data.join(&name).join("state"))?;
        fs::create_dir_all(place.data.join(&name).join("disk"))?;
        fs::write(
            place.data.join(&name).join("disks.cfg"),
            format!("{data}/{name}/disk\n"),
        )?;
        let text = format!(
            "{common}DATA_PATH = {data}/{name}/state\nHDD_CONF_FILENAME = {data}/{name}/disks.cfg\n\
             BIND_HOST = {ADDRESS}\nMASTER_HOST = {ADDRESS}\nMASTER_PORT = {FOR_SERVERS}\n\
             CSSERV_LISTEN_HOST = {ADDRESS}\nCSSERV_LISTEN_PORT = {}\nHDD_FSYNC_BEFORE_CLOSE = {}\n",
            FIRST_CHUNK_SERVER + number,
            u8::from(sync)
        );
        let config = place.data.join(&name).join("config.cfg");
        fs::write(&config, text)?;
        let server = place.daemon(&name, "mfschunkserver");
        server.args(["-f", "-c"]).arg(&config).arg("start").start().await?;
    }
    place
        .wait("the chunk servers at the master", || async {
            let (host, port) = (ADDRESS, FOR_CLIENTS.to_string());
            let listed = cmd!["mfscli", "-H", host, "-P", port, "-SCS", "-n", "-p"].run().await?;
            Ok(listed.matches(ADDRESS).count() >= usize::from(COPIES))
        })
        .await
}

pub(super) async fn mount(place: &Place) -> Result<()> {
    let target = place.mountpoint.to_str().context("a mount point of this name")?;
    let port = FOR_CLIENTS.to_string();
    let arguments = ["-f", target, "-H", ADDRESS, "-P", &port, "-o", "mfsnice=0"];
    place.mount("mfsmount", &arguments).await?;
    // Kept by the master for everything made in the folder later.
    cmd!["mfssetgoal", COPIES.to_string(), target].run().await?;
    cmd!["mfssettrashtime", "0", target].run().await.map(drop)
}
