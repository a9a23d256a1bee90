//! Mounting, unmounting and judging mounts. Everything here may block, some of it for as long as
//! a file system hangs: call it from blocking tasks only.

use super::mountinfo::{self, Mount};
use crate::capability::MountOptions;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_bind, mount_remount, move_mount, open_tree, unmount,
};
use std::io;
use std::path::{Component, Path, PathBuf};

/// What went wrong with a mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A system call.
    #[error("{doing} {path}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// Files are open there.
    #[error("{0} is busy: a process still uses it")]
    Busy(PathBuf),
}

impl MountError {
    fn new(doing: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io {
            doing,
            path: path.to_owned(),
            source: source.into(),
        }
    }
}

/// Whether a mounted file system answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// It does.
    Alive,
    /// It answers with an error, as when the volume's owner has ended the session.
    Failing,
    /// It never will again: its daemon has gone.
    Dead,
}

/// Asks a file system for a sign of life. Blocks as long as it hangs.
pub fn liveness(path: &Path) -> Liveness {
    match rustix::fs::statfs(path) {
        Ok(_) => Liveness::Alive,
        // The FUSE connection was aborted.
        Err(Errno::NOTCONN | Errno::CONNABORTED) => Liveness::Dead,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "file system fails");
            Liveness::Failing
        }
    }
}

/// The path as `/proc/self/mountinfo` shows it: without symbolic links above its last component,
/// which is not looked at since it may be a dead mount. `None` if the parent does not exist.
pub fn resolve(path: &Path) -> Result<Option<PathBuf>, MountError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(Some(path.to_owned()));
    };
    match parent.canonicalize() {
        Ok(parent) => Ok(Some(parent.join(name))),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(MountError::new("cannot resolve", parent, error)),
    }
}

/// Whether a path from a request is absolute and free of `..`.
pub fn is_plain(path: &Path) -> bool {
    path.is_absolute()
        && path.file_name().is_some()
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

/// All mounts.
pub fn all() -> Result<Vec<Mount>, MountError> {
    mountinfo::read().map_err(|error| MountError::new("cannot read", Path::new("/proc/self/mountinfo"), error))
}

/// Shows what is mounted at `source` also at the folder `target`, with options.
///
/// The mount appears with its options or not at all. Changing them afterwards would leave a gap
/// in which the target is writable, and, worse, would not reach the copies of the mount in other
/// mount namespaces: that of the host, where the containers get theirs from. So the options are
/// set on a bind mount in `scratch`, and a clone of that is attached to the target.
pub fn bind(source: &Path, target: &Path, options: MountOptions, scratch: &Path) -> Result<(), MountError> {
    if options == MountOptions::default() {
        return mount_bind(source, target).map_err(|error| MountError::new("cannot bind-mount at", target, error));
    }
    std::fs::create_dir_all(scratch).map_err(|error| MountError::new("cannot create", scratch, error))?;
    mount_bind(source, scratch).map_err(|error| MountError::new("cannot bind-mount at", scratch, error))?;
    let attached = attach_with_options(scratch, target, options);
    let removed = remove(scratch);
    attached.and(removed)
}

fn attach_with_options(scratch: &Path, target: &Path, options: MountOptions) -> Result<(), MountError> {
    // A remount sets all options, so those that the source has must be repeated.
    let mounts = all()?;
    let present = mountinfo::at(&mounts, scratch).ok_or_else(|| {
        let gone = io::Error::from(io::ErrorKind::NotFound);
        MountError::new("cannot find the mount at", scratch, gone)
    })?;
    let mut flags = MountFlags::BIND;
    for (wanted, name, flag) in [
        (options.read_only, "ro", MountFlags::RDONLY),
        (options.no_suid, "nosuid", MountFlags::NOSUID),
        (options.no_dev, "nodev", MountFlags::NODEV),
        (options.no_exec, "noexec", MountFlags::NOEXEC),
    ] {
        if wanted || present.has_option(name) {
            flags |= flag;
        }
    }
    mount_remount(scratch, flags, "").map_err(|error| MountError::new("cannot set the options of", scratch, error))?;
    let clone = open_tree(
        CWD,
        scratch,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .map_err(|error| MountError::new("cannot clone", scratch, error))?;
    move_mount(clone, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|error| MountError::new("cannot mount at", target, error))
}

/// Unmounts everything that is mounted at a path (as [`resolve`] gives it). A mount that is in use
/// is refused, unless it is dead: that is detached. Nothing mounted there is no error.
pub fn unmount_all(path: &Path) -> Result<(), MountError> {
    while mountinfo::at(&all()?, path).is_some() {
        match unmount(path, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point any more: someone else was faster.
            Err(Errno::INVAL | Errno::NOENT) => {}
            Err(Errno::BUSY) if liveness(path) != Liveness::Dead => {
                return Err(MountError::Busy(path.to_owned()));
            }
            Err(Errno::BUSY) => detach(path)?,
            Err(error) => return Err(MountError::new("cannot unmount", path, error)),
        }
    }
    Ok(())
}

/// Takes the mount at a path out of sight at once; its file system ends with its last user.
pub fn detach(path: &Path) -> Result<(), MountError> {
    match unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(MountError::new("cannot detach", path, error)),
    }
}

/// Creates the folder to mount at; one that is there already is fine.
pub fn create_target(path: &Path) -> Result<(), MountError> {
    std::fs::create_dir_all(path).map_err(|error| MountError::new("cannot create", path, error))
}

/// The same for a folder that may be a mount, perhaps a dead one, which is not looked at.
pub fn create_target_unless_mounted(path: &Path) -> Result<(), MountError> {
    match resolve(path)? {
        Some(resolved) if mountinfo::at(&all()?, &resolved).is_some() => Ok(()),
        _ => create_target(path),
    }
}

/// Detaches what is mounted at a path and removes the folder.
pub fn remove(path: &Path) -> Result<(), MountError> {
    while mountinfo::at(&all()?, path).is_some() {
        detach(path)?;
    }
    remove_target(path)
}

/// Removes the folder that was mounted at. Only an empty one: whatever is in it when nothing is
/// mounted there is not ours.
pub fn remove_target(path: &Path) -> Result<(), MountError> {
    match std::fs::remove_dir(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(MountError::new("cannot remove", path, error)),
    }
}

/// What a file system says of its space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes: all, in use, free for users without privileges.
    pub bytes: (u64, u64, u64),
    /// Inodes: the same.
    pub inodes: (u64, u64, u64),
}

/// Reads a file system's use. Blocks as long as it hangs.
pub fn usage(path: &Path) -> Result<Usage, MountError> {
    let stat = rustix::fs::statvfs(path).map_err(|error| MountError::new("cannot read the use of", path, error))?;
    let unit = stat.f_frsize;
    Ok(Usage {
        bytes: (
            stat.f_blocks.saturating_mul(unit),
            stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(unit),
            stat.f_bavail.saturating_mul(unit),
        ),
        inodes: (stat.f_files, stat.f_files.saturating_sub(stat.f_ffree), stat.f_favail),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_paths() {
        assert!(is_plain(Path::new("/var/lib/kubelet/pods/x/mount")));
        for bad in ["", "/", "some/path", "/a/../b", "/a/.."] {
            assert!(!is_plain(Path::new(bad)), "{bad:?}");
        }
    }

    #[test]
    fn links_above_the_target_are_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(resolve(&link.join("target")).unwrap(), Some(real.join("target")));
        assert_eq!(resolve(&dir.path().join("no/target")).unwrap(), None);
    }

    #[test]
    fn a_folder_with_contents_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        create_target(&target).unwrap();
        create_target(&target).unwrap();
        std::fs::write(target.join("file"), "data").unwrap();
        assert!(remove_target(&target).is_err());
        std::fs::remove_file(target.join("file")).unwrap();
        remove_target(&target).unwrap();
        remove_target(&target).unwrap();
    }
}
