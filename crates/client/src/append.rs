//! Appends that are exact over all clients.

use crate::backoff::Backoff;
use crate::extents::PIECE;
use crate::flush::wall_clock;
use crate::{Error, File, Result};
use bytes::Bytes;
use lazarette_proto::meta::{AppendBegin, AppendEnd, request::Op, response};
use lazarette_types::{ErrorCode, FILE_SIZE_MAX};

/// How long the owner holds a request that waits for its turn.
const WAIT_MS: u32 = 2000;

impl File {
    /// Writes at the end of the file, one append at a time over all clients. Durable when done.
    pub(crate) async fn append(&self, data: Bytes) -> Result<u64> {
        if data.is_empty() {
            return Ok(self.attr().size);
        }
        let volume = self.volume.clone();
        let inode = self.inode.clone();
        // A task of its own: a turn that was begun must be ended.
        let task = self.volume.inner.work.spawn(async move {
            let inner = &volume.inner;
            let _turn = inode.turn.clone().lock_owned().await;
            inner.flush_in_turn(&inode).await;
            let ino = inode.ino;
            let mut backoff = Backoff::new();
            let length = data.len() as u64;
            loop {
                let begin = AppendBegin {
                    ino,
                    wait_ms: WAIT_MS,
                    length,
                };
                let turn = match inner.call(Op::AppendBegin(begin)).await {
                    Ok(response) => match response.result {
                        Some(response::Result::AppendTurn(turn)) => turn,
                        _ => return Err(Error::malformed("no turn to append")),
                    },
                    Err(error) if error.code() == ErrorCode::WouldBlock => {
                        inner.lease.unless_dead(backoff.wait()).await?;
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let offset = turn.offset;
                let written = if offset.saturating_add(length) > FILE_SIZE_MAX {
                    Err(Error::new(
                        ErrorCode::FileTooBig,
                        format!("at most {FILE_SIZE_MAX} bytes"),
                    ))
                } else {
                    let seed = inode.state().attr().seed;
                    let mut pieces = Vec::new();
                    for from in (0..length).step_by(PIECE as usize) {
                        let part = data.slice(from as usize..length.min(from + PIECE) as usize);
                        pieces.push(inner.write_durably(ino, seed, offset + from, part));
                    }
                    let results: Vec<Result<()>> = futures::future::join_all(pieces).await;
                    results.into_iter().collect::<Result<()>>()
                };
                let mtime = wall_clock();
                let end = AppendEnd {
                    ino,
                    offset,
                    // Nothing of a failed append becomes part of the file.
                    length: if written.is_ok() { length } else { 0 },
                    mtime,
                    since: turn.change,
                };
                let response = match inner.call(Op::AppendEnd(end)).await {
                    Ok(response) => response,
                    // Truncated meanwhile: the end is elsewhere now.
                    Err(error) if error.code() == ErrorCode::Overtaken => continue,
                    Err(error) => return Err(error),
                };
                written?;
                if let Some(response::Result::Attr(_)) = response.result {
                    volume.entry(response)?;
                } else {
                    volume.get_attr(ino).await?;
                }
                inode.state().content += 1;
                return Ok(offset);
            }
        });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "append task failed"))?
    }
}
