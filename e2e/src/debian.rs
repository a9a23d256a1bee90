//! Programs that come from the distribution.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cmd;

/// What building needs: etcd's client generates its code with protoc, from files that import protobuf's own.
pub const BUILD_PACKAGES: &[&str] = &["protobuf-compiler", "libprotobuf-dev"];

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

/// Installs the packages that are missing, without starting any service of theirs.
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
    let _services = NoServices::forbid()?;
    apt(&["install", "-y", "-qq", "--no-install-recommends"])
        .args(&missing)
        .run()
        .await
        .with_context(|| format!("install {}", missing.join(" ")))?;
    Ok(())
}

/// While it lives, packages that are installed do not start their services.
struct NoServices {
    /// Whether the machine had such a rule before, of its own.
    had: bool,
}

impl NoServices {
    /// What packages ask before they start a service.
    const RULE: &str = "/usr/sbin/policy-rc.d";

    fn forbid() -> Result<Self> {
        let had = Path::new(Self::RULE).exists();
        if !had {
            fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o755)
                .open(Self::RULE)
                .and_then(|mut file| file.write_all(b"#!/bin/sh\nexit 101\n"))
                .with_context(|| format!("write {}", Self::RULE))?;
        }
        Ok(Self { had })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if !self.had {
            let _ = fs::remove_file(Self::RULE);
        }
    }
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
