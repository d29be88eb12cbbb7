"""A Ray cluster of two nodes writes the bytes that one process writes, whoever dies meanwhile."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_kills import Killer, two_nodes
from conftest import mgn_deploy
from embedding_runs import assert_same_store, counts, refusal

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import write_manifest
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery import writer
from mgn_deploy.gallery.cluster import embed_on_cluster
from mgn_deploy.gallery.cluster_connection import Cluster
from mgn_deploy.gallery.embed import GalleryReport, embed_folder
from mgn_deploy.gallery.sources import Source
from mgn_deploy.images.listing import ImageFile
from mgn_deploy.machine import this_cpu

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture
def images(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The forty drawn crops and one that cannot be read, embedded in shards of eight."""
    monkeypatch.setattr(writer, "SHARD_ROWS", 8)
    shutil.copytree(crops, tmp_path / "images")
    (tmp_path / "images/camera 1/0005_broken.jpg").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture
def one(images: Path, tmp_path: Path, embedder: Embedder) -> Path:
    """The store that one process makes of `images`."""
    embed_folder(images, tmp_path / "one", embedder, labels="folder")
    return tmp_path / "one"


def on_cluster(images: Path, store: Path, bundle: Path) -> GalleryReport:
    return embed_on_cluster(images, store, bundle, Cluster("auto", (1, 4)), backend="onnxruntime", labels="folder")


def test_nothing_is_reported_of_the_use_of_ray(nodes):
    from ray._common.usage import usage_lib

    assert not usage_lib.usage_stats_enabled()


def test_what_workers_are_warned_of_is_told(nodes, images, bundle_folder, tmp_path, caplog):
    """Here that the engine was proven on another machine."""
    moved = tmp_path / "moved"
    shutil.copytree(bundle_folder, moved)
    manifest = Bundle.open(bundle_folder).manifest
    elsewhere = this_cpu().model_copy(update={"cpu": "another CPU"})
    proofs = {name: proof.model_copy(update={"hardware": elsewhere}) for name, proof in manifest.proofs.items()}
    write_manifest(moved, manifest.model_copy(update={"proofs": proofs}))
    on_cluster(images, tmp_path / "many", moved)
    assert re.search(r"on another CPU .* \(by workers of the cluster; how often: [1-4]\)", caplog.text)


def test_four_workers_write_the_bytes_of_one_process_and_go_on_like_it(
    nodes, images, one, bundle_folder, embedder, tmp_path
):
    many = tmp_path / "many"
    first = on_cluster(images, many, bundle_folder)
    assert counts(first) == (40, 0, 1, 0)
    assert first.proof == embedder.proof
    assert_same_store(many, one)
    # The last shard is not whole, one image has changed, and one fails as before.
    for number in range(12):
        shutil.copy(images / "camera 1/0001_c1s1_000000_00.jpg", images / f"new {number}.jpg")
    shutil.copy(images / "camera 2/0002_c2s1_000000_00.jpg", images / "camera 1/0003_c1s1_000001_00.jpg")
    embed_folder(images, one, embedder, labels="folder")
    assert counts(on_cluster(images, many, bundle_folder)) == (13, 39, 1, 0)
    assert_same_store(many, one)


def test_workers_and_a_node_that_die_lose_nothing_and_double_nothing(nodes, images, one, bundle_folder, tmp_path):
    many = tmp_path / "many"
    with Killer(nodes, many / "parts", seed=1, workers=1, nodes_too=1) as killer:
        assert counts(on_cluster(images, many, bundle_folder)) == (40, 0, 1, 0)
    assert killer.workers + killer.nodes > 0
    assert_same_store(many, one)


@pytest.mark.parametrize(
    "options", [["--profile"], ["--batch", "auto"], ["--server", "http://localhost:1"]], ids=lambda options: options[0]
)
def test_what_belongs_to_one_process_is_refused_beside_a_cluster(crops, tmp_path, options):
    refused = mgn_deploy("embed", crops, "-o", tmp_path / "store", "--bundle", "none", "--cluster", "local", *options)
    assert refused.exit_code == 2
    assert options[0] in refused.stderr


def test_a_cluster_is_named_by_an_address_and_a_range():
    assert "ray://HOST:PORT" in refusal(UserError, Cluster, "head:10001")
    assert "4 to 2 workers" in refusal(UserError, Cluster, "auto", (4, 2))


def test_objects_in_the_memory_of_this_process_are_refused(tmp_path):
    source = Source("memory://bucket", "a bucket", [ImageFile(None, "a.jpg")])
    refused = refusal(UserError, embed_on_cluster, source, tmp_path / "store", tmp_path / "bundle", Cluster("local"))
    assert "memory of this process" in refused
