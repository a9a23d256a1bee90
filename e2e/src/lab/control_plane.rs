//! The control plane: etcd, API server, controller manager, scheduler.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::config::LabConfig;
use super::machine::Machine;
use super::pki::Pki;
use crate::tools::Tool;

const DAEMONS: &[&str] = &["etcd", "apiserver", "controller-manager", "scheduler"];

/// Whether every component runs; says nothing about their health.
pub(super) fn is_running(control: &Machine) -> bool {
    DAEMONS.iter().all(|name| control.runs(name))
}

/// Makes the control plane's credentials.
pub(super) fn credentials(config: &LabConfig, pki: &Pki) -> Result<()> {
    for (name, user) in [
        ("controller-manager", "system:kube-controller-manager"),
        ("scheduler", "system:kube-scheduler"),
    ] {
        pki.kubeconfig(
            config,
            name,
            user,
            None,
            &config.pki().join(format!("{name}.kubeconfig")),
        )?;
    }
    pki.kubeconfig(
        config,
        "admin",
        "lab-admin",
        Some("system:masters"),
        &config.kubeconfig(),
    )
}

/// Starts the components; they are ready some seconds later.
pub(super) async fn start(config: &LabConfig, control: &Machine) -> Result<()> {
    let pki = |name: &str| -> PathBuf { config.pki().join(name) };
    let flag = |name: &str, value: PathBuf| format!("--{name}={}", value.display());
    let etcd_data = config.dir.join("etcd");
    fs::create_dir_all(&etcd_data).with_context(|| format!("create {}", etcd_data.display()))?;

    control
        .daemon("etcd", Tool::Etcd.path())?
        .arg(flag("data-dir", etcd_data))
        .args([
            // The lab's own state need not survive a power cut.
            "--unsafe-no-fsync",
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            "--initial-cluster=default=http://127.0.0.1:2380",
            "--log-level=warn",
        ])
        .start()
        .await?;

    control
        .daemon("apiserver", Tool::KubeApiserver.path())?
        .args([
            "--etcd-servers=http://127.0.0.1:2379",
            "--secure-port=6443",
            "--allow-privileged=true",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            // Logs and exec would otherwise try to resolve the node's name.
            "--kubelet-preferred-address-types=InternalIP",
            // Services are not reachable from here, their pods are.
            "--enable-aggregator-routing=true",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            "--profiling=false",
        ])
        .arg(format!("--bind-address={}", config.control_plane_address()))
        .arg(format!("--advertise-address={}", config.control_plane_address()))
        .arg(format!("--service-cluster-ip-range={}", config.service_range()))
        .arg(flag("client-ca-file", pki("ca.crt")))
        .arg(flag("tls-cert-file", pki("apiserver.crt")))
        .arg(flag("tls-private-key-file", pki("apiserver.key")))
        .arg(flag("kubelet-certificate-authority", pki("ca.crt")))
        .arg(flag("kubelet-client-certificate", pki("apiserver-kubelet-client.crt")))
        .arg(flag("kubelet-client-key", pki("apiserver-kubelet-client.key")))
        .arg(flag("service-account-key-file", pki("service-account.pub")))
        .arg(flag("service-account-signing-key-file", pki("service-account.key")))
        .start()
        .await?;

    control
        .daemon("controller-manager", Tool::KubeControllerManager.path())?
        .args([
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            "--use-service-account-credentials=true",
            // Every node has its range already; the controller would hand out others.
            "--allocate-node-cidrs=false",
            // Half of the default: tests that lose a node need not wait as long.
            "--node-monitor-grace-period=20s",
            "--profiling=false",
        ])
        .arg(flag("kubeconfig", pki("controller-manager.kubeconfig")))
        .arg(flag("flex-volume-plugin-dir", config.dir.join("no-flex-volumes")))
        .arg(flag("root-ca-file", pki("ca.crt")))
        .arg(flag("cluster-signing-cert-file", pki("ca.crt")))
        .arg(flag("cluster-signing-key-file", pki("ca.key")))
        .arg(flag("service-account-private-key-file", pki("service-account.key")))
        .start()
        .await?;

    control
        .daemon("scheduler", Tool::KubeScheduler.path())?
        .args(["--bind-address=127.0.0.1", "--leader-elect=false", "--profiling=false"])
        .arg(flag("kubeconfig", pki("scheduler.kubeconfig")))
        .start()
        .await?;
    Ok(())
}
