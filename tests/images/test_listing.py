"""What is below a folder: all of it, in one order, with the odd entries named and none waited for."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hostile import permissions_apply
from PIL import Image

from mgn_deploy.errors import UserError
from mgn_deploy.images import formats
from mgn_deploy.images.decode import load_rgb
from mgn_deploy.images.listing import list_images


def names(folder) -> list[str]:
    return [file.name for file in list_images(folder)]


def problems(folder) -> dict[str, str]:
    return {file.name: file.problem for file in list_images(folder) if file.problem}


def touch(folder, *below: str) -> None:
    for name in below:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def refusal(folder) -> str:
    with pytest.raises(UserError) as refused:
        list_images(folder)
    return str(refused.value)


def test_order_is_that_of_the_names_bytes(tmp_path):
    touch(tmp_path, "b.jpg", "a/z.jpg", "a.jpg", "B.JPG", "é.png", "a b/1.jpeg", "10.webp", "9.webp")
    assert names(tmp_path) == sorted(names(tmp_path), key=os.fsencode)
    assert names(tmp_path) == [
        "10.webp",
        "9.webp",
        "B.JPG",
        "a b/1.jpeg",
        "a.jpg",
        "a/z.jpg",
        "b.jpg",
        "é.png",
    ]


def test_other_files_are_counted_by_extension(tmp_path, said):
    touch(
        tmp_path, "a.jpg", "notes.txt", "b.TXT", "Thumbs.db", "b.jpg.part", "jpg", ".jpg", "._a.jpg", "__MACOSX/a.jpg"
    )
    listing = list_images(tmp_path)
    assert [file.name for file in listing] == ["a.jpg"]
    assert listing.skipped == {".txt": 2, ".db": 1, ".part": 1, "without extension": 2, "of macOS's metadata": 2}
    assert (
        f"{tmp_path}: 8 files skipped: 2 .txt, 2 of macOS's metadata, 2 without extension, 1 .db, 1 .part"
    ) in " ".join(said)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF", "AVIF"])
@pytest.mark.parametrize("name", ["crop", "crop.dat", "0001.001"])
def test_content_decides_where_the_extension_does_not(tmp_path, kind, name):
    Image.new("RGB", (32, 64), (200, 40, 40)).save(tmp_path / name, kind)
    assert names(tmp_path) == [name]
    assert load_rgb(tmp_path / name).size == (32, 64)


@pytest.mark.parametrize("name", ["a.jpe", "a.JFIF", "a.gif", "a.avif", "a.pgm", "a.dib"])
def test_less_common_extensions_are_images(tmp_path, name):
    touch(tmp_path, name)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("content", [b"BM, a note that begins so", b"P1 has no size", b"ftyp", b"", b"RIFFxxxxAVI "])
def test_text_that_begins_like_an_image_is_none(tmp_path, content):
    (tmp_path / "note").write_bytes(content)
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert names(tmp_path) == ["a.jpg"]


def test_a_file_whose_content_cannot_be_seen_is_told_from_one_that_is_no_image(tmp_path):
    touch(tmp_path, "a.jpg", "notes.txt", "photo")
    (tmp_path / "photo").chmod(0)
    with permissions_apply():
        skipped = list_images(tmp_path).skipped
    assert skipped == {".txt": 1, "without extension that cannot be read (Permission denied)": 1}


def test_heic_without_its_reader_is_counted_and_the_extra_named(tmp_path, monkeypatch, said):
    touch(tmp_path, "a.jpg", "b.heic")
    (tmp_path / "photo").write_bytes(b"\0\0\0\x18ftypheic" + bytes(16))
    monkeypatch.setattr(formats, "readable_formats", lambda: ("JPEG",))
    assert names(tmp_path) == ["a.jpg"]
    assert "1 .heic (mgn-deploy[heif] reads them)" in " ".join(said)
    assert "1 without extension (mgn-deploy[heif] reads them)" in " ".join(said)


def test_heic_is_read_where_its_reader_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 128), (200, 40, 40))).save(tmp_path / "photo.heic")
    assert names(tmp_path) == ["photo.heic"]
    pixels = np.asarray(load_rgb(tmp_path / "photo.heic")).astype(int)
    assert np.abs(pixels - (200, 40, 40)).max() < 8


def test_pipe_without_extension_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    touch(tmp_path, "a.jpg")
    assert names(tmp_path) == ["a.jpg"]


def test_size_and_mtime_are_the_files(tmp_path):
    touch(tmp_path, "a.jpg")
    os.utime(tmp_path / "a.jpg", ns=(1, 1234567890123456789))
    [file] = list_images(tmp_path)
    assert (file.size, file.mtime_ns, file.problem) == (1, 1234567890123456789, None)


@pytest.mark.parametrize(
    "name", ["a b.jpg", "a\nb.jpg", "a'\"b.jpg", "-rf.jpg", "n" * 251 + ".jpg", "%20#?.jpg", "*.jpg"]
)
def test_odd_name_is_kept(tmp_path, name):
    touch(tmp_path, name)
    assert names(tmp_path) == [name]


def test_name_that_is_not_utf8_keeps_its_bytes(tmp_path):
    raw = os.fsencode(tmp_path) + b"/a\xff\xfe.jpg"
    with open(raw, "wb") as file:
        file.write(b"x")
    assert [os.fsencode(name) for name in names(tmp_path)] == [b"a\xff\xfe.jpg"]


def test_missing_folder_is_a_sentence(tmp_path):
    assert refusal(tmp_path / "none") == (
        f"{str(tmp_path / 'none')!r} cannot be listed (No such file or directory): "
        "give the folder that holds the images"
    )


def test_file_in_the_folders_place_is_a_sentence(tmp_path):
    touch(tmp_path, "a.jpg")
    assert "Not a directory" in refusal(tmp_path / "a.jpg")


@pytest.mark.parametrize("length", [300, 5000])
def test_too_long_path_is_a_sentence(tmp_path, length):
    assert "File name too long" in refusal(tmp_path / ("n" * length))


def test_empty_folder_and_folder_without_images_are_sentences(tmp_path):
    assert "holds no image and no other file" in refusal(tmp_path)
    touch(tmp_path, "a.txt", "sub/b.txt")
    assert "holds no image" in refusal(tmp_path)


def test_folder_that_may_not_be_read_is_a_sentence(tmp_path):
    folder = tmp_path / "closed"
    touch(folder, "a.jpg")
    folder.chmod(0)
    try:
        with permissions_apply():
            assert "cannot be listed (Permission denied)" in refusal(folder)
            assert "cannot be listed (Permission denied)" in refusal(folder / "below")
    finally:
        folder.chmod(0o755)


def test_subfolder_that_may_not_be_read_is_named_beside_the_rest(tmp_path):
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        with permissions_apply():
            assert problems(tmp_path) == {"closed": "folder: Permission denied"}
            assert names(tmp_path) == ["a.jpg", "closed"]
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_link_to_a_folder_is_followed(tmp_path):
    touch(tmp_path, "images/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "images/more").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "images") == ["a.jpg", "more/b.jpg"]


def test_link_to_a_file_has_the_files_size(tmp_path):
    touch(tmp_path, "images/a.txt", "b")
    (tmp_path / "b").write_bytes(b"12345")
    (tmp_path / "images/b.jpg").symlink_to(tmp_path / "b")
    [file] = list_images(tmp_path / "images")
    assert (file.name, file.size, file.problem) == ("b.jpg", 5, None)


def test_broken_link_is_named(tmp_path):
    (tmp_path / "a.jpg").symlink_to("nowhere")
    assert problems(tmp_path) == {"a.jpg": "a link to a file that does not exist"}


def test_link_to_itself_is_named(tmp_path):
    (tmp_path / "a.jpg").symlink_to("b.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    assert problems(tmp_path) == dict.fromkeys(("a.jpg", "b.jpg"), "Too many levels of symbolic links")


def test_link_to_a_folder_above_is_named_and_not_followed(tmp_path):
    touch(tmp_path, "a/b/c.jpg")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/b/self").symlink_to(".")
    assert names(tmp_path) == ["a/b/c.jpg", "a/b/self", "a/b/up"]
    assert set(problems(tmp_path).values()) == {"a link that leads back to a folder above it"}


def test_two_folders_that_link_to_each_other_end(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/b").symlink_to("../b")
    (tmp_path / "b/a").symlink_to("../a")
    assert names(tmp_path) == ["a/1.jpg", "a/b/2.jpg", "a/b/a", "b/2.jpg", "b/a/1.jpg", "b/a/b"]


def test_pipe_and_folder_named_like_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    touch(tmp_path, "folder.jpg/a.jpg")
    assert names(tmp_path) == ["folder.jpg/a.jpg", "pipe.jpg"]
    assert problems(tmp_path) == {"pipe.jpg": "not a regular file"}


def test_folders_nested_deeper_than_pythons_stack(tmp_path):
    folders = ["/".join("d" * depth) for depth in range(1, 1051)]
    for folder in folders:
        (tmp_path / folder).mkdir()
    (tmp_path / folders[-1] / "a.jpg").touch()
    try:
        assert names(tmp_path) == [folders[-1] + "/a.jpg"]
    finally:
        (tmp_path / folders[-1] / "a.jpg").unlink()
        for folder in reversed(folders):  # pytest's own clean-up would recurse
            (tmp_path / folder).rmdir()
