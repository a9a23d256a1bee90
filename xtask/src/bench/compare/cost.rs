//! What work costs: processor time and memory.

use super::place::Place;
use anyhow::{Context, Result, ensure};
use lazarette_e2e::{Deadline, wait_for};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

/// Processor time in /proc is in 1/100 s on every machine.
const TICK: Duration = Duration::from_millis(10);
/// Share of one processor that others may use while the machine counts as quiet.
const QUIET: f64 = 0.15;

/// Processor time so far, or between two moments.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Cost {
    /// Of the system's processes.
    pub(super) system: Duration,
    /// Of everybody, the kernel included.
    pub(super) machine: Duration,
    /// Of processes that have nothing to do with the measurement.
    pub(super) others: Duration,
}

/// A moment to count from.
pub(super) struct Since {
    system: Duration,
    machine: Duration,
    expected: Duration,
}

impl Since {
    pub(super) fn now(place: &Place) -> Result<Self> {
        Ok(Self {
            system: place.processor()?,
            machine: machine()?,
            expected: own()? + kernel_threads()?,
        })
    }

    pub(super) fn cost(&self, place: &Place) -> Result<Cost> {
        let now = Self::now(place)?;
        let system = now.system.saturating_sub(self.system);
        let machine = now.machine.saturating_sub(self.machine);
        let expected = now.expected.saturating_sub(self.expected);
        Ok(Cost {
            system,
            machine,
            others: machine.saturating_sub(system + expected),
        })
    }
}

/// Time that processors were not idle.
fn machine() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u32> = line
        .split_whitespace()
        .skip(1)
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?;
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are part of user.
    ensure!(ticks.len() >= 8, "/proc/stat is short");
    let busy: u32 = [0, 1, 2, 5, 6, 7].map(|field| ticks[field]).iter().sum();
    Ok(TICK * busy)
}

/// User and system time of this process and of its children that have ended.
fn own() -> Result<Duration> {
    times("self", &[11, 12, 13, 14])
}

/// Write-back and loop devices: nobody's in particular, but no strangers.
fn kernel_threads() -> Result<Duration> {
    let mut all = Duration::ZERO;
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name
            .to_str()
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        else {
            continue;
        };
        // Who ends meanwhile is no kernel thread.
        if times(pid, &[1]).is_ok_and(|parent| parent == TICK * 2) {
            all += times(pid, &[11, 12]).unwrap_or_default();
        }
    }
    Ok(all)
}

/// Sum of fields of /proc/PID/stat, counted from the one after the name, as ticks.
fn times(pid: &str, fields: &[usize]) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything.
    let (_, rest) = stat.rsplit_once(')').context("no name in stat")?;
    let values: Vec<_> = rest.split_whitespace().collect();
    let ticks = fields.iter().map(|field| values.get(*field)?.parse::<u32>().ok());
    let sum: Option<u32> = ticks.sum();
    Ok(TICK * sum.context("stat is short")?)
}

/// Waits until others leave the processors alone for three seconds, or for as long as `patience`.
/// Returns how long that took.
pub(super) async fn wait_until_quiet(patience: Duration) -> Result<Duration> {
    let started = Instant::now();
    while started.elapsed() < patience {
        let (before, window) = (machine()?, Duration::from_secs(3));
        tokio::time::sleep(window).await;
        if (machine()? - before).as_secs_f64() / window.as_secs_f64() < QUIET {
            break;
        }
    }
    Ok(started.elapsed())
}

/// Waits, 30 seconds at most, until the system's processes rest, so that work put off in one part
/// does not run in the next.
pub(super) async fn wait_until_idle(place: &Place) -> Result<()> {
    let deadline = Deadline::secs(30).every(Duration::ZERO);
    let _ = wait_for(deadline, "work that was put off", || async {
        let before = place.processor()?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let used = place.processor()?.saturating_sub(before);
        Ok((used.as_secs_f64() < QUIET).then_some(()))
    })
    .await;
    Ok(())
}

/// Memory of a system's processes, by program.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Memory(BTreeMap<String, Program>);

/// Bytes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Program {
    pub(super) processes: usize,
    /// Of all of them, pages shared with others counted in part, when last looked at.
    pub(super) proportional: u64,
    /// Of the largest process, when last looked at.
    pub(super) resident: u64,
    /// Of the largest process at any time.
    pub(super) peak: u64,
}

impl Memory {
    /// Looks at the processes that run now. Has to happen before a process is stopped, or its peak
    /// is not known.
    pub(super) fn look(&mut self, place: &Place) {
        for program in self.0.values_mut() {
            (program.processes, program.proportional, program.resident) = (0, 0, 0);
        }
        for process in place.processes() {
            let read = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", process.pid)).unwrap_or_default();
            let (name, rollup, status) = (read("comm"), read("smaps_rollup"), read("status"));
            if name.is_empty() {
                continue;
            }
            let program = self.0.entry(name.trim().to_owned()).or_default();
            program.processes += 1;
            program.proportional += bytes(&rollup, "Pss:");
            program.resident = program.resident.max(bytes(&rollup, "Rss:"));
            program.peak = program.peak.max(bytes(&status, "VmHWM:"));
        }
    }

    pub(super) fn programs(&self) -> impl Iterator<Item = (&str, &Program)> {
        self.0.iter().map(|(name, program)| (name.as_str(), program))
    }
}

/// A line `NAME: N kB`.
fn bytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_and_the_machine_use_time() {
        let before = (machine().unwrap(), own().unwrap());
        let started = Instant::now();
        while own().unwrap() < before.1 + 5 * TICK {
            assert!(started.elapsed() < Duration::from_secs(60));
        }
        assert!(machine().unwrap() > before.0);
        kernel_threads().unwrap();
    }

    #[test]
    fn a_line_of_a_status_file() {
        assert_eq!(bytes("VmPeak:  9 kB\nVmHWM:\t   12 kB\n", "VmHWM:"), 12 << 10);
        assert_eq!(bytes("", "VmHWM:"), 0);
    }
}
