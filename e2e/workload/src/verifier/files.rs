//! Where things are on the volume, and reading them.

use super::content::small;
use super::names::Found;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The folder of the logs.
pub(super) fn shared_folder(mount: &Path) -> PathBuf {
    mount.join("shared")
}

pub(super) fn path_of_log(mount: &Path, name: &str) -> PathBuf {
    shared_folder(mount).join(name)
}

/// The folder of a worker's data files.
pub(super) fn data_folder(mount: &Path, worker: u32) -> PathBuf {
    mount.join(format!("data-{worker}"))
}

pub(super) fn path_of_data(mount: &Path, worker: u32, id: u64) -> PathBuf {
    data_folder(mount, worker).join(format!("f{id}"))
}

/// The root of a worker's names.
pub(super) fn names_folder(mount: &Path, worker: u32) -> PathBuf {
    mount.join(format!("names-{worker}"))
}

/// Reads `length` bytes; what is beyond the file's end is zeros.
pub(super) fn read_at(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(buffer)
}

/// What is under a name.
pub(super) fn look(path: &Path) -> io::Result<Found> {
    if fs::symlink_metadata(path)?.is_dir() {
        return Ok(Found::Folder);
    }
    let content = fs::read(path)?;
    let Some(word) = content.first_chunk() else {
        return Ok(Found::Broken("empty".to_owned()));
    };
    let id = u64::from_le_bytes(*word);
    Ok(if content == small(id) {
        Found::File(id)
    } else {
        Found::Broken(format!("{} bytes that begin with {id}", content.len()))
    })
}

/// All that is below a folder, by path.
pub(super) fn walk(folder: &Path) -> io::Result<BTreeMap<String, Found>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![String::new()];
    while let Some(at) = todo.pop() {
        for entry in fs::read_dir(folder.join(&at))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let path = if at.is_empty() { name } else { format!("{at}/{name}") };
            let what = look(&folder.join(&path))?;
            if what == Found::Folder {
                todo.push(path.clone());
            }
            found.insert(path, what);
        }
    }
    Ok(found)
}
