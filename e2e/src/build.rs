//! Lazarette's own programs, built from this checkout.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

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
pub const WORKLOAD: &str = "lazarette-workload";

/// Builds the programs that hold and mount data; returns the folder they are in.
pub async fn storage() -> Result<PathBuf> {
    programs(&[STORAGE_NODE, MOUNT]).await
}

/// What a cargo that runs this program has set for this program's package.
const OF_OUR_PACKAGE: [&str; 8] = [
    "CARGO_MANIFEST_DIR",
    "CARGO_MANIFEST_LINKS",
    "CARGO_PKG_NAME",
    "CARGO_PKG_VERSION",
    "CARGO_PKG_VERSION_MAJOR",
    "CARGO_PKG_VERSION_MINOR",
    "CARGO_PKG_VERSION_PATCH",
    "CARGO_PKG_VERSION_PRE",
];

/// Cargo, as from a shell, for who wants its output as it comes. Build scripts (ring's) have cargo watch
/// the variables of the package, so that it would compile half of the dependencies anew for each program
/// that calls it.
pub fn cargo_command() -> Command {
    without_package(Command::new("cargo"))
}

/// The same with whatever runs cargo.
pub fn without_package(mut command: Command) -> Command {
    for name in OF_OUR_PACKAGE {
        command.env_remove(name);
    }
    command
}

/// Builds everything; returns the folder.
pub async fn all() -> Result<PathBuf> {
    // In the same groups each time: cargo compiles dependencies anew for another selection of
    // packages, as that may need other features of them.
    storage().await?;
    programs(&[CSI, OPERATOR, WORKLOAD]).await
}

/// Builds an example of a package, optimised; returns its path.
pub async fn example(package: &str, name: &str) -> Result<PathBuf> {
    let folder = release(["--package", package, "--example", name]).await?;
    Ok(folder.join("examples").join(name))
}

/// Builds programs (their packages have the same names), optimised.
async fn programs(names: &[&str]) -> Result<PathBuf> {
    debian::ensure(debian::BUILD_PACKAGES).await?;
    release(names.iter().flat_map(|name| ["--package", name])).await
}

/// Builds what these arguments of cargo select, optimised; returns the folder.
pub async fn release<'a>(selection: impl IntoIterator<Item = &'a str>) -> Result<PathBuf> {
    let unset = OF_OUR_PACKAGE.iter().flat_map(|name| ["--unset", name]);
    cmd!["env"]
        .args(unset)
        .args(["cargo", "build", "--release", "--quiet"])
        .args(selection)
        .cwd(workspace_root())
        .limit(Duration::from_secs(3000))
        .run()
        .await?;
    Ok(release_dir())
}
