//! CSI's Identity service: who the driver is, and whether it can work.

use lazarette_proto::csi::identity_server::Identity;
use lazarette_proto::csi::plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion};
use lazarette_proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};
use std::future::Future;
use tonic::{Request, Response, Status};

/// Says whether the service beside this one can work now.
pub trait Ready: Send + Sync + 'static {
    /// Checks; must return within a second or two.
    fn ready(&self) -> impl Future<Output = bool> + Send;
}

/// The Identity service beside a controller or a node.
#[derive(Debug)]
pub struct IdentityService<R> {
    ready: R,
}

impl<R: Ready> IdentityService<R> {
    /// `ready` answers Probe.
    pub fn new(ready: R) -> Self {
        Self { ready }
    }
}

#[tonic::async_trait]
impl<R: Ready> Identity for IdentityService<R> {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: crate::DRIVER_NAME.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        // The plugin as a whole has a controller, whichever part is asked.
        let capabilities = [
            Type::Service(Service {
                r#type: service::Type::ControllerService.into(),
            }),
            Type::VolumeExpansion(VolumeExpansion {
                r#type: volume_expansion::Type::Online.into(),
            }),
        ]
        .map(|r#type| PluginCapability { r#type: Some(r#type) });
        Ok(Response::new(GetPluginCapabilitiesResponse {
            capabilities: capabilities.into(),
        }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse {
            ready: Some(self.ready.ready().await),
        }))
    }
}
