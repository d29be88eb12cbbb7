"""Lists of images: text, CSV, Parquet and stdin give the rows that the folder gives."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import mgn_deploy

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_source
from mgn_deploy.gallery.store import Store


@pytest.fixture
def images(tmp_path) -> Path:
    """Four drawn crops: a.jpg, b.jpg, deep/c.jpg, deep/d.jpg."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.jpg", "b.jpg", "deep/c.jpg", "deep/d.jpg"]):
        draw_crop(number, 1, 0).save(folder / name, quality=90)
    return folder


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def names(source) -> list[str]:
    return [file.name for file in source.files]


TEXTS = {
    "lines": "b.jpg\ndeep/c.jpg\n",
    "windows": "\ufeffb.jpg\r\n\r\n./deep/c.jpg\r\n  \r\n",
    "no newline at the end": "b.jpg\ndeep/c.jpg",
    "nul": "b.jpg\0deep/c.jpg\0",
    "table": "path\tnote\nb.jpg\tx\ndeep/c.jpg\ty\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_list_names_its_images_in_order(images, text):
    assert names(open_source(written(images / "list.txt", text))) == ["b.jpg", "deep/c.jpg"]


def test_names_that_nul_divides_may_have_any_bytes(images):
    name = os.fsencode(images) + b"/caf\xe9.jpg"
    os.rename(images / "b.jpg", name)
    assert names(open_source(written(images / "list.txt", b"./caf\xe9.jpg\0a.jpg\0"))) == ["caf\udce9.jpg", "a.jpg"]


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_a_table_gives_paths_and_labels(images, tmp_path, embedder, said, suffix, delimiter):
    rows = [["Camera", "path", "identity"], ["1", "b.jpg", "7"], ["2", ".\\deep\\c.jpg", ""], ["2", "a.jpg", "9"]]
    content = "\ufeff" + "\r\n".join(delimiter.join(row) for row in rows) + "\r\n\r\n"
    embed_folder(open_source(written(images / f"list.{suffix}", content)), tmp_path / "s", embedder)
    found = [(row.name, row.identity, row.camera) for row in Store.open(tmp_path / "s")]
    assert found == [("b.jpg", 7, 1), ("deep/c.jpg", None, None), ("a.jpg", 9, 2)]
    assert any("gives the labels" in sentence for sentence in said)


def test_a_parquet_list_is_as_the_csv(images, tmp_path, embedder):
    table = {"path": ["b.jpg", "deep/c.jpg", "a.jpg"], "identity": [7, None, 9], "camera": [1.0, None, 2.0]}
    pq.write_table(pa.table(table), images / "list.parquet")
    written(images / "list.csv", "path,identity,camera\nb.jpg,7,1\ndeep/c.jpg,,\na.jpg,9,2\n")
    embed_folder(open_source(images / "list.parquet"), tmp_path / "s", embedder)
    embed_folder(open_source(images / "list.csv"), tmp_path / "t", embedder)
    one, other = Store.open(tmp_path / "s"), Store.open(tmp_path / "t")
    assert one.rows == other.rows
    assert one.rows[2].identity == 9
    assert np.array_equal(one.embeddings(), other.embeddings())


def test_labels_that_are_asked_for_replace_the_lists(images, tmp_path, embedder):
    source = open_source(written(images / "list.csv", "path,identity\na.jpg,7\ndeep/c.jpg,8\n"))
    embed_folder(source, tmp_path / "s", embedder, labels="folder")
    embed_folder(source, tmp_path / "t", embedder, labels="none")
    assert [row.identity for row in Store.open(tmp_path / "s")] == [None, 1]
    assert [row.identity for row in Store.open(tmp_path / "t")] == [None, None]


def test_a_list_has_the_rows_of_the_folder(images, tmp_path, embedder):
    written(images / "list.txt", "a.jpg\nb.jpg\ndeep/c.jpg\ndeep/d.jpg\n")
    embed_folder(images, tmp_path / "s", embedder)
    report = embed_folder(open_source(images / "list.txt"), tmp_path / "s", embedder)
    assert (report.embedded, report.unchanged) == (0, 4)


def test_missing_images_are_rows_with_their_reason(images, tmp_path, embedder):
    report = embed_folder(open_source(written(images / "l.txt", "a.jpg\nnone.jpg\ndeep\n")), tmp_path / "s", embedder)
    assert report.failed == [("none.jpg", "no such file"), ("deep", "not a regular file")]
    assert report.embedded == 1


def test_an_image_that_is_named_twice_counts_once(images, said):
    source = open_source(written(images / "list.txt", "a.jpg\n./a.jpg\ndeep/../a.jpg\nb.jpg\n"))
    assert names(source) == ["a.jpg", "b.jpg"]
    assert source.skipped == {"named twice": 2}
    assert "names 2 images again" in said[0]


def test_root_is_what_relative_paths_are_below(images, tmp_path):
    path = written(tmp_path / "list.txt", "c.jpg\n")
    assert names(open_source(path, root=images / "deep")) == ["c.jpg"]
    assert open_source(path, root=images / "deep").files[0].problem is None
    outside = written(tmp_path / "out.txt", f"{images}/a.jpg\n")
    with pytest.raises(UserError, match="is not below"):
        open_source(outside, root=images / "deep")


def test_absolute_paths_elsewhere_are_named_below_the_folder_that_all_are_in(images, tmp_path):
    (tmp_path / "lists").mkdir()
    path = written(tmp_path / "lists/l.csv", f"path,identity\n{images}/a.jpg,1\n{images}/deep/c.jpg,2\n")
    source = open_source(path)
    assert names(source) == ["a.jpg", "deep/c.jpg"]
    assert source.labels("deep/c.jpg").identity == 2


def test_stdin_is_a_list_below_the_current_folder(images, monkeypatch):
    monkeypatch.chdir(images)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"deep/d.jpg\nb.jpg\n")))
    source = open_source("-")
    assert names(source) == ["deep/d.jpg", "b.jpg"]
    assert source.uri == images.as_uri()


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("l.txt", "", "names no image"),
        ("l.txt", b"a.jpg\n\xff\xfe.jpg\n", "is not UTF-8 .byte 6"),
        ("l.txt", "a.jpg\n".encode("utf-16"), "is not UTF-8 .byte 0"),
        ("l.txt", "s3://bucket/a.jpg\n", "give URLs themselves"),
        ("l.csv", "file,identity\na.jpg,1\n", "has to name the column path once; it is 'file,identity'"),
        ("l.csv", "path,identity\na.jpg,1\na.jpg,2\n", "has another label than in an earlier line"),
        ("l.csv", "path,identity\na.jpg,-9\n", "identity -9 is not from"),
        ("l.csv", "path\na\0.jpg\n", "NUL|not a table"),
        ("l.parquet", b"PAR1 and no more", "no Parquet file that can be read"),
        ("l.parquet", "PAR", "has to name the column path"),
    ],
)
def test_a_list_that_cannot_be_used_is_a_sentence(images, name, content, sentence):
    with pytest.raises(UserError, match=sentence):
        open_source(written(images / name, content))


def test_a_list_among_others_and_one_that_is_missing_are_sentences(images):
    written(images / "l.txt", "a.jpg\n")
    with pytest.raises(UserError, match="give it alone"):
        open_source(images / "l.txt", images / "a.jpg")
    with pytest.raises(UserError, match=r"none\.csv cannot be read: No such file"):
        open_source(images / "none.csv")


def test_changed_bytes_of_the_same_size_and_time_are_found_by_verify_content(images, tmp_path, embedder):
    path = written(images / "list.txt", "a.jpg\nb.jpg\n")
    embed_folder(open_source(path), tmp_path / "s", embedder)
    content = bytearray((images / "b.jpg").read_bytes())
    content[-40] ^= 1
    status = os.stat(images / "b.jpg")
    (images / "b.jpg").write_bytes(content)
    os.utime(images / "b.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert embed_folder(open_source(path), tmp_path / "s", embedder).embedded == 0
    assert embed_folder(open_source(path), tmp_path / "s", embedder, verify_content=True).embedded == 1


def test_embed_takes_a_list_on_the_command_line(images, tmp_path, bundle_folder):
    path = written(images / "list.csv", "path,identity\na.jpg,anna\nnone.jpg,bob\n")
    done = mgn_deploy("embed", path, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime")
    assert done.exit_code == 0, done.output
    assert "1 embedded" in done.stdout
    assert "1 failed" in done.stdout


def test_whole_photos_are_told_from_crops(images, tmp_path, embedder, said):
    draw_crop(1, 1, 0).resize((200, 150)).save(images / "wide.jpg")
    draw_crop(1, 1, 0).resize((900, 2001)).save(images / "large.jpg")
    report = embed_folder(images, tmp_path / "s", embedder)
    assert report.to_dict()["unlike_crops"] == 2
    assert any(sentence.startswith("images wider than high or larger than 2000 pixels: 2;") for sentence in said)
