# syntax=docker/dockerfile:1

# One image with all of Lazarette's programs:
#   docker build -t registry.example.com/lazarette:0.1.0 .
# The same programs at the same paths as in the image that `cargo xtask` makes without an engine.

FROM rust:1.95.0-bookworm AS build
# For the generated code of etcd's client.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends protobuf-compiler libprotobuf-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked \
        --package lazarette-operator \
        --package lazarette-csi \
        --package lazarette-node \
        --package lazarette-mount \
    && install -D --mode=0755 --target-directory=/out \
        target/release/lazarette-operator \
        target/release/lazarette-csi \
        target/release/lazarette-node \
        target/release/lazarette-mount

# glibc and its name resolution, certificates, no shell.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /out/ /usr/bin/
# The pods that mount for others ask for root themselves.
USER 65532:65532
