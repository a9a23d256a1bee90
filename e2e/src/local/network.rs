//! A network for a local cluster, so that its parts can be cut off from each other: every etcd
//! member, storage node and mount daemon has a network namespace of its own, with a cable to a bridge
//! in one more.
//!
//! The namespaces are held by sleeping processes among the cluster's daemons; when these are dead the
//! kernel removes interfaces and addresses by itself. A cut is silent: packets vanish on the bridge,
//! and neighbours' hardware addresses are known for good, so that nobody is told that a peer cannot be
//! reached.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::command::Cmd;
use crate::process::{self, Daemon};
use crate::{Deadline, cmd, wait_for};

const BRIDGE: &str = "bridge";
/// The namespace with the bridge.
const SWITCH: &str = "network";
const UPLINK: &str = "uplink";
/// This machine's number in the network.
const HOST: u8 = 1;

/// The network of a cluster.
#[derive(Debug, Clone)]
pub(super) struct Network {
    state: PathBuf,
    /// Its addresses are 10.212.NUMBER.0/24.
    number: u8,
}

/// Something with an address of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Station {
    /// 2 to 254; the last part of the address.
    pub(super) number: u8,
}

impl Network {
    /// The network of a cluster that has one already.
    pub(super) fn of(state: &Path, number: u8) -> Self {
        Self {
            state: state.to_owned(),
            number,
        }
    }

    /// A number that no other network on this machine has now.
    pub(super) fn free_number() -> Result<u8> {
        let taken = |number: &u8| Path::new("/sys/class/net").join(host_link(*number)).exists();
        (0..=255)
            .find(|number| !taken(number))
            .context("no free network of 256")
    }

    /// Where a station is reached.
    pub(super) fn address(&self, station: Station) -> String {
        format!("10.212.{}.{}", self.number, station.number)
    }

    fn hardware(&self, number: u8) -> String {
        format!("02:4c:5a:{:02x}:00:{number:02x}", self.number)
    }

    /// Makes the bridge and this machine's cable to it, if they are not there.
    pub(super) async fn up(&self) -> Result<()> {
        if process::is_running(&self.state, SWITCH) {
            return Ok(());
        }
        let switch = self.hold(SWITCH).await?;
        ip_in(
            &switch,
            &[
                "link set lo up".to_owned(),
                format!("link add {BRIDGE} type bridge forward_delay 0 mcast_snooping 0"),
                format!("link set {BRIDGE} up"),
            ],
        )
        .await?;
        let link = host_link(self.number);
        let mut batch = vec![
            format!(
                "link add {link} address {} type veth peer name {UPLINK} netns {switch}",
                self.hardware(HOST)
            ),
            format!("addr add 10.212.{}.{HOST}/24 dev {link}", self.number),
            format!("link set {link} up"),
        ];
        batch.extend(self.neighbours(HOST, &link));
        ip(&batch)
            .await
            .context("connect this machine to the cluster's network")?;
        ip_in(&switch, &[format!("link set {UPLINK} master {BRIDGE} up")]).await
    }

    /// Every other station's hardware address, so that none is ever asked for.
    fn neighbours(&self, own: u8, device: &str) -> impl Iterator<Item = String> {
        (1..=254).filter(move |other| *other != own).map(move |other| {
            let hardware = self.hardware(other);
            format!(
                "neigh replace 10.212.{}.{other} lladdr {hardware} dev {device} nud permanent",
                self.number
            )
        })
    }

    /// Connects a station if it is not.
    pub(super) async fn connect(&self, station: Station) -> Result<()> {
        let (name, port) = (holder(station), port(station));
        if process::is_running(&self.state, &name) {
            return Ok(());
        }
        let switch = self.switch()?;
        let holder = self.hold(&name).await?;
        let hardware = self.hardware(station.number);
        ip_in(
            &switch,
            &[
                format!("link add {port} type veth peer name eth0 address {hardware} netns {holder}"),
                format!("link set {port} master {BRIDGE} up"),
            ],
        )
        .await?;
        let mut batch = vec![
            "link set lo up".to_owned(),
            format!("addr add {}/24 dev eth0", self.address(station)),
            "link set eth0 up".to_owned(),
        ];
        batch.extend(self.neighbours(station.number, "eth0"));
        ip_in(&holder, &batch).await
    }

    /// A daemon's words, to be run as this station.
    pub(super) fn enter(&self, station: Station) -> Result<[String; 5]> {
        let pid = self.pid(&holder(station))?;
        Ok(["nsenter", "--target", &pid, "--net", "--"].map(str::to_owned))
    }

    /// Drops everything that a station sends or is sent, or ends that.
    pub(super) async fn cut(&self, station: Station, cut: bool) -> Result<()> {
        // Without carrier what the station sends vanishes too; a port's state would not stay disabled.
        let (port, state) = (port(station), if cut { "down" } else { "up" });
        ip_in(&self.switch()?, &[format!("link set {port} {state}")]).await
    }

    /// Disconnects this machine. The rest goes with the daemons.
    pub(super) async fn down(&self) -> Result<()> {
        let link = host_link(self.number);
        if !Path::new("/sys/class/net").join(&link).exists() {
            return Ok(());
        }
        cmd!["ip", "link", "delete", &link].run().await.map(drop)
    }

    fn switch(&self) -> Result<String> {
        self.pid(SWITCH)
    }

    fn pid(&self, holder: &str) -> Result<String> {
        match process::find(&self.state, holder) {
            Some(process) => Ok(process.pid.to_string()),
            None => bail!("namespace {holder} is gone"),
        }
    }

    /// Makes a namespace; the pid of the process that holds it.
    async fn hold(&self, name: &str) -> Result<String> {
        let unshare = Daemon::new(name, &self.state, "unshare").args(["--net", "sleep", "infinity"]);
        let pid = unshare.start().await.context("network namespaces need root")?.pid;
        // unshare(1) replaces itself by sleep when the namespace is complete.
        let deadline = Deadline::secs(10).every(std::time::Duration::from_millis(5));
        wait_for(deadline, format!("namespace {name}"), || {
            let ready = fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "sleep\n");
            async move { Ok(ready.then_some(())) }
        })
        .await?;
        Ok(pid.to_string())
    }
}

fn host_link(number: u8) -> String {
    format!("lzlocal{number}")
}

fn holder(station: Station) -> String {
    format!("network-{}", station.number)
}

fn port(station: Station) -> String {
    format!("port{}", station.number)
}

async fn ip(batch: &[String]) -> Result<()> {
    batched(cmd!["ip"], batch).await
}

async fn ip_in(pid: &str, batch: &[String]) -> Result<()> {
    batched(cmd!["nsenter", "--target", pid, "--net", "--", "ip"], batch).await
}

async fn batched(ip: Cmd, batch: &[String]) -> Result<()> {
    let ip = ip.args(["-batch", "-"]).stdin(batch.join("\n") + "\n");
    ip.run().await.map(drop)
}
