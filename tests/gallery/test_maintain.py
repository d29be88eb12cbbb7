"""Stores are verified, mended, pruned, compacted, joined and exported without a row lost or moved."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import mgn_deploy

from mgn_deploy.errors import UserError
from mgn_deploy.gallery import inputs
from mgn_deploy.gallery import shards as shards_module
from mgn_deploy.gallery import writer as writer_module
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.export import export_store
from mgn_deploy.gallery.inputs import open_source, part_of
from mgn_deploy.gallery.maintain import compact, merge, prune, repair, verify
from mgn_deploy.gallery.relocate import relocate
from mgn_deploy.gallery.store import Store


@pytest.fixture(autouse=True)
def small_shards(monkeypatch) -> None:
    for module in (shards_module, writer_module, inputs):
        monkeypatch.setattr(module, "SHARD_ROWS", 8)


@pytest.fixture
def folder(crops, tmp_path) -> Path:
    shutil.copytree(crops, tmp_path / "images")
    (tmp_path / "images/bad.jpg").touch()
    return tmp_path / "images"


@pytest.fixture
def store(folder, embedder, tmp_path) -> Path:
    embed_folder(folder, tmp_path / "s", embedder, labels="market1501")
    return tmp_path / "s"


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def embeddings(store: Path) -> dict[str, bytes]:
    opened = Store.open(store)
    return {row.name: opened[row.name].tobytes() for row in opened}


def break_shard(store: Path, number: int, kind: str) -> None:
    [path] = store.glob(f"shard-{number:05d}-*.{kind}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def refusal(action, *arguments) -> str:
    with pytest.raises(UserError) as refused:
        action(*arguments)
    return str(refused.value)


def test_whole_store_is_verified(store):
    found = verify(store)
    assert (found.shards, found.rows, found.without_hash, found.damaged) == (6, 41, 0, [])


def labels(store: Path) -> dict[str, tuple[int | None, int | None]]:
    return {row.name: (row.identity, row.camera) for row in Store.open(store)}


def check_embeddings(store: Path, expected: dict[str, bytes]) -> None:
    found = embeddings(store)
    assert found.keys() == expected.keys()
    for name, row in found.items():
        assert np.allclose(np.frombuffer(row, "f4"), np.frombuffer(expected[name], "f4"), atol=1e-6)


def test_repair_names_what_is_broken_and_embeds_it_again(store):
    before, labelled = embeddings(store), labels(store)
    [rows] = store.glob("shard-00002-*.parquet")
    break_shard(store, 2, "npy")
    [damage] = verify(store).damaged
    assert damage.rows == 8
    assert damage.reason.endswith("is damaged (its SHA-256 is not the manifest's)")
    assert damage.to_dict()["images"] == pq.read_table(rows).column("path").to_pylist()
    dropped, report = repair(store)
    assert dropped == [damage]
    assert report.embedded == 8
    check_embeddings(store, before)
    assert labels(store) == labelled
    assert verify(store).damaged == []


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_repair_without_names_or_bundle_drops_and_embed_makes_it_again(store, folder, embedder, kind, said):
    before = embeddings(store)
    break_shard(store, 2, kind)
    if kind == "npy":
        path = store / "manifest.json"
        path.write_text(path.read_text().replace(str(embedder.bundle.folder), "/nowhere"))
    dropped, report = repair(store)
    assert ([damage.rows for damage in dropped], report) == ([8], None)
    assert len(Store.open(store)) == 32
    told = "not embedded again: .*which is no longer in /nowhere: give --bundle"
    assert bool(re.search(told, " ".join(said))) == (kind == "npy")
    assert embed_folder(folder, store, embedder, labels="market1501").embedded == 8
    check_embeddings(store, before)


def test_prune_removes_the_images_that_are_gone_and_no_others(store, folder):
    before = embeddings(store)
    gone = sorted(folder.rglob("*_c1*.jpg"))[:11]
    for path in gone:
        path.unlink()
    names = [file.name for file in open_source(folder).files]
    assert prune(store, names) == 11
    assert embeddings(store) == {name: value for name, value in before.items() if name in names}
    assert verify(store).damaged == []
    assert len(Store.open(store).failures) == 1


def test_prune_that_would_empty_a_store_is_refused(store):
    assert "none of its 41 images would be left" in refusal(prune, store, ["other.jpg"])


def test_compact_keeps_the_latest_rows(store, folder, embedder):
    for path in sorted(folder.rglob("*_c2*.jpg")):
        os.utime(path, ns=(1, 1))
    embed_folder(folder, store, embedder, labels="market1501")
    rows, before = Store.open(store).rows, embeddings(store)
    assert compact(store) == (61, 41)
    assert Store.open(store).rows == rows
    assert embeddings(store) == before


def test_merged_parts_are_the_bytes_of_one_run(store, folder, embedder, tmp_path):
    parts = [tmp_path / f"part-{number}" for number in (1, 2, 3)]
    for number, part in enumerate(parts, 1):
        embed_folder(part_of(open_source(folder), f"{number}/3"), part, embedder, labels="market1501")
    assert merge(parts, tmp_path / "merged") == 41
    assert contents(tmp_path / "merged") == contents(store)
    assert merge(parts, tmp_path / "merged") == 41
    assert contents(tmp_path / "merged") == contents(store)
    assert "holds other rows already" in refusal(merge, parts[:2], tmp_path / "merged")


def test_parts_number_the_people_of_all_parts(folder, embedder, tmp_path):
    """Here a folder is a person, and five of the six parts have images of one alone."""
    embed_folder(folder, tmp_path / "whole", embedder, labels="folder")
    parts = [tmp_path / f"part-{number}" for number in range(1, 7)]
    for number, part in enumerate(parts, 1):
        embed_folder(part_of(open_source(folder), f"{number}/6"), part, embedder, labels="folder")
    merge(parts, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_stores_of_two_sources_do_not_merge(store, folder, embedder, tmp_path):
    embed_folder(folder / "camera 1", tmp_path / "t", embedder)
    assert f"{tmp_path / 't'} was made with source" in refusal(merge, [store, tmp_path / "t"], tmp_path / "m")


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_part_that_is_none_is_refused(folder, part):
    assert f"--shard {part}: give the part's number" in refusal(part_of, open_source(folder), part)


def test_a_part_without_an_image_says_why(folder, caplog):
    for part in range(1, 8):
        part_of(open_source(folder), f"{part}/7")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("part 7/7 of")
    assert said.endswith("has no image: parts are of whole shards of 8, and there are 41 images")


def test_relocated_store_leads_to_the_new_folder(store, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert relocate(store, str(tmp_path / "copy")) == (41, 41)
    opened = Store.open(store)
    assert opened.path(opened.rows[0]).is_relative_to(tmp_path / "copy")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.jpg").touch()
    assert "not one of the 41 images" in refusal(relocate, store, str(tmp_path / "other"))


def test_a_uri_loses_the_slash_at_its_end_as_embed_has_it(store, folder):
    for given, kept in ((f"{folder.as_uri()}/", folder.as_uri()), ("s3://bucket/a/", "s3://bucket/a")):
        relocate(store, given)
        assert Store.open(store).manifest.source == kept


@pytest.mark.parametrize("url", ["s3://[bucket", "s3://bucket/%00", "https://user:secret@host"])
def test_a_url_that_a_store_may_not_keep_is_refused(store, url):
    source = Store.open(store).manifest.source
    assert "secret" not in refusal(relocate, store, url)
    assert Store.open(store).manifest.source == source


def test_exports_hold_the_embeddings_in_order(store, tmp_path):
    opened = Store.open(store)
    table = pq.read_table(export_store(opened, tmp_path / "all.parquet"))
    group = pq.ParquetFile(tmp_path / "all.parquet").metadata.row_group(0)
    assert [bool(group.column(at).statistics) for at in (0, group.num_columns - 1)] == [True, False]
    assert table.column("path").to_pylist() == [row.name for row in opened]
    assert table.column("identity").to_pylist() == opened.identities().tolist()
    made = np.stack(table.column("embedding").to_pylist()).astype(np.float32)
    assert np.array_equal(made, opened.embeddings())
    assert np.array_equal(np.load(export_store(opened, tmp_path / "all.npy")), opened.embeddings())
    with open(export_store(opened, tmp_path / "all.csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["path"] for line in lines] == [row.name for row in opened]
    read = np.array([[float(line[f"e{number}"]) for number in range(128)] for line in lines], np.float32)
    assert np.array_equal(read, opened.embeddings())
    assert "has to end with .parquet, .npy, .csv" in refusal(export_store, opened, tmp_path / "all.h5")


def test_commands_print_what_they_did_and_a_damaged_store_exits_1(store, folder, tmp_path):
    info = json.loads(mgn_deploy("store", "info", store, "--json").stdout)
    assert (info["images"], info["failures"], info["identities"], info["cameras"]) == (40, 1, 10, 2)
    assert mgn_deploy("store", "verify", store).stdout == f"{store}: 41 rows in 6 of 6 shards are whole\n"
    break_shard(store, 0, "npy")
    verified = mgn_deploy("store", "verify", store, "--json")
    assert verified.exit_code == 1
    assert json.loads(verified.stdout)["damaged"][0]["rows"] == 8
    repaired = mgn_deploy("store", "repair", store)
    assert "dropped 8 rows" in repaired.stdout
    assert f"{store}: 7 embedded again, 1 failed\n" in repaired.stdout
    assert mgn_deploy("store", "repair", store).stdout == f"{store}: nothing to repair\n"
    assert json.loads(mgn_deploy("store", "prune", store, folder, "--json").stdout)["removed"] == 0
    assert mgn_deploy("store", "compact", store).exit_code == 0
    assert mgn_deploy("store", "export", store, "-o", tmp_path / "x.npy").stdout.startswith(
        f"{tmp_path / 'x.npy'}: 40 "
    )
    assert "41 of its 41 images are" in mgn_deploy("store", "relocate", store, folder).stdout
    assert (
        mgn_deploy("store", "merge", store, "-o", tmp_path / "m").stdout == f"{tmp_path / 'm'}: 41 rows of 1 stores\n"
    )


def test_a_store_of_boxes_is_pruned_and_relocated(folder, tmp_path, bundle_folder):
    first = next(folder.rglob("0001*.jpg")).relative_to(folder).as_posix()
    (tmp_path / "b.csv").write_text(f"path,left,top,width,height\n{first},0,0,30,60\n{first},3,0,30,60\n")
    options = ["--boxes", tmp_path / "b.csv"]
    embed = ["-o", tmp_path / "boxes", "--bundle", bundle_folder, "--backend", "onnxruntime"]
    assert mgn_deploy("embed", folder, *embed, *options).exit_code == 0
    shutil.copytree(folder, tmp_path / "copy")
    assert relocate(tmp_path / "boxes", str(tmp_path / "copy")) == (2, 2)
    (tmp_path / "b.csv").write_text(f"path,left,top,width,height\n{first},0,0,30,60\n")
    done = mgn_deploy("store", "prune", tmp_path / "boxes", tmp_path / "copy", *options)
    assert "1 images removed" in done.stdout, done.output
    assert [row.name for row in Store.open(tmp_path / "boxes")] == [f"{first}#1"]
