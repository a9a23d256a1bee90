//! `cargo xtask test`: everything that must pass before a change lands.

use anyhow::{Context, Result, anyhow, bail, ensure};
use lazarette_e2e::lab::{Lab, LabConfig};
use lazarette_e2e::tools::{self, Tool};
use lazarette_e2e::{applications, build, cmd, debian, posix};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only the part with this name: unit, simulation, local or kubernetes
    #[arg(long)]
    part: Option<String>,
}

/// A part of the suite: a run of `cargo test`.
struct Part {
    name: &'static str,
    tests: Tests,
}

enum Tests {
    /// All that need nothing but themselves.
    Unit,
    /// Programs that make a cluster for each test, so one test at a time.
    Clusters(&'static [&'static str]),
    /// So many seeds of the simulation.
    Seeds(u32),
}

/// Those of a row run beside each other: tests on whole clusters wait more than they compute.
const PARTS: &[&[Part]] = &[
    &[Part {
        name: "unit",
        tests: Tests::Unit,
    }],
    &[
        Part {
            name: "local",
            tests: Tests::Clusters(&["local", "faults", "healing", "csi", "posix", "files"]),
        },
        Part {
            name: "kubernetes",
            tests: Tests::Clusters(&["lab", "kubernetes"]),
        },
        Part {
            name: "simulation",
            tests: Tests::Seeds(1000),
        },
    ],
];

#[derive(Default)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// What runs of `cargo test` said.
#[derive(Default)]
struct Report {
    counts: Counts,
    /// What each failed test has printed, its name first.
    failures: Vec<Vec<String>>,
    /// The next lines are of the last failure.
    in_failure: bool,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let names: Vec<_> = PARTS.iter().copied().flatten().map(|part| part.name).collect();
    if let Some(wanted) = &args.part
        && !names.contains(&wanted.as_str())
    {
        bail!("no part {wanted}; use one of {}", names.join(", "));
    }
    debian::ensure(debian::BUILD_PACKAGES).await?;
    debian::ensure(debian::LAB_PACKAGES).await?;
    debian::ensure(&["e2fsprogs"]).await?;
    debian::ensure(applications::PACKAGES).await?;
    // Before the clock of any test runs.
    build_tools().await?;
    build::all().await?;

    let lab = LabConfig::default();
    let lab_was_up = Lab::attach(lab.clone()).await.is_ok();
    let mut report = Report::default();
    let mut broken = Vec::new();
    for beside in PARTS {
        let wanted = beside
            .iter()
            .filter(|part| args.part.as_ref().is_none_or(|wanted| part.name == wanted));
        let runs: Vec<_> = wanted
            .map(|part| (part.name, std::thread::spawn(|| part.run())))
            .collect();
        for (name, run) in runs {
            let (success, said) = run
                .join()
                .map_err(|_| anyhow!("the thread of part {name} panicked"))??;
            if !success {
                broken.push(name);
            }
            report.add(said);
        }
    }
    if !lab_was_up && let Err(error) = put_away(&lab, !broken.is_empty()).await {
        println!("putting the lab away: {error:#}");
        broken.push("clean-up");
    }
    report.print_failures();
    let total = report.counts;
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
    tools::ensure(&all).await?;
    posix::ensure().await.map(drop)
}

impl Tests {
    fn command(&self) -> Command {
        // To the end also after a failure: one run shows all of them.
        let test = ["test", "--no-fail-fast"];
        // The whole workspace, or cargo would compile dependencies anew for each selection.
        let workspace = [test.as_slice(), &["--workspace"]].concat();
        let mut command = build::cargo_command();
        match self {
            Self::Unit => {
                command.args(workspace);
            }
            Self::Clusters(programs) => {
                command.args(workspace).arg("--features=lazarette-e2e/machine");
                command.args(programs.iter().map(|program| format!("--test={program}")));
                command.args(["--", "--test-threads=1"]);
            }
            Self::Seeds(count) => {
                // It computes only, and may wait for those who have a deadline.
                command = build::without_package(Command::new("nice"));
                command.args(["-n", "15", "cargo"]).args(test);
                command.args(["--release", "--package=lazarette-simulation", "--test=seeds"]);
                command.env("LAZARETTE_SEEDS", count.to_string());
            }
        }
        command
    }
}

impl Part {
    /// Runs it and passes its output on; gives whether all is well, and what was said.
    fn run(&self) -> Result<(bool, Report)> {
        eprintln!("== {}", self.name);
        let started = Instant::now();
        let mut command = self.tests.command();
        let mut child = command
            // A test's message says what was seen; backtraces of its runtime bury it.
            .env("RUST_BACKTRACE", "0")
            .current_dir(build::workspace_root())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("run cargo test")?;
        let stdout = child.stdout.take().context("no output")?;
        let mut report = Report::default();
        let mut slow = Vec::new();
        let mut last = Instant::now();
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            println!("{line}");
            if !matches!(self.tests, Tests::Unit)
                && let Some((name, _)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
            {
                slow.push(format!("\n  {:>4} s  {name}", last.elapsed().as_secs()));
            }
            last = Instant::now();
            report.take(line);
        }
        let success = child.wait()?.success();
        eprintln!(
            "== {} took {} s{}",
            self.name,
            started.elapsed().as_secs(),
            slow.concat()
        );
        Ok((success, report))
    }
}

impl Report {
    /// Takes the next line that `cargo test` has printed.
    fn take(&mut self, line: String) {
        if let Some(counts) = counts(&line) {
            self.counts.add(&counts);
        } else if line.starts_with("---- ") && line.ends_with(" stdout ----") {
            self.in_failure = true;
            self.failures.push(vec![line]);
        } else if line == "failures:" {
            self.in_failure = false;
        } else if self.in_failure
            && let Some(failure) = self.failures.last_mut()
        {
            failure.push(line);
        }
    }

    fn add(&mut self, other: Self) {
        self.counts.add(&other.counts);
        self.failures.extend(other.failures);
    }

    /// Repeats the failures, for who sees only the end of a long log.
    fn print_failures(&self) {
        const LINES: usize = 40;
        for failure in &self.failures {
            let cut = failure.len().saturating_sub(LINES).max(1);
            println!("{}", failure[0]);
            for line in &failure[cut..] {
                println!("{line}");
            }
        }
    }
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

    #[test]
    fn failures_are_kept() {
        let output = "test a ... FAILED\n\nfailures:\n\n---- a stdout ----\nleft: 1\nright: 2\n\n\nfailures:\n    a\n\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        let mut report = Report::default();
        output.lines().for_each(|line| report.take(line.to_owned()));
        assert_eq!(report.counts.failed, 1);
        assert_eq!(
            report.failures.iter().flatten().map(String::as_str).collect::<Vec<_>>(),
            ["---- a stdout ----", "left: 1", "right: 2", "", ""]
        );
    }
}
