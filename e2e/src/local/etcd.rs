//! The local cluster's etcd.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{LocalCluster, Part};
use crate::process::{self, Process};
use crate::tools::{self, Tool};
use crate::{Deadline, wait_for};

/// What Lazarette's etcd is run with, here as in the operator's StatefulSet.
const ETCD_SETTINGS: &[&str] = &[
    "--quota-backend-bytes=8589934592",
    "--auto-compaction-mode=periodic",
    "--auto-compaction-retention=1m",
    "--snapshot-count=2000",
    "--grpc-keepalive-min-time=500ms",
];

impl LocalCluster {
    /// Starts a member unless it runs.
    pub async fn start_etcd(&self, member: usize) -> Result<Process> {
        let binary = tools::ensure(&[Tool::Etcd]).await?.remove(0);
        let name = member_name(member);
        let (client, peer) = (self.etcd_url(member)?, self.peer_url(member)?);
        let cluster =
            (0..self.etcd_members()).map(|other| Ok(format!("{}={}", member_name(other), self.peer_url(other)?)));
        let cluster: Vec<String> = cluster.collect::<Result<_>>()?;
        self.daemon(&name, &binary, Part::Etcd(member))
            .await?
            .arg(format!("--name={name}"))
            .arg("--log-level=warn")
            .arg(format!("--data-dir={}", self.dir.join(&name).display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster={}", cluster.join(",")))
            .args(ETCD_SETTINGS)
            .start()
            .await
    }

    /// Number of members.
    pub fn etcd_members(&self) -> usize {
        self.config.etcd.len()
    }

    /// The process of a member, if it runs.
    pub fn etcd_member(&self, member: usize) -> Option<Process> {
        process::find(&self.dir, &member_name(member))
    }

    /// `http://host:port` of all members, with commas between.
    pub fn etcd(&self) -> String {
        let urls = (0..self.etcd_members()).filter_map(|member| self.etcd_url(member).ok());
        urls.collect::<Vec<_>>().join(",")
    }

    /// The index of the member that leads, once there is one.
    pub async fn etcd_leader(&self) -> Result<usize> {
        let deadline = Deadline::secs(30).logs(self.dir.join("logs"));
        wait_for(deadline, "a leader of etcd", || async {
            for member in 0..self.etcd_members() {
                let url = self.etcd_url(member)?;
                let address = url.trim_start_matches("http://");
                let asked = tokio::time::timeout(Duration::from_secs(1), status(address)).await;
                if let Ok(Ok((own, leader))) = asked
                    && own == leader
                {
                    return Ok(Some(member));
                }
            }
            bail!("no member says that it leads")
        })
        .await
    }

    pub(super) fn etcd_url(&self, member: usize) -> Result<String> {
        let ports = self.config.etcd.get(member).context("no such member of etcd")?;
        Ok(format!("http://{}:{}", self.host(Part::Etcd(member))?, ports.client))
    }

    fn peer_url(&self, member: usize) -> Result<String> {
        let ports = self.config.etcd.get(member).context("no such member of etcd")?;
        Ok(format!("http://{}:{}", self.host(Part::Etcd(member))?, ports.peer))
    }
}

fn member_name(member: usize) -> String {
    format!("etcd-{member}")
}

/// A member's id and its leader's, from etcd's JSON gateway.
async fn status(address: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!(
        "POST /v3/maintenance/status HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    ensure!(head.contains(" 200 "), "{head}");
    let body = body.get(body.find('{').unwrap_or(0)..=body.rfind('}').unwrap_or(0));
    let status: serde_json::Value = serde_json::from_str(body.context("no body")?)?;
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let own = text(&status["header"]["member_id"]).context("no member id")?;
    Ok((own, text(&status["leader"]).unwrap_or_default()))
}
