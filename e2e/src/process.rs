//! Background daemons: started once, found again by a later command, stopped for certain.
//!
//! A daemon `NAME` of a state folder `DIR` logs to `DIR/logs/NAME.log` and is remembered in
//! `DIR/run/NAME.pid`. The pid file also holds the process's start time and the machine's boot id,
//! so that a stale file never leads to killing a stranger who got the same pid.

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::{Deadline, wait_for};

/// What to run in the background.
#[derive(Debug, Clone)]
pub struct Daemon {
    name: String,
    state: PathBuf,
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    cwd: Option<PathBuf>,
    cgroups: Vec<PathBuf>,
}

/// A process, identified beyond the reuse of its pid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// The process id.
    pub pid: i32,
    /// Start time in clock ticks since boot.
    start: u64,
    boot: String,
}

impl Daemon {
    /// A daemon called `name` that keeps its log and pid file under `state`.
    pub fn new(name: impl Into<String>, state: impl Into<PathBuf>, program: impl AsRef<OsStr>) -> Self {
        Self {
            name: name.into(),
            state: state.into(),
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: None,
            cgroups: Vec::new(),
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable; the rest is inherited.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory (default: the root, which keeps no mount busy).
    #[must_use]
    pub fn cwd(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = Some(dir.into());
        self
    }

    /// Puts the process into these existing cgroup folders.
    #[must_use]
    pub fn cgroups(mut self, folders: impl IntoIterator<Item = PathBuf>) -> Self {
        self.cgroups.extend(folders);
        self
    }

    /// Where the daemon logs to.
    pub fn log(&self) -> PathBuf {
        log_path(&self.state, &self.name)
    }

    /// Starts the daemon in a session of its own, unless it already runs.
    ///
    /// Returns as soon as the program runs; whether it is ready is for the caller to find out. A
    /// program that cannot be executed at all is an error here.
    pub async fn start(&self) -> Result<Process> {
        if let Some(running) = find(&self.state, &self.name) {
            return Ok(running);
        }
        let log_path = self.log();
        let pid_path = pid_path(&self.state, &self.name);
        for path in [&log_path, &pid_path] {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
            }
        }
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)
            .with_context(|| format!("open {}", log_path.display()))?;
        let words: Vec<_> = std::iter::once(&self.program)
            .chain(&self.args)
            .map(|w| w.to_string_lossy())
            .collect();
        writeln!(log, "--- start: {}", words.join(" "))?;

        // setsid(1) replaces itself by the program when it is no group leader, as here, so the
        // child's pid is the daemon's.
        let mut command = std::process::Command::new("setsid");
        command
            .arg(&self.program)
            .args(&self.args)
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .current_dir(self.cwd.as_deref().unwrap_or(Path::new("/")))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut child = command.spawn().with_context(|| format!("start {}", self.name))?;
        let pid = i32::try_from(child.id())?;
        let found = Process::of(pid);
        // Somebody has to collect the exit status as long as this command lives, or the daemon
        // would stay behind as a zombie.
        std::thread::spawn(move || child.wait());
        let Some(process) = found else {
            bail!("{} ended at once; see {}", self.name, log_path.display());
        };
        for cgroup in &self.cgroups {
            fs::write(cgroup.join("cgroup.procs"), pid.to_string())
                .with_context(|| format!("put {} into {}", self.name, cgroup.display()))?;
        }
        write_atomically(&pid_path, &serde_json::to_vec(&process)?)?;
        // setsid(1) or the program may fail right after the spawn; a short look catches typing
        // errors and missing libraries.
        tokio::time::sleep(Duration::from_millis(20)).await;
        if !process.is_running() {
            fs::remove_file(&pid_path).ok();
            bail!("{} ended at once: {}", self.name, last_lines(&log_path, 5));
        }
        Ok(process)
    }
}

impl Process {
    /// The process with this pid, if it lives.
    pub fn of(pid: i32) -> Option<Self> {
        let start = start_time(pid)?;
        Some(Self {
            pid,
            start,
            boot: boot_id(),
        })
    }

    /// Whether it still is this process that has the pid, and not a zombie.
    pub fn is_running(&self) -> bool {
        self.boot == boot_id() && start_time(self.pid) == Some(self.start)
    }

    /// Sends a signal, unless the process is gone (then `false`).
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        let Some(fd) = self.open()? else { return Ok(false) };
        match pidfd_send_signal(&fd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("signal process {}", self.pid)),
        }
    }

    /// A descriptor of the process: once it is held and the start time compared, the pid cannot
    /// come to mean another process.
    fn open(&self) -> Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("open process {}", self.pid)),
        };
        Ok(self.is_running().then_some(fd))
    }

    /// TERM, then KILL after `grace`; returns when the process is gone.
    pub async fn stop(&self, grace: Duration) -> Result<()> {
        if !grace.is_zero() && self.signal(Signal::TERM)? {
            let ended = self.wait(grace).await;
            if ended.is_ok() {
                return Ok(());
            }
        }
        if self.signal(Signal::KILL)? {
            self.wait(Duration::from_secs(20)).await?;
        }
        Ok(())
    }

    /// Waits for the process to end.
    pub async fn wait(&self, limit: Duration) -> Result<()> {
        let deadline = Deadline::after(limit).every(Duration::from_millis(20));
        wait_for(deadline, format!("process {} to end", self.pid), || {
            let ended = !self.is_running();
            async move { Ok(ended.then_some(())) }
        })
        .await
    }
}

/// The running daemon `name` of the state folder, if it runs.
pub fn find(state: &Path, name: &str) -> Option<Process> {
    let text = fs::read(pid_path(state, name)).ok()?;
    let process: Process = serde_json::from_slice(&text).ok()?;
    process.is_running().then_some(process)
}

/// Whether the daemon `name` of the state folder runs.
pub fn is_running(state: &Path, name: &str) -> bool {
    find(state, name).is_some()
}

/// The running daemons of the state folder, by name.
pub fn list(state: &Path) -> Vec<(String, Process)> {
    names(state)
        .into_iter()
        .filter_map(|name| find(state, &name).map(|p| (name, p)))
        .collect()
}

/// Stops the daemon `name`: TERM, then KILL after `grace`. One that does not run is no error.
pub async fn stop(state: &Path, name: &str, grace: Duration) -> Result<()> {
    if let Some(process) = find(state, name) {
        process.stop(grace).await.with_context(|| format!("stop {name}"))?;
    }
    match fs::remove_file(pid_path(state, name)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove the pid file of {name}"))
        }
        _ => Ok(()),
    }
}

/// Stops all daemons of the state folder at the same time.
pub async fn stop_all(state: &Path, grace: Duration) -> Result<()> {
    let names = names(state);
    let stops = names.iter().map(|name| stop(state, name, grace));
    futures::future::join_all(stops).await.into_iter().collect()
}

/// The last lines of a log, for error messages.
pub fn last_lines(log: &Path, count: usize) -> String {
    let text = fs::read(log)
        .map(|b| String::from_utf8_lossy(&b).into_owned())
        .unwrap_or_default();
    let lines: Vec<_> = text.lines().rev().take(count).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

/// Where the daemon `name` of the state folder logs to.
pub fn log_path(state: &Path, name: &str) -> PathBuf {
    state.join("logs").join(format!("{name}.log"))
}

fn pid_path(state: &Path, name: &str) -> PathBuf {
    state.join("run").join(format!("{name}.pid"))
}

fn names(state: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(state.join("run")) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .filter_map(|e| Some(e.ok()?.file_name().to_str()?.strip_suffix(".pid")?.to_owned()))
        .collect();
    names.sort();
    names
}

/// Replaces a file so that an interruption leaves the old or the new content.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).with_context(|| format!("write in {}", folder.display()))?;
    file.write_all(content)?;
    file.persist(path)
        .with_context(|| format!("write {}", path.display()))?;
    Ok(())
}

fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// Field 22 of /proc/PID/stat; `None` for a process that is gone or a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name in parentheses may hold spaces and parentheses itself.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(dir: &Path) -> Daemon {
        Daemon::new("sleeper", dir, "sleep").arg("1000")
    }

    #[tokio::test]
    async fn a_daemon_starts_once_and_stops() {
        let dir = tempfile::tempdir().unwrap();
        let first = sleeper(dir.path()).start().await.unwrap();
        let second = sleeper(dir.path()).start().await.unwrap();
        assert_eq!(first, second);
        assert_eq!(list(dir.path()), [("sleeper".to_owned(), first.clone())]);
        stop(dir.path(), "sleeper", Duration::from_secs(5)).await.unwrap();
        assert!(!first.is_running());
        assert!(list(dir.path()).is_empty());
        stop(dir.path(), "sleeper", Duration::from_secs(5)).await.unwrap();
    }

    #[tokio::test]
    async fn a_stale_pid_file_does_not_kill_a_stranger() {
        let dir = tempfile::tempdir().unwrap();
        let mut stale = Process::of(1).unwrap();
        stale.start += 1;
        fs::create_dir_all(dir.path().join("run")).unwrap();
        fs::write(dir.path().join("run/init.pid"), serde_json::to_vec(&stale).unwrap()).unwrap();
        assert!(!is_running(dir.path(), "init"));
        assert!(!stale.signal(Signal::TERM).unwrap());
    }

    #[tokio::test]
    async fn who_ignores_term_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let stubborn =
            Daemon::new("stubborn", dir.path(), "sh").args(["-c", "trap '' TERM; while :; do sleep 1; done"]);
        let process = stubborn.start().await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        stop(dir.path(), "stubborn", Duration::from_millis(200)).await.unwrap();
        assert!(!process.is_running());
    }

    #[tokio::test]
    async fn a_program_that_does_not_exist_is_reported_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Daemon::new("missing", dir.path(), "/no/such/program");
        let deadline = Deadline::secs(5);
        // The failure is seen at the start or, on a busy machine, a moment later.
        match missing.start().await {
            Err(error) => assert!(error.to_string().contains("/no/such/program"), "{error}"),
            Ok(process) => wait_for(deadline, "its end", || {
                let ended = !process.is_running();
                async move { Ok(ended.then_some(())) }
            })
            .await
            .unwrap(),
        }
    }
}
