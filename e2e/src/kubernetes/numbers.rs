use std::collections::BTreeMap;
use std::fs;

use anyhow::Result;

use super::install::{Installation, NAMESPACE};
use crate::build;
use crate::image::Archive;

/// One line with the size of each image.
pub(super) fn image_sizes(archives: &[Archive]) -> Result<String> {
    let sizes: Vec<_> = archives
        .iter()
        .map(|archive| {
            let name = archive.name.rsplit('/').next().unwrap_or_default();
            Ok(format!("{name} {} MB", archive.size()? / 1_000_000))
        })
        .collect::<Result<_>>()?;
    Ok(format!("images: {}", sizes.join(", ")))
}

/// Resident memory of each of Lazarette's programs, the largest process of each kind.
pub(super) async fn memory(installation: &Installation) -> Result<Vec<String>> {
    let mut largest: BTreeMap<String, u64> = BTreeMap::new();
    for pod in installation.pods("").await? {
        let Some(name) = pod.metadata.name else { continue };
        for pid in installation
            .lab
            .pod_processes(NAMESPACE, &name)
            .await
            .unwrap_or_default()
        {
            let Some((program, bytes)) = resident(pid) else {
                continue;
            };
            let known = largest.entry(program).or_default();
            *known = bytes.max(*known);
        }
    }
    Ok(largest
        .into_iter()
        .filter(|(program, _)| build::ALL.contains(&program.as_str()) || program == "etcd")
        .map(|(program, bytes)| format!("{program}: {} MiB resident", bytes >> 20))
        .collect())
}

/// A process's program and resident bytes; `None` when it is gone.
fn resident(pid: i32) -> Option<(String, u64)> {
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let program = command.split(|&byte| byte == 0).next()?;
    let program = String::from_utf8_lossy(program).rsplit('/').next()?.to_owned();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some((program, kib << 10))
}
