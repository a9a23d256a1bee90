//! How volumes and clusters are named towards Kubernetes.

use lazarette_types::VolumeId;
use std::fmt;
use std::str::FromStr;

/// Longest CSI string, in bytes, where the specification does not say otherwise.
pub const STRING_MAX: usize = 128;

/// A `StorageCluster`: where a volume lives.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterRef {
    namespace: String,
    name: String,
}

/// Why a name or handle was refused; the message names what and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandleError {
    /// Not a DNS label.
    #[error(
        "{field} is {value:?}; use 1 to 63 lower-case letters, digits and '-', starting and ending with a letter or digit"
    )]
    Label {
        /// Which name.
        field: &'static str,
        /// As given.
        value: String,
    },
    /// Not of the form of a volume handle.
    #[error("volume id {0:?} is not of the form <namespace>/<cluster>/<number>")]
    Malformed(String),
    /// Not of the form of a cluster.
    #[error("cluster {0:?} is not of the form <namespace>/<name>")]
    MalformedCluster(String),
    /// Volume handles would exceed [`STRING_MAX`].
    #[error(
        "namespace {namespace:?} and cluster {cluster:?} are together longer than {} characters; use a shorter name",
        ClusterRef::LENGTH_MAX
    )]
    TooLong {
        /// As given.
        namespace: String,
        /// As given.
        cluster: String,
    },
}

fn label(field: &'static str, value: &str) -> Result<String, HandleError> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=63).contains(&value.len()) && value.bytes().all(inner) && !value.starts_with('-') && !value.ends_with('-') {
        Ok(value.to_owned())
    } else {
        Err(HandleError::Label {
            field,
            value: value.to_owned(),
        })
    }
}

impl ClusterRef {
    /// Longest namespace and name together, in bytes, so that handles with the largest volume
    /// number still fit [`STRING_MAX`].
    pub const LENGTH_MAX: usize = STRING_MAX - 2 - 20;

    /// Checks that both are DNS labels and not too long together.
    pub fn new(namespace: &str, name: &str) -> Result<Self, HandleError> {
        let cluster = Self {
            namespace: label("clusterNamespace", namespace)?,
            name: label("cluster", name)?,
        };
        if namespace.len() + name.len() > Self::LENGTH_MAX {
            return Err(HandleError::TooLong {
                namespace: cluster.namespace,
                cluster: cluster.name,
            });
        }
        Ok(cluster)
    }

    /// The namespace of the `StorageCluster`.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name of the `StorageCluster`.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for ClusterRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for ClusterRef {
    type Err = HandleError;

    fn from_str(text: &str) -> Result<Self, HandleError> {
        let (namespace, name) = text
            .split_once('/')
            .ok_or_else(|| HandleError::MalformedCluster(text.to_owned()))?;
        Self::new(namespace, name)
    }
}

/// A CSI `volume_id`: the cluster and the volume's number in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeHandle {
    /// Where the volume lives.
    pub cluster: ClusterRef,
    /// The volume in its cluster.
    pub volume: VolumeId,
}

impl fmt::Display for VolumeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.volume)
    }
}

impl FromStr for VolumeHandle {
    type Err = HandleError;

    /// Accepts exactly what `Display` writes: one handle, one spelling.
    fn from_str(text: &str) -> Result<Self, HandleError> {
        let malformed = || HandleError::Malformed(text.to_owned());
        let (cluster, number) = text.rsplit_once('/').ok_or_else(malformed)?;
        let handle = Self {
            cluster: cluster.parse().map_err(|_| malformed())?,
            volume: VolumeId(number.parse().map_err(|_| malformed())?),
        };
        if handle.volume.0 == 0 || handle.to_string() != text {
            return Err(malformed());
        }
        Ok(handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn handles_have_one_spelling() {
        let handle: VolumeHandle = "storage/fast/42".parse().unwrap();
        assert_eq!(handle.cluster, ClusterRef::new("storage", "fast").unwrap());
        assert_eq!(handle.volume, VolumeId(42));
        for bad in [
            "",
            "/",
            "//",
            "fake-vol-id",
            "storage/fast",
            "storage/fast/",
            "storage/fast/0",
            "storage/fast/042",
            "storage/fast/+42",
            "storage/fast/-1",
            "storage/fast/18446744073709551616",
            "storage/fast/42/",
            "a/storage/fast/42",
            "Storage/fast/42",
            "storage/-fast/42",
            "storage/../42",
            " storage/fast/42",
            "storage/fast/42\n",
        ] {
            assert!(bad.parse::<VolumeHandle>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn handles_of_the_longest_names_fit() {
        let namespace = "n".repeat(63);
        let cluster = ClusterRef::new(&namespace, &"c".repeat(43)).unwrap();
        let handle = VolumeHandle {
            cluster,
            volume: VolumeId(u64::MAX),
        };
        assert_eq!(handle.to_string().len(), STRING_MAX);
        assert!(matches!(
            ClusterRef::new(&namespace, &"c".repeat(44)),
            Err(HandleError::TooLong { .. })
        ));
        assert!(ClusterRef::new("n", &"c".repeat(64)).is_err());
    }

    proptest! {
        #[test]
        fn any_handle_round_trips(ns in "[a-z0-9]{1,50}", name in "[a-z]([a-z0-9-]{0,40}[a-z0-9])?", id in 1u64..) {
            let handle = VolumeHandle {
                cluster: ClusterRef::new(&ns, &name).unwrap(),
                volume: VolumeId(id),
            };
            prop_assert_eq!(handle.to_string().parse::<VolumeHandle>().unwrap(), handle);
        }

        #[test]
        fn any_text_is_refused_or_round_trips(text in "\\PC{0,40}") {
            if let Ok(handle) = text.parse::<VolumeHandle>() {
                prop_assert_eq!(handle.to_string(), text);
            }
        }
    }
}
