//! The Controller service in front of a cluster.

#![allow(clippy::unwrap_used, clippy::panic)]

mod stand_in;

use lazarette_csi::cluster::Clusters;
use lazarette_csi::controller::ControllerService;
use lazarette_proto::csi::controller_server::Controller;
use lazarette_proto::csi::volume_capability::access_mode::Mode;
use lazarette_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use lazarette_proto::csi::*;
use stand_in::{FakeCluster, NODE_BYTES, NODES};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tonic::{Code, Request, Status};

const GIB: i64 = 1 << 30;

struct Bench {
    cluster: FakeCluster,
    clusters: Arc<Clusters>,
    service: Arc<ControllerService>,
}

async fn bench() -> Bench {
    let cluster = FakeCluster::default();
    let template = cluster.serve().await.parse().unwrap();
    let known = "default/test".parse().unwrap();
    let clusters = Arc::new(Clusters::new(template, [known]));
    let service = Arc::new(ControllerService::new(Arc::clone(&clusters), "default".to_owned()));
    Bench {
        cluster,
        clusters,
        service,
    }
}

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode {
            mode: Mode::MultiNodeMultiWriter.into(),
        }),
        access_type: Some(AccessType::Mount(MountVolume::default())),
    }
}

fn request(name: &str, required_bytes: i64, limit_bytes: i64) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(CapacityRange {
            required_bytes,
            limit_bytes,
        }),
        volume_capabilities: vec![capability()],
        parameters: HashMap::from([("cluster".to_owned(), "test".to_owned())]),
        ..CreateVolumeRequest::default()
    }
}

fn with(mut request: CreateVolumeRequest, parameters: &[(&str, &str)]) -> CreateVolumeRequest {
    for (name, value) in parameters {
        request.parameters.insert((*name).to_owned(), (*value).to_owned());
    }
    request
}

impl Bench {
    async fn create(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let response = self.service.create_volume(Request::new(request)).await?;
        Ok(response.into_inner().volume.unwrap())
    }

    async fn refused(&self, request: CreateVolumeRequest, code: Code, words: &str) {
        let before = self.cluster.volumes();
        let error = self.create(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(words), "{error}");
        assert_eq!(self.cluster.volumes(), before, "a refusal changed something");
    }

    async fn delete(&self, volume_id: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest {
            volume_id: volume_id.to_owned(),
            ..DeleteVolumeRequest::default()
        };
        let mut request = Request::new(request);
        request.set_timeout(Duration::from_secs(1));
        self.service.delete_volume(request).await.map(|_| ())
    }

    async fn expand(&self, volume_id: &str, required_bytes: i64, limit_bytes: i64) -> Result<i64, Status> {
        let request = ControllerExpandVolumeRequest {
            volume_id: volume_id.to_owned(),
            capacity_range: Some(CapacityRange {
                required_bytes,
                limit_bytes,
            }),
            volume_capability: Some(capability()),
            ..ControllerExpandVolumeRequest::default()
        };
        let response = self.service.controller_expand_volume(Request::new(request)).await?;
        let response = response.into_inner();
        assert!(!response.node_expansion_required);
        Ok(response.capacity_bytes)
    }

    async fn list(&self, max_entries: i32, starting_token: &str) -> Result<(Vec<String>, String), Status> {
        let request = ListVolumesRequest {
            max_entries,
            starting_token: starting_token.to_owned(),
        };
        let response = self.service.list_volumes(Request::new(request)).await?.into_inner();
        let ids = response
            .entries
            .into_iter()
            .map(|entry| entry.volume.unwrap().volume_id);
        Ok((ids.collect(), response.next_token))
    }

    async fn capacity(&self, request: GetCapacityRequest) -> Result<i64, Status> {
        let response = self.service.get_capacity(Request::new(request)).await?;
        Ok(response.into_inner().available_capacity)
    }
}

#[tokio::test]
async fn a_volume_from_its_making_to_its_end() {
    let bench = bench().await;
    let wanted = with(
        request("pvc-1", GIB + 1, 0),
        &[
            ("copies", "2"),
            ("ack", "1"),
            ("chunkSize", "8Mi"),
            ("csi.storage.k8s.io/pvc/name", "data"),
        ],
    );
    let volume = bench.create(wanted.clone()).await.unwrap();
    assert_eq!(volume.volume_id, "default/test/1");
    assert_eq!(volume.capacity_bytes, GIB + (1 << 20), "rounded up to MiB");
    assert_eq!(volume.volume_context["volume"], "1");
    assert!(volume.volume_context["endpoint"].starts_with("http://127.0.0.1:"));
    let made = &bench.cluster.volumes()[0];
    let policy = made.replication.unwrap();
    assert_eq!((policy.copies, policy.ack, made.chunk_size), (2, 1, 8 << 20));
    assert_eq!(made.labels["csi.storage.k8s.io/pvc/name"], "data");

    assert_eq!(bench.create(wanted).await.unwrap(), volume, "made twice");
    let got = bench
        .service
        .controller_get_volume(Request::new(ControllerGetVolumeRequest {
            volume_id: volume.volume_id.clone(),
        }))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(got.volume, Some(volume.clone()));

    bench.cluster.set_sessions(1, 1);
    let error = bench.delete(&volume.volume_id).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    bench.cluster.set_sessions(1, 0);
    bench.delete(&volume.volume_id).await.unwrap();
    bench.delete(&volume.volume_id).await.unwrap();
    assert!(bench.cluster.volumes().is_empty());
}

#[tokio::test]
async fn a_count_of_clients_that_lags_is_waited_for() {
    let bench = bench().await;
    let volume_id = bench.create(request("pvc-1", GIB, 0)).await.unwrap().volume_id;
    bench.cluster.set_sessions(1, 1);
    let service = Arc::clone(&bench.service);
    let deleting = tokio::spawn(async move {
        let request = DeleteVolumeRequest {
            volume_id,
            ..DeleteVolumeRequest::default()
        };
        service.delete_volume(Request::new(request)).await
    });
    stand_in::eventually("a first refusal", || bench.cluster.in_use() > 0).await;
    bench.cluster.set_sessions(1, 0);
    deleting.await.unwrap().unwrap();
    assert!(bench.cluster.volumes().is_empty());
}

#[tokio::test]
async fn what_is_not_said_is_left_to_the_cluster() {
    let bench = bench().await;
    let mut wanted = request("pvc-1", 0, 0);
    wanted.capacity_range = None;
    let volume = bench.create(wanted).await.unwrap();
    assert_eq!(volume.capacity_bytes, GIB);
    let sent = &bench.cluster.created()[0];
    assert_eq!((sent.replication, sent.chunk_size), (None, 0));
}

#[tokio::test]
async fn bad_requests_are_refused_by_name() {
    let bench = bench().await;
    let good = || request("pvc-1", GIB, 0);
    let invalid = Code::InvalidArgument;
    bench.refused(request("", GIB, 0), invalid, "name is missing").await;
    bench
        .refused(request("a\tb", GIB, 0), invalid, "control characters")
        .await;
    bench
        .refused(
            with(good(), &[("replicas", "3")]),
            invalid,
            "unknown parameter \"replicas\"",
        )
        .await;
    bench.refused(with(good(), &[("ack", "4")]), invalid, "ack is 4").await;
    let mut wanted = good();
    wanted.parameters.clear();
    bench.refused(wanted, invalid, "\"cluster\" is missing").await;
    let mut wanted = good();
    wanted.volume_capabilities.clear();
    bench.refused(wanted, invalid, "volume_capability is missing").await;
    let mut wanted = good();
    wanted.volume_capabilities[0].access_type = Some(AccessType::Block(BlockVolume {}));
    bench.refused(wanted, invalid, "block volumes").await;
    let mut wanted = good();
    wanted.volume_content_source = Some(VolumeContentSource {
        r#type: Some(volume_content_source::Type::Snapshot(
            volume_content_source::SnapshotSource {
                snapshot_id: "s".to_owned(),
            },
        )),
    });
    bench.refused(wanted, invalid, "volume_content_source").await;
    let mut wanted = good();
    wanted.mutable_parameters.insert("a".to_owned(), "b".to_owned());
    bench.refused(wanted, invalid, "mutable_parameters").await;
    bench
        .refused(request("x", 0, 0), Code::OutOfRange, "asks for 0 bytes")
        .await;
    bench
        .refused(request("x", -1, 0), Code::OutOfRange, "required_bytes")
        .await;
    bench
        .refused(request("x", 2 * GIB, GIB), Code::OutOfRange, "limit_bytes")
        .await;
    bench.refused(request("x", 1, 2), Code::OutOfRange, "whole MiB").await;
    // Of the cluster's own making: the reason must reach the claim's events.
    bench
        .refused(with(good(), &[("copies", "4")]), Code::ResourceExhausted, "there are 3")
        .await;
}

#[tokio::test]
async fn a_name_that_is_taken_is_compared() {
    let bench = bench().await;
    let volume = bench.create(request("pvc-1", 10 * GIB, 0)).await.unwrap();
    // What exists will do.
    for (required, limit) in [(5 * GIB, 0), (10 * GIB, 10 * GIB), (1, 20 * GIB)] {
        let again = bench.create(request("pvc-1", required, limit)).await.unwrap();
        assert_eq!(again, volume, "{required}..{limit}");
    }
    let taken = Code::AlreadyExists;
    bench
        .refused(request("pvc-1", 11 * GIB, 0), taken, "10737418240 bytes")
        .await;
    bench
        .refused(request("pvc-1", GIB, 5 * GIB), taken, "10737418240 bytes")
        .await;
    bench
        .refused(
            with(request("pvc-1", 10 * GIB, 0), &[("copies", "2")]),
            taken,
            "copies 3",
        )
        .await;
    bench
        .refused(
            with(request("pvc-1", 10 * GIB, 0), &[("chunkSize", "1Mi")]),
            taken,
            "chunks of 4194304",
        )
        .await;
}

#[tokio::test]
async fn handles_of_others_are_no_volumes() {
    let bench = bench().await;
    for id in ["fake", "default/test/x", "default/test/007", "default/test/99"] {
        bench.delete(id).await.unwrap();
        let error = bench.expand(id, GIB, 0).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{id}: {error}");
    }
    assert_eq!(bench.delete("").await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn volumes_grow_and_never_shrink() {
    let bench = bench().await;
    let id = bench.create(request("pvc-1", 2 * GIB, 0)).await.unwrap().volume_id;
    assert_eq!(bench.expand(&id, 3 * GIB, 0).await.unwrap(), 3 * GIB);
    assert_eq!(bench.expand(&id, 3 * GIB, 0).await.unwrap(), 3 * GIB, "twice");
    assert_eq!(bench.expand(&id, GIB, 0).await.unwrap(), 3 * GIB, "large enough");
    assert_eq!(bench.expand(&id, 3 * GIB + 1, 0).await.unwrap(), 3 * GIB + (1 << 20));
    for (required, limit) in [(GIB, 2 * GIB), (0, 0), (-1, 0), (5 * GIB, 4 * GIB)] {
        let error = bench.expand(&id, required, limit).await.unwrap_err();
        assert_eq!(error.code(), Code::OutOfRange, "{required}..{limit}: {error}");
    }
    let mut request = ControllerExpandVolumeRequest {
        volume_id: id,
        ..ControllerExpandVolumeRequest::default()
    };
    let error = bench
        .service
        .controller_expand_volume(Request::new(request.clone()))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "no range: {error}");
    request.volume_id.clear();
    let error = bench
        .service
        .controller_expand_volume(Request::new(request))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "no id: {error}");
}

#[tokio::test]
async fn pages_neither_repeat_nor_miss() {
    let bench = bench().await;
    for number in 1..=5 {
        bench.create(request(&format!("pvc-{number}"), GIB, 0)).await.unwrap();
    }
    let id = |number: u32| format!("default/test/{number}");
    let (all, token) = bench.list(0, "").await.unwrap();
    assert_eq!((all.len(), token.as_str()), (5, ""));
    let (exact, token) = bench.list(5, "").await.unwrap();
    assert_eq!((exact.len(), token.as_str()), (5, ""), "no empty last page");

    let (first, token) = bench.list(2, "").await.unwrap();
    assert_eq!(first, [id(1), id(2)]);
    // The last of the page goes, and one comes.
    bench.delete(&id(2)).await.unwrap();
    bench.create(request("pvc-6", GIB, 0)).await.unwrap();
    let (second, token) = bench.list(2, &token).await.unwrap();
    assert_eq!(second, [id(3), id(4)]);
    let (third, token) = bench.list(0, &token).await.unwrap();
    assert_eq!((third, token.as_str()), (vec![id(5), id(6)], ""));

    assert_eq!(bench.list(0, "junk").await.unwrap_err().code(), Code::Aborted);
    assert_eq!(bench.list(-1, "").await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn pages_go_on_from_cluster_to_cluster() {
    let bench = bench().await;
    // The stand-in answers for both, so each volume is seen twice.
    for number in 1..=3 {
        let wanted = with(request(&format!("pvc-{number}"), GIB, 0), &[("cluster", "another")]);
        bench.create(wanted).await.unwrap();
    }
    assert_eq!(bench.clusters.known().len(), 2, "a cluster is known once it was named");
    let mut pages = Vec::new();
    let mut token = String::new();
    loop {
        let (page, next) = bench.list(2, &token).await.unwrap();
        assert!(page.len() <= 2 && pages.len() < 6, "endless: {pages:?}");
        pages.extend(page);
        if next.is_empty() {
            break;
        }
        token = next;
    }
    let expected: Vec<_> = ["default/another", "default/test"]
        .iter()
        .flat_map(|cluster| (1..=3).map(move |number| format!("{cluster}/{number}")))
        .collect();
    assert_eq!(pages, expected);
}

#[tokio::test]
async fn capacity_is_what_new_volumes_can_hold() {
    let bench = bench().await;
    let all = i64::try_from(u64::from(NODES) * NODE_BYTES).unwrap();
    let parameters = |pairs: &[(&str, &str)]| GetCapacityRequest {
        parameters: with(request("", 0, 0), pairs).parameters,
        ..GetCapacityRequest::default()
    };
    assert_eq!(bench.capacity(GetCapacityRequest::default()).await.unwrap(), all / 3);
    assert_eq!(bench.capacity(parameters(&[])).await.unwrap(), all / 3);
    assert_eq!(bench.capacity(parameters(&[("copies", "1")])).await.unwrap(), all);
    assert_eq!(bench.capacity(parameters(&[("copies", "4")])).await.unwrap(), 0);
    let block = VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        ..capability()
    };
    let unsupported = GetCapacityRequest {
        volume_capabilities: vec![block],
        ..parameters(&[])
    };
    assert_eq!(bench.capacity(unsupported).await.unwrap(), 0);
    let error = bench.capacity(parameters(&[("x", "y")])).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn capabilities_are_confirmed_or_not() {
    let bench = bench().await;
    let wanted = request("pvc-1", GIB, 0);
    let volume_id = bench.create(wanted.clone()).await.unwrap().volume_id;
    let validate = async |volume_capabilities: Vec<VolumeCapability>, parameters: &[(&str, &str)]| {
        let request = ValidateVolumeCapabilitiesRequest {
            volume_id: volume_id.clone(),
            volume_capabilities,
            parameters: with(wanted.clone(), parameters).parameters,
            ..ValidateVolumeCapabilitiesRequest::default()
        };
        let response = bench
            .service
            .validate_volume_capabilities(Request::new(request))
            .await
            .unwrap()
            .into_inner();
        (response.confirmed.is_some(), response.message)
    };
    assert_eq!(validate(vec![capability()], &[]).await, (true, String::new()));
    let block = VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        ..capability()
    };
    let (confirmed, message) = validate(vec![capability(), block], &[]).await;
    assert!(!confirmed && message.contains("block volumes"), "{message}");
    let (confirmed, message) = validate(vec![capability()], &[("copies", "1")]).await;
    assert!(!confirmed && message.contains("copies 3"), "{message}");
    let (confirmed, message) = validate(vec![capability()], &[("cluster", "other")]).await;
    assert!(!confirmed && message.contains("default/test"), "{message}");
}

#[tokio::test]
async fn a_cluster_that_fails_over_is_waited_for() {
    let bench = bench().await;
    bench.cluster.refuse(3);
    bench.create(request("pvc-1", GIB, 0)).await.unwrap();
    assert_eq!(bench.cluster.volumes().len(), 1);

    bench.cluster.refuse(u32::MAX);
    let mut late = Request::new(request("pvc-2", GIB, 0));
    late.set_timeout(Duration::from_millis(300));
    let error = bench.service.create_volume(late).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("failing over"), "{error}");
}

#[tokio::test]
async fn the_same_volume_twice_at_once_is_aborted() {
    let bench = bench().await;
    bench.cluster.refuse(u32::MAX);
    let service = Arc::clone(&bench.service);
    let first = tokio::spawn(async move { service.create_volume(Request::new(request("pvc-1", GIB, 0))).await });
    // Once the first is seen at the cluster, the second finds it under way.
    stand_in::eventually("the first call", || bench.cluster.refusals() < u32::MAX).await;
    let error = bench.create(request("pvc-1", GIB, 0)).await.unwrap_err();
    assert_eq!(error.code(), Code::Aborted, "{error}");
    bench.cluster.refuse(0);
    first.await.unwrap().unwrap();
    bench.create(request("pvc-1", GIB, 0)).await.unwrap();
    assert_eq!(bench.cluster.volumes().len(), 1);
}
