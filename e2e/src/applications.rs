//! What people do on their volumes: repositories, compilers, databases.

/// One application, as scripts for `sh -e` whose first argument is a new folder on the volume. They fail if
/// anything is not as it must be.
pub struct Application {
    /// Of the folder as well.
    pub name: &'static str,
    /// What it does.
    pub work: &'static str,
    /// What must be true after that on another node.
    pub check: &'static str,
}

/// The Debian packages with their programs; cargo is there anyway.
pub const PACKAGES: &[&str] = &["git", "python3", "make", "gcc", "libc6-dev", "postgresql"];

/// All of them.
pub const ALL: [Application; 5] = [
    Application {
        name: "git",
        work: include_str!("applications/git.sh"),
        check: include_str!("applications/git-check.sh"),
    },
    Application {
        name: "sqlite",
        work: include_str!("applications/sqlite.sh"),
        check: include_str!("applications/sqlite-check.sh"),
    },
    Application {
        name: "make",
        work: include_str!("applications/make.sh"),
        check: include_str!("applications/make-check.sh"),
    },
    Application {
        name: "cargo",
        work: include_str!("applications/cargo.sh"),
        check: include_str!("applications/cargo-check.sh"),
    },
    Application {
        name: "postgresql",
        work: include_str!("applications/postgresql.sh"),
        check: include_str!("applications/postgresql-check.sh"),
    },
];
