//! A directory, mounted elsewhere: `passthrough SOURCE MOUNTPOINT [--readers N] [--ttl SECONDS]
//! [--serve-all]`.
//!
//! What it costs is what FUSE costs. It needs the right to open whatever others may, so root, and
//! serves one file system: what is mounted below the source is not shown.
//!
//! Large files are read and written by the kernel itself where it can (Linux 6.9, a source that is not
//! itself stacked on another file system), unless `--serve-all` is given.

mod files;
mod nodes;

use files::{BACKED_FROM, Passthrough};
use lazarette_fuse::abi::Capabilities;
use lazarette_fuse::{Config, MountOptions, Session, Terms, Unmount};
use std::time::Duration;

/// As many as a table has room for from the start.
const DESCRIPTORS: i32 = 1 << 16;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut places = Vec::new();
    // Beside those that the processors can keep busy, some that wait for disks.
    let mut readers = Config::default().readers + 2;
    let mut ttl = 1.0;
    let mut backed_from = BACKED_FROM;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--readers" => readers = value()?.parse()?,
            "--serve-all" => backed_from = u64::MAX,
            "--ttl" => ttl = value()?.parse()?,
            _ => places.push(argument),
        }
    }
    let [source, mountpoint] = &places[..] else {
        return Err("usage: passthrough SOURCE MOUNTPOINT [--readers N] [--ttl SECONDS] [--serve-all]".into());
    };
    // Modes come with the callers' umasks applied.
    rustix::process::umask(rustix::fs::Mode::empty());
    let files = rustix::process::Resource::Nofile;
    let limit = rustix::process::getrlimit(files);
    rustix::process::setrlimit(
        files,
        rustix::process::Rlimit {
            current: limit.maximum,
            ..limit
        },
    )?;
    // Each time the table of descriptors grows, every thread that needs one waits for an RCU grace
    // period, unless there is but one thread: it grows now.
    drop(rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), DESCRIPTORS));
    let options = MountOptions {
        source: source.clone(),
        subtype: "passthrough".into(),
        allow_other: true,
        suid: true,
        devices: true,
        ..MountOptions::default()
    };
    let mut terms = Terms::default();
    // The kernel's own locks do: nobody else writes.
    terms.wanted -= Capabilities::POSIX_LOCKS | Capabilities::FLOCK_LOCKS;
    terms.wanted |= Capabilities::CACHE_SYMLINKS | Capabilities::EXPORT_SUPPORT | Capabilities::PASSTHROUGH;
    terms.max_stack_depth = 1;
    let config = Config {
        terms,
        readers,
        ..Config::default()
    };
    let filesystem = Passthrough::new(source, Duration::from_secs_f64(ttl), readers, backed_from)?;
    let session = Session::mount(filesystem, mountpoint, options, config).await?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        end = session.ended() => println!("ended: {end:?}"),
        _ = tokio::signal::ctrl_c() => session.unmount(Unmount::Detach).await?,
        _ = terminate.recv() => session.unmount(Unmount::Detach).await?,
    }
    Ok(())
}
