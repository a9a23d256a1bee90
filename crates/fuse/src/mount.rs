//! Mounting and unmounting.

use crate::device;
use rustix::fs::FileType;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// How a file system is mounted.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Shown as the mounted device.
    pub source: String,
    /// The type shown is "fuse." and this.
    pub subtype: String,
    /// Users other than the one who mounts may use it.
    pub allow_other: bool,
    /// The kernel checks permissions by mode, owner and ACL.
    pub default_permissions: bool,
    /// Nothing can be written.
    pub read_only: bool,
    /// Set-user-id bits take effect.
    pub suid: bool,
    /// Device nodes work.
    pub devices: bool,
    /// Programs can be run.
    pub exec: bool,
    /// Bytes of the largest read; None for the kernel's limit.
    pub max_read: Option<u32>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            source: "fuse".into(),
            subtype: "fuse".into(),
            allow_other: false,
            default_permissions: true,
            read_only: false,
            suid: false,
            devices: false,
            exec: true,
            max_read: None,
        }
    }
}

/// Why something is not mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point cannot be used.
    #[error("mount point {path}: {source}")]
    Mountpoint {
        /// The mount point.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// No access to the device.
    #[error("cannot open /dev/fuse: {0}")]
    Device(io::Error),
    /// mount(2) failed.
    #[error("cannot mount on {path}: {source}")]
    Mount {
        /// The mount point.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// fusermount3 failed.
    #[error("fusermount3 failed for {path}: {message}")]
    Fusermount {
        /// The mount point.
        path: String,
        /// What it said.
        message: String,
    },
    /// umount2(2) failed.
    #[error("cannot unmount {path}: {source}")]
    Unmount {
        /// The mount point.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// An option that has no form.
    #[error("mount option {0} contains a character that is not possible")]
    Option(&'static str),
}

/// How a file system is unmounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// Fails if it is in use.
    Orderly,
    /// It disappears from its place now; it ends with its last use.
    Detach,
    /// It disappears now and what is under way fails with ECONNABORTED.
    Force,
}

fn root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Mounts, and returns the connection's descriptor, whose first request is INIT: directly as root,
/// by fusermount3 otherwise.
pub fn mount(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    if options.source.contains(['\0', '\n']) {
        return Err(MountError::Option("source"));
    }
    if options.subtype.contains(['\0', '\n', ',', '\\', ' ']) {
        return Err(MountError::Option("subtype"));
    }
    if root() {
        directly(mountpoint, options)
    } else {
        by_fusermount(mountpoint, options)
    }
}

fn directly(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    use std::os::fd::AsRawFd;
    let path = || mountpoint.display().to_string();
    let unusable = |source: io::Error| MountError::Mountpoint { path: path(), source };
    let stat = rustix::fs::stat(mountpoint).map_err(|error| unusable(error.into()))?;
    let kind = FileType::from_raw_mode(stat.st_mode).as_raw_mode();
    let device = device::open().map_err(MountError::Device)?;
    let mut data = format!(
        "fd={},rootmode={kind:o},user_id={},group_id={}",
        device.as_fd().as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    if options.default_permissions {
        data.push_str(",default_permissions");
    }
    if let Some(bytes) = options.max_read {
        data.push_str(&format!(",max_read={bytes}"));
    }
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::RDONLY, options.read_only);
    flags.set(MountFlags::NOSUID, !options.suid);
    flags.set(MountFlags::NODEV, !options.devices);
    flags.set(MountFlags::NOEXEC, !options.exec);
    let data = CString::new(data).map_err(|_| MountError::Option("max_read"))?;
    let kind = format!("fuse.{}", options.subtype);
    rustix::mount::mount(
        options.source.as_str(),
        mountpoint,
        kind.as_str(),
        flags,
        data.as_c_str(),
    )
    .map_err(|error| MountError::Mount {
        path: path(),
        source: error.into(),
    })?;
    Ok(device)
}

/// Escapes what fusermount3 takes for the end of an option.
fn escaped(value: &str) -> String {
    value
        .chars()
        .flat_map(|letter| {
            if matches!(letter, ',' | '\\') {
                vec!['\\', letter]
            } else {
                vec![letter]
            }
        })
        .collect()
}

fn by_fusermount(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let path = mountpoint.display().to_string();
    let failed = |message: String| MountError::Fusermount {
        path: path.clone(),
        message,
    };
    let mut words = vec![
        format!("fsname={}", escaped(&options.source)),
        format!("subtype={}", options.subtype),
    ];
    for (wanted, word) in [
        (options.allow_other, "allow_other"),
        (options.default_permissions, "default_permissions"),
        (options.read_only, "ro"),
        (!options.exec, "noexec"),
        (options.suid, "suid"),
        (options.devices, "dev"),
    ] {
        if wanted {
            words.push(word.into());
        }
    }
    if let Some(bytes) = options.max_read {
        words.push(format!("max_read={bytes}"));
    }
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(|error| failed(error.to_string()))?;
    // As its standard input the socket needs no inheritable descriptor in this process.
    let mut child = Command::new("fusermount3")
        .arg("-o")
        .arg(words.join(","))
        .arg("--")
        .arg(mountpoint)
        .env("_FUSE_COMMFD", "0")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("cannot be started: {error}")))?;
    let received = crate::handover::receive_descriptor(&ours);
    let mut message = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = io::Read::read_to_string(&mut stderr, &mut message);
    }
    let status = child.wait().map_err(|error| failed(error.to_string()))?;
    match received {
        Ok(Some(device)) if status.success() => Ok(device),
        Ok(_) => Err(failed(format!("{status}: {}", message.trim()))),
        Err(error) => Err(failed(format!("{error}; {}", message.trim()))),
    }
}

/// Unmounts. Blocks for as long as the file system takes to answer.
pub fn unmount(mountpoint: &Path, how: Unmount) -> Result<(), MountError> {
    let path = || mountpoint.display().to_string();
    if root() {
        let flags = match how {
            Unmount::Orderly => UnmountFlags::NOFOLLOW,
            Unmount::Detach => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
            Unmount::Force => UnmountFlags::NOFOLLOW | UnmountFlags::FORCE | UnmountFlags::DETACH,
        };
        return rustix::mount::unmount(mountpoint, flags).map_err(|error| MountError::Unmount {
            path: path(),
            source: error.into(),
        });
    }
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if how != Unmount::Orderly {
        // Only root can force; it ends with its last use.
        command.arg("-z");
    }
    let output = command
        .arg("--")
        .arg(OsStr::from_bytes(mountpoint.as_os_str().as_bytes()))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| MountError::Fusermount {
            path: path(),
            message: error.to_string(),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(MountError::Fusermount { path: path(), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_do_not_end_an_option() {
        assert_eq!(escaped("a,b\\c"), "a\\,b\\\\c");
    }

    #[test]
    fn options_are_checked_before_anything_is_mounted() {
        let options = MountOptions {
            subtype: "a,suid".into(),
            ..MountOptions::default()
        };
        assert!(matches!(
            mount(Path::new("/nonexistent"), &options),
            Err(MountError::Option("subtype"))
        ));
        let error = mount(Path::new("/nonexistent"), &MountOptions::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent"), "{error}");
    }
}
