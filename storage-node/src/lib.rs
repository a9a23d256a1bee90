//! The storage node: metadata owner of some volumes, chunk server for some replica sets, and
//! sometimes the cluster's coordinator, in one process.

pub mod chunk;
pub mod membership;
