//! pjdfstest and fsx.

use super::ext4::{Disk, compare};
use super::{mounted, operations};
use lazarette_e2e::posix;
use std::fs;
use std::path::PathBuf;

/// The same each time: a failure can be looked into.
const SEED: u64 = 11;

#[tokio::test]
async fn what_passes_on_ext4_passes_here() {
    let programs = posix::ensure().await.unwrap();
    let (cluster, mounts) = mounted("pjdfstest", 1).await;
    let state = cluster.inner.dir().join("pjdfstest");
    fs::create_dir(&state).unwrap();
    let disk = Disk::ext4(&state).await;
    let ext4 = programs.pjdfstest(&disk.0, &state).await.unwrap();
    drop(disk);
    let ours = programs.pjdfstest(&mounts.path(0, ""), &state).await.unwrap();
    compare("a mount", &ours, &ext4);
    cluster.down().await;
}

/// On a mount that is alone, and on two of a volume at the same time.
#[tokio::test]
async fn files_hold_what_is_written() {
    let programs = posix::ensure().await.unwrap();
    let (cluster, mounts) = mounted("fsx", 1).await;
    let exercise = async |folder: PathBuf, name: &str, seed| {
        let state = cluster.inner.dir().join(name);
        fs::create_dir(&state).unwrap();
        programs
            .fsx(&folder.join(name), &state, seed, operations(5_000))
            .await
            .unwrap();
    };
    exercise(mounts.path(0, ""), "alone", SEED).await;
    let second = cluster.inner.dir().join("mnt/second");
    cluster.inner.mount("fsx", &second).await.unwrap();
    tokio::join!(
        exercise(mounts.path(0, ""), "first", SEED + 1),
        exercise(second.clone(), "second", SEED + 2),
    );
    // The other one reads the same.
    for name in ["first", "second", "alone"] {
        let here = fs::read(mounts.path(0, name)).ok();
        assert!(here == fs::read(second.join(name)).ok(), "{name}");
    }
    cluster.inner.umount(&second).await.unwrap();
    cluster.down().await;
}
