use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Copies a folder's files and folders; returns how many files.
pub fn copy_tree(from: &Path, to: &Path) -> Result<u64> {
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    let mut files = 0;
    for entry in fs::read_dir(from).with_context(|| format!("list {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            files += copy_tree(&entry.path(), &target)?;
        } else {
            // Not fs::copy: it would ask for copy_file_range or reflinks, where an application
            // such as tar writes.
            let mut source = File::open(entry.path())?;
            let mut copy = File::create(&target).with_context(|| format!("create {}", target.display()))?;
            let mut buffer = vec![0; 128 << 10];
            loop {
                match io::Read::read(&mut source, &mut buffer)? {
                    0 => break,
                    count => io::Write::write_all(&mut copy, &buffer[..count])
                        .with_context(|| format!("write {}", target.display()))?,
                }
            }
            files += 1;
        }
    }
    Ok(files)
}

/// The SHA-256 sum of every file of a folder, by path within it, in hexadecimal.
pub fn hash_tree(dir: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut sums = BTreeMap::new();
    hash_into(dir, Path::new(""), &mut sums)?;
    Ok(sums)
}

fn hash_into(dir: &Path, prefix: &Path, sums: &mut BTreeMap<PathBuf, String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry?;
        let name = prefix.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            hash_into(&entry.path(), &name, sums)?;
        } else {
            let mut file = File::open(entry.path()).with_context(|| format!("open {}", entry.path().display()))?;
            let mut hash = Sha256::new();
            io::copy(&mut file, &mut hash).with_context(|| format!("read {}", entry.path().display()))?;
            let sum = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            sums.insert(name, sum);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_same_sums() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::write(from.join("a/b/c"), "one").unwrap();
        fs::write(from.join("d"), vec![7; 300_000]).unwrap();
        assert_eq!(copy_tree(&from, &to).unwrap(), 2);
        assert_eq!(hash_tree(&from).unwrap(), hash_tree(&to).unwrap());
        fs::write(to.join("d"), "two").unwrap();
        assert_ne!(hash_tree(&from).unwrap(), hash_tree(&to).unwrap());
    }
}
