"""`embed --decoder nvimagecodec`: the rows of Pillow's run in a store of its own kind, proven before it is filled."""

import json

import numpy as np
import pytest
from conftest import mgn_deploy

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_inputs
from mgn_deploy.gallery.store import Store

pytest.importorskip("nvidia.nvimgcodec", reason="the extra nvimagecodec is not installed")
from mgn_deploy.images.nvimagecodec import NvImageCodec


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(40):
        draw_crop(number % 5 + 1, 1, number).save(folder / f"{number:02}.{'png' if number == 7 else 'jpg'}")
    (folder / "broken.jpg").write_bytes((folder / "00.jpg").read_bytes()[:700])
    return folder


def test_the_store_has_pillows_rows_and_says_what_decoded_it(images, embedder, tmp_path, said):
    pillow = embed_folder(images, tmp_path / "pillow", embedder)
    report = embed_folder(images, tmp_path / "codec", embedder, decoder="nvimagecodec", profile=True)
    one, other = Store.open(tmp_path / "pillow"), Store.open(tmp_path / "codec")
    assert other.rows == one.rows
    assert report.failed == pillow.failed
    read = [row.error is None for row in one.rows]
    cosines = (one.embeddings()[read] * other.embeddings()[read]).sum(axis=1)
    assert cosines.min() > 1 - 1e-6
    assert one.manifest.preprocessing == "pillow-bicubic-1"
    assert other.manifest.preprocessing.startswith("nvimagecodec-")
    assert (report.decoder.images, report.decoder.by_pillow) == (32, 1)
    assert report.decoder.largest_distance < 1e-6
    assert "images that are no whole JPEG and were decoded by Pillow: 1" in said
    assert {stage for stage, seconds in report.profile.threads().items() if seconds} >= {"read", "decode", "resize"}


def test_pixels_of_two_decoders_are_not_mixed(images, embedder, tmp_path):
    embed_folder(images, tmp_path / "store", embedder)
    with pytest.raises(UserError, match="was made with preprocessing"):
        embed_folder(images, tmp_path / "store", embedder, decoder="nvimagecodec")


def test_pixels_that_move_embeddings_are_refused_before_a_store_is_made(images, embedder, tmp_path, monkeypatch):
    resize = NvImageCodec.resize
    monkeypatch.setattr(NvImageCodec, "resize", lambda *given: np.roll(resize(*given), 1, axis=1))
    with pytest.raises(GateFailed, match="use --decoder pillow"):
        embed_folder(images, tmp_path / "store", embedder, decoder="nvimagecodec")
    assert not (tmp_path / "store").exists()


def test_boxes_are_cut_as_by_pillow(images, embedder, tmp_path):
    boxes = tmp_path / "boxes.csv"
    lines = ["path,left,top,width,height"]
    lines += [f"{n:02}.jpg,{n / 2},{n},{30 + n / 3},{80}" for n in range(5)] + ["06.jpg,500,500,30,40"]
    boxes.write_text("\n".join(lines))
    stores = []
    for decoder in ("pillow", "nvimagecodec"):
        source = open_inputs([str(images)], boxes=boxes)
        embed_folder(source, tmp_path / decoder, embedder, decoder=decoder)
        stores.append(Store.open(tmp_path / decoder))
    assert stores[0].rows == stores[1].rows
    assert sum(row.error is None for row in stores[0].rows) == 5
    np.testing.assert_allclose(stores[0].embeddings(), stores[1].embeddings(), atol=1e-4, equal_nan=True)


def test_the_command_has_the_proof_in_its_json(images, bundle_folder, tmp_path):
    options = ("--backend", "onnxruntime", "--decoder", "nvimagecodec", "--json")
    result = mgn_deploy("embed", images, "-o", tmp_path / "s", "--bundle", bundle_folder, *options)
    assert json.loads(result.stdout)["decoder"]["images"] == 32
