//! Lazarette's own programs, built from this checkout.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::{cmd, debian};

/// The program that runs as a storage node.
pub const STORAGE_NODE: &str = "lazarette-node";
/// The mount daemon.
pub const MOUNT: &str = "lazarette-mount";
/// The CSI driver.
pub const CSI: &str = "lazarette-csi";
/// The operator.
pub const OPERATOR: &str = "lazarette-operator";
/// Everything that goes into the image.
pub const ALL: &[&str] = &[STORAGE_NODE, MOUNT, CSI, OPERATOR];

/// The checkout that this was built from.
pub fn workspace_root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Where cargo puts optimised programs.
pub fn release_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace_root().join("target"), PathBuf::from)
        .join("release")
}

/// What pods of the tests and the demo run.
const WORKLOAD: &str = "lazarette-workload";

/// Builds the programs that hold and mount data; returns the folder they are in.
pub async fn storage() -> Result<PathBuf> {
    programs(&[STORAGE_NODE, MOUNT]).await
}

/// Builds everything; returns the folder.
pub async fn all() -> Result<PathBuf> {
    // In the same groups each time: cargo compiles dependencies anew for another selection of
    // packages, as that may need other features of them.
    storage().await?;
    programs(&[CSI, OPERATOR, WORKLOAD]).await
}

/// Builds programs (their packages have the same names), optimised.
async fn programs(names: &[&str]) -> Result<PathBuf> {
    // etcd's client generates its code with protoc at build time.
    debian::ensure(&["protobuf-compiler"]).await?;
    let packages = names.iter().flat_map(|name| ["--package", name]);
    cmd!["cargo", "build", "--release", "--quiet"]
        .args(packages)
        .cwd(workspace_root())
        .limit(Duration::from_secs(3000))
        .run()
        .await
        .with_context(|| format!("build {}", names.join(", ")))?;
    Ok(release_dir())
}
