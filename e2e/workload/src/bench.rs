use anyhow::{Context, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Bytes of one write or read of a stream.
const BLOCK: usize = 1 << 20;

/// One measured row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What was done.
    pub name: &'static str,
    /// Operations a second, or MiB a second for streams.
    pub rate: f64,
    /// Unit of `rate`.
    pub unit: &'static str,
}

/// How much work a measurement does.
#[derive(Clone, Copy, Debug)]
pub struct Amount {
    /// Files of each kind.
    pub files: usize,
    /// Bytes of the stream.
    pub stream: usize,
    /// Threads for the rows marked with it.
    pub threads: usize,
}

/// Measures a folder: empty files, stats, small files and a stream. `cold` is called before rows
/// that are to find empty caches.
pub fn measure(dir: &Path, amount: Amount, cold: &mut dyn FnMut() -> Result<()>) -> Result<Vec<Row>> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let mut rows = Vec::new();
    let block = vec![0x5a; BLOCK];
    let small = vec![0xa5; 4096];
    for threads in [1, amount.threads] {
        let names = |kind: &str| -> Vec<Vec<PathBuf>> {
            (0..threads)
                .map(|thread| {
                    let folder = dir.join(format!("{kind}-{threads}-{thread}"));
                    (0..amount.files / threads)
                        .map(|i| folder.join(format!("f{i}")))
                        .collect()
                })
                .collect()
        };
        let label = |one: &'static str, many: &'static str| if threads == 1 { one } else { many };
        let (empty, files, synced) = (names("empty"), names("small"), names("synced"));
        for folder in [&empty, &files, &synced].into_iter().flatten() {
            fs::create_dir_all(folder[0].parent().context("no folder")?)?;
        }
        let mut row = |name, paths: &[Vec<PathBuf>], work: &(dyn Fn(&Path) -> Result<()> + Sync)| -> Result<()> {
            let rate = each(paths, work)?;
            rows.push(Row { name, rate, unit: "/s" });
            Ok(())
        };
        row(label("create, 1 thread", "create, 8 threads"), &empty, &|path| {
            File::create_new(path)?;
            Ok(())
        })?;
        cold()?;
        row(label("stat cold, 1 thread", "stat cold, 8 threads"), &empty, &|path| {
            fs::metadata(path)?;
            Ok(())
        })?;
        row(
            label("write 4 KiB files, 1 thread", "write 4 KiB files, 8 threads"),
            &files,
            &|path| {
                File::create_new(path)?.write_all(&small)?;
                Ok(())
            },
        )?;
        row(
            label(
                "write 4 KiB files + fsync, 1 thread",
                "write 4 KiB files + fsync, 8 threads",
            ),
            &synced,
            &|path| {
                let mut file = File::create_new(path)?;
                file.write_all(&small)?;
                Ok(file.sync_all()?)
            },
        )?;
        cold()?;
        row(
            label("read 4 KiB files cold, 1 thread", "read 4 KiB files cold, 8 threads"),
            &files,
            &|path| {
                fs::read(path)?;
                Ok(())
            },
        )?;
        row(label("unlink, 1 thread", "unlink, 8 threads"), &empty, &|path| {
            Ok(fs::remove_file(path)?)
        })?;
    }

    let path = dir.join("stream");
    let mut stream = |name, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let started = Instant::now();
        work()?;
        let rate = amount.stream as f64 / (1 << 20) as f64 / started.elapsed().as_secs_f64();
        rows.push(Row {
            name,
            rate,
            unit: "MiB/s",
        });
        Ok(())
    };
    stream("stream write + fsync", &mut || {
        let mut file = OpenOptions::new().create_new(true).write(true).open(&path)?;
        for _ in 0..amount.stream / BLOCK {
            file.write_all(&block)?;
        }
        Ok(file.sync_all()?)
    })?;
    cold()?;
    stream("stream read cold", &mut || {
        let mut file = File::open(&path)?;
        let mut buffer = vec![0; BLOCK];
        while file.read(&mut buffer)? > 0 {}
        Ok(())
    })?;
    Ok(rows)
}

/// Runs `work` on every path, one thread for each list; operations a second.
fn each(paths: &[Vec<PathBuf>], work: &(dyn Fn(&Path) -> Result<()> + Sync)) -> Result<f64> {
    let started = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = paths
            .iter()
            .map(|list| {
                scope.spawn(move || {
                    list.iter()
                        .try_for_each(|path| work(path).with_context(|| path.display().to_string()))
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked")))
    })?;
    let count: usize = paths.iter().map(Vec::len).sum();
    Ok(count as f64 / started.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        let amount = Amount {
            files: 16,
            stream: 2 << 20,
            threads: 8,
        };
        let mut colds = 0;
        let rows = measure(dir.path(), amount, &mut || {
            colds += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!((rows.len(), colds), (14, 5));
        assert!(rows.iter().all(|row| row.rate > 0.0));
    }
}
