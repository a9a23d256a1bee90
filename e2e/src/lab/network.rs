//! The cables of the lab.
//!
//! The bridge is in the control plane's namespace; this machine's own namespace has one end of one
//! cable. Nodes route pods to each other directly. Nothing is forwarded or translated to the
//! outside, so the lab is closed.

use anyhow::{Context, Result};

use super::config::{LabConfig, Node};
use super::machine::Machine;
use crate::cmd;

const BRIDGE: &str = "lz-bridge";
const UPLINK: &str = "lz-uplink";

/// Sets up the bridge and the cable to this machine.
pub(super) async fn connect_control_plane(config: &LabConfig, control: &Machine) -> Result<()> {
    let mut batch = vec![
        "link set lo up".to_owned(),
        format!("link add {BRIDGE} type bridge forward_delay 0"),
        format!("addr add {}/24 dev {BRIDGE}", config.control_plane_address()),
        format!("link set {BRIDGE} up"),
    ];
    // The API server reaches pods (webhooks) as well as nodes.
    batch.extend(
        config
            .all_nodes()
            .map(|node| format!("route add {} via {}", node.pod_range(), node.address())),
    );
    control.ip(&batch).await?;

    let (link, pid) = (config.host_link(), control.process()?.pid);
    let host = [
        format!("link add {link} type veth peer name {UPLINK} netns {pid}"),
        format!("addr add {}/24 dev {link}", config.host_address()),
        format!("link set {link} up"),
    ];
    cmd!["ip", "-batch", "-"]
        .stdin(host.join("\n") + "\n")
        .run()
        .await
        .context("connect this machine to the lab")?;
    control.ip(&[format!("link set {UPLINK} master {BRIDGE} up")]).await
}

/// Connects a node to the bridge.
pub(super) async fn connect_node(config: &LabConfig, control: &Machine, node: Node, machine: &Machine) -> Result<()> {
    let (port, pid) = (node.port(), machine.process()?.pid);
    // The cable of a node that just died may not be gone yet. Most of the time there is none.
    control.enter("ip")?.args(["link", "delete", &port]).output().await?;
    control
        .ip(&[
            format!("link add {port} type veth peer name eth0 netns {pid}"),
            format!("link set {port} master {BRIDGE} up"),
        ])
        .await?;
    let mut batch = vec![
        "link set lo up".to_owned(),
        format!("addr add {}/24 dev eth0", node.address()),
        "link set eth0 up".to_owned(),
        // Leads nowhere, but without a route the kernel refuses to send to a Service's address
        // before kube-proxy's rules get to see the packet.
        format!("route add default via {}", config.control_plane_address()),
    ];
    let others = config.all_nodes().filter(|other| *other != node);
    batch.extend(others.map(|other| format!("route add {} via {}", other.pod_range(), other.address())));
    machine.ip(&batch).await?;
    machine.sysctl("net/ipv4/ip_forward", "1").await
}

/// Pulls a node's cable, or plugs it in again. The node itself keeps its addresses and routes.
pub(super) async fn plug(control: &Machine, node: Node, plugged: bool) -> Result<()> {
    let state = if plugged { "up" } else { "down" };
    control.ip(&[format!("link set {} {state}", node.port())]).await
}

/// Removes this machine's end of the cable; none is no error.
pub(super) async fn disconnect_host(config: &LabConfig) -> Result<()> {
    if host_link_exists(config) {
        let out = cmd!["ip", "link", "delete", config.host_link()].output().await?;
        // The kernel may be removing it at this moment, after its other end went away.
        anyhow::ensure!(
            out.code == Some(0) || !host_link_exists(config),
            "delete {}: {}",
            config.host_link(),
            out.stderr.trim()
        );
    }
    Ok(())
}

pub(super) fn host_link_exists(config: &LabConfig) -> bool {
    std::path::Path::new("/sys/class/net").join(config.host_link()).exists()
}
