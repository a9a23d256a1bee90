//! Asks the storage nodes about a cluster.

use lazarette_proto::cluster::cluster_client::ClusterClient;
use lazarette_proto::cluster::{
    ClusterStatus, DrainNodeRequest, ForgetNodeRequest, GetStatusRequest, ListVolumesRequest, UndrainNodeRequest,
    Volume,
};
use std::future::Future;
use std::time::Duration;
use tonic::transport::Endpoint;

/// How long a storage node may take to accept the connection.
const CONNECT: Duration = Duration::from_secs(2);

/// How long an answer may take in all.
const ANSWER: Duration = Duration::from_secs(5);

/// Volumes asked for at once.
const PAGE: u32 = 500;

/// The storage nodes gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum StorageError {
    /// No connection.
    #[error("storage nodes at {0} cannot be reached: {1}")]
    Connect(String, String),
    /// An answer, but not a good one.
    #[error("storage nodes at {0} answered: {1}")]
    Status(String, String),
    /// No answer in time.
    #[error("storage nodes at {0} gave no answer within {ANSWER:?}")]
    Timeout(String),
}

/// The state of the cluster as its storage nodes see it.
pub(super) async fn status(address: &str) -> Result<ClusterStatus, StorageError> {
    within(address, async {
        let mut client = connect(address).await?;
        let answer = client.get_status(GetStatusRequest {}).await;
        Ok(answer.map_err(|s| rejected(address, &s))?.into_inner())
    })
    .await
}

/// All volumes of the cluster.
pub(super) async fn volumes(address: &str) -> Result<Vec<Volume>, StorageError> {
    within(address, async {
        let mut client = connect(address).await?;
        let mut all: Vec<Volume> = Vec::new();
        loop {
            let request = ListVolumesRequest {
                after_id: all.last().map_or(0, |volume| volume.id),
                limit: PAGE,
            };
            let answer = client.list_volumes(request).await;
            let page = answer.map_err(|s| rejected(address, &s))?.into_inner().volumes;
            // A server that ignores the limit or goes in circles must not keep us here for ever.
            let done = page.len() < PAGE as usize || page.iter().any(|v| all.last().is_some_and(|l| v.id <= l.id));
            all.extend(page);
            if done {
                return Ok(all);
            }
        }
    })
    .await
}

/// Has a storage node hand over what it holds.
pub(super) async fn drain(address: &str, node: &str) -> Result<(), StorageError> {
    let node = node.to_owned();
    within(address, async {
        let answer = connect(address).await?.drain_node(DrainNodeRequest { node }).await;
        answer.map(|_| ()).map_err(|s| rejected(address, &s))
    })
    .await
}

/// Lets a storage node take part again.
pub(super) async fn undrain(address: &str, node: &str) -> Result<(), StorageError> {
    let node = node.to_owned();
    within(address, async {
        let answer = connect(address).await?.undrain_node(UndrainNodeRequest { node }).await;
        answer.map(|_| ()).map_err(|s| rejected(address, &s))
    })
    .await
}

/// Strikes a storage node that is gone off the list.
pub(super) async fn forget(address: &str, node: &str) -> Result<(), StorageError> {
    let node = node.to_owned();
    within(address, async {
        let answer = connect(address).await?.forget_node(ForgetNodeRequest { node }).await;
        answer.map(|_| ()).map_err(|s| rejected(address, &s))
    })
    .await
}

async fn within<T>(address: &str, work: impl Future<Output = Result<T, StorageError>>) -> Result<T, StorageError> {
    tokio::time::timeout(ANSWER, work)
        .await
        .unwrap_or_else(|_| Err(StorageError::Timeout(address.to_owned())))
}

async fn connect(address: &str) -> Result<ClusterClient<tonic::transport::Channel>, StorageError> {
    let failed = |error: tonic::transport::Error| {
        // The innermost error says what happened: refused, no route, unknown name.
        let mut source: &dyn std::error::Error = &error;
        while let Some(inner) = source.source() {
            source = inner;
        }
        StorageError::Connect(address.to_owned(), source.to_string())
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(failed)?;
    let channel = endpoint.connect_timeout(CONNECT).connect().await.map_err(failed)?;
    Ok(ClusterClient::new(channel).max_decoding_message_size(lazarette_proto::MAX_MESSAGE_BYTES))
}

fn rejected(address: &str, status: &tonic::Status) -> StorageError {
    StorageError::Status(address.to_owned(), format!("{}: {}", status.code(), status.message()))
}
