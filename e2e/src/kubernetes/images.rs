use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::image::{self, Image};
use crate::story;
use crate::tools::cache_dir;

/// The image of the pods that use volumes: a shell, the workload and a source tree.
pub(super) const WORKLOAD: &str = "localhost/lazarette-workload:dev";

/// The image of pods that use this machine's programs, which its node mounts into them.
pub(super) const TOOLBOX: &str = "localhost/lazarette-toolbox:dev";

/// Debian's names for folders that moved to `/usr`, and something that stays.
pub(super) fn toolbox() -> Image {
    ["bin", "sbin", "lib", "lib64"]
        .iter()
        .fold(Image::new(TOOLBOX), |image, name| {
            image.symlink(format!("/{name}"), format!("usr/{name}"))
        })
        .entrypoint(["/usr/bin/sleep", "infinity"])
}

/// The image of the story's pods.
pub(super) async fn workload(binaries: &Path) -> Result<Image> {
    let tree = tree_archive().await?;
    let workload = image::busybox()
        .await?
        .renamed(WORKLOAD)
        .file(tree, "/tree.tar")
        .program(binaries.join("lazarette-workload"), "/bin/workload")?
        .entrypoint(["/bin/workload", "idle"])
        .command(std::iter::empty::<String>());
    Ok(workload)
}

/// The source tree as one archive.
async fn tree_archive() -> Result<PathBuf> {
    let source = story::source_tree().await?;
    let name = source.file_name().context("no name")?.to_string_lossy().into_owned();
    let folder = cache_dir().join("images");
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{name}.tar"));
    if !path.exists() {
        let new = path.with_extension("new");
        tokio::task::spawn_blocking({
            let new = new.clone();
            move || -> Result<()> {
                let mut archive = tar::Builder::new(File::create(&new)?);
                archive.mode(tar::HeaderMode::Deterministic);
                archive.append_dir_all("tree", &source)?;
                Ok(archive.into_inner()?.sync_all()?)
            }
        })
        .await??;
        fs::rename(&new, &path)?;
    }
    Ok(path)
}
