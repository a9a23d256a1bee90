//! `cargo xtask crds`.

use anyhow::{Context, Result};
use lazarette_e2e::build::workspace_root;
use std::fs;

/// Where the definitions are kept: for `kubectl apply`, and for Helm.
const FOLDERS: [&str; 2] = ["crds", "charts/lazarette/crds"];

/// Writes the definitions rendered from the Rust types. The API crate's tests fail while the files
/// differ from them.
pub(crate) fn write() -> Result<()> {
    for (name, yaml) in lazarette_api::render()? {
        for folder in FOLDERS {
            let path = workspace_root().join(folder).join(&name);
            fs::write(&path, &yaml).with_context(|| format!("write {}", path.display()))?;
            println!("{}", path.display());
        }
    }
    Ok(())
}
