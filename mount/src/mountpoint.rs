//! What is mounted where, and unmounting.

use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::io;
use std::path::Path;

/// Our file system type in /proc/mounts.
pub(crate) const TYPE: &str = "fuse.lazarette";
/// Unmounts; with `detach` at once, also while in use.
pub(crate) fn unmount(target: &Path, detach: bool) -> io::Result<()> {
    let flags = if detach {
        UnmountFlags::DETACH | UnmountFlags::NOFOLLOW
    } else {
        UnmountFlags::NOFOLLOW
    };
    match rustix::mount::unmount(target, flags) {
        Ok(()) => Ok(()),
        // Not a mount point (any more).
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(named(error, &format!("cannot unmount {}", target.display()))),
    }
}

/// Detaches mounts of daemons that have died, so that the folder is usable again.
pub(crate) fn clear_dead(target: &Path) -> io::Result<()> {
    /// Dead mounts on top of each other; more than a few would be something else.
    const LIMIT: usize = 16;
    for _ in 0..LIMIT {
        match rustix::fs::stat(target) {
            Err(Errno::NOTCONN | Errno::CONNABORTED) => {
                tracing::warn!(folder = %target.display(), "detaching a dead mount");
                unmount(target, true)?;
            }
            Err(error) => return Err(named(error, &format!("target {}", target.display()))),
            Ok(stat) if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() => return Ok(()),
            Ok(_) => return Err(named(Errno::NOTDIR, &format!("target {}", target.display()))),
        }
    }
    Err(named(Errno::BUSY, &format!("target {}", target.display())))
}

/// Whether a live mount of ours is at the folder.
pub(crate) fn is_mounted(target: &Path) -> io::Result<bool> {
    Ok(has_mount(&std::fs::read_to_string("/proc/self/mountinfo")?, target))
}

fn has_mount(mountinfo: &str, target: &Path) -> bool {
    // Later lines are on top of earlier ones.
    mountinfo.lines().rev().any(|line| {
        let mut halves = line.splitn(2, " - ");
        let at = halves.next().and_then(|left| left.split(' ').nth(4)).unwrap_or("");
        let kind = halves.next().and_then(|right| right.split(' ').next()).unwrap_or("");
        kind == TYPE && Path::new(&unescape(at)) == target
    })
}

/// mountinfo writes spaces and the like in octal.
fn unescape(field: &str) -> String {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first == b'\\'
            && let Some(code) = tail
                .get(..3)
                .and_then(|digits| std::str::from_utf8(digits).ok())
                .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            text.push(code);
            rest = &tail[3..];
        } else {
            text.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn named(error: Errno, what: &str) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_our_mounts() {
        let info = "22 1 0:21 / /proc rw shared:5 - proc proc rw\n\
                    90 22 0:60 / /mnt/a\\040b rw,nodev - fuse.lazarette lazarette:1 rw\n\
                    91 22 0:61 / /mnt/c rw - fuse.other x rw\n";
        assert!(has_mount(info, Path::new("/mnt/a b")));
        assert!(!has_mount(info, Path::new("/mnt/c")));
        assert!(!has_mount(info, Path::new("/mnt")));
    }

    #[test]
    fn a_folder_that_is_missing_or_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(clear_dead(dir.path()).is_ok());
        assert!(clear_dead(&dir.path().join("missing")).is_err());
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(clear_dead(&file).is_err());
        assert!(unmount(dir.path(), false).is_ok(), "nothing mounted is fine");
    }
}
