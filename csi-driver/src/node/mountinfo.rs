//! `/proc/self/mountinfo`: which mounts this process sees. Reading it touches no file system, so
//! it never hangs on a dead one.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Unique among present mounts.
    pub id: u32,
    /// The mount that this one is on.
    pub parent: u32,
    /// Device number, the same for all mounts of one file system.
    pub device: (u32, u32),
    /// What of the file system is mounted: `/`, or the folder that a bind mount shows.
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// Per-mount options, such as `rw,nosuid`.
    pub options: String,
    /// Such as `fuse.lazarette`.
    pub file_system: String,
}

impl Mount {
    /// Whether the mount point (not the file system) has an option.
    pub fn has_option(&self, option: &str) -> bool {
        self.options.split(',').any(|one| one == option)
    }

    /// Whether both show the same part of the same file system.
    pub fn shows_same(&self, other: &Self) -> bool {
        self.device == other.device && self.root == other.root
    }
}

/// All mounts of this process's mount namespace, in order of mounting.
pub fn read() -> io::Result<Vec<Mount>> {
    parse(&std::fs::read("/proc/self/mountinfo")?)
}

/// The mount that is seen at `path`, which has to be absolute and without symbolic links: the
/// last one there, since it hides the others.
pub fn at<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.mount_point == path)
}

/// Parses the file's text.
pub fn parse(text: &[u8]) -> io::Result<Vec<Mount>> {
    text.split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse_line(line).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("mountinfo line not understood: {}", String::from_utf8_lossy(line)),
                )
            })
        })
        .collect()
}

// 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut next = || fields.next();
    let number = |bytes: &[u8]| std::str::from_utf8(bytes).ok()?.parse::<u32>().ok();
    let id = number(next()?)?;
    let parent = number(next()?)?;
    let (major, minor) = std::str::from_utf8(next()?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let root = path(next()?)?;
    let mount_point = path(next()?)?;
    let options = String::from_utf8(next()?.to_vec()).ok()?;
    // Any number of optional fields, then a separator.
    while next()? != b"-" {}
    let file_system = String::from_utf8_lossy(next()?).into_owned();
    Some(Mount {
        id,
        parent,
        device,
        root,
        mount_point,
        options,
        file_system,
    })
}

/// Undoes the kernel's escapes: `\040` for a space and the like.
fn path(field: &[u8]) -> Option<PathBuf> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'\\' {
            let (digits, tail) = tail.split_at_checked(3)?;
            let value = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()?;
            bytes.push(value);
            rest = tail;
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    Some(PathBuf::from(OsString::from_vec(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
90 27 0:52 / /var/lib/kubelet/globalmount rw,nosuid,nodev shared:7 master:3 propagate_from:2 - fuse.lazarette lazarette rw,user_id=0
91 27 0:52 / /var/lib/kubelet/pods/my\\040pod/mount ro,nosuid - fuse.lazarette lazarette rw
92 27 0:52 /sub\\134dir /var/lib/kubelet/pods/a\\012b rw - fuse.lazarette lazarette rw
93 27 0:60 / /var/lib/kubelet/globalmount rw - tmpfs tmpfs rw
";

    #[test]
    fn the_kernels_text_is_read() {
        let mounts = parse(TEXT.as_bytes()).unwrap();
        assert_eq!(mounts.len(), 6);
        let first = &mounts[2];
        assert_eq!((first.id, first.parent, first.device), (90, 27, (0, 52)));
        assert_eq!(first.file_system, "fuse.lazarette");
        assert!(first.has_option("nosuid") && !first.has_option("ro"));
        let bind = at(&mounts, Path::new("/var/lib/kubelet/pods/my pod/mount")).unwrap();
        assert!(bind.has_option("ro") && bind.shows_same(first));
        let part = at(&mounts, Path::new("/var/lib/kubelet/pods/a\nb")).unwrap();
        assert_eq!(part.root, Path::new("/sub\\dir"));
        assert!(!part.shows_same(first));
    }

    #[test]
    fn the_last_mount_hides_the_others() {
        let mounts = parse(TEXT.as_bytes()).unwrap();
        let seen = at(&mounts, Path::new("/var/lib/kubelet/globalmount")).unwrap();
        assert_eq!(seen.id, 93);
        assert_eq!(at(&mounts, Path::new("/nowhere")), None);
    }

    #[test]
    fn this_machines_own_is_read() {
        let mounts = read().unwrap();
        assert!(at(&mounts, Path::new("/")).is_some());
    }

    #[test]
    fn damaged_lines_are_errors() {
        for bad in [
            "x",
            "1 2 0:1 / /a rw",
            "1 2 0:1 / /a rw -",
            "1 2 01 / /a rw - tmpfs t rw",
            "1 2 0:1 / /a\\04 rw - tmpfs t rw",
            "1 2 0:1 / /a\\999 rw - tmpfs t rw",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }

        #[test]
        fn any_path_round_trips(bytes in proptest::collection::vec(1u8.., 1..40)) {
            let escaped: Vec<u8> = bytes.iter().flat_map(|&b| match b {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{b:03o}").into_bytes(),
                other => vec![other],
            }).collect();
            prop_assert_eq!(path(&escaped), Some(PathBuf::from(OsString::from_vec(bytes))));
        }
    }
}
