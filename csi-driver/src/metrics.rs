//! Counts and times of the calls to a gRPC server, by method and code; and a line in the log for
//! each that failed.

use lazarette_telemetry::Registry;
use lazarette_telemetry::metrics::counter::Counter;
use lazarette_telemetry::metrics::family::Family;
use lazarette_telemetry::metrics::histogram::Histogram;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tonic::codegen::http;
use tonic::{Code, Status};
use tower::{Layer, Service};

type Labels = Vec<(&'static str, String)>;

/// Upper bounds in seconds.
const BUCKETS: [f64; 10] = [0.001, 0.005, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0];

/// The metrics, to be layered on a server.
#[derive(Clone, Debug)]
pub struct CallMetrics {
    calls: Family<Labels, Counter>,
    seconds: Family<Labels, Histogram, fn() -> Histogram>,
}

impl CallMetrics {
    /// Registers `lazarette_csi_calls_total` and `lazarette_csi_call_seconds`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            calls: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
        };
        registry.register(
            "lazarette_csi_calls",
            "CSI calls answered, by method and code",
            metrics.calls.clone(),
        );
        registry.register(
            "lazarette_csi_call_seconds",
            "Time to answer CSI calls, by method",
            metrics.seconds.clone(),
        );
        metrics
    }

    fn count(&self, path: &str, code: Code, took: Duration) {
        // Only names that exist, since a caller can send any.
        let method = match code {
            Code::Unimplemented => "unimplemented",
            _ => path.rsplit('/').next().unwrap_or_default(),
        };
        let method = ("method", method.to_owned());
        self.seconds
            .get_or_create(&vec![method.clone()])
            .observe(took.as_secs_f64());
        self.calls
            .get_or_create(&vec![method, ("code", format!("{code:?}"))])
            .inc();
    }
}

impl<S> Layer<S> for CallMetrics {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted {
            inner,
            metrics: self.clone(),
        }
    }
}

/// A service whose calls are counted.
#[derive(Clone, Debug)]
pub struct Counted<S> {
    inner: S,
    metrics: CallMetrics,
}

impl<S, B, R> Service<http::Request<B>> for Counted<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let start = Instant::now();
        let path = request.uri().path().to_owned();
        let metrics = self.metrics.clone();
        let call = self.inner.call(request);
        Box::pin(async move {
            let response = call.await?;
            // The status of a call that failed is in the headers; one that succeeded has it in the
            // trailers.
            let status = Status::from_header_map(response.headers());
            let code = status.as_ref().map_or(Code::Ok, Status::code);
            let took = start.elapsed();
            metrics.count(&path, code, took);
            match status.filter(|status| status.code() != Code::Ok) {
                Some(status) => {
                    tracing::warn!(method = path, code = ?code, error = status.message(), ?took, "call failed");
                }
                None => tracing::debug!(method = path, ?took, "call answered"),
            }
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_methods_share_a_label() {
        let mut registry = Registry::default();
        let metrics = CallMetrics::register(&mut registry);
        let took = Duration::from_millis(3);
        metrics.count("/csi.v1.Node/NodeStageVolume", Code::Ok, took);
        metrics.count("/csi.v1.Node/NodeStageVolume", Code::Aborted, took);
        metrics.count("/x/made-up-1", Code::Unimplemented, took);
        metrics.count("/x/made-up-2", Code::Unimplemented, took);
        let of = |method: &str, code: &str| {
            let labels = vec![("method", method.to_owned()), ("code", code.to_owned())];
            metrics.calls.get_or_create(&labels).get()
        };
        assert_eq!(of("NodeStageVolume", "Ok"), 1);
        assert_eq!(of("NodeStageVolume", "Aborted"), 1);
        assert_eq!(of("unimplemented", "Unimplemented"), 2);
    }
}
