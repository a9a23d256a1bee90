//! Requests to storage nodes that get lost, come late or twice, or whose answers get lost.

use crate::bugs::{Bug, Verdict, answer, without_recalls};
use crate::conditions::{Fate, World};
use crate::etcd::Etcd;
use bytes::Bytes;
use futures::future::BoxFuture;
use http_body_util::{BodyExt, Full};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

/// Methods whose answer or request is a stream: they are only delayed.
const STREAMS: [&str; 3] = ["Recalls", "WatchMap", "List"];
/// Methods that may come twice though the first was answered. No connection does that to a request, but these
/// are made for it.
const REPEATABLE: [&str; 4] = ["Call", "Apply", "Install", "Prepare"];
/// Methods that are told apart here.
const METHODS: [&str; 12] = [
    "Recalls", "WatchMap", "List", "Call", "Apply", "Install", "Prepare", "Write", "Read", "Truncate", "Fetch", "Clock",
];

/// Wraps what a storage node serves.
#[derive(Clone)]
pub(crate) struct Unreliable {
    pub(crate) world: Arc<World>,
    pub(crate) etcd: Arc<Etcd>,
}

impl<S> Layer<S> for Unreliable {
    type Service = UnreliableService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        UnreliableService {
            world: Arc::clone(&self.world),
            etcd: Arc::clone(&self.etcd),
            inner,
        }
    }
}

/// See [`Unreliable`].
#[derive(Clone)]
pub(crate) struct UnreliableService<S> {
    world: Arc<World>,
    etcd: Arc<Etcd>,
    inner: S,
}

/// How long after its acknowledgement a change is made, if that is the mistake.
const EARLY: Duration = Duration::from_millis(300);

impl<S> UnreliableService<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    /// Serves a request, with the mistake that is made.
    async fn serve(mut self, method: &'static str, request: Request<Body>) -> Result<Response<Body>, S::Error> {
        let Some(bug) = self.world.bug else {
            return self.inner.call(request).await;
        };
        if bug == Bug::NoRecalls && method == "Recalls" {
            return self.inner.call(request).await.map(without_recalls);
        }
        if !bug.changes_requests() || method == "Recalls" {
            return self.inner.call(request).await;
        }
        let (parts, body) = request.into_parts();
        let Ok(bytes) = body.collect().await.map(|body| body.to_bytes()) else {
            return Ok(Status::unavailable("the connection broke").into_http());
        };
        match bug.request(&self.etcd, method, bytes) {
            Verdict::Pass(bytes) => self.inner.call(Request::from_parts(parts, whole(bytes))).await,
            Verdict::Answered(said, later) => {
                if let Some(later) = later {
                    let request = Request::from_parts(parts, whole(later));
                    tokio::spawn(async move {
                        tokio::time::sleep(EARLY).await;
                        let _ = self.inner.call(request).await;
                    });
                }
                Ok(answer(said))
            }
        }
    }
}

impl<S> Service<Request<Body>> for UnreliableService<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let ready = self.inner.clone();
        let ready = Self {
            inner: std::mem::replace(&mut self.inner, ready),
            ..self.clone()
        };
        let path = request.uri().path();
        let method = path.rsplit('/').next().unwrap_or_default();
        let method = METHODS.into_iter().find(|known| *known == method).unwrap_or_default();
        let mut fate = self.world.fate_of_message();
        if let Fate::Twice(later) = fate
            && !REPEATABLE.contains(&method)
        {
            fate = Fate::Ghost(later);
        }
        Box::pin(async move {
            match fate {
                Fate::Fine => ready.serve(method, request).await,
                Fate::Late(time) => {
                    tokio::time::sleep(time).await;
                    ready.serve(method, request).await
                }
                _ if STREAMS.contains(&method) => ready.serve(method, request).await,
                Fate::Lost => Ok(Status::unavailable("the request was lost").into_http()),
                Fate::AnswerLost => {
                    ready.serve(method, request).await?;
                    Ok(Status::unavailable("the answer was lost").into_http())
                }
                Fate::Ghost(later) | Fate::Twice(later) => {
                    let (parts, body) = request.into_parts();
                    let Ok(bytes) = body.collect().await.map(|body| body.to_bytes()) else {
                        return Ok(Status::unavailable("the connection broke").into_http());
                    };
                    let again = Request::from_parts(parts.clone(), whole(bytes.clone()));
                    let second = ready.clone();
                    tokio::spawn(async move {
                        tokio::time::sleep(later).await;
                        let _ = second.serve(method, again).await;
                    });
                    if matches!(fate, Fate::Ghost(_)) {
                        return Ok(Status::unavailable("the connection broke").into_http());
                    }
                    ready.serve(method, Request::from_parts(parts, whole(bytes))).await
                }
            }
        })
    }
}

fn whole(bytes: Bytes) -> Body {
    Body::new(Full::new(bytes))
}
