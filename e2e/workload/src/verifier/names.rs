//! What names must and may be there.

use super::journal::Step;
use std::collections::BTreeMap;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Of the file or folder, unlike all others ever made. Names of one file share it.
    pub(super) id: u64,
    pub(super) folder: bool,
    /// A file's content is complete for certain.
    pub(super) solid: bool,
}

/// Names by path.
pub(super) type Names = BTreeMap<String, Entry>;

/// A worker's names. Its operations on them follow one another, so each has one right outcome.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    pub(super) names: Names,
    pub(super) doubts: Vec<Doubt>,
}

/// An operation that failed or was never answered: all of it or nothing happened, and it may still
/// happen. Its names are not used again.
#[derive(Clone, Debug)]
pub(super) struct Doubt {
    paths: Vec<String>,
    alternatives: Vec<Names>,
}

impl Tree {
    /// An operation was answered.
    pub(super) fn end(&mut self, step: &Step, ok: bool) {
        let mut after = self.names.clone();
        if !apply(&mut after, step, ok) {
            return;
        }
        if ok {
            self.names = after;
            return;
        }
        let paths: Vec<String> = paths(step).into_iter().map(str::to_owned).collect();
        let part = |names: &Names| names.iter().filter(|(path, _)| under(path, &paths)).map(own).collect();
        let alternatives = vec![part(&self.names), part(&after)];
        self.names.retain(|path, _| !under(path, &paths));
        self.doubts.push(Doubt { paths, alternatives });
    }

    /// Whether a path, or one above or below it, is in doubt.
    pub(super) fn doubtful(&self, path: &str) -> bool {
        let clash = |doubt: &str| inside(path, doubt) || inside(doubt, path);
        self.doubts
            .iter()
            .flat_map(|doubt| &doubt.paths)
            .any(|doubt| clash(doubt))
    }

    /// The names directly in a folder ("" is the root), as far as they are certain.
    pub(super) fn children<'a>(&'a self, folder: &'a str) -> impl Iterator<Item = (&'a str, Entry)> {
        self.names.iter().filter_map(move |(path, entry)| {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            (parent == folder).then_some((name, *entry))
        })
    }

    /// Names of a file.
    pub(super) fn links(&self, id: u64) -> usize {
        self.names.values().filter(|entry| entry.id == id).count()
    }

    /// Judges all names that are there.
    pub(super) fn judge(&self, found: &BTreeMap<String, Found>) -> Vec<String> {
        let mut problems = Vec::new();
        let in_doubt = |path: &str| self.doubts.iter().any(|doubt| under(path, &doubt.paths));
        for (path, entry) in &self.names {
            match found.get(path) {
                None => problems.push(format!("{path} is lost")),
                Some(found) => problems.extend(found.differs(entry).map(|how| format!("{path} {how}"))),
            }
        }
        for path in found.keys() {
            if !self.names.contains_key(path) && !in_doubt(path) {
                problems.push(format!("{path} is there and must not be"));
            }
        }
        for doubt in &self.doubts {
            let part: BTreeMap<_, _> = found.iter().filter(|(path, _)| under(path, &doubt.paths)).collect();
            let fits = |names: &Names| {
                let same = |(path, entry): (&String, &Entry)| {
                    part.get(path).is_some_and(|found| found.differs(entry).is_none())
                };
                names.len() == part.len() && names.iter().all(same)
            };
            if !doubt.alternatives.iter().any(fits) {
                problems.push(format!(
                    "of the operation in doubt on {} neither all nor nothing happened: {:?} is there, expected one of {:?}",
                    doubt.paths.join(" and "),
                    part.keys(),
                    doubt.alternatives.iter().map(BTreeMap::keys).collect::<Vec<_>>()
                ));
            }
        }
        problems
    }
}

/// What is there under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Folder,
    /// A file that holds the content of this id.
    File(u64),
    /// A file that holds something else; told in words.
    Broken(String),
}

impl Found {
    fn differs(&self, entry: &Entry) -> Option<String> {
        match self {
            Self::Folder => (!entry.folder).then(|| "is a folder, not a file".to_owned()),
            _ if entry.folder => Some("is a file, not a folder".to_owned()),
            Self::File(id) => (*id != entry.id).then(|| format!("is file {id}, not {}", entry.id)),
            Self::Broken(how) => entry.solid.then(|| format!("is damaged: {how}")),
        }
    }
}

/// The names that an operation touches, with all below them.
fn paths(step: &Step) -> Vec<&str> {
    match step {
        Step::Create { path, .. } | Step::Mkdir { path, .. } | Step::Unlink { path } | Step::Rmdir { path } => {
            vec![path]
        }
        Step::Rename { from, to } => vec![from, to],
        // The old name stays as it is.
        Step::Link { to, .. } => vec![to],
        _ => Vec::new(),
    }
}

/// Changes the names as a successful operation does; whether it is one on names.
fn apply(names: &mut Names, step: &Step, ok: bool) -> bool {
    match step {
        Step::Create { path, id } => {
            let entry = Entry {
                id: *id,
                folder: false,
                solid: ok,
            };
            names.insert(path.clone(), entry);
        }
        Step::Mkdir { path, id } => {
            let entry = Entry {
                id: *id,
                folder: true,
                solid: true,
            };
            names.insert(path.clone(), entry);
        }
        Step::Unlink { path } | Step::Rmdir { path } => {
            names.remove(path);
        }
        Step::Link { from, to } => {
            if let Some(entry) = names.get(from).copied() {
                names.insert(to.clone(), entry);
            }
        }
        Step::Rename { from, to } => {
            // Two names of one file: nothing happens.
            if names.get(from).map(|entry| entry.id) == names.get(to).map(|entry| entry.id) {
                return true;
            }
            let moving: Vec<String> = names.keys().filter(|path| inside(path, from)).cloned().collect();
            for path in moving {
                if let Some(entry) = names.remove(&path) {
                    names.insert(format!("{to}{}", &path[from.len()..]), entry);
                }
            }
        }
        _ => return false,
    }
    true
}

/// Whether a path is `folder` or below it.
pub(super) fn inside(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn under(path: &str, folders: &[String]) -> bool {
    folders.iter().any(|folder| inside(path, folder))
}

fn own((path, entry): (&String, &Entry)) -> (String, Entry) {
    (path.clone(), *entry)
}
