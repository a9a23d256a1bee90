//! CephFS: one monitor, one manager, three OSDs (bluestore, each on a device of its own), one metadata
//! server, ceph-fuse. Three copies, without cephx, which costs, and with 1 GiB of memory for each OSD.

use super::place::{ADDRESS, Place};
use crate::bench::disk;
use anyhow::{Context, Result, ensure};
use lazarette_e2e::cmd;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::symlink;

pub(super) const PACKAGES: &[&str] = &[
    "ceph-mon",
    "ceph-mgr",
    "ceph-osd",
    "ceph-mds",
    "ceph-fuse",
    "ceph-common",
];
pub(super) const FSYNC: &str = "on the disks of all three OSDs; changes of metadata are answered before the \
                                journal is safe, fsync waits for it";

const OSDS: usize = 3;
/// Bytes at the start of a device that bluestore recognises it by.
const LABELS: usize = 32 << 20;

pub(super) async fn start(place: &Place) -> Result<()> {
    let data = place.data.display();
    for folder in ["mon", "mgr", "mds", "sockets"] {
        fs::create_dir_all(place.data.join(folder))?;
    }
    let cluster = uuid()?;
    let text = format!(
        "[global]\nfsid = {cluster}\nmon_host = [v2:{ADDRESS}:13300,v1:{ADDRESS}:16789]\n\
         public_network = {ADDRESS}/32\ncluster_network = {ADDRESS}/32\npublic_addr = {ADDRESS}\n\
         auth_cluster_required = none\nauth_service_required = none\nauth_client_required = none\n\
         osd_pool_default_size = 3\nosd_pool_default_min_size = 2\nosd_crush_chooseleaf_type = 0\n\
         osd_pool_default_pg_autoscale_mode = off\nmon_warn_on_insecure_global_id_reclaim_allowed = false\n\
         mon_data_avail_warn = 1\nmon_data_avail_crit = 1\nrun_dir = {data}/sockets\n\
         admin_socket = {data}/sockets/$cluster-$name.$pid.asok\npid_file =\nlog_file = {data}/logs/$name.log\n\
         mon_cluster_log_file = {data}/logs/cluster.log\ncrash_dir = {data}/logs\nms_bind_ipv6 = false\n\
         [mon.a]\nmon_data = {data}/mon/a\n[mgr.x]\nmgr_data = {data}/mgr\nmgr_initial_modules =\n\
         [mds.a]\nmds_data = {data}/mds\n[osd]\nosd_data = {data}/osd-$id\nosd_objectstore = bluestore\n\
         osd_memory_target = 1073741824\nbluestore_debug_enforce_settings = ssd\n"
    );
    fs::write(place.data.join("ceph.conf"), text)?;

    let map = place.data.join("monmap");
    let monitor = format!("[v2:{ADDRESS}:13300,v1:{ADDRESS}:16789]");
    cmd![
        "monmaptool",
        "--create",
        "--fsid",
        &cluster,
        "--addv",
        "a",
        monitor,
        &map
    ]
    .run()
    .await?;
    cmd!["ceph-mon", "-c", config(place), "-i", "a", "--mkfs", "--monmap", &map]
        .run()
        .await?;
    daemon(place, "ceph-mon", "a").await?;
    place
        .wait("the monitor", || async {
            ceph(place, &["mon", "stat"]).await?;
            Ok(true)
        })
        .await?;
    daemon(place, "ceph-mgr", "x").await?;
    for number in 0..OSDS {
        start_osd(place, number).await?;
    }
    place
        .wait("three OSDs", || async {
            let stat = ceph(place, &["osd", "stat", "-f", "json"]).await?;
            Ok(stat.contains("\"num_up_osds\":3"))
        })
        .await?;
    for (pool, groups) in [("meta", "16"), ("data", "32")] {
        ceph(place, &["osd", "pool", "create", pool, groups, groups, "replicated"]).await?;
    }
    ceph(place, &["fs", "new", "fs", "meta", "data"]).await?;
    daemon(place, "ceph-mds", "a").await?;
    place
        .wait("an active metadata server", || async {
            Ok(ceph(place, &["mds", "stat"]).await?.contains("up:active"))
        })
        .await?;
    place
        .wait("clean placement groups", || async {
            Ok(all_clean(&ceph(place, &["pg", "stat"]).await?))
        })
        .await
}

/// Of `N pgs: N active+clean; …`; the manager may have made pools of its own.
fn all_clean(stat: &str) -> bool {
    let Some((all, rest)) = stat.trim().split_once(" pgs: ") else {
        return false;
    };
    rest.strip_prefix(all)
        .is_some_and(|rest| rest.starts_with(" active+clean;"))
}

async fn start_osd(place: &Place, number: usize) -> Result<()> {
    let image = place.dir.join(format!("osd-{number}.image"));
    // Beside the XFS, not on it, so that there are as many layers as for the others.
    disk::write_image(&image, place.disk / OSDS as u64).await?;
    let mut file = OpenOptions::new().write(true).open(&image)?;
    file.write_all(&vec![0; LABELS])?;
    file.sync_all()?;
    let folder = place.data.join(format!("osd-{number}"));
    fs::create_dir_all(&folder)?;
    symlink(disk::attach(&image).await?, folder.join("block"))?;
    let (number, id) = (number.to_string(), uuid()?);
    let given = ceph(place, &["osd", "new", &id]).await?;
    ensure!(
        given.trim() == number,
        "the OSD's number is {given} instead of {number}"
    );
    cmd![
        "ceph-osd",
        "-c",
        config(place),
        "-i",
        &number,
        "--mkfs",
        "--osd-uuid",
        &id
    ]
    .run()
    .await?;
    daemon(place, "ceph-osd", &number).await
}

pub(super) async fn mount(place: &Place) -> Result<()> {
    let target = place.mountpoint.to_str().context("a mount point of this name")?;
    let arguments = ["-f", "-c", &config(place), "--name", "client.admin", target];
    place.mount("ceph-fuse", &arguments).await
}

/// Drops what the servers keep in memory.
pub(super) async fn forget(place: &Place) -> Result<()> {
    ceph(place, &["tell", "mds.a", "cache", "drop"]).await?;
    ceph(place, &["tell", "osd.*", "cache", "drop"]).await.map(drop)
}

fn config(place: &Place) -> String {
    place.data.join("ceph.conf").display().to_string()
}

async fn daemon(place: &Place, program: &str, id: &str) -> Result<()> {
    let daemon = place.daemon(&format!("{program}-{id}"), program);
    daemon
        .args(["-f", "-c", &config(place), "-i", id])
        .start()
        .await
        .map(drop)
}

async fn ceph(place: &Place, arguments: &[&str]) -> Result<String> {
    cmd!["timeout", "60", "ceph", "-c", config(place), "--name", "client.admin"]
        .args(arguments)
        .run()
        .await
}

fn uuid() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::all_clean;

    #[test]
    fn some_groups_that_are_not_clean() {
        assert!(all_clean("49 pgs: 49 active+clean; 0 B data\n"));
        assert!(!all_clean("49 pgs: 1 peering, 48 active+clean; 0 B data"));
        assert!(!all_clean("49 pgs: 48 active+clean, 1 peering; 0 B data"));
        assert!(!all_clean("no answer"));
    }
}
