//! The volume context: what the controller tells the nodes about a volume, kept in the
//! PersistentVolume.

use crate::handle::VolumeHandle;
use lazarette_types::VolumeId;
use std::collections::HashMap;

const ENDPOINT: &str = "endpoint";
const VOLUME: &str = "volume";

/// A context that contradicts itself or the handle.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// The context belongs to another volume.
    #[error("volume_context says volume {context:?}, but volume_id says {handle}")]
    OtherVolume {
        /// As given.
        context: String,
        /// From the handle.
        handle: VolumeId,
    },
}

/// The context of a volume that is reached at `endpoint`.
pub fn write(endpoint: String, volume: VolumeId) -> HashMap<String, String> {
    [(ENDPOINT.to_owned(), endpoint), (VOLUME.to_owned(), volume.to_string())].into()
}

/// The endpoint in a context, if it has one. Keys of others (Kubernetes adds some) are ignored.
pub fn read<'a>(context: &'a HashMap<String, String>, handle: &VolumeHandle) -> Result<Option<&'a str>, ContextError> {
    match context.get(VOLUME) {
        Some(volume) if *volume != handle.volume.to_string() => Err(ContextError::OtherVolume {
            context: volume.clone(),
            handle: handle.volume,
        }),
        _ => Ok(context
            .get(ENDPOINT)
            .map(String::as_str)
            .filter(|endpoint| !endpoint.is_empty())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_round_trips_and_guards_its_volume() {
        let handle: VolumeHandle = "ns/c/7".parse().unwrap();
        let mut context = write("http://x:1".to_owned(), handle.volume);
        context.insert("csi.storage.k8s.io/pod.name".to_owned(), "p".to_owned());
        assert_eq!(read(&context, &handle), Ok(Some("http://x:1")));
        assert_eq!(read(&HashMap::new(), &handle), Ok(None));
        let other: VolumeHandle = "ns/c/8".parse().unwrap();
        assert!(read(&context, &other).is_err());
    }
}
