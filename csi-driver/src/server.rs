//! Unix sockets to serve on.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

/// How long calls under way get at shutdown.
pub const GRACE: std::time::Duration = std::time::Duration::from_secs(10);

/// A listening Unix socket; its file is removed when this is dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    inode: (u64, u64),
}

/// A socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A system call.
    #[error("cannot listen at {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// Something that is not a socket is in the way.
    #[error("{0} exists and is no socket; remove it")]
    NotSocket(PathBuf),
}

/// Listens at a path. A socket that is there is a dead predecessor's (or one's that is about to
/// go) and is replaced.
pub fn listen(path: &Path) -> Result<(Socket, UnixListenerStream), SocketError> {
    let failed = |source| SocketError::Io {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            std::fs::remove_file(path).map_err(failed)?;
        }
        Ok(_) => return Err(SocketError::NotSocket(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let found = std::fs::symlink_metadata(path).map_err(failed)?;
    let socket = Socket {
        path: path.to_owned(),
        inode: (found.dev(), found.ino()),
    };
    Ok((socket, UnixListenerStream::new(listener)))
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Not if a successor has put its own there.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stale_sockets_are_replaced_and_successors_spared() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/csi.sock");
        let (old, _listener) = listen(&path).unwrap();
        let (new, _stream) = listen(&path).unwrap();
        drop(old);
        assert!(path.exists(), "the predecessor removed its successor's");
        drop(new);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(SocketError::NotSocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
