//! Registration with the kubelet, which watches a folder for sockets.

use lazarette_proto::registration::registration_server::Registration;
use lazarette_proto::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tonic::{Request, Response, Status};

/// The socket in the kubelet's `plugins_registry` folder.
///
/// The `@` matters. The kubelet connects without naming an authority, so its gRPC library sends
/// the percent-encoded path as HTTP/2's `:authority`. A `%` is malformed in a host name and our
/// HTTP/2 library refuses such requests; but it is fine in user information, which is everything
/// before an `@`.
pub fn socket(kubelet_dir: &Path) -> PathBuf {
    kubelet_dir
        .join("plugins_registry")
        .join(format!("{}@reg.sock", crate::DRIVER_NAME))
}

/// The Registration service.
#[derive(Clone, Debug)]
pub struct RegistrationService {
    endpoint: String,
    registered: Arc<AtomicBool>,
}

impl RegistrationService {
    /// `endpoint` is the CSI socket's path as the kubelet sees it.
    pub fn new(endpoint: String) -> Self {
        Self {
            endpoint,
            registered: Arc::default(),
        }
    }

    /// Whether the kubelet said that it has registered the driver.
    pub fn registered(&self) -> bool {
        self.registered.load(Ordering::Relaxed)
    }
}

#[tonic::async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: crate::DRIVER_NAME.to_owned(),
            endpoint: self.endpoint.clone(),
            // The version of the kubelet's side of CSI, not of the specification.
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        self.registered.store(status.plugin_registered, Ordering::Relaxed);
        if status.plugin_registered {
            tracing::info!("registered with the kubelet");
        } else {
            // The kubelet tries again by itself.
            tracing::error!(error = status.error, "the kubelet refused the registration");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
