//! The verifier as a program: it is told what to do by lines of standard input and answers each with a
//! line of JSON. At the end of input it stops, so it does not outlive who started it.

use super::{Report, Running};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::io::BufRead;

/// What the verifier can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Answered with the [`Stalls`](super::Stalls) since the last such order.
    Stalls,
    /// Answered with the operations that succeeded so far, by mount.
    Operations,
    /// Answered with the problems found so far.
    Problems,
    /// See [`Running::isolate`].
    Isolate(usize),
    /// See [`Running::join_all`].
    JoinAll,
}

/// Carries out orders until there are none any more, then stops.
pub fn obey(running: Running) -> Result<Report> {
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let order = serde_json::from_str(&line).with_context(|| format!("no such order: {line}"))?;
        let answer = match order {
            Order::Stalls => serde_json::to_string(&running.stalls())?,
            Order::Operations => {
                let mounts = 0..running.shared.plan.mounts.len();
                serde_json::to_string(&mounts.map(|mount| running.operations(mount)).collect::<Vec<_>>())?
            }
            Order::Problems => serde_json::to_string(&running.problems())?,
            Order::Isolate(mount) if mount >= running.shared.plan.mounts.len() => bail!("there is no mount {mount}"),
            Order::Isolate(mount) => {
                running.isolate(mount);
                "null".to_owned()
            }
            Order::JoinAll => {
                running.join_all();
                "null".to_owned()
            }
        };
        println!("{answer}");
    }
    running.stop()
}
