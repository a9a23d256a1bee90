//! Container images without a container engine.
//!
//! An image here is one layer made of a list of files, written as a `docker-archive` tar that
//! `ctr images import` and `docker load` both read. The same input gives the same bytes.

mod catalogue;
mod libraries;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use sha2::{Digest, Sha256};

pub use catalogue::{LAZARETTE, busybox, chart, coredns, etcd, lazarette, pause, sidecars, snapshots};
pub use libraries::shared_libraries;

/// One thing in the image's file system.
#[derive(Debug, Clone)]
enum Entry {
    /// The content and the permissions of a file of this machine.
    Host(PathBuf),
    Text(String),
    Symlink(String),
    Directory(u32),
}

/// What an image is made of.
#[derive(Debug, Clone)]
pub struct Image {
    name: String,
    entries: BTreeMap<PathBuf, Entry>,
    entrypoint: Vec<String>,
    command: Vec<String>,
    env: Vec<String>,
}

/// An image on disk, ready to be imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// Reference under which pods use the image, such as `localhost/busybox:1`.
    pub name: String,
    /// The `docker-archive` tar.
    pub path: PathBuf,
    /// SHA-256 of the image's configuration, which covers its content.
    pub digest: String,
}

impl Archive {
    /// Bytes of the image, uncompressed.
    pub fn size(&self) -> Result<u64> {
        let file = fs::metadata(&self.path).with_context(|| format!("look at {}", self.path.display()))?;
        Ok(file.len())
    }
}

impl Image {
    /// An empty image with a `/tmp` and the files that name resolution expects.
    pub fn new(name: impl Into<String>) -> Self {
        let image = Self {
            name: name.into(),
            entries: BTreeMap::new(),
            entrypoint: Vec::new(),
            command: Vec::new(),
            env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
        };
        image
            .directory("/tmp", 0o1777)
            .text(
                "/etc/passwd",
                "root:x:0:0:root:/:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n",
            )
            .text("/etc/group", "root:x:0:\nnobody:x:65534:\n")
            .text("/etc/nsswitch.conf", "hosts: files dns\n")
    }

    /// The same content under another reference.
    #[must_use]
    pub fn renamed(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// The reference of the image.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Copies a file of this machine to an absolute path in the image.
    #[must_use]
    pub fn file(self, host: impl Into<PathBuf>, target: impl AsRef<Path>) -> Self {
        self.entry(target, Entry::Host(host.into()))
    }

    /// Copies a program and the shared libraries that it loads.
    pub fn program(mut self, host: impl AsRef<Path>, target: impl AsRef<Path>) -> Result<Self> {
        for library in shared_libraries(host.as_ref())? {
            self = self.file(&library, &library);
        }
        Ok(self.file(host.as_ref(), target))
    }

    /// Writes a small file.
    #[must_use]
    pub fn text(self, target: impl AsRef<Path>, content: impl Into<String>) -> Self {
        self.entry(target, Entry::Text(content.into()))
    }

    /// Makes a symbolic link.
    #[must_use]
    pub fn symlink(self, target: impl AsRef<Path>, to: impl Into<String>) -> Self {
        self.entry(target, Entry::Symlink(to.into()))
    }

    /// Makes a directory with these permissions.
    #[must_use]
    pub fn directory(self, target: impl AsRef<Path>, mode: u32) -> Self {
        self.entry(target, Entry::Directory(mode))
    }

    /// The program to run.
    #[must_use]
    pub fn entrypoint<S: Into<String>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.entrypoint = words.into_iter().map(Into::into).collect();
        self
    }

    /// Default arguments of the entry point.
    #[must_use]
    pub fn command<S: Into<String>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.command = words.into_iter().map(Into::into).collect();
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push(format!("{key}={value}"));
        self
    }

    /// The files copied from this machine: where they are and where they go.
    pub fn host_files(&self) -> impl Iterator<Item = (&Path, &Path)> {
        self.entries.iter().filter_map(|(target, entry)| match entry {
            Entry::Host(host) => Some((host.as_path(), target.as_path())),
            _ => None,
        })
    }

    fn entry(mut self, target: impl AsRef<Path>, entry: Entry) -> Self {
        let target = target.as_ref();
        self.entries
            .insert(target.strip_prefix("/").unwrap_or(target).to_owned(), entry);
        self
    }

    /// Writes the archive into `folder`, unless one made of the same input is there.
    pub async fn build(&self, folder: &Path) -> Result<Archive> {
        let (image, folder) = (self.clone(), folder.to_owned());
        tokio::task::spawn_blocking(move || image.build_blocking(&folder))
            .await?
            .with_context(|| format!("build image {}", self.name))
    }

    fn build_blocking(&self, folder: &Path) -> Result<Archive> {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let stem = self.name.replace(['/', ':'], "_");
        let path = folder.join(format!("{stem}.tar"));
        let stamp_path = folder.join(format!("{stem}.stamp"));
        let input = self.input_hash()?;
        if let Ok(stamp) = fs::read_to_string(&stamp_path)
            && let Some((known, digest)) = stamp.split_once(' ')
            && known == input
            && path.exists()
        {
            return Ok(Archive {
                name: self.name.clone(),
                path,
                digest: digest.to_owned(),
            });
        }
        let mut layer = HashWriter::new(tempfile::tempfile_in(folder)?);
        self.write_layer(&mut layer)?;
        let (mut layer, layer_digest) = layer.finish();
        let config = self.config(&layer_digest);
        let digest = crate::hex(&Sha256::digest(&config));
        let layer_name = format!("{layer_digest}/layer.tar");
        let config_name = format!("{digest}.json");
        let manifest = serde_json::to_vec(&json!([
            {"Config": config_name, "RepoTags": [self.name], "Layers": [layer_name]}
        ]))?;

        let mut archive = tempfile::NamedTempFile::new_in(folder)?;
        let mut tar = tar::Builder::new(io::BufWriter::new(archive.as_file_mut()));
        append(
            &mut tar,
            Path::new("manifest.json"),
            0o644,
            manifest.len() as u64,
            manifest.as_slice(),
        )?;
        append(
            &mut tar,
            Path::new(&config_name),
            0o644,
            config.len() as u64,
            config.as_slice(),
        )?;
        let size = layer.stream_position()?;
        layer.rewind()?;
        append(&mut tar, Path::new(&layer_name), 0o644, size, &mut layer)?;
        tar.into_inner()?.flush()?;
        // Builds of the same repository before this one would only pile up.
        let repository = format!(
            "{}_",
            stem.rsplit_once('_').map_or(&*stem, |(repository, _)| repository)
        );
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&repository) {
                fs::remove_file(entry.path())?;
            }
        }
        archive.persist(&path)?;
        crate::process::write_atomically(&stamp_path, format!("{input} {digest}").as_bytes())?;
        Ok(Archive {
            name: self.name.clone(),
            path,
            digest,
        })
    }

    fn config(&self, layer_digest: &str) -> Vec<u8> {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        json!({
            "architecture": architecture,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {"Entrypoint": self.entrypoint, "Cmd": self.command, "Env": self.env, "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer_digest}")]},
        })
        .to_string()
        .into_bytes()
    }

    fn write_layer(&self, out: impl Write) -> Result<()> {
        let mut tar = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, out));
        let mut folders: BTreeMap<PathBuf, u32> = BTreeMap::new();
        for (target, entry) in &self.entries {
            for parent in target.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()) {
                folders.entry(parent.to_owned()).or_insert(0o755);
            }
            if let Entry::Directory(mode) = entry {
                folders.insert(target.clone(), *mode);
            }
        }
        for (folder, mode) in folders {
            let mut header = header(mode, 0);
            header.set_entry_type(tar::EntryType::Directory);
            tar.append_data(&mut header, folder, io::empty())?;
        }
        for (target, entry) in &self.entries {
            match entry {
                Entry::Directory(_) => {}
                Entry::Text(text) => append(&mut tar, target, 0o644, text.len() as u64, text.as_bytes())?,
                Entry::Symlink(to) => {
                    let mut header = header(0o777, 0);
                    header.set_entry_type(tar::EntryType::Symlink);
                    tar.append_link(&mut header, target, to)?;
                }
                Entry::Host(host) => {
                    let file = File::open(host).with_context(|| format!("open {}", host.display()))?;
                    let meta = file.metadata()?;
                    if !meta.is_file() {
                        bail!("{} is not a file", host.display());
                    }
                    let mode = if meta.mode() & 0o111 == 0 { 0o644 } else { 0o755 };
                    append(&mut tar, target, mode, meta.len(), file)?;
                }
            }
        }
        tar.into_inner()?.flush()?;
        Ok(())
    }

    /// Changes whenever the archive would; cheaper than making it.
    fn input_hash(&self) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(format!("{self:?}"));
        for (host, _) in self.host_files() {
            let meta = fs::metadata(host).with_context(|| format!("read {}", host.display()))?;
            hash.update(format!("{} {} {}\n", meta.len(), meta.mtime(), meta.mtime_nsec()));
        }
        Ok(crate::hex(&hash.finalize()))
    }
}

fn header(mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append(tar: &mut tar::Builder<impl Write>, path: &Path, mode: u32, size: u64, data: impl Read) -> Result<()> {
    tar.append_data(&mut header(mode, size), path, data)
        .with_context(|| format!("add {}", path.display()))
}

/// Hashes what passes through.
struct HashWriter<W> {
    inner: W,
    hash: Sha256,
}

impl<W> HashWriter<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
        }
    }

    fn finish(self) -> (W, String) {
        (self.inner, crate::hex(&self.hash.finalize()))
    }
}

impl<W: Write> Write for HashWriter<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(data)?;
        self.hash.update(&data[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_input_gives_the_same_bytes() {
        let make = |folder: PathBuf| async move {
            let image = Image::new("localhost/test:1")
                .program("/bin/true", "/bin/true")
                .unwrap();
            let archive = image.build(&folder).await.unwrap();
            (archive.digest.clone(), fs::read(&archive.path).unwrap())
        };
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = make(one.path().to_owned()).await;
        assert_eq!(first, make(two.path().to_owned()).await);
        // The second time the archive is found.
        assert_eq!(first, make(one.path().to_owned()).await);
    }

    #[tokio::test]
    async fn a_missing_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let image = Image::new("localhost/test:1").file("/no/such/file", "/x");
        let error = format!("{:#}", image.build(dir.path()).await.unwrap_err());
        assert!(error.contains("/no/such/file"), "{error}");
    }
}
