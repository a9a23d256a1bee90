use crate::{Error, Result};
use lazarette_proto::{FRAME_BYTES, MAX_MESSAGE_BYTES, chunk, cluster, meta};
use lazarette_types::ErrorCode;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

/// A connection is made within this time or the attempt fails.
const CONNECT: Duration = Duration::from_secs(1);
/// A silent peer is asked for a sign of life after the interval and given up after the time-out.
const PING_INTERVAL: Duration = Duration::from_millis(700);
const PING_TIMEOUT: Duration = Duration::from_millis(1000);
/// h2 windows: its default of 64 KiB would stop a stream of chunks at every round trip.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// What a connection is used for; bulk data must not delay metadata.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Purpose {
    Metadata,
    Data,
}

/// Makes the connection to an endpoint; it may connect later.
pub type Dial = Arc<dyn Fn(&Endpoint) -> Channel + Send + Sync>;

/// Connections by address, made when first used and kept; tonic reconnects a broken one.
pub(crate) struct Channels {
    dial: Dial,
    open: Mutex<HashMap<(Purpose, String), Channel>>,
}

impl Channels {
    pub(crate) fn new(dial: Dial) -> Self {
        let open = Mutex::default();
        Self { dial, open }
    }

    fn get(&self, purpose: Purpose, address: &str) -> Result<Channel> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = open.get(&(purpose, address.to_string())) {
            return Ok(channel.clone());
        }
        let uri = if address.contains("://") {
            address.to_string()
        } else {
            format!("http://{address}")
        };
        let endpoint = Endpoint::from_shared(uri)
            .map_err(|_| {
                Error::new(
                    ErrorCode::InvalidArgument,
                    format!("endpoint {address:?} is not a URL; use http://host:port"),
                )
            })?
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .max_frame_size(FRAME_BYTES)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let channel = (self.dial)(&endpoint);
        open.insert((purpose, address.to_string()), channel.clone());
        Ok(channel)
    }

    pub(crate) fn cluster(&self, address: &str) -> Result<cluster::cluster_client::ClusterClient<Channel>> {
        Ok(
            cluster::cluster_client::ClusterClient::new(self.get(Purpose::Metadata, address)?)
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
    }

    pub(crate) fn meta(&self, address: &str) -> Result<meta::meta_client::MetaClient<Channel>> {
        Ok(
            meta::meta_client::MetaClient::new(self.get(Purpose::Metadata, address)?)
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
    }

    pub(crate) fn chunk(&self, address: &str) -> Result<chunk::chunk_client::ChunkClient<Channel>> {
        Ok(chunk::chunk_client::ChunkClient::new(self.get(Purpose::Data, address)?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }
}
