//! Creates a volume if need be and copies a local file into it, without any mount:
//! `cargo run -p lazarette-client --example copy -- http://HOST:PORT VOLUME FILE NAME`.

use lazarette_client::{Cluster, CreateVolumeRequest, Kind, NewNode, OpenMode, Volume, VolumeOptions};
use lazarette_types::{ROOT_INODE, VolumeId};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [endpoint, volume, file, name] = &arguments[..] else {
        return Err("arguments: ENDPOINT VOLUME FILE NAME".into());
    };
    let cluster = Cluster::connect([endpoint])?;
    let record = cluster
        .create_volume(CreateVolumeRequest {
            name: volume.clone(),
            size: 1 << 30,
            ..CreateVolumeRequest::default()
        })
        .await?;
    let volume = Volume::mount(&cluster, VolumeId(record.id), VolumeOptions::default()).await?;
    let node = NewNode::new(Kind::File, 0o644);
    let truncate = OpenMode {
        truncate: true,
        ..OpenMode::default()
    };
    let (copy, _) = volume
        .create(ROOT_INODE.0, name.as_bytes(), node, false, truncate)
        .await?;
    copy.write(0, &std::fs::read(file)?).await?;
    copy.close().await?;
    volume.close().await?;
    Ok(())
}
