//! What has to be settled before an etcd member starts: whether it begins a new cluster, joins one,
//! or goes on where it ended.
//!
//! A member whose disk was lost must not come back under its old identity: it has acknowledged
//! entries that it no longer has, and with its vote the cluster could forget them. So a member with
//! an empty disk is taken out of the membership and put in anew, which only the others can do, and
//! only while they are enough to decide. It then gets everything from them.

use etcd_client::{Client, ConnectOptions, Member};
use serde_json::json;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How long one answer of one member may take. A change of the membership is a round of all of them.
const ANSWER: Duration = Duration::from_secs(8);

/// The same before the cluster has run, when most likely nobody is there to answer.
const FIRST_ANSWER: Duration = Duration::from_secs(1);

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// How the member is to start.
#[derive(Clone, Debug, clap::Args)]
pub struct EtcdMember {
    /// The member's name: that of its pod
    #[arg(long)]
    pub name: String,
    /// URL under which the other members reach it
    #[arg(long)]
    pub peer_url: String,
    /// URL under which clients reach it
    #[arg(long)]
    pub client_url: String,
    /// NAME=PEER-URL of all members
    #[arg(long, value_delimiter = ',', required = true)]
    pub members: Vec<String>,
    /// Client URLs of all members
    #[arg(long, value_delimiter = ',', required = true)]
    pub endpoints: Vec<String>,
    /// Keeps members of different clusters apart
    #[arg(long)]
    pub token: String,
    /// Where it serves clients
    #[arg(long)]
    pub listen_client: String,
    /// Where it serves the other members
    #[arg(long)]
    pub listen_peer: String,
    /// Where it serves probes and metrics
    #[arg(long)]
    pub listen_metrics: String,
    /// Folder of etcd's data
    #[arg(long)]
    pub data_dir: PathBuf,
    /// Where to write etcd's configuration
    #[arg(long)]
    pub config: PathBuf,
    /// File that says "existing" once the cluster has run, "new" before
    #[arg(long)]
    pub state: PathBuf,
    /// How long to try to join before giving up; the kubelet then starts over
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
    pub patience: Duration,
}

/// Why a member cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EtcdMemberError {
    /// A file.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Neither `new` nor `existing`.
    #[error("{path} says {found:?}, not new or existing")]
    State {
        /// The file.
        path: PathBuf,
        /// Its text.
        found: String,
    },
    /// Nobody is left who has the data.
    #[error(
        "the disk of etcd member {0} is empty, and there is no other member to get the data from: bring the disk back"
    )]
    Alone(String),
    /// The others do not answer or do not agree.
    #[error(
        "the disk of etcd member {name} is empty, and it could not join the others: {cause}; a majority of the members \
         must run"
    )]
    Join {
        /// The member.
        name: String,
        /// What they said last.
        cause: String,
    },
}

/// Whom the configuration names as members.
struct Start {
    state: &'static str,
    /// NAME=PEER-URL.
    members: Vec<String>,
}

/// Joins the others if need be, and writes the configuration with which etcd is to be started.
pub async fn prepare(member: &EtcdMember) -> Result<(), EtcdMemberError> {
    let start = if has_data(&member.data_dir) {
        tracing::info!("the disk has the member's data");
        // etcd looks at neither then.
        Start {
            state: "existing",
            members: member.members.clone(),
        }
    } else {
        // Not finished by an earlier start, and etcd would stumble over it.
        match fs::remove_dir_all(&member.data_dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&member.data_dir)(error)),
            _ => {}
        }
        begin_or_join(member).await?
    };
    let text = configuration(member, &start).to_string();
    let new = member.config.with_extension("new");
    fs::write(&new, text).map_err(failed(&new))?;
    fs::rename(&new, &member.config).map_err(failed(&member.config))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> EtcdMemberError {
    let path = path.to_owned();
    move |source| EtcdMemberError::Io { path, source }
}

/// Whether there is a write-ahead log: etcd's own sign of a member.
fn has_data(folder: &Path) -> bool {
    let entries = fs::read_dir(folder.join("member/wal"));
    entries.is_ok_and(|mut entries| {
        entries.any(|entry| entry.is_ok_and(|entry| entry.path().extension().is_some_and(|e| e == "wal")))
    })
}

async fn begin_or_join(member: &EtcdMember) -> Result<Start, EtcdMemberError> {
    let has_run = match fs::read_to_string(&member.state).map_err(failed(&member.state))?.trim() {
        "existing" => true,
        "new" => false,
        found => {
            return Err(EtcdMemberError::State {
                path: member.state.clone(),
                found: found.to_owned(),
            });
        }
    };
    let others: Vec<&String> = member
        .endpoints
        .iter()
        .filter(|url| **url != member.client_url)
        .collect();
    let deadline = Instant::now() + member.patience;
    loop {
        let patience = if has_run { ANSWER } else { FIRST_ANSWER };
        let cause = match join(member, &others, patience).await {
            Ok(members) => {
                tracing::info!(?members, "joining the other members");
                return Ok(Start {
                    state: "existing",
                    members,
                });
            }
            Err(NotJoined::Silence(_)) if !has_run => {
                tracing::info!("beginning a new cluster");
                return Ok(Start {
                    state: "new",
                    members: member.members.clone(),
                });
            }
            Err(NotJoined::Silence(_)) if others.is_empty() => {
                return Err(EtcdMemberError::Alone(member.name.clone()));
            }
            Err(NotJoined::Silence(cause) | NotJoined::Refused(cause)) => cause,
        };
        if Instant::now() + PAUSE >= deadline {
            return Err(EtcdMemberError::Join {
                name: member.name.clone(),
                cause,
            });
        }
        tracing::warn!(cause, "not joined yet");
        sleep(PAUSE).await;
    }
}

enum NotJoined {
    /// No other member answers.
    Silence(String),
    /// They answer, but the membership cannot be changed now.
    Refused(String),
}

/// Makes sure that the others know this member as one that has never started; returns all members
/// as NAME=PEER-URL.
async fn join(member: &EtcdMember, others: &[&String], patience: Duration) -> Result<Vec<String>, NotJoined> {
    let mut silence = "no answer".to_owned();
    for url in others {
        let options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(2))
            .with_timeout(ANSWER);
        let connecting = Client::connect([url.as_str()], Some(options));
        let listed = async { connecting.await?.member_list().await };
        match timeout(patience, listed).await {
            Ok(Ok(list)) => {
                let connecting = Client::connect([url.as_str()], Some(ConnectOptions::new().with_timeout(ANSWER)));
                let client = connecting
                    .await
                    .map_err(|error| NotJoined::Refused(error.to_string()))?;
                return change(member, client, list.members())
                    .await
                    .map_err(|error| NotJoined::Refused(error.to_string()));
            }
            Ok(Err(error)) => silence = format!("{url}: {error}"),
            Err(_) => silence = format!("{url}: no answer in {patience:?}"),
        }
    }
    Err(NotJoined::Silence(silence))
}

async fn change(
    member: &EtcdMember,
    mut client: Client,
    present: &[Member],
) -> Result<Vec<String>, etcd_client::Error> {
    let is_this = |one: &&Member| one.name() == member.name || one.peer_urls().contains(&member.peer_url);
    let mut members = present.to_vec();
    match present.iter().find(is_this) {
        // Its first start did not come to pass: only then a member tells where it serves clients.
        Some(known) if known.client_urls().is_empty() => {}
        known => {
            if let Some(lost) = known {
                tracing::warn!(id = lost.id(), "the disk is empty: removing the member that had it");
                client.member_remove(lost.id()).await?;
            }
            let added = client.member_add([member.peer_url.clone()], None).await?;
            members = added.member_list().to_vec();
        }
    }
    let planned = |url: &String| {
        let mut pairs = member.members.iter().filter_map(|pair| pair.split_once('='));
        pairs
            .find(|(_, planned)| *planned == url)
            .map(|(name, _)| name.to_owned())
    };
    Ok(members
        .iter()
        .flat_map(|one| one.peer_urls().iter().map(move |url| (one, url)))
        .map(|(one, url)| {
            let name = match one.name() {
                "" => planned(url).unwrap_or_else(|| format!("{:x}", one.id())),
                name => name.to_owned(),
            };
            format!("{name}={url}")
        })
        .collect())
}

/// etcd's configuration file; JSON is YAML.
fn configuration(member: &EtcdMember, start: &Start) -> serde_json::Value {
    json!({
        "name": member.name,
        "data-dir": member.data_dir,
        "listen-client-urls": member.listen_client,
        "listen-peer-urls": member.listen_peer,
        "listen-metrics-urls": member.listen_metrics,
        "advertise-client-urls": member.client_url,
        "initial-advertise-peer-urls": member.peer_url,
        "initial-cluster": start.members.join(","),
        "initial-cluster-token": member.token,
        "initial-cluster-state": start.state,
        "strict-reconfig-check": true,
        "quota-backend-bytes": 8_u64 << 30,
        // The journal is a stream of puts and deletes; its history is of no use.
        "auto-compaction-mode": "periodic",
        "auto-compaction-retention": "1m",
        // Journal records are large: 10,000 of them in memory would be over 1 GB.
        "snapshot-count": 2000,
        "snapshot-catchup-entries": 1000,
        "max-request-bytes": 4 << 20,
        "max-txn-ops": 1024,
        // Nanoseconds. Storage nodes ask a silent member for a sign of life every second.
        "grpc-keepalive-min-time": 500_000_000,
        "log-level": "warn",
    })
}
