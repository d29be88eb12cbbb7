"""Tar shards: members are rows, read by offset; whatever is broken in an archive is a row with its reason."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import mgn_deploy

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_source
from mgn_deploy.gallery.store import Store

KEYS = ["a", "b", "c", "d"]


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    draw_crop(number, 1, 0).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes, **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(content), 1_700_000_000
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def shard(path: Path, names: dict[str, bytes] | None = None, **options: object) -> Path:
    """An archive of four drawn crops with their labels beside them, as WebDataset writes it, or of other members."""
    with tarfile.open(path, "w", **options) as archive:
        if names is None:
            names = {f"{key}.{kind}": b"" for key in KEYS for kind in ("jpg", "cls")}
            names.update({f"{key}.jpg": jpeg(number) for number, key in enumerate(KEYS)})
            names.update({f"{key}.cls": str(number).encode() for number, key in enumerate(KEYS)})
        for name, content in names.items():
            add(archive, name, content)
    return path


def offsets(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as archive:
        return {member.name: member for member in archive}


def spoil(path: Path, at: int, count: int) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + count] = b"\x55" * count
    path.write_bytes(content)


def rows(store: Path) -> list[str]:
    return [row.name for row in Store.open(store)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_rows_are_the_members(tmp_path, embedder, form):
    shard(tmp_path / "shard-000.tar", format=form)
    long = "deep/" * 40 + "ü" * 50 + ".jpg" if form != tarfile.USTAR_FORMAT else "deep/ö.jpg"
    shard(tmp_path / "shard-001.tar", {long: jpeg(9), "./no-extension": jpeg(8)}, format=form)
    report = embed_folder(open_source(tmp_path / "shard-*.tar"), tmp_path / "s", embedder)
    names = [f"shard-000.tar/{key}.jpg" for key in KEYS] + [f"shard-001.tar/{long}", "shard-001.tar/no-extension"]
    assert rows(tmp_path / "s") == names
    assert report.skipped == {".cls": 4}
    for row, number in zip(Store.open(tmp_path / "s"), (0, 1, 2, 3, 9, 8), strict=True):
        (tmp_path / "one.jpg").write_bytes(jpeg(number))
        assert np.abs(Store.open(tmp_path / "s")[row.name] - embedder.embed([tmp_path / "one.jpg"])[0]).max() < 1e-5
        assert row.mtime_ns == 1_700_000_000 * 10**9


def test_archives_and_single_images_go_together_and_nothing_is_unpacked(tmp_path, embedder):
    shard(tmp_path / "x.tar")
    (tmp_path / "one.jpg").write_bytes(jpeg(7))
    embed_folder(open_source(tmp_path / "x.tar", tmp_path / "one.jpg"), tmp_path / "s", embedder)
    assert rows(tmp_path / "s") == [*(f"x.tar/{key}.jpg" for key in KEYS), "one.jpg"]
    assert sorted(os.listdir(tmp_path)) == ["one.jpg", "s", "x.tar"]


def test_a_second_run_embeds_what_is_new_and_verify_content_what_has_changed(tmp_path, embedder):
    path = shard(tmp_path / "x.tar")
    embed_folder(open_source(path), tmp_path / "s", embedder)
    assert embed_folder(open_source(path), tmp_path / "s", embedder).unchanged == 4
    member = offsets(path)["b.jpg"]
    spoil(path, member.offset_data + member.size - 40, 1)
    assert embed_folder(open_source(path), tmp_path / "s", embedder).unchanged == 4
    report = embed_folder(open_source(path), tmp_path / "s", embedder, verify_content=True)
    assert (report.embedded, report.unchanged) == (1, 3)


def test_a_member_that_is_no_image_fails_and_the_others_do_not(tmp_path, embedder):
    path = shard(tmp_path / "x.tar", {"a.jpg": b"a letter", "b.jpg": jpeg(1), "c.jpg": b"", "d.jpg": jpeg(2)[:900]})
    report = embed_folder(open_source(path), tmp_path / "s", embedder)
    failed = dict(report.failed)
    assert set(failed) == {"x.tar/a.jpg", "x.tar/c.jpg", "x.tar/d.jpg"}
    assert failed["x.tar/c.jpg"] == "the file is empty"
    assert report.embedded == 1


def test_a_broken_header_loses_its_member_and_no_other(tmp_path, embedder):
    path = shard(tmp_path / "x.tar")
    member = offsets(path)["b.jpg"]
    spoil(path, member.offset, 100)
    report = embed_folder(open_source(path), tmp_path / "s", embedder)
    assert rows(tmp_path / "s") == ["x.tar/a.jpg", "x.tar/c.jpg", "x.tar/d.jpg"]
    [(name, reason)] = report.failed
    assert name == f"x.tar/byte {member.offset}"
    assert "the archive is broken here" in reason


def test_an_archive_that_is_cut_off_fails_its_last_member(tmp_path, embedder, said):
    path = shard(tmp_path / "x.tar")
    member = offsets(path)["c.jpg"]
    path.write_bytes(path.read_bytes()[: member.offset_data + member.size // 2])
    report = embed_folder(open_source(path), tmp_path / "s", embedder)
    assert rows(tmp_path / "s") == ["x.tar/a.jpg", "x.tar/b.jpg"]
    assert report.failed == [("x.tar/c.jpg", "the archive ends within it")]
    path.write_bytes(path.read_bytes()[: member.offset])
    said.clear()
    assert len(open_source(path).files) == 2
    assert any("may have been cut off" in sentence for sentence in said)


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "deep/../../a.jpg"])
def test_a_name_that_leads_out_of_the_archive_fails(tmp_path, embedder, name):
    path = shard(tmp_path / "x.tar", {name: jpeg(1), "b.jpg": jpeg(2)})
    report = embed_folder(open_source(path), tmp_path / "s", embedder)
    assert report.failed == [(f"x.tar/{name}", "its name leads out of the archive")]
    assert rows(tmp_path / "s") == ["x.tar/b.jpg"]


def test_links_and_folders_are_no_members_and_of_one_name_the_last_counts(tmp_path, said):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.jpg", jpeg(1))
        add(archive, "deep", b"", type=tarfile.DIRTYPE)
        add(archive, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "a.jpg", jpeg(2))
    source = open_source(tmp_path / "x.tar")
    assert [file.read() for file in source.files] == [jpeg(2)]
    assert source.skipped == {"links in archives": 1, "members that a later one of the same name replaces": 1}
    assert "1 members have the name of a later one" in said[0]


@pytest.mark.parametrize("content, reason", [(b"", "the archive is empty"), (b"a letter" * 300, "not a tar archive")])
def test_what_is_no_archive_is_a_row(tmp_path, content, reason):
    (tmp_path / "x.tar").write_bytes(content)
    [file] = open_source(tmp_path / "x.tar").files
    assert (file.name, file.problem) == ("x.tar", reason)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_a_compressed_archive_is_a_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(shard(tmp_path / "y.tar").read_bytes()))
    with pytest.raises(UserError, match="is compressed by gzip, and members are read by offset: decompress it first"):
        open_source(tmp_path / name)


def test_any_broken_byte_of_the_headers_is_survived(tmp_path):
    path = shard(tmp_path / "x.tar", format=tarfile.PAX_FORMAT)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    headers = [member.offset for member in offsets(path).values()]
    for _ in range(300):
        changed = bytearray(content)
        for at in random.integers(0, 512, 4):
            changed[int(random.choice(headers)) + int(at)] = int(random.integers(256))
        path.write_bytes(changed)
        files = open_source(path).files
        assert len({file.name for file in files}) == len(files)


def test_a_folder_of_shards_is_told_how_to_give_them(tmp_path):
    shard(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"holds no image: 1 file skipped: 1 \.tar .give 'FOLDER/\*\.tar' to read them"):
        open_source(tmp_path)


def test_embed_takes_shards_on_the_command_line(tmp_path, bundle_folder):
    paths = [shard(tmp_path / f"shard-{number}.tar") for number in range(2)]
    done = mgn_deploy("embed", *paths, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime")
    assert done.exit_code == 0, done.output
    assert "8 embedded" in done.stdout
    assert "8 skipped" in done.stdout
