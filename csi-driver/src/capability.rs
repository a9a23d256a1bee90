//! What a volume is to be used for: access types and modes.

use lazarette_proto::csi::VolumeCapability;
use lazarette_proto::csi::volume_capability::AccessType;
use lazarette_proto::csi::volume_capability::access_mode::Mode;

/// A supported way to use a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Nobody writes through this.
    pub read_only: bool,
    /// One pod only (ReadWriteOncePod).
    pub single_pod: bool,
    /// Options of the mount point.
    pub options: MountOptions,
}

/// Options of a mount point that volumes take from a PersistentVolume's or StorageClass's
/// `mountOptions`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// No writes through this mount point.
    pub read_only: bool,
    /// Set-user-id bits have no effect.
    pub no_suid: bool,
    /// Device files do not work.
    pub no_dev: bool,
    /// Nothing can be executed.
    pub no_exec: bool,
}

/// Why a capability was refused; the message names field and remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    /// None was given.
    #[error("volume_capability is missing")]
    Missing,
    /// Raw block.
    #[error("block volumes are not supported; use volumeMode: Filesystem")]
    Block,
    /// Neither block nor mount.
    #[error("volume_capability.access_type is missing; use mount")]
    NoAccessType,
    /// No or an unknown access mode.
    #[error("volume_capability.access_mode {0} is not known")]
    Mode(i32),
    /// Another file system.
    #[error("fs_type is {0:?}; leave it empty")]
    FileSystem(String),
    /// An option that does not exist here.
    #[error("mount option {0:?} is not supported; use ro, rw, nosuid, nodev, noexec or none")]
    Option(String),
    /// Mounting as a group.
    #[error("volume_mount_group is not supported; leave it empty")]
    MountGroup,
}

/// Checks one capability.
pub fn check(capability: Option<&VolumeCapability>) -> Result<Access, CapabilityError> {
    let capability = capability.ok_or(CapabilityError::Missing)?;
    let mount = match &capability.access_type {
        Some(AccessType::Mount(mount)) => mount,
        Some(AccessType::Block(_)) => return Err(CapabilityError::Block),
        None => return Err(CapabilityError::NoAccessType),
    };
    let number = capability.access_mode.as_ref().map_or(0, |mode| mode.mode);
    let mode = Mode::try_from(number).map_err(|_| CapabilityError::Mode(number))?;
    let (read_only, single_pod) = match mode {
        Mode::Unknown => return Err(CapabilityError::Mode(number)),
        Mode::SingleNodeWriter
        | Mode::SingleNodeMultiWriter
        | Mode::MultiNodeSingleWriter
        | Mode::MultiNodeMultiWriter => (false, false),
        Mode::SingleNodeSingleWriter => (false, true),
        Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly => (true, false),
    };
    if !matches!(mount.fs_type.as_str(), "" | "lazarette" | "fuse.lazarette") {
        return Err(CapabilityError::FileSystem(mount.fs_type.clone()));
    }
    if !mount.volume_mount_group.is_empty() {
        return Err(CapabilityError::MountGroup);
    }
    let mut options = MountOptions {
        read_only,
        ..MountOptions::default()
    };
    for option in mount.mount_flags.iter().flat_map(|flag| flag.split(',')) {
        match option {
            "" | "defaults" | "suid" | "dev" | "exec" => {}
            "rw" if !read_only => {}
            "ro" => options.read_only = true,
            "nosuid" => options.no_suid = true,
            "nodev" => options.no_dev = true,
            "noexec" => options.no_exec = true,
            // Access times are the volume's own matter, the same through every mount point.
            "noatime" | "nodiratime" | "relatime" => {}
            _ => return Err(CapabilityError::Option(option.to_owned())),
        }
    }
    Ok(Access {
        read_only,
        single_pod,
        options,
    })
}

/// Checks all, of which there must be at least one.
pub fn check_all(capabilities: &[VolumeCapability]) -> Result<(), CapabilityError> {
    if capabilities.is_empty() {
        return Err(CapabilityError::Missing);
    }
    capabilities
        .iter()
        .try_for_each(|capability| check(Some(capability)).map(|_| ()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazarette_proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};

    fn mount(mode: i32, mount: MountVolume) -> VolumeCapability {
        VolumeCapability {
            access_mode: Some(AccessMode { mode }),
            access_type: Some(AccessType::Mount(mount)),
        }
    }

    #[test]
    fn the_matrix_of_access_modes() {
        // mode, supported, read-only, one pod only
        for (mode, supported, read_only, single_pod) in [
            (0, false, false, false),
            (1, true, false, false),
            (2, true, true, false),
            (3, true, true, false),
            (4, true, false, false),
            (5, true, false, false),
            (6, true, false, true),
            (7, true, false, false),
            (8, false, false, false),
            (-1, false, false, false),
        ] {
            let got = check(Some(&mount(mode, MountVolume::default())));
            assert_eq!(got.is_ok(), supported, "mode {mode}");
            if let Ok(access) = got {
                assert_eq!(
                    (access.read_only, access.single_pod),
                    (read_only, single_pod),
                    "mode {mode}"
                );
                assert_eq!(access.options.read_only, read_only);
            }
            let block = VolumeCapability {
                access_mode: Some(AccessMode { mode }),
                access_type: Some(AccessType::Block(BlockVolume {})),
            };
            assert_eq!(check(Some(&block)), Err(CapabilityError::Block));
        }
    }

    #[test]
    fn incomplete_capabilities_are_refused() {
        assert_eq!(check(None), Err(CapabilityError::Missing));
        assert_eq!(check_all(&[]), Err(CapabilityError::Missing));
        assert_eq!(
            check(Some(&VolumeCapability {
                access_mode: Some(AccessMode { mode: 1 }),
                access_type: None,
            })),
            Err(CapabilityError::NoAccessType)
        );
        assert_eq!(
            check(Some(&VolumeCapability {
                access_mode: None,
                access_type: Some(AccessType::Mount(MountVolume::default())),
            })),
            Err(CapabilityError::Mode(0))
        );
        let good = mount(5, MountVolume::default());
        let bad = mount(0, MountVolume::default());
        assert!(check_all(std::slice::from_ref(&good)).is_ok());
        assert!(check_all(&[good, bad]).is_err());
    }

    #[test]
    fn mount_options_are_taken_or_refused() {
        let with = |flags: &[&str]| {
            check(Some(&mount(
                5,
                MountVolume {
                    mount_flags: flags.iter().map(|&f| f.to_owned()).collect(),
                    ..MountVolume::default()
                },
            )))
        };
        let options = with(&["ro", "nosuid,nodev", "noexec"]).unwrap().options;
        assert_eq!(
            options,
            MountOptions {
                read_only: true,
                no_suid: true,
                no_dev: true,
                no_exec: true
            }
        );
        assert_eq!(with(&["rw", "noatime"]).unwrap().options, MountOptions::default());
        assert_eq!(
            with(&["nfsvers=4"]),
            Err(CapabilityError::Option("nfsvers=4".to_owned()))
        );
        let rw_on_reader = mount(
            3,
            MountVolume {
                mount_flags: vec!["rw".to_owned()],
                ..MountVolume::default()
            },
        );
        assert!(check(Some(&rw_on_reader)).is_err());
    }

    #[test]
    fn other_file_systems_are_refused() {
        let with = |fs_type: &str| {
            check(Some(&mount(
                5,
                MountVolume {
                    fs_type: fs_type.to_owned(),
                    ..MountVolume::default()
                },
            )))
        };
        assert!(with("").is_ok());
        assert!(with("lazarette").is_ok());
        assert_eq!(
            with("ext4").unwrap_err().to_string(),
            "fs_type is \"ext4\"; leave it empty"
        );
    }
}
