//! Test programs for POSIX file systems, installed once from crates.io into the cache.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{build, cmd, tools};

/// The crates and their versions: new versions have new tests.
const PJDFSTEST: (&str, &str) = ("pjdfstest", "0.2.2");
const FSX: (&str, &str) = ("fsx", "0.3.2");

/// Another file system than any that is tested, for EXDEV.
const ELSEWHERE: &str = "/dev/shm";

/// Operations of fsx and how often each comes, all that it has. What makes a disk wait is rare. Each is
/// of a byte at least: posix_fallocate(3) of none is an error, which fsx does not expect.
const WEIGHTS: &str = "[weights]\nread = 10\nwrite = 10\nmapread = 10\nmapwrite = 10\ntruncate = 5\n\
    posix_fallocate = 5\npunch_hole = 5\ncopy_file_range = 5\nsendfile = 5\nclose_open = 2\n\
    invalidate = 1\nposix_fadvise = 1\nfsync = 0.1\nfdatasync = 0.1\n[opsize]\nmin = 1\nmax = 16384\n";

/// The installed programs.
#[derive(Debug, Clone)]
pub struct Programs {
    pjdfstest: PathBuf,
    fsx: PathBuf,
}

/// What pjdfstest says of one of its cases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// As POSIX wants it.
    Passed,
    /// Not tried; why.
    Skipped(String),
    /// Not as POSIX wants it; what was seen.
    Failed(String),
}

/// Verdicts by the cases' names.
pub type Verdicts = BTreeMap<String, Verdict>;

/// Installs what is missing: pjdfstest and fsx.
pub async fn ensure() -> Result<Programs> {
    Ok(Programs {
        pjdfstest: install(PJDFSTEST).await?,
        fsx: install(FSX).await?,
    })
}

async fn install((name, version): (&str, &str)) -> Result<PathBuf> {
    let crates = tools::cache_dir().join("crates");
    let folder = crates.join(format!("{name}-{version}"));
    let program = folder.join("bin").join(name);
    if program.exists() {
        return Ok(program);
    }
    let _lock = tools::lock(&crates.join(".lock")).await?;
    // cargo puts the program there when it is complete.
    if !program.exists() {
        let started = Instant::now();
        eprintln!("installing {name} {version} …");
        cmd!["nice", "-n", "5", "cargo", "install", "--locked", "--quiet"]
            .args([name, "--version", version, "--root"])
            .arg(&folder)
            // For the compiler that the project is built with.
            .cwd(build::workspace_root())
            .env("CARGO_TARGET_DIR", folder.join("target"))
            .limit(Duration::from_secs(3000))
            .run()
            .await
            .with_context(|| format!("install {name} {version}"))?;
        fs::remove_dir_all(folder.join("target"))?;
        eprintln!("installed {name} in {:.0} s", started.elapsed().as_secs_f32());
    }
    Ok(program)
}

/// Operations of one process of fsx. It never gives its mappings of the file back, of which a process may have 65,530.
const FSX_MOST: u64 = 100_000;

impl Programs {
    /// Runs all cases of pjdfstest on the file system that is mounted on `mountpoint`, which is
    /// remounted read-only for some; keeps its configuration in `state`. Needs root, and a mount point
    /// whose path is short: some cases bind sockets deep below it, whose paths have 107 bytes at most.
    pub async fn pjdfstest(&self, mountpoint: &Path, state: &Path) -> Result<Verdicts> {
        let mut verdicts = self.pjdfstest_run(mountpoint, state, false).await?;
        // In a process of their own: descriptors that other cases leave open for writing keep the
        // kernel from remounting.
        verdicts.extend(self.pjdfstest_run(mountpoint, state, true).await?);
        Ok(verdicts)
    }

    async fn pjdfstest_run(&self, mountpoint: &Path, state: &Path, read_only: bool) -> Result<Verdicts> {
        let config = state.join("pjdfstest.toml");
        let text = format!(
            "[features]\nposix_fallocate = {{}}\nrename_ctime = {{}}\nstat_st_birthtime = {{}}\nutime_now = {{}}\n\
             utimensat = {{}}\nsecondary_fs = '{ELSEWHERE}'\n\
             [settings]\nnaptime = 0.02\nallow_remount = {read_only}\n\
             [dummy_auth]\nentries = [['nobody', 'nogroup'], ['daemon', 'daemon']]\n"
        );
        fs::write(&config, text).with_context(|| format!("write {}", config.display()))?;
        let mut command = cmd![&self.pjdfstest, "--configuration-file", &config, "--path", mountpoint]
            .env("PATH", path_with_own_mount(state)?)
            .env("NO_COLOR", "1")
            .env("RUST_BACKTRACE", "0")
            .limit(Duration::from_secs(900));
        if read_only {
            command = command.arg("erofs");
        }
        let output = command.output().await?;
        verdicts(&output.stdout).with_context(|| format!("pjdfstest ended with {:?}: {}", output.code, output.stderr))
    }

    /// Lets fsx do this many operations, which follow from `seed`, on the file, which need not
    /// exist. What it writes about itself goes to `state`. An error quotes what it said.
    pub async fn fsx(&self, file: &Path, state: &Path, seed: u64, operations: u64) -> Result<()> {
        let config = state.join("fsx.toml");
        fs::write(&config, WEIGHTS).with_context(|| format!("write {}", config.display()))?;
        for part in 0..operations.div_ceil(FSX_MOST) {
            let count = FSX_MOST.min(operations - part * FSX_MOST);
            let seed = seed + part;
            cmd![&self.fsx, "-f", &config, "-P", state, "-S", seed.to_string()]
                .args(["-N", &count.to_string()])
                .arg(file)
                // Slow file systems do a hundred operations in a second.
                .limit(Duration::from_secs(60 + count / 100))
                .run()
                .await?;
        }
        Ok(())
    }
}

/// A search path on which mount(8) does itself what it is asked for. To remount "fuse.NAME" it would run
/// the program NAME, as mount.fuse(8) wants it.
fn path_with_own_mount(state: &Path) -> Result<OsString> {
    let folder = state.join("bin");
    let mount = folder.join("mount");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    fs::write(&mount, "#!/bin/sh\nexec /bin/mount --internal-only \"$@\"\n")?;
    fs::set_permissions(&mount, fs::Permissions::from_mode(0o755))?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder).chain(std::env::split_paths(&path));
    Ok(std::env::join_paths(folders)?)
}

/// Reads what pjdfstest prints: a line for each case, reasons indented below it, a summary.
fn verdicts(text: &str) -> Result<Verdicts> {
    let mut verdicts = Verdicts::new();
    let mut total: Option<usize> = None;
    let mut last = None;
    for line in text.lines() {
        if let Some(summary) = line.strip_prefix("Summary: ") {
            let words: Vec<_> = summary.split_whitespace().collect();
            total = words.iter().rev().nth(1).and_then(|number| number.parse().ok());
        } else if let Some((name, verdict)) = case(line) {
            last = Some(name.to_owned());
            verdicts.insert(name.to_owned(), verdict);
        } else if let Some(Verdict::Failed(reason) | Verdict::Skipped(reason)) =
            last.as_ref().and_then(|name| verdicts.get_mut(name))
        {
            reason.push_str(line.trim());
            reason.push('\n');
        }
    }
    match total {
        Some(total) => ensure!(verdicts.len() == total, "{} verdicts of {total}", verdicts.len()),
        None => bail!("it did not get to its end, but to {last:?}"),
    }
    Ok(verdicts)
}

fn case(line: &str) -> Option<(&str, Verdict)> {
    if !line.starts_with(|first: char| first.is_alphanumeric()) {
        return None;
    }
    let (name, verdict) = line.split_once(' ')?;
    let verdict = match verdict.trim() {
        "ok" => Verdict::Passed,
        "skipped" => Verdict::Skipped(String::new()),
        "FAILED" => Verdict::Failed(String::new()),
        _ => return None,
    };
    Some((name, verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_read() {
        let text = "link::a              ok\n\
                    link::b              FAILED\n\tleft: 1\n right: 2\n\
                    link::c              skipped\n\tno remounts\n\n\
                    Summary: 1 failed, 1 skipped, 1 passed, 0 expected failures, 3 total\n";
        let verdicts = verdicts(text).unwrap();
        assert_eq!(verdicts["link::a"], Verdict::Passed);
        assert_eq!(verdicts["link::b"], Verdict::Failed("left: 1\nright: 2\n".into()));
        assert_eq!(verdicts["link::c"], Verdict::Skipped("no remounts\n\n".into()));
    }

    #[test]
    fn an_early_end_is_an_error() {
        let error = super::verdicts("link::a    ok\n").unwrap_err().to_string();
        assert!(error.contains("link::a"), "{error}");
        assert!(super::verdicts("link::a    ok\nSummary: 0 failed, 2 total\n").is_err());
    }
}
