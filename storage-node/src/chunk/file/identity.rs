//! Whose disk this is.

use super::disk::{Disk, Mode};
use super::format::FORMAT;
use lazarette_types::NodeId;
use serde::{Deserialize, Serialize};
use std::io;

/// The identity's file.
pub(super) const IDENTITY: &str = "identity.json";
/// The same while the folder is being initialised.
pub(super) const NEW_IDENTITY: &str = "identity.json.new";

/// Says whose disk a folder is; kept in it as `identity.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Format of everything in the folder.
    pub format: u32,
    /// The cluster's id.
    pub cluster: String,
    /// The storage node.
    pub node: NodeId,
    /// The disk's own id, random.
    pub disk: String,
}

/// A folder that must not be used; nothing in it has been changed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The operating system refused.
    #[error("identity.json: {0}")]
    Io(#[from] io::Error),
    /// Not the JSON object that it should be.
    #[error("identity.json is damaged: {0}; restore it, or give the node an empty folder")]
    Damaged(String),
    /// Written by a newer version.
    #[error(
        "the folder is of format {found}, this version reads up to {supported}; run the version that wrote it, or a newer one"
    )]
    Format {
        /// In the folder.
        found: u32,
        /// What this version reads.
        supported: u32,
    },
    /// Another cluster's or node's disk.
    #[error(
        "the folder belongs to {what} {found:?}, expected {expected:?}; mount the disk of this {what}, or give the node an empty folder"
    )]
    Foreign {
        /// `cluster` or `node`.
        what: &'static str,
        /// In the folder.
        found: String,
        /// As configured.
        expected: String,
    },
    /// Something else's files.
    #[error(
        "the folder has no identity.json but holds {found:?}; give the node an empty folder, or restore identity.json if these are its data"
    )]
    Unknown {
        /// One of the names found.
        found: String,
    },
}

/// Reads a whole small file.
fn read(disk: &dyn Disk, path: &str) -> io::Result<Option<Vec<u8>>> {
    let file = match disk.open(path, Mode::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut bytes = vec![0; file.len()?.min(1 << 20) as usize];
    let length = file.read_at(&mut bytes, 0)?;
    bytes.truncate(length);
    Ok(Some(bytes))
}

/// What a folder is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Folder {
    /// A store's.
    Ready(Identity),
    /// Empty, or initialising it was interrupted.
    Empty,
}

/// Reads the folder's identity.
pub(super) fn inspect(disk: &dyn Disk) -> Result<Folder, IdentityError> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let Some(bytes) = read(disk, IDENTITY)? else {
        let names = disk.list("")?;
        if names.iter().any(|n| n.name == NEW_IDENTITY) {
            return Ok(Folder::Empty);
        }
        // What mkfs leaves in the root of a volume.
        return match names.into_iter().find(|n| n.name != "lost+found") {
            None => Ok(Folder::Empty),
            Some(name) => Err(IdentityError::Unknown { found: name.name }),
        };
    };
    let damaged = |error: serde_json::Error| IdentityError::Damaged(error.to_string());
    // The format first: a newer one may have other fields.
    let Format { format } = serde_json::from_slice(&bytes).map_err(damaged)?;
    if format > FORMAT {
        return Err(IdentityError::Format {
            found: format,
            supported: FORMAT,
        });
    }
    Ok(Folder::Ready(serde_json::from_slice(&bytes).map_err(damaged)?))
}

/// Checks that a folder is this node's.
pub(super) fn expect(identity: &Identity, cluster: &str, node: &NodeId) -> Result<(), IdentityError> {
    for (what, found, expected) in [
        ("cluster", identity.cluster.as_str(), cluster),
        ("node", identity.node.0.as_str(), node.0.as_str()),
    ] {
        if found != expected {
            return Err(IdentityError::Foreign {
                what,
                found: found.to_owned(),
                expected: expected.to_owned(),
            });
        }
    }
    Ok(())
}

/// Marks the folder as being initialised.
pub(super) fn begin(disk: &dyn Disk, identity: &Identity) -> io::Result<()> {
    let file = disk.open(NEW_IDENTITY, Mode::Create)?;
    file.write_at(&serde_json::to_vec_pretty(identity)?, 0)?;
    file.sync()?;
    disk.sync_dir("")
}

/// Ends what [`begin`] began.
pub(super) fn finish(disk: &dyn Disk) -> io::Result<()> {
    disk.rename(NEW_IDENTITY, IDENTITY)?;
    disk.sync_dir("")
}
