use axum::{
    Router, extract::State, http::StatusCode, http::header::CONTENT_TYPE, response::IntoResponse, routing::get,
};
use prometheus_client::registry::Registry;
use std::net::SocketAddr;
use std::sync::Arc;

/// The admin server could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve admin HTTP on {address}: {source}")]
pub struct AdminError {
    address: SocketAddr,
    source: std::io::Error,
}

struct Admin {
    registry: Registry,
    ready: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Serves `/livez` (200 while the process answers at all), `/readyz` (200 or 503, as `ready`
/// says) and `/metrics` (OpenMetrics) in a task; returns when it listens, with the address.
pub async fn admin(
    address: SocketAddr,
    registry: Registry,
    ready: impl Fn() -> bool + Send + Sync + 'static,
) -> Result<SocketAddr, AdminError> {
    let failed = |source| AdminError { address, source };
    let listener = tokio::net::TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let state = Arc::new(Admin {
        registry,
        ready: Box::new(ready),
    });
    let router = Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(state);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "admin server ended");
        }
    });
    Ok(bound)
}

async fn readyz(State(admin): State<Arc<Admin>>) -> (StatusCode, &'static str) {
    if (admin.ready)() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}

async fn metrics(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &admin.registry) {
        Ok(()) => (
            StatusCode::OK,
            [(
                CONTENT_TYPE,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            )],
            text,
        ),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            [(CONTENT_TYPE, "text/plain")],
            error.to_string(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn request(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn live_is_not_ready() {
        let ready = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&ready);
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let address = admin(any, Registry::default(), move || flag.load(Ordering::Relaxed))
            .await
            .unwrap();
        assert!(request(address, "/livez").await.starts_with("HTTP/1.1 200"));
        assert!(request(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        ready.store(true, Ordering::Relaxed);
        assert!(request(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(request(address, "/metrics").await.contains("# EOF"));
    }
}
