//! A worker node: its folders and mounts, containerd, kubelet, kube-proxy.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::config::{DISKS_PER_NODE, LabConfig, Node};
use super::machine::Machine;
use super::pki::Pki;
use crate::image::Archive;
use crate::process::write_atomically;
use crate::tools::{Tool, bin_dir, cache_dir};
use crate::{Deadline, wait_for};

/// Where pods and PersistentVolumes find the node's disks.
pub(super) const DISKS: &str = "/var/lib/lazarette-disks";

/// Folders of which every node has its own, with what is in them.
const PRIVATE: &[&str] = &["/var/lib", "/var/log"];

const CONTAINERD: &str = "containerd";
const KUBELET: &str = "kubelet";
const KUBE_PROXY: &str = "kube-proxy";

pub(super) fn is_running(machine: &Machine) -> bool {
    [CONTAINERD, KUBELET, KUBE_PROXY].iter().all(|name| machine.runs(name))
}

/// This machine's view of a path of the node, for paths that are the node's own.
pub(super) fn host_path(config: &LabConfig, node: Node, path: &Path) -> Option<PathBuf> {
    PRIVATE.iter().find_map(|private| {
        let rest = path.strip_prefix(private).ok()?;
        Some(private_dir(config, node, private).join(rest))
    })
}

fn private_dir(config: &LabConfig, node: Node, path: &str) -> PathBuf {
    config
        .node_dir(node)
        .join(path.trim_start_matches('/').replace('/', "-"))
}

/// Writes the node's credentials and configuration files.
pub(super) fn configure(config: &LabConfig, pki: &Pki, node: Node) -> Result<()> {
    let (dir, name) = (config.node_dir(node), node.name());
    let mut folders = vec![
        dir.join("cni"),
        dir.join("images"),
        private_dir(config, node, "/var/log"),
    ];
    let lib = private_dir(config, node, "/var/lib");
    folders.extend(["kubelet", "containerd", "cni"].map(|folder| lib.join(folder)));
    folders.extend((0..DISKS_PER_NODE).map(|disk| lib.join("lazarette-disks").join(format!("disk{disk}"))));
    for folder in folders {
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    }

    let user = format!("system:node:{name}");
    pki.kubeconfig(
        config,
        &name,
        &user,
        Some("system:nodes"),
        &dir.join("kubelet.kubeconfig"),
    )?;
    pki.server(&format!("{name}-server"), &user, &[&name], &[node.address()])?;
    pki.kubeconfig(
        config,
        &format!("{name}-proxy"),
        "system:kube-proxy",
        None,
        &dir.join("kube-proxy.kubeconfig"),
    )?;

    write_atomically(&dir.join("containerd.toml"), containerd_config(&dir).as_bytes())?;
    write_atomically(&dir.join("resolv.conf"), b"")?;
    let files = [
        ("cni/10-lab.conflist", cni_config(node)),
        ("kubelet.json", kubelet_config(config, node)),
        ("kube-proxy.json", kube_proxy_config(config, node)),
    ];
    for (file, content) in files {
        write_atomically(&dir.join(file), serde_json::to_string_pretty(&content)?.as_bytes())?;
    }
    Ok(())
}

/// Sets up the mounts inside the node's mount namespace.
///
/// All nodes have the standard paths, as a chart expects, but each its own content.
pub(super) async fn mount(config: &LabConfig, node: Node, machine: &Machine) -> Result<()> {
    let mount = |args: Vec<String>| async move { machine.enter("mount")?.args(args).run().await };
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    // Shared inside the node, as on a real one, so that Bidirectional propagation works. The
    // namespace was made private before, so nothing gets out.
    mount(words(&["--make-rshared", "/"])).await?;
    for private in PRIVATE {
        let own = private_dir(config, node, private);
        for visible in [&config.dir, &cache_dir()] {
            // What the node's own folder would hide: its state and its programs.
            if let Ok(rest) = visible.strip_prefix(private) {
                let target = own.join(rest);
                fs::create_dir_all(&target)?;
                fs::create_dir_all(visible)?;
                mount(vec![
                    "--bind".into(),
                    visible.display().to_string(),
                    target.display().to_string(),
                ])
                .await?;
            }
        }
        mount(vec!["--rbind".into(), own.display().to_string(), (*private).into()]).await?;
    }
    mount(words(&["-t", "tmpfs", "-o", "mode=755", "lz-run", "/run"])).await?;
    Ok(())
}

/// Starts containerd and waits until it answers.
pub(super) async fn start_containerd(config: &LabConfig, node: Node, machine: &Machine) -> Result<()> {
    let path = std::env::var("PATH").unwrap_or_default();
    let daemon = machine
        .daemon(CONTAINERD, Tool::Containerd.path())?
        .arg("--config")
        .arg(config.node_dir(node).join("containerd.toml"))
        // It finds its shim and runc through PATH.
        .env("PATH", format!("{}:{path}:/usr/sbin:/sbin", bin_dir().display()));
    daemon.start().await?;
    let deadline = Deadline::secs(60).logs(daemon.log());
    wait_for(deadline, format!("containerd on {}", node.name()), || async {
        machine.enter(Tool::Ctr.path())?.arg("version").run().await.map(Some)
    })
    .await?;
    Ok(())
}

/// Starts kubelet and kube-proxy; the node registers itself when the API server is ready.
pub(super) async fn start_kubernetes(config: &LabConfig, node: Node, machine: &Machine) -> Result<()> {
    let dir = config.node_dir(node);
    machine
        .daemon(KUBELET, Tool::Kubelet.path())?
        .arg(format!("--config={}", dir.join("kubelet.json").display()))
        .arg(format!("--kubeconfig={}", dir.join("kubelet.kubeconfig").display()))
        .arg(format!("--hostname-override={}", node.name()))
        .arg(format!("--node-ip={}", node.address()))
        .start()
        .await?;
    machine
        .daemon(KUBE_PROXY, Tool::KubeProxy.path())?
        .arg(format!("--config={}", dir.join("kube-proxy.json").display()))
        .start()
        .await?;
    Ok(())
}

/// Imports an image into the node's containerd, unless it has it.
pub(super) async fn import(config: &LabConfig, node: Node, machine: &Machine, archive: &Archive) -> Result<bool> {
    let name = archive.name.replace(['/', ':'], "_");
    let stamp = config.node_dir(node).join("images").join(name);
    if fs::read_to_string(&stamp).is_ok_and(|digest| digest == archive.digest) {
        return Ok(false);
    }
    machine
        .enter(Tool::Ctr.path())?
        .args(["--namespace", "k8s.io", "images", "import"])
        .arg(&archive.path)
        .limit(Duration::from_secs(300))
        .run()
        .await
        .with_context(|| format!("import {} into {}", archive.name, node.name()))?;
    write_atomically(&stamp, archive.digest.as_bytes())?;
    Ok(true)
}

fn containerd_config(dir: &Path) -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins."io.containerd.nri.v1.nri"]
  disable = true

[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "localhost/pause:1"

[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  # Lowering the score takes CAP_SYS_RESOURCE, which root in a container or sandbox often lacks;
  # without this runc dies of it.
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{}"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      SystemdCgroup = false
"#,
        dir.join("cni").display()
    )
}

fn cni_config(node: Node) -> serde_json::Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                // Forgotten with a reboot, like the pods that had the addresses.
                "dataDir": "/run/cni-ipam",
                "ranges": [[{"subnet": node.pod_range()}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }, {
            "type": "portmap",
            "capabilities": {"portMappings": true},
        }],
    })
}

fn kubelet_config(config: &LabConfig, node: Node) -> serde_json::Value {
    let pki = config.pki();
    let name = node.name();
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address(),
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki.join("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki.join(format!("{name}-server.crt")),
        "tlsPrivateKeyFile": pki.join(format!("{name}-server.key")),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "clusterDNS": [config.dns_service()],
        "clusterDomain": "cluster.local",
        "resolvConf": config.node_dir(node).join("resolv.conf"),
        "podLogsDir": "/var/log/pods",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}/{name}", config.cgroup()),
        "enforceNodeAllocatable": [],
        "failCgroupV1": false,
        "failSwapOn": false,
        // All nodes share one disk and one memory, which other people fill as well.
        "evictionHard": {
            "memory.available": "50Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
            "imagefs.inodesFree": "1%",
        },
        // Images are imported, nobody could pull a deleted one again.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "nodeStatusUpdateFrequency": "5s",
        "serializeImagePulls": false,
        "registerNode": true,
    })
}

fn kube_proxy_config(config: &LabConfig, node: Node) -> serde_json::Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": config.node_dir(node).join("kube-proxy.kubeconfig")},
        "mode": "iptables",
        "clusterCIDR": config.pod_range(),
        "hostnameOverride": node.name(),
        // The limits belong to the whole machine, not to a network namespace.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}
