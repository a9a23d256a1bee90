//! The coordinator: the elected storage node that replaces dead primaries, and nodes that are lost
//! or are to leave, in the replica sets. Placement, which any
//! node may do, and the summary for status are here too.

mod election;
mod error;
mod moves;
mod summary;
mod table;

pub use election::Coordinator;
pub use error::PlacementError;
pub use summary::{Summary, summarize};
pub use table::{Candidate, ensure_table, plan};
