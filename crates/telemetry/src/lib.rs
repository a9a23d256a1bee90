//! Logs, metrics and the admin HTTP server of every binary.

mod admin;

pub use admin::{AdminError, admin};
pub use prometheus_client::{metrics, registry::Registry};

use tracing_subscriber::EnvFilter;

/// Starts logging to standard error: JSON, or plain text if `LAZARETTE_LOG_FORMAT=text`. The
/// filter comes from `LAZARETTE_LOG` (tracing's directives), by default `info`.
pub fn init(component: &'static str) {
    let filter = EnvFilter::try_from_env("LAZARETTE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second call, as in tests that start several parts in one process, changes nothing.
    let _ = if std::env::var("LAZARETTE_LOG_FORMAT").is_ok_and(|format| format == "text") {
        builder.try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
    tracing::info!(component, version = env!("CARGO_PKG_VERSION"), "starting");
}
