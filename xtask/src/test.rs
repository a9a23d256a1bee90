//! `cargo xtask test`: everything that must pass before a change lands.

use anyhow::{Context, Result, bail, ensure};
use lazarette_e2e::lab::{Lab, LabConfig};
use lazarette_e2e::tools::{self, Tool};
use lazarette_e2e::{build, cmd, debian};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only the part with this name: unit, local, lab or kubernetes
    #[arg(long)]
    part: Option<String>,
}

/// A part of the suite: a run of `cargo test`.
struct Part {
    name: &'static str,
    args: &'static [&'static str],
}

// All parts select the whole workspace, or cargo would compile dependencies anew for each.
const PARTS: &[Part] = &[
    Part {
        name: "unit",
        args: &["--workspace"],
    },
    // One test at a time: they use the whole machine and kill processes.
    Part {
        name: "local",
        args: &[
            "--workspace",
            "--features=lazarette-e2e/machine",
            "--test=local",
            "--test=csi",
            "--",
            "--test-threads=1",
        ],
    },
    Part {
        name: "lab",
        args: &[
            "--workspace",
            "--features=lazarette-e2e/machine",
            "--test=lab",
            "--",
            "--test-threads=1",
        ],
    },
    Part {
        name: "kubernetes",
        args: &[
            "--workspace",
            "--features=lazarette-e2e/machine",
            "--test=kubernetes",
            "--",
            "--test-threads=1",
        ],
    },
];

#[derive(Default)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    if let Some(wanted) = &args.part
        && !PARTS.iter().any(|part| part.name == wanted)
    {
        let names: Vec<_> = PARTS.iter().map(|part| part.name).collect();
        bail!("no part {wanted}; use one of {}", names.join(", "));
    }
    debian::ensure(&["protobuf-compiler"]).await?;
    debian::ensure(debian::LAB_PACKAGES).await?;
    // Applications that the tests run on a mount.
    debian::ensure(&["git", "python3"]).await?;
    // Before the clock of any test runs.
    build_tools().await?;
    build::all().await?;

    let lab = LabConfig::default();
    let lab_was_up = Lab::attach(lab.clone()).await.is_ok();
    let mut total = Counts::default();
    let mut broken = Vec::new();
    for part in PARTS {
        if args.part.as_ref().is_some_and(|wanted| part.name != wanted) {
            continue;
        }
        eprintln!("== {}", part.name);
        let started = Instant::now();
        if !cargo_test(part.args, &mut total)? {
            broken.push(part.name);
        }
        eprintln!("== {} took {:.0} s", part.name, started.elapsed().as_secs_f32());
    }
    if !lab_was_up {
        put_away(&lab, !broken.is_empty()).await?;
    }
    println!(
        "{} passed, {} failed, {} skipped",
        total.passed,
        total.failed.max(u64::from(!broken.is_empty())),
        total.ignored
    );
    if !broken.is_empty() {
        bail!("failed: {}", broken.join(", "));
    }
    Ok(())
}

/// Takes the lab down that the tests have started. After a failure its logs are kept.
async fn put_away(lab: &LabConfig, failed: bool) -> Result<()> {
    const KEPT: &str = "/var/tmp/lazarette-test-logs";
    if failed && lab.logs().exists() {
        cmd!["cp", "--recursive", "--no-target-directory", lab.logs(), KEPT]
            .run()
            .await?;
        eprintln!("the lab's logs are in {KEPT}");
    }
    Lab::down(lab).await?;
    let left = Lab::leftovers(lab)?;
    ensure!(left.is_empty(), "the lab has left behind: {}", left.join(", "));
    Ok(())
}

/// Builds the programs that the tests and the lab need.
pub(crate) async fn build_tools() -> Result<()> {
    let all = [Tool::LAB, Tool::SIDECARS, &[Tool::Etcd, Tool::CsiSanity, Tool::Helm]].concat();
    tools::ensure(&all).await.map(drop)
}

/// Runs `cargo test`, passes its output on and adds its counts up; whether all is well.
fn cargo_test(args: &[&str], total: &mut Counts) -> Result<bool> {
    // To the end also after a failure: one run shows all of them.
    let mut child = Command::new("cargo")
        .args(["test", "--no-fail-fast"])
        .args(args)
        .current_dir(build::workspace_root())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("run cargo test")?;
    let stdout = child.stdout.take().context("no output")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        if let Some(counts) = counts(&line) {
            total.passed += counts.passed;
            total.failed += counts.failed;
            total.ignored += counts.ignored;
        }
        println!("{line}");
    }
    Ok(child.wait()?.success())
}

/// The numbers of libtest's closing line.
fn counts(line: &str) -> Option<Counts> {
    let rest = line.strip_prefix("test result: ")?;
    let number = |word: &str| {
        let before = rest.split(word).next()?;
        before.split_whitespace().last()?.parse().ok()
    };
    Some(Counts {
        passed: number(" passed")?,
        failed: number(" failed")?,
        ignored: number(" ignored")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_counted() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 6.66s";
        let counts = counts(line).unwrap();
        assert_eq!((counts.passed, counts.failed, counts.ignored), (12, 3, 1));
        assert!(super::counts("running 3 tests").is_none());
    }
}
