//! Compiles the protocol files with protox, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "lazarette/cluster.proto",
        "lazarette/meta.proto",
        "lazarette/chunk.proto",
        "lazarette/mount.proto",
        "csi/csi.proto",
        "kubelet/pluginregistration.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::codec::Codec")
        .compile_fds(descriptors)?;
    Ok(())
}
