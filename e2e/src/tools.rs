//! Go programs, built once from the pinned modules under `e2e/tools` into a cache.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::cmd;
use crate::process::write_atomically;

/// The Kubernetes version of the lab; the same as in `tools/kubernetes/go.mod`.
pub const KUBERNETES_VERSION: &str = "v1.37.2";

/// A program that the lab or the tests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each is the program of that name")]
pub enum Tool {
    Etcd,
    Etcdctl,
    KubeApiserver,
    KubeControllerManager,
    KubeScheduler,
    Kubelet,
    KubeProxy,
    Kubectl,
    Containerd,
    ContainerdShim,
    Ctr,
    Coredns,
    CsiSanity,
    CsiProvisioner,
    CsiResizer,
    CsiSnapshotter,
    SnapshotController,
    Helm,
}

/// How a tool is built.
struct Recipe {
    /// Name of the executable.
    name: &'static str,
    /// Folder below `e2e/tools` with the `go.mod`.
    group: &'static str,
    package: &'static str,
    /// The module whose version the program shows, and the variables that take it.
    version_of: &'static str,
    version_vars: &'static [&'static str],
    tags: &'static str,
}

impl Tool {
    /// What a running lab needs on this machine.
    pub const LAB: &'static [Self] = &[
        Self::Etcd,
        Self::Etcdctl,
        Self::KubeApiserver,
        Self::KubeControllerManager,
        Self::KubeScheduler,
        Self::Kubelet,
        Self::KubeProxy,
        Self::Kubectl,
        Self::Containerd,
        Self::ContainerdShim,
        Self::Ctr,
        Self::Coredns,
    ];

    /// The official sidecars of a CSI controller, without snapshots.
    pub const SIDECARS: &'static [Self] = &[Self::CsiProvisioner, Self::CsiResizer];

    /// What volume snapshots take in addition.
    pub const SNAPSHOTS: &'static [Self] = &[Self::CsiSnapshotter, Self::SnapshotController];

    /// The executable's name.
    pub fn name(self) -> &'static str {
        self.recipe().name
    }

    /// Where the executable is, or will be after [`ensure`].
    pub fn path(self) -> PathBuf {
        bin_dir().join(self.name())
    }

    /// The version that the tool's `go.mod` pins, such as `v3.7.3`.
    pub fn version(self) -> Result<String> {
        let recipe = self.recipe();
        let path = group_dir(recipe.group).join("go.mod");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let version = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix(recipe.version_of)?.strip_prefix(' '))
            .find_map(|rest| rest.split_whitespace().next().filter(|word| word.starts_with('v')));
        match version {
            Some(version) => Ok(version.to_owned()),
            None => bail!("{} pins no {}", path.display(), recipe.version_of),
        }
    }

    fn recipe(self) -> Recipe {
        const BASE: &[&str] = &["k8s.io/component-base/version.gitVersion"];
        const MAIN: &[&str] = &["main.version"];
        let kubernetes = |name, package| Recipe {
            name,
            group: "kubernetes",
            package,
            version_of: "k8s.io/kubernetes",
            version_vars: BASE,
            tags: "",
        };
        let containerd = |name, package| Recipe {
            name,
            group: "containerd",
            package,
            version_of: "github.com/containerd/containerd/v2",
            version_vars: &["github.com/containerd/containerd/v2/version.Version"],
            tags: "no_btrfs,no_devmapper,no_zfs",
        };
        let other = |name, group, package, version_of, version_vars| Recipe {
            name,
            group,
            package,
            version_of,
            version_vars,
            tags: "",
        };
        let etcd = |name, package| other(name, "etcd", package, package, &[]);
        let sidecar = |name, package, module| other(name, "csi-sidecars", package, module, MAIN);
        match self {
            Self::Etcd => etcd("etcd", "go.etcd.io/etcd/server/v3"),
            Self::Etcdctl => etcd("etcdctl", "go.etcd.io/etcd/etcdctl/v3"),
            Self::KubeApiserver => kubernetes("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
            Self::KubeControllerManager => kubernetes(
                "kube-controller-manager",
                "k8s.io/kubernetes/cmd/kube-controller-manager",
            ),
            Self::KubeScheduler => kubernetes("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
            Self::Kubelet => kubernetes("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
            Self::KubeProxy => kubernetes("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
            Self::Kubectl => kubernetes("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
            Self::Containerd => containerd("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
            Self::ContainerdShim => containerd(
                "containerd-shim-runc-v2",
                "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
            ),
            Self::Ctr => containerd("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
            Self::Coredns => other(
                "coredns",
                "coredns",
                "github.com/coredns/coredns",
                "github.com/coredns/coredns",
                &[],
            ),
            Self::CsiSanity => other(
                "csi-sanity",
                "csi-sanity",
                "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity",
                "github.com/kubernetes-csi/csi-test/v5",
                &[],
            ),
            Self::CsiProvisioner => sidecar(
                "csi-provisioner",
                "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner",
                "github.com/kubernetes-csi/external-provisioner/v6",
            ),
            Self::CsiResizer => sidecar(
                "csi-resizer",
                "github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer",
                "github.com/kubernetes-csi/external-resizer/v2",
            ),
            Self::CsiSnapshotter => sidecar(
                "csi-snapshotter",
                "github.com/kubernetes-csi/external-snapshotter/v8/cmd/csi-snapshotter",
                "github.com/kubernetes-csi/external-snapshotter/v8",
            ),
            Self::SnapshotController => sidecar(
                "snapshot-controller",
                "github.com/kubernetes-csi/external-snapshotter/v8/cmd/snapshot-controller",
                "github.com/kubernetes-csi/external-snapshotter/v8",
            ),
            Self::Helm => other(
                "helm",
                "helm",
                "helm.sh/helm/v4/cmd/helm",
                "helm.sh/helm/v4",
                &["helm.sh/helm/v4/internal/version.version"],
            ),
        }
    }

    fn ldflags(self) -> Result<String> {
        let recipe = self.recipe();
        let version = self.version()?;
        let mut flags = "-s -w".to_owned();
        for var in recipe.version_vars {
            flags.push_str(&format!(" -X {var}={version}"));
        }
        if recipe.group == "kubernetes" {
            // Without these the API server calls itself v0.0.0 and clients distrust it.
            let mut numbers = version.trim_start_matches('v').split('.');
            for var in ["gitMajor", "gitMinor"] {
                let number = numbers.next().unwrap_or_default();
                flags.push_str(&format!(" -X k8s.io/component-base/version.{var}={number}"));
            }
        }
        Ok(flags)
    }

    /// Identifies everything that the executable depends on.
    fn stamp(self, go_version: &str) -> Result<String> {
        let recipe = self.recipe();
        let folder = group_dir(recipe.group);
        let mut hash = Sha256::new();
        for file in ["go.mod", "go.sum"] {
            let path = folder.join(file);
            hash.update(fs::read(&path).with_context(|| format!("read {}", path.display()))?);
        }
        for text in [recipe.package, recipe.tags, &self.ldflags()?, go_version] {
            hash.update(text);
            hash.update([0]);
        }
        Ok(crate::hex(&hash.finalize()))
    }

    fn stamp_path(self) -> PathBuf {
        bin_dir().join(".stamps").join(self.name())
    }

    fn is_current(self, stamp: &str) -> bool {
        self.path().exists() && fs::read_to_string(self.stamp_path()).is_ok_and(|s| s == stamp)
    }
}

/// The project's cache: `$LAZARETTE_CACHE`, `$XDG_CACHE_HOME` or `~/.cache`, then `lazarette`.
pub fn cache_dir() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = var("LAZARETTE_CACHE")
        .or_else(|| var("XDG_CACHE_HOME"))
        .or_else(|| Some(var("HOME")?.join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"));
    base.join("lazarette")
}

/// Where the built tools are.
pub fn bin_dir() -> PathBuf {
    cache_dir().join("bin")
}

fn group_dir(group: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools").join(group)
}

/// Builds the tools that are missing or out of date and returns their paths in the same order.
///
/// Safe to call from several processes at once: the second waits and then finds the work done.
pub async fn ensure(tools: &[Tool]) -> Result<Vec<PathBuf>> {
    let go_version = cmd!["go", "env", "GOVERSION"]
        .cwd(group_dir("etcd"))
        .run()
        .await
        .context("the lab's tools are built with Go, which is not installed")?;
    let go_version = go_version.trim();
    let mut stale = Vec::new();
    for tool in tools {
        let stamp = tool.stamp(go_version)?;
        if !tool.is_current(&stamp) {
            stale.push((*tool, stamp));
        }
    }
    if !stale.is_empty() {
        fs::create_dir_all(bin_dir().join(".stamps"))?;
        let lock = lock(&bin_dir().join(".lock")).await?;
        let count = stale.len();
        for (index, (tool, stamp)) in stale.iter().enumerate() {
            if !tool.is_current(stamp) {
                build(*tool, stamp, index + 1, count).await?;
            }
        }
        drop(lock);
    }
    Ok(tools.iter().map(|t| t.path()).collect())
}

async fn build(tool: Tool, stamp: &str, index: usize, count: usize) -> Result<()> {
    let recipe = tool.recipe();
    let started = Instant::now();
    eprintln!("building {} {} [{index}/{count}] …", recipe.name, tool.version()?);
    let target = bin_dir().join(format!(".{}.new", recipe.name));
    // Below normal priority, so that the machine stays usable. Without cgo the result is static
    // and can go into an image by itself.
    cmd![
        "nice",
        "-n",
        "5",
        "go",
        "build",
        "-trimpath",
        "-buildvcs=false",
        "-mod=readonly"
    ]
    .args(["-tags", recipe.tags, "-ldflags", &tool.ldflags()?])
    .arg("-o")
    .arg(&target)
    .arg(recipe.package)
    .cwd(group_dir(recipe.group))
    .env("CGO_ENABLED", "0")
    .env("GOFLAGS", "")
    .env("GOWORK", "off")
    .limit(Duration::from_secs(3000))
    .run()
    .await
    .with_context(|| format!("build {}", recipe.name))?;
    fs::rename(&target, tool.path())?;
    write_atomically(&tool.stamp_path(), stamp.as_bytes())?;
    eprintln!("built {} in {:.0} s", recipe.name, started.elapsed().as_secs_f32());
    Ok(())
}

/// Takes an exclusive lock on a file for as long as the result lives.
pub(crate) async fn lock(path: &Path) -> Result<File> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || lock_blocking(&path).with_context(|| format!("lock {}", path.display())))
        .await?
}

fn lock_blocking(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    loop {
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!("waiting for {}, which another command holds …", path.display());
            flock(&file, FlockOperation::LockExclusive)?;
        }
        // The holder may have removed the file before it let go; then the lock is on a file that
        // nobody else will find.
        if fs::metadata(path).is_ok_and(|meta| file.metadata().is_ok_and(|own| own.ino() == meta.ino())) {
            return Ok(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tool_is_pinned_and_its_package_listed() {
        let all = [
            Tool::LAB,
            Tool::SIDECARS,
            Tool::SNAPSHOTS,
            &[Tool::CsiSanity, Tool::Helm],
        ]
        .concat();
        for tool in all {
            let recipe = tool.recipe();
            assert!(tool.version().unwrap().starts_with('v'), "{tool:?}");
            let text = fs::read_to_string(group_dir(recipe.group).join("go.mod")).unwrap();
            assert!(text.contains(recipe.package), "{tool:?}");
        }
        assert_eq!(Tool::Kubelet.version().unwrap(), KUBERNETES_VERSION);
    }
}
