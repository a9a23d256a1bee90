//! The parameters of a StorageClass.

use crate::handle::{ClusterRef, HandleError};
use lazarette_types::{Layout, LayoutError, ReplicationPolicy};
use std::collections::HashMap;

/// Parameters with this prefix are added by the provisioner and kept as labels of the volume.
const PROVISIONER_PREFIX: &str = "csi.storage.k8s.io/";

const CLUSTER: &str = "cluster";
const CLUSTER_NAMESPACE: &str = "clusterNamespace";
const COPIES: &str = "copies";
const ACK: &str = "ack";
const CHUNK_SIZE: &str = "chunkSize";

/// What a StorageClass says about its volumes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Where volumes are made; absent if the class does not name a cluster.
    pub cluster: Option<ClusterRef>,
    /// Absent: the cluster's own default.
    pub replication: Option<ReplicationPolicy>,
    /// Bytes; absent: the default.
    pub chunk_size: Option<u32>,
    /// From the provisioner: the claim's namespace and name, the volume's name.
    pub labels: HashMap<String, String>,
}

/// What is wrong with a parameter; the message names it and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// A required one is absent.
    #[error("parameter \"cluster\" is missing; set it to the name of a StorageCluster")]
    ClusterMissing,
    /// Not a parameter of this driver.
    #[error(
        "unknown parameter {0:?}; known are \"cluster\", \"clusterNamespace\", \"copies\", \"ack\" and \"chunkSize\""
    )]
    Unknown(String),
    /// Not a number.
    #[error("parameter {name:?} is {value:?}; use a number such as 3")]
    Number {
        /// Which.
        name: &'static str,
        /// As given.
        value: String,
    },
    /// Not a size.
    #[error("parameter \"chunkSize\" is {0:?}; use a size such as 4Mi")]
    Size(String),
    /// A number out of range.
    #[error("parameters are out of range: {0}")]
    Range(#[from] LayoutError),
    /// A bad name.
    #[error("parameters name no cluster: {0}")]
    Name(#[from] HandleError),
}

impl Parameters {
    /// Reads a StorageClass's parameters. `namespace` is where clusters are looked for if the
    /// class does not say.
    pub fn parse(parameters: &HashMap<String, String>, namespace: &str) -> Result<Self, ParameterError> {
        let mut labels = HashMap::new();
        let mut unknown = Vec::new();
        for (name, value) in parameters {
            match name.as_str() {
                CLUSTER | CLUSTER_NAMESPACE | COPIES | ACK | CHUNK_SIZE => {}
                _ if name.starts_with(PROVISIONER_PREFIX) => {
                    labels.insert(name.clone(), value.clone());
                }
                _ => unknown.push(name),
            }
        }
        // The smallest, so that the same mistake always gives the same message.
        if let Some(name) = unknown.into_iter().min() {
            return Err(ParameterError::Unknown(name.clone()));
        }
        let namespace = parameters.get(CLUSTER_NAMESPACE).map_or(namespace, String::as_str);
        let cluster = parameters
            .get(CLUSTER)
            .map(|name| ClusterRef::new(namespace, name))
            .transpose()?;
        let copies = number(parameters, COPIES)?;
        let ack = number(parameters, ACK)?;
        let replication = match (copies, ack) {
            (None, None) => None,
            (copies, ack) => {
                let copies = copies.unwrap_or(ReplicationPolicy::default().copies);
                // A majority: no single loss among the copies loses an acknowledged write.
                let ack = ack.unwrap_or(copies / 2 + 1);
                Some(ReplicationPolicy { copies, ack }.validate()?)
            }
        };
        let chunk_size = parameters
            .get(CHUNK_SIZE)
            .map(|text| {
                let bytes = size(text).ok_or_else(|| ParameterError::Size(text.clone()))?;
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                Layout::validate_chunk_size(bytes).map_err(ParameterError::from)
            })
            .transpose()?;
        Ok(Self {
            cluster,
            replication,
            chunk_size,
            labels,
        })
    }

    /// The cluster, which creating a volume needs.
    pub fn require_cluster(&self) -> Result<&ClusterRef, ParameterError> {
        self.cluster.as_ref().ok_or(ParameterError::ClusterMissing)
    }
}

fn number(parameters: &HashMap<String, String>, name: &'static str) -> Result<Option<u32>, ParameterError> {
    let Some(value) = parameters.get(name) else {
        return Ok(None);
    };
    match value.parse() {
        Ok(number) if value.bytes().all(|byte| byte.is_ascii_digit()) => Ok(Some(number)),
        _ => Err(ParameterError::Number {
            name,
            value: value.clone(),
        }),
    }
}

/// Bytes of `4194304`, `4096Ki`, `4Mi` or `1Gi`.
fn size(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "" => 0,
        "Ki" => 10,
        "Mi" => 20,
        "Gi" => 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Parameters, ParameterError> {
        let map = pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        Parameters::parse(&map, "lazarette-system")
    }

    fn message(pairs: &[(&str, &str)]) -> String {
        parse(pairs).unwrap_err().to_string()
    }

    #[test]
    fn all_parameters_are_read() {
        let got = parse(&[
            ("cluster", "fast"),
            ("clusterNamespace", "storage"),
            ("copies", "5"),
            ("ack", "2"),
            ("chunkSize", "16Mi"),
            ("csi.storage.k8s.io/pvc/name", "data"),
        ])
        .unwrap();
        assert_eq!(
            got.require_cluster().unwrap(),
            &ClusterRef::new("storage", "fast").unwrap()
        );
        assert_eq!(got.replication, Some(ReplicationPolicy { copies: 5, ack: 2 }));
        assert_eq!(got.chunk_size, Some(16 << 20));
        assert_eq!(got.labels["csi.storage.k8s.io/pvc/name"], "data".to_owned());
    }

    #[test]
    fn what_is_absent_is_left_to_the_cluster() {
        let got = parse(&[("cluster", "fast")]).unwrap();
        assert_eq!(got.cluster, Some(ClusterRef::new("lazarette-system", "fast").unwrap()));
        assert_eq!((got.replication, got.chunk_size), (None, None));
        assert!(got.labels.is_empty());
    }

    #[test]
    fn ack_defaults_to_a_majority() {
        for (copies, ack) in [("1", 1), ("2", 2), ("3", 2), ("4", 3), ("5", 3)] {
            let got = parse(&[("cluster", "c"), ("copies", copies)]).unwrap();
            assert_eq!(got.replication.unwrap().ack, ack, "copies {copies}");
        }
        let got = parse(&[("cluster", "c"), ("ack", "3")]).unwrap();
        assert_eq!(got.replication, Some(ReplicationPolicy { copies: 3, ack: 3 }));
    }

    #[test]
    fn errors_name_parameter_and_remedy() {
        assert_eq!(
            parse(&[]).unwrap().require_cluster().unwrap_err().to_string(),
            "parameter \"cluster\" is missing; set it to the name of a StorageCluster"
        );
        assert_eq!(
            message(&[("cluster", "c"), ("replicas", "3"), ("zone", "a")]),
            "unknown parameter \"replicas\"; known are \"cluster\", \"clusterNamespace\", \"copies\", \"ack\" and \"chunkSize\""
        );
        for (name, value, word) in [
            ("copies", "three", "\"copies\""),
            ("copies", "+3", "\"copies\""),
            ("copies", "0", "copies is 0"),
            ("copies", "9", "copies is 9"),
            ("ack", "4", "ack is 4"),
            ("ack", "-1", "\"ack\""),
            ("chunkSize", "4MB", "\"chunkSize\""),
            ("chunkSize", "", "\"chunkSize\""),
            ("chunkSize", "Mi", "\"chunkSize\""),
            ("chunkSize", "3Mi", "power of two"),
            ("chunkSize", "128Mi", "power of two"),
            ("chunkSize", "18446744073709551615Gi", "\"chunkSize\""),
            ("chunkSize", "4096Gi", "power of two"),
            ("clusterNamespace", "", "clusterNamespace"),
        ] {
            let text = message(&[("cluster", "c"), (name, value)]);
            assert!(text.contains(word), "{name}={value}: {text}");
        }
        assert!(message(&[("cluster", "Fast")]).contains("cluster is \"Fast\""));
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(size("4194304"), Some(4 << 20));
        assert_eq!(size("4096Ki"), Some(4 << 20));
        assert_eq!(size("1Gi"), Some(1 << 30));
        assert_eq!(size("1.5Gi"), None);
        assert_eq!(size("-1"), None);
    }
}
