//! Disks in files, so that no system is measured on whatever the machine happens to have.

use anyhow::{Context, Result, ensure};
use lazarette_e2e::{cmd, debian};
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Long enough to write an image to a slow disk.
const LIMIT: Duration = Duration::from_secs(600);

/// A new XFS in a file, mounted as long as this lives. The machine's own file system may be one that
/// creates files in very different times, as ext4 without a journal soon after many were deleted.
pub(super) struct Disk {
    folder: PathBuf,
    bytes: u64,
}

impl Disk {
    /// Makes a new file system in the image of so many bytes in `dir`, which is made if it is not
    /// there, and mounts it.
    pub(super) async fn mount(dir: &Path, bytes: u64) -> Result<Self> {
        debian::ensure(&["xfsprogs"]).await?;
        let (image, folder) = (dir.join("disk.image"), dir.join("disk"));
        fs::create_dir_all(&folder)?;
        write_image(&image, bytes).await?;
        // Without discards, which would punch holes into the image.
        cmd!["mkfs.xfs", "-q", "-f", "-K", &image].run().await?;
        let device = attach(&image).await?;
        let mounted = cmd!["mount", "-o", "noatime", &device, &folder].run().await;
        // Which is when it is unmounted, if it is mounted.
        detach(&device).await?;
        mounted?;
        Ok(Self { folder, bytes })
    }

    /// The same in memory, a tmpfs.
    pub(super) fn in_memory(dir: &Path, bytes: u64) -> Result<Self> {
        let folder = dir.join("memory");
        fs::create_dir_all(&folder)?;
        let size = CString::new(format!("size={bytes}"))?;
        rustix::mount::mount("tmpfs", &folder, "tmpfs", MountFlags::NOATIME, Some(size.as_c_str()))
            .context("mount a tmpfs; this needs root")?;
        Ok(Self { folder, bytes })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.folder, UnmountFlags::DETACH);
    }
}

/// Makes an image of this many bytes unless it is there. It is written to its end: in a file with
/// holes, who writes first would pay for the blocks.
pub(super) async fn write_image(image: &Path, bytes: u64) -> Result<()> {
    const BLOCK: u64 = 4 << 20;
    if image.exists() {
        return Ok(());
    }
    eprintln!("writing {} MiB of zeros to {}", bytes >> 20, image.display());
    let free = rustix::fs::statvfs(image.parent().unwrap_or(image))?;
    ensure!(
        free.f_bavail * free.f_frsize > bytes,
        "{} MiB are free, {} MiB are needed for {}",
        (free.f_bavail * free.f_frsize) >> 20,
        bytes >> 20,
        image.display()
    );
    let unfinished = image.with_extension("unfinished");
    cmd!["dd", "if=/dev/zero", "conv=fsync", "status=none"]
        .arg(format!("of={}", unfinished.display()))
        .args([format!("bs={BLOCK}"), format!("count={}", bytes / BLOCK)])
        .limit(LIMIT)
        .run()
        .await?;
    fs::rename(unfinished, image).with_context(|| format!("make {}", image.display()))
}

/// Makes a device of an image, without a second page cache below it.
pub(super) async fn attach(image: &Path) -> Result<String> {
    let device = cmd!["losetup", "--find", "--show", "--direct-io=on", image]
        .run()
        .await?;
    Ok(device.trim().to_owned())
}

/// A device that is mounted goes away when it is unmounted.
async fn detach(device: &str) -> Result<()> {
    cmd!["losetup", "--detach", device].run().await.map(drop)
}

/// The devices of images in `dir`.
async fn attached(dir: &Path) -> Result<Vec<String>> {
    let table = cmd![
        "losetup",
        "--list",
        "--noheadings",
        "--raw",
        "--output",
        "NAME,BACK-FILE"
    ]
    .run()
    .await?;
    let of_dir = |line: &str| {
        let (device, image) = line.split_once(' ')?;
        Path::new(image).starts_with(dir).then(|| device.to_owned())
    };
    Ok(table.lines().filter_map(of_dir).collect())
}

/// Unmounts everything below `dir` and detaches all devices of images in it.
pub(super) async fn release(dir: &Path) -> Result<()> {
    let mounted = || -> Result<Vec<PathBuf>> {
        let table = fs::read_to_string("/proc/self/mounts")?;
        let below = |line: &str| {
            let target = PathBuf::from(line.split(' ').nth(1)?);
            target.starts_with(dir).then_some(target)
        };
        Ok(table.lines().filter_map(below).collect())
    };
    // The latest first: they may lie on earlier ones.
    for target in mounted()?.iter().rev() {
        rustix::mount::unmount(target, UnmountFlags::DETACH)
            .with_context(|| format!("unmount {}", target.display()))?;
    }
    for device in attached(dir).await? {
        detach(&device).await?;
    }
    let left = mounted()?;
    ensure!(left.is_empty(), "still mounted: {left:?}");
    Ok(())
}
