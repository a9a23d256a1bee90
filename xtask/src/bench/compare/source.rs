//! The files that programs work on: as an archive and as a git repository.

use anyhow::{Context, Result};
use lazarette_e2e::{cmd, debian, story};
use std::fs;
use std::path::{Path, PathBuf};

pub(super) struct Source {
    pub(super) archive: PathBuf,
    pub(super) repository: PathBuf,
    /// Files and folders.
    pub(super) names: usize,
    /// Of the archive.
    pub(super) bytes: u64,
}

impl Source {
    /// The folder in the archive.
    pub(super) const FOLDER: &str = "tree";

    pub(super) async fn make(dir: &Path) -> Result<Self> {
        debian::ensure(&["git", "python3", "tar", "findutils", "grep"]).await?;
        // One of the versions of the same interface: about a thousand files.
        let mut versions: Vec<_> = fs::read_dir(story::source_tree().await?.join("src"))?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        versions.retain(|path| path.is_dir());
        versions.sort();
        let version = versions.last().context("the source tree has no folders")?;
        let (work, archive, repository) = (dir.join("source"), dir.join("source.tar"), dir.join("source.git"));
        fs::create_dir_all(&work)?;
        let tree = work.join(Self::FOLDER);
        cmd!["cp", "--recursive", "--no-target-directory", version, &tree]
            .run()
            .await?;
        let listed = cmd!["find", &tree].run().await?;
        cmd![
            "tar",
            "--create",
            "--sort=name",
            "--file",
            &archive,
            "--directory",
            &work,
            Self::FOLDER
        ]
        .run()
        .await?;
        let git = |arguments: &[&str]| {
            cmd![
                "git",
                "-c",
                "user.name=bench",
                "-c",
                "user.email=bench@example.com",
                "-C",
                &tree
            ]
            .args(arguments)
            .run()
        };
        git(&["init", "--quiet"]).await?;
        git(&["add", "--all", "--force"]).await?;
        git(&["commit", "--quiet", "--message=all"]).await?;
        git(&["gc", "--quiet"]).await?;
        cmd!["git", "clone", "--quiet", "--bare", &tree, &repository]
            .run()
            .await?;
        fs::remove_dir_all(&work)?;
        Ok(Self {
            bytes: fs::metadata(&archive)?.len(),
            archive,
            repository,
            names: listed.lines().count(),
        })
    }
}
