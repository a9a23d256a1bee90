//! Connections over the simulated network.

use futures::Stream;
use hyper_util::rt::TokioIo;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::codegen::http::Uri;
use tonic::transport::Channel;
use tonic::transport::server::Connected;
use turmoil::net::{TcpListener, TcpStream};

/// Where storage nodes serve.
pub(crate) const PORT: u16 = 7400;

async fn connect(to: Uri) -> io::Result<TokioIo<TcpStream>> {
    let host = to.host().unwrap_or_default().to_owned();
    let stream = TcpStream::connect((host, to.port_u16().unwrap_or(PORT))).await?;
    Ok(TokioIo::new(stream))
}

/// How clients connect.
pub(crate) fn dial_of_client() -> lazarette_client::Dial {
    Arc::new(|endpoint| endpoint.connect_with_connector_lazy(tower::service_fn(connect)))
}

/// How storage nodes connect to each other.
pub(crate) fn dial_of_node() -> lazarette_node::replication::Dial {
    Arc::new(|address| -> Result<Channel, _> {
        let endpoint = lazarette_node::replication::endpoint(format!("http://{address}"))?;
        Ok(endpoint.connect_with_connector_lazy(tower::service_fn(connect)))
    })
}

/// The connections that come in at [`PORT`] of the present host.
pub(crate) async fn listen() -> io::Result<impl Stream<Item = io::Result<Accepted>>> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    Ok(futures::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| Accepted(stream));
        Some((accepted, listener))
    }))
}

/// A connection, as tonic's server wants it.
pub(crate) struct Accepted(TcpStream);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
