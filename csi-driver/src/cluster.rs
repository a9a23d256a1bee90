//! Calls to the storage nodes of clusters.

use crate::error::csi_status;
use crate::handle::{ClusterRef, HandleError};
use lazarette_proto::cluster::cluster_client::ClusterClient;
use lazarette_proto::code_of;
use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

/// One try of one call. Volume administration is a few etcd transactions; a storage node that
/// takes longer than this is better replaced by another.
const ATTEMPT: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(2);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Where the storage nodes of a cluster are reached: a URL with `{cluster}` and `{namespace}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointTemplate(String);

/// Why a template was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// Braces around something else.
    #[error("endpoint template {0:?} has an unknown placeholder; known are {{cluster}} and {{namespace}}")]
    Placeholder(String),
    /// What comes out is no URL.
    #[error("endpoint template {0:?} gives no http://host:port")]
    Url(String),
}

impl std::str::FromStr for EndpointTemplate {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        let template = Self(text.to_owned());
        let sample = ClusterRef::new("namespace", "cluster")
            .map(|cluster| template.expand(&cluster))
            .unwrap_or_default();
        if sample.contains(['{', '}']) {
            return Err(TemplateError::Placeholder(text.to_owned()));
        }
        match sample.parse::<tonic::transport::Uri>() {
            Ok(uri) if uri.scheme_str() == Some("http") && uri.host().is_some() && uri.port_u16().is_some() => {
                Ok(template)
            }
            _ => Err(TemplateError::Url(text.to_owned())),
        }
    }
}

impl EndpointTemplate {
    /// The URL of one cluster.
    pub fn expand(&self, cluster: &ClusterRef) -> String {
        self.0
            .replace("{cluster}", cluster.name())
            .replace("{namespace}", cluster.namespace())
    }
}

/// Connections to clusters, made on first use.
#[derive(Debug)]
pub struct Clusters {
    template: EndpointTemplate,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    channels: HashMap<ClusterRef, Channel>,
    known: BTreeSet<ClusterRef>,
}

impl Clusters {
    /// `known` are the clusters that listing covers from the start; others join them when a call
    /// names them.
    pub fn new(template: EndpointTemplate, known: impl IntoIterator<Item = ClusterRef>) -> Self {
        Self {
            template,
            state: Mutex::new(State {
                known: known.into_iter().collect(),
                ..State::default()
            }),
        }
    }

    /// The URL of a cluster's storage nodes.
    pub fn endpoint(&self, cluster: &ClusterRef) -> String {
        self.template.expand(cluster)
    }

    /// The clusters that listing covers, in order.
    pub fn known(&self) -> BTreeSet<ClusterRef> {
        self.lock().known.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channel(&self, cluster: &ClusterRef) -> Result<Channel, Status> {
        if let Some(channel) = self.lock().channels.get(cluster) {
            return Ok(channel.clone());
        }
        let url = self.endpoint(cluster);
        let channel = Endpoint::from_shared(url.clone())
            .map_err(|error| Status::internal(format!("{url} is no endpoint: {error}")))?
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .connect_lazy();
        Ok(self.lock().channels.entry(cluster.clone()).or_insert(channel).clone())
    }

    /// Calls a cluster's storage nodes, again and again while they cannot answer, until `deadline`.
    /// `call` must be idempotent. The error is one for the CSI caller.
    pub async fn call<T, F, R>(&self, cluster: &ClusterRef, deadline: Instant, call: F) -> Result<T, Status>
    where
        F: Fn(ClusterClient<Channel>) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let mut pause = PAUSE_MIN;
        loop {
            let client = ClusterClient::new(self.channel(cluster)?);
            let attempt = deadline.min(Instant::now() + ATTEMPT);
            let error = match tokio::time::timeout_at(attempt, call(client)).await {
                Ok(Ok(response)) => {
                    self.lock().known.insert(cluster.clone());
                    return Ok(response.into_inner());
                }
                Ok(Err(status)) if !code_of(&status).retryable() => {
                    return Err(csi_status(&status));
                }
                Ok(Err(status)) => status.message().to_owned(),
                Err(_) => "no answer".to_owned(),
            };
            // The next try connects anew and so may reach another storage node of the Service.
            self.lock().channels.remove(cluster);
            let url = self.endpoint(cluster);
            if Instant::now() + pause >= deadline {
                return Err(Status::new(
                    Code::Unavailable,
                    format!("cluster {cluster} cannot be reached at {url}: {error}"),
                ));
            }
            tracing::debug!(%cluster, url, error, "storage node did not answer, trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// Reads `<namespace>/<name>` for the command line.
pub fn parse_cluster(text: &str) -> Result<ClusterRef, HandleError> {
    text.parse()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazarette_proto::cluster::GetStatusRequest;

    #[test]
    fn templates_are_checked_and_expanded() {
        let cluster = ClusterRef::new("storage", "fast").unwrap();
        let template: EndpointTemplate = crate::DEFAULT_ENDPOINT_TEMPLATE.parse().unwrap();
        assert_eq!(template.expand(&cluster), "http://fast-storage.storage.svc:7400");
        let fixed: EndpointTemplate = "http://127.0.0.1:1".parse().unwrap();
        assert_eq!(fixed.expand(&cluster), "http://127.0.0.1:1");
        for bad in [
            "",
            "http://{name}:7400",
            "http://{cluster}",
            "ftp://{cluster}:1",
            "{cluster}:7400",
            "http://{cluster:7400",
        ] {
            assert!(bad.parse::<EndpointTemplate>().is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn an_unreachable_cluster_is_named_before_the_deadline() {
        // A port that was free a moment ago and that nobody listens on.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let template = format!("http://127.0.0.1:{port}").parse().unwrap();
        let clusters = Clusters::new(template, []);
        let cluster = ClusterRef::new("ns", "gone").unwrap();
        let deadline = Instant::now() + Duration::from_millis(300);
        let error = clusters
            .call(&cluster, deadline, |mut client| async move {
                client.get_status(GetStatusRequest {}).await
            })
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
        assert!(error.message().contains("cluster ns/gone"), "{error}");
        assert!(Instant::now() <= deadline + Duration::from_secs(5));
        assert!(clusters.known().is_empty());
    }
}
