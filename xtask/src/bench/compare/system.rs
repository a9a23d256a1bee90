//! The systems that can be compared, behind one set of verbs.

use super::place::Place;
use super::{cephfs, glusterfs, moosefs};
use crate::bench::disk::Disk;
use crate::bench::drop_caches;
use crate::bench::rivals::{self, Control};
use anyhow::{Context, Result};
use lazarette_e2e::local::LocalCluster;
use lazarette_e2e::{build, cmd, debian};
use std::fs;
use std::path::{Path, PathBuf};

/// What can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(super) enum Kind {
    /// etcd and three storage nodes, three copies
    Lazarette,
    /// As shipped
    Moosefs,
    /// With its log synced at every change
    MoosefsSync,
    Glusterfs,
    Cephfs,
    /// libfuse's passthrough_ll: what FUSE alone costs
    Passthrough,
    Bindfs,
    /// A folder of the disk that all data lies on
    Local,
}

/// What is forgotten before something is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forget {
    Nothing,
    /// The client is a new one and the kernel knows no names.
    Names,
    /// That, and servers have dropped their caches, and no data is in the page cache.
    All,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Lazarette => "lazarette",
            Self::Moosefs => "moosefs",
            Self::MoosefsSync => "moosefs-sync",
            Self::Glusterfs => "glusterfs",
            Self::Cephfs => "cephfs",
            Self::Passthrough => "passthrough",
            Self::Bindfs => "bindfs",
            Self::Local => "local",
        }
    }

    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Moosefs | Self::MoosefsSync => moosefs::PACKAGES,
            Self::Glusterfs => glusterfs::PACKAGES,
            Self::Cephfs => cephfs::PACKAGES,
            // The pass-throughs are prepared together, with what they need.
            Self::Lazarette | Self::Passthrough | Self::Bindfs | Self::Local => &[],
        }
    }

    /// Installs or builds the system, so that nothing of this happens during a turn.
    pub(super) async fn prepare(self) -> Result<()> {
        debian::ensure(self.packages()).await?;
        if self == Self::Lazarette {
            build::storage().await?;
        }
        Ok(())
    }

    /// Version, copies and what an fsync means, for the record.
    pub(super) async fn about(self) -> Result<String> {
        let packaged = |fsync: &'static str| async move {
            let package = self.packages()[0];
            let version = cmd!["dpkg-query", "--show", "--showformat=${Version}", package]
                .run()
                .await?;
            Ok(format!("Debian's {package} {version}; 3 copies; fsync: {fsync}"))
        };
        match self {
            Self::Lazarette => {
                let commit = cmd!["git", "describe", "--always", "--dirty"]
                    .cwd(build::workspace_root())
                    .run()
                    .await?;
                let commit = commit.trim();
                Ok(format!(
                    "commit {commit}; 3 copies, one etcd member; fsync: on the disks of two storage nodes and in \
                     etcd; every change of metadata is on etcd's disk before it is answered"
                ))
            }
            Self::Moosefs => packaged(moosefs::fsync(false)).await,
            Self::MoosefsSync => packaged(moosefs::fsync(true)).await,
            Self::Glusterfs => packaged(glusterfs::FSYNC).await,
            Self::Cephfs => packaged(cephfs::FSYNC).await,
            Self::Passthrough => Ok("libfuse's passthrough_ll; 1 copy, no server; fsync: on the disk".into()),
            Self::Bindfs => Ok("1 copy, no server; fsync: on the disk".into()),
            Self::Local => Ok("XFS in a file; 1 copy; fsync: on the disk".into()),
        }
    }
}

/// A system that runs, new and empty, and is mounted.
pub(super) struct System {
    kind: Kind,
    pub(super) place: Place,
    cluster: Option<LocalCluster>,
    pass_through: Option<(rivals::System, Control)>,
}

impl System {
    pub(super) async fn start(kind: Kind, dir: &Path, disk: &Disk) -> Result<Self> {
        let mut system = Self {
            kind,
            place: Place::new(dir, disk, kind.name())?,
            cluster: None,
            pass_through: None,
        };
        let place = &system.place;
        match kind {
            Kind::Local => {}
            Kind::Moosefs => moosefs::start(place, false).await?,
            Kind::MoosefsSync => moosefs::start(place, true).await?,
            Kind::Glusterfs => glusterfs::start(place).await?,
            Kind::Cephfs => cephfs::start(place).await?,
            Kind::Lazarette => {
                let cluster = LocalCluster::up(&place.data, Some(3)).await?;
                for (_, _, process) in cluster.processes() {
                    place.adopt(&process)?;
                }
                system.cluster = Some(cluster);
            }
            Kind::Passthrough | Kind::Bindfs => {
                let name = if kind == Kind::Bindfs {
                    "bindfs"
                } else {
                    "passthrough_ll"
                };
                let all = rivals::all(dir, disk).await?;
                let found = all.into_iter().find(|system| system.name == name);
                let found = found.with_context(|| format!("no pass-through {name}"))?;
                found.empty()?;
                system.pass_through = Some((found, Control::mount(dir.join("connections"))?));
            }
        }
        system.mount().await?;
        Ok(system)
    }

    /// The folder to work in.
    pub(super) fn folder(&self) -> PathBuf {
        match &self.pass_through {
            Some((system, _)) => system.mountpoint().to_owned(),
            None if self.kind == Kind::Local => self.place.data.join("work"),
            None => self.place.mountpoint.clone(),
        }
    }

    async fn mount(&self) -> Result<()> {
        let place = &self.place;
        match self.kind {
            Kind::Local => Ok(fs::create_dir_all(self.folder())?),
            Kind::Moosefs | Kind::MoosefsSync => moosefs::mount(place).await,
            Kind::Glusterfs => glusterfs::mount(place).await,
            Kind::Cephfs => cephfs::mount(place).await,
            Kind::Lazarette => {
                let cluster = self.cluster.as_ref().context("no cluster")?;
                place.adopt(&cluster.mount("bench", &place.mountpoint).await?)
            }
            Kind::Passthrough | Kind::Bindfs => {
                let (system, control) = self.pass_through.as_ref().context("no pass-through")?;
                place.adopt(system.mount(control).await?.process())
            }
        }
    }

    async fn unmount(&self) -> Result<()> {
        match self.kind {
            Kind::Local => Ok(()),
            Kind::Lazarette => {
                let cluster = self.cluster.as_ref().context("no cluster")?;
                cluster.umount(&self.place.mountpoint).await
            }
            Kind::Passthrough | Kind::Bindfs => {
                let (system, _) = self.pass_through.as_ref().context("no pass-through")?;
                system.unmount().await
            }
            _ => self.place.unmount().await,
        }
    }

    pub(super) async fn forget(&self, what: Forget) -> Result<()> {
        if what == Forget::Nothing {
            rustix::fs::sync();
            return Ok(());
        }
        self.unmount().await?;
        if what == Forget::All && self.kind == Kind::Cephfs {
            cephfs::forget(&self.place).await?;
        }
        self.mount().await?;
        drop_caches(if what == Forget::All { "3" } else { "2" })
    }
}
