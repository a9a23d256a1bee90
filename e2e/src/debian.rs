//! Programs that come from the distribution.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::cmd;

/// What the lab needs from Debian.
pub const LAB_PACKAGES: &[&str] = &[
    "runc",
    "containernetworking-plugins",
    "iptables",
    "nftables",
    "conntrack",
    "iproute2",
    "util-linux",
    "fuse3",
    "busybox-static",
];

/// Installs the packages that are missing.
pub async fn ensure(packages: &[&str]) -> Result<()> {
    let missing = missing(packages).await?;
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("installing Debian packages: {}", missing.join(" "));
    let apt = |args: &[&str]| {
        cmd!["apt-get", "-o", "DPkg::Lock::Timeout=300"]
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .limit(Duration::from_secs(900))
    };
    apt(&["update", "-qq"])
        .run()
        .await
        .context("refresh the package lists")?;
    apt(&["install", "-y", "-qq", "--no-install-recommends"])
        .args(&missing)
        .run()
        .await
        .with_context(|| format!("install {}", missing.join(" ")))?;
    Ok(())
}

async fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    // dpkg-query prints one line for each package that it knows and fails if it misses any.
    let known = cmd![
        "dpkg-query",
        "--show",
        "--showformat",
        "${Package} ${db:Status-Status}\n"
    ]
    .args(packages)
    .output()
    .await?;
    let installed: Vec<_> = known
        .stdout
        .lines()
        .filter_map(|l| l.strip_suffix(" installed"))
        .collect();
    Ok(packages.iter().copied().filter(|p| !installed.contains(p)).collect())
}
