//! The images that the lab uses.

use std::path::Path;

use anyhow::{Context, Result};

use super::Image;
use crate::tools::{Tool, ensure};
use crate::{build, cmd};

/// Repository of the image that holds all of Lazarette's programs.
pub const LAZARETTE: &str = "localhost/lazarette";

/// Lazarette itself: [`build::ALL`] in `/usr/bin`, from the release binaries in a folder such as
/// `target/release`. The tag is different for each build, so that Kubernetes sees an upgrade.
pub fn lazarette(binaries: &Path) -> Result<Image> {
    let image = build::ALL.iter().try_fold(Image::new(LAZARETTE), |image, name| {
        let path = binaries.join(name);
        let path = path
            .canonicalize()
            .with_context(|| format!("{} has not been built yet", path.display()))?;
        image.program(path, Path::new("/usr/bin").join(name))
    })?;
    let tag = image.input_hash()?;
    Ok(image.renamed(format!("{LAZARETTE}:{}", &tag[..12])))
}

/// A shell with the usual small tools: `localhost/busybox:1`.
pub async fn busybox() -> Result<Image> {
    let applets = cmd!["/bin/busybox", "--list"]
        .run()
        .await
        .context("busybox-static is needed")?;
    let image = Image::new("localhost/busybox:1")
        .program("/bin/busybox", "/bin/busybox")?
        .directory("/root", 0o700)
        .command(["/bin/sh"]);
    Ok(applets
        .lines()
        .filter(|applet| *applet != "busybox")
        .fold(image, |image, applet| {
            image.symlink(format!("/bin/{applet}"), "busybox")
        }))
}

/// Holds a pod's namespaces and ends at once on TERM: `localhost/pause:1`.
///
/// A shell does: it waits, reaps the orphans of pods that share a process namespace, and handles
/// TERM, which process 1 otherwise ignores.
pub async fn pause() -> Result<Image> {
    Ok(Image::new("localhost/pause:1")
        .program("/bin/busybox", "/bin/busybox")?
        .entrypoint([
            "/bin/busybox",
            "sh",
            "-c",
            "trap 'exit 0' TERM INT; /bin/busybox sleep 2147483647 & while :; do wait; done",
        ]))
}

/// The cluster's name server: `localhost/coredns:VERSION`.
pub async fn coredns() -> Result<Image> {
    tool_image("coredns", &[Tool::Coredns]).await
}

/// etcd with etcdctl: `localhost/etcd:VERSION`.
pub async fn etcd() -> Result<Image> {
    tool_image("etcd", &[Tool::Etcd, Tool::Etcdctl]).await
}

/// The CSI sidecars, an image each: `localhost/csi-provisioner:VERSION` and so on.
pub async fn sidecars() -> Result<Vec<Image>> {
    single_tools(Tool::SIDECARS).await
}

/// The programs for volume snapshots, an image each: `localhost/csi-snapshotter:VERSION` and
/// `localhost/snapshot-controller:VERSION`.
pub async fn snapshots() -> Result<Vec<Image>> {
    single_tools(Tool::SNAPSHOTS).await
}

/// Everything that the chart installs by default: Lazarette, etcd and the CSI sidecars.
pub async fn chart(binaries: &Path) -> Result<Vec<Image>> {
    let mut images = vec![lazarette(binaries)?, etcd().await?];
    images.extend(sidecars().await?);
    Ok(images)
}

async fn single_tools(tools: &[Tool]) -> Result<Vec<Image>> {
    ensure(tools).await?;
    let mut images = Vec::new();
    for tool in tools {
        images.push(tool_image(tool.name(), &[*tool]).await?);
    }
    Ok(images)
}

/// An image of static Go programs; the first gives the version and is the entry point.
async fn tool_image(name: &str, tools: &[Tool]) -> Result<Image> {
    ensure(tools).await?;
    let first = tools.first().context("an image needs a program")?;
    let image = Image::new(format!("localhost/{name}:{}", first.version()?))
        .entrypoint([format!("/usr/local/bin/{}", first.name())]);
    tools.iter().try_fold(image, |image, tool| {
        image.program(tool.path(), format!("/usr/local/bin/{}", tool.name()))
    })
}
