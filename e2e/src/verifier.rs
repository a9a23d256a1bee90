//! The verifier as a process of its own. In the process of a test it would be in the way: a child that a
//! test starts first closes the files that it has inherited, and waits for a volume that hangs.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lazarette_workload::verifier::{Checked, Order, Report, Stalls};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::Mutex;

use crate::{build, cmd};

/// An answer needs no file system.
const ANSWER: Duration = Duration::from_secs(60);
/// Making everything durable waits for a cluster that recovers.
const STOP: Duration = Duration::from_secs(180);

/// A verifier at work; killed when dropped.
pub struct Verifier {
    child: Child,
    pipes: Mutex<(ChildStdin, Lines<BufReader<ChildStdout>>)>,
}

impl Verifier {
    /// Starts it on some mounts, with a model outside of them and a log. See the verifier's plan for
    /// `full_disks`.
    pub fn start(mounts: &[PathBuf], model: &Path, seed: u64, full_disks: bool, log: &Path) -> Result<Self> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut child = tokio::process::Command::new(program())
            .arg("verifier")
            .args(mounts.iter().flat_map(|mount| ["--mount".as_ref(), mount.as_os_str()]))
            .arg("--model")
            .arg(model)
            .args(["--seed", &seed.to_string()])
            .args(full_disks.then_some("--full-disks"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", program().display()))?;
        let (input, output) = child.stdin.take().zip(child.stdout.take()).context("no pipes")?;
        Ok(Self {
            child,
            pipes: Mutex::new((input, BufReader::new(output).lines())),
        })
    }

    async fn ask<T: DeserializeOwned>(&self, order: Order) -> Result<T> {
        let mut pipes = self.pipes.lock().await;
        let (input, output) = &mut *pipes;
        let asking = async {
            input
                .write_all(format!("{}\n", serde_json::to_string(&order)?).as_bytes())
                .await?;
            let answer = output.next_line().await?.context("the verifier has ended")?;
            Ok::<T, anyhow::Error>(serde_json::from_str(&answer)?)
        };
        let answer = tokio::time::timeout(ANSWER, asking)
            .await
            .context("the verifier does not answer")?;
        answer.with_context(|| format!("the verifier was asked for {order:?}"))
    }

    /// Stalls and failures since the last call.
    pub async fn stalls(&self) -> Result<Stalls> {
        self.ask(Order::Stalls).await
    }

    /// Operations that succeeded since the start, by mount.
    pub async fn operations(&self) -> Result<Vec<u64>> {
        self.ask(Order::Operations).await
    }

    /// What was found to be wrong so far.
    pub async fn problems(&self) -> Result<Vec<String>> {
        self.ask(Order::Problems).await
    }

    /// Lets only a mount's own workers use it, and these only it, before it is cut off.
    pub async fn isolate(&self, mount: usize) -> Result<()> {
        self.ask(Order::Isolate(mount)).await
    }

    /// Ends [`Self::isolate`].
    pub async fn join_all(&self) -> Result<()> {
        self.ask(Order::JoinAll).await
    }

    /// Makes everything durable and ends.
    pub async fn stop(self) -> Result<Report> {
        let Self { mut child, pipes } = self;
        let (input, mut output) = pipes.into_inner();
        drop(input);
        let ending = async {
            let report = output.next_line().await?.context("no report")?;
            let status = child.wait().await?;
            if !status.success() {
                bail!("the verifier ended with {status}");
            }
            Ok(serde_json::from_str(&report)?)
        };
        tokio::time::timeout(STOP, ending)
            .await
            .context("the verifier does not end")?
    }

    /// Kills it: all that it has not been answered yet is in doubt.
    pub async fn kill(mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }
}

/// Compares a volume with a model. Nothing may write meanwhile.
pub async fn check(mount: &Path, model: &Path) -> Result<Checked> {
    let answer = cmd![program(), "check", mount, model].limit(STOP).run().await?;
    Ok(serde_json::from_str(&answer)?)
}

fn program() -> PathBuf {
    build::release_dir().join(build::WORKLOAD)
}
