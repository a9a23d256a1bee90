//! Small disks for storage nodes, in files: they can be filled and lost.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use super::{LocalCluster, detach, is_mounted, node_name};
use crate::cmd;

/// What is left free of a full disk.
const LEFT: u64 = 64 << 10;

impl LocalCluster {
    fn disk(&self, index: usize) -> PathBuf {
        self.dir.join(node_name(index))
    }

    /// Whether the storage nodes' disks can be filled.
    pub fn has_small_disks(&self) -> bool {
        self.config.disk_mib.is_some()
    }

    /// Where a storage node keeps its data: on a disk of its own there is room for others.
    pub fn data_dir(&self, index: usize) -> PathBuf {
        match self.config.disk_mib {
            Some(_) => self.disk(index).join("data"),
            None => self.disk(index),
        }
    }

    /// Makes and mounts a storage node's disk, if it has one.
    pub(super) async fn attach_disk(&self, index: usize) -> Result<()> {
        let Some(mib) = self.config.disk_mib else { return Ok(()) };
        let folder = self.disk(index);
        fs::create_dir_all(&folder)?;
        if is_mounted(&folder)? {
            return Ok(());
        }
        let image = folder.with_extension("image");
        if !image.exists() {
            File::create(&image)?.set_len(mib << 20)?;
            let made = cmd!["mkfs.ext4", "-q", "-F", "-m", "0", &image].run().await;
            made.context("make a disk")?;
        }
        cmd!["mount", "-o", "loop", &image, &folder]
            .run()
            .await
            .context("mount a disk; it needs root")?;
        Ok(())
    }

    pub(super) fn detach_disk(&self, index: usize) -> Result<()> {
        match self.config.disk_mib {
            Some(_) => detach(&self.disk(index)),
            None => Ok(()),
        }
    }

    /// Fills a storage node's disk with a file of somebody else.
    pub fn fill_disk(&self, index: usize) -> Result<()> {
        ensure!(self.config.disk_mib.is_some(), "only small disks may be filled");
        let folder = self.disk(index);
        let ballast = File::create(folder.join("ballast"))?;
        // What is free becomes less meanwhile.
        for margin in (1..=16).map(|times| times * LEFT) {
            let space = rustix::fs::statvfs(&folder)?;
            let free = (space.f_bavail * space.f_frsize).saturating_sub(margin).max(1);
            match rustix::fs::fallocate(&ballast, rustix::fs::FallocateFlags::empty(), 0, free) {
                Err(rustix::io::Errno::NOSPC) => {}
                result => return result.context("fill a disk"),
            }
        }
        bail!("{} fills up by itself", folder.display())
    }

    /// Frees what [`Self::fill_disk`] took.
    pub fn free_disk(&self, index: usize) -> Result<()> {
        fs::remove_file(self.disk(index).join("ballast")).context("free a disk")
    }

    /// Deletes all that a storage node has stored, also under its feet. Nothing there is no error.
    pub fn lose_disk(&self, index: usize) -> Result<()> {
        let data = self.data_dir(index);
        let lost = data.with_extension("lost");
        // At one instant: a storage node that runs must not make files in what is being deleted.
        match fs::rename(&data, &lost) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            result => result.with_context(|| format!("take {} away", data.display()))?,
        }
        fs::remove_dir_all(&lost).with_context(|| format!("delete {}", lost.display()))
    }
}
