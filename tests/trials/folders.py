"""Folders as real people have them, each with how many of its files are embedded, failed and skipped.

    python -m tests.trials.folders

`tests/gallery/test_folders.py` runs them too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.images.formats import readable_formats

CROP = draw_crop(1, 1, 0).resize((64, 128))
OTHER = draw_crop(2, 1, 0).resize((64, 128))


class Counts(NamedTuple):
    """Files that `embed` embeds, counts with a reason, and passes over as no images."""

    embedded: int
    failed: int = 0
    skipped: int = 0


def put(path: Path, kind: str | None = None, image: Image.Image = CROP, **options: Any) -> Path:
    """Write an image, in the format of its extension unless told another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind, **options)
    return path


def a_folder_a_person(top: Path) -> Counts:
    for name in ("Anna", "Ben Müller", "unsorted/Çelik"):
        for number in range(2):
            put(top / name / f"{number}.jpg")
    return Counts(6)


def every_extension(top: Path) -> Counts:
    names = "a.jpg b.JPG c.jpeg d.jpe e.jfif f.png g.PNG h.bmp i.webp j.tif k.TIFF l.gif m.ppm".split()  # noqa: SIM905
    for name in names:
        put(top / name, {".jpe": "JPEG", ".jfif": "JPEG"}.get(os.path.splitext(name)[1]))
    for name in ("notes.txt", "clip.mp4", "list.csv"):
        (top / name).write_text("1,2\n")
    return Counts(len(names), 0, 3)


def odd_names(top: Path) -> Counts:
    names = [
        "a b.jpg", "🙂.jpg", "two\nlines.jpg", "-o.jpg", "it's \"it\".jpg", "n" * 200 + ".jpg", "100%.jpg", "*.jpg",
        "\u00e9.jpg", "e\u0301.jpg", "tab\t.jpg", "#1;&.jpg", " .jpg", "${HOME}.jpg", "s3:.jpg",
    ]  # fmt: skip
    for name in names:
        put(top / name)
    os.rename(put(top / "latin.jpg"), os.fsencode(top) + b"/\xe4.jpg")
    return Counts(len(names) + 1)


def a_link_that_leads_back(top: Path) -> Counts:
    put(top / "a.jpg")
    (top / "again").symlink_to(top)
    return Counts(1, 1)


def links(top: Path) -> Counts:
    elsewhere = put(top.with_name("elsewhere") / "a.jpg").parent
    put(top / "own.jpg")
    (top / "file.jpg").symlink_to(elsewhere / "a.jpg")
    (top / "folder").symlink_to(elsewhere)
    (top / "broken.jpg").symlink_to("nowhere.jpg")
    return Counts(3, 1)


def empty_files(top: Path) -> Counts:
    put(top / "a.jpg")
    for name in ("b.jpg", "c.png", "noextension", "d.txt"):
        (top / name).touch()
    return Counts(1, 2, 2)


def hidden_files(top: Path) -> Counts:
    """What is hidden is read like the rest: cameras and sync tools hide pictures, too."""
    put(top / ".a.jpg")
    put(top / ".trash/b.jpg")
    (top / ".nomedia").touch()
    (top / ".directory").write_text("[Desktop Entry]")
    return Counts(2, 0, 2)


def a_zip_of_macos(top: Path) -> Counts:
    put(top / "People/a.jpg")
    (top / "__MACOSX/People").mkdir(parents=True)
    (top / "__MACOSX/People/._a.jpg").write_bytes(b"\0\5\x16\7")
    (top / "People/._a.jpg").write_bytes(b"\0\5\x16\7")
    (top / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return Counts(1, 0, 3)


def a_zip_of_windows(top: Path) -> Counts:
    put(top / "People\\Anna\\1.JPG")
    put(top / "New folder (2)/IMG_0001 - Copy.JPG")
    (top / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")
    (top / "desktop.ini").write_text("[.ShellClassInfo]")
    return Counts(2, 0, 2)


def copies(top: Path) -> Counts:
    one = put(top / "a.jpg")
    for name in ("a (1).jpg", "a - Copy.jpg", "backup.jpg"):
        shutil.copy(one, top / name)
    os.link(one, top / "hard.jpg")
    return Counts(5)


def tiny_images(top: Path) -> Counts:
    for width, height in ((1, 1), (3, 3), (1, 100), (4, 4), (4, 300)):
        put(top / f"{width}x{height}.png", image=CROP.resize((width, height)))
    return Counts(2, 3)


def scans(top: Path) -> Counts:
    put(top / "cmyk.jpg", image=CROP.convert("CMYK"))
    for mode in ("L", "1", "LA"):
        put(top / f"{mode}.png", image=CROP.convert(mode))
    put(top / "lzw.tif", compression="tiff_lzw")
    put(top / "fax.tif", image=CROP.convert("1"), compression="group4")
    put(top / "pages.tif", save_all=True, append_images=[OTHER])
    return Counts(7)


def turned_phones(top: Path) -> Counts:
    for orientation in range(10):  # 0 and 9 do not exist, and some software writes them
        exif = Image.Exif()
        exif[0x0112] = orientation
        put(top / f"{orientation}.jpg", exif=exif)
    return Counts(10)


def animations(top: Path) -> Counts:
    for name in ("a.gif", "b.webp", "c.png"):
        put(top / name, save_all=True, append_images=[OTHER, CROP])
    put(top / "d.jpg", "MPO", save_all=True, append_images=[OTHER])
    return Counts(4)


def deep_and_clear(top: Path) -> Counts:
    deep = Image.frombytes("I;16", (64, 128), bytes(range(256)) * 64)
    put(top / "16 bit.png", image=deep)
    put(top / "16 bit.tif", image=deep)
    put(top / "palette.png", image=CROP.quantize(32), transparency=2)
    put(top / "glass.png", image=CROP.convert("RGBA"))
    put(top / "glass.webp", image=CROP.convert("RGBA"))
    put(top / "float.tif", image=CROP.convert("F"))
    return Counts(5, 1)


def huge_photos(top: Path) -> Counts:
    put(top / "6 megapixels.jpg", image=CROP.resize((2000, 3000)))
    put(top / "panorama.png", image=Image.new("1", (30000, 5000)))
    return Counts(1, 1)


def no_extensions(top: Path) -> Counts:
    put(top / "IMG_0001", "JPEG")
    put(top / "download", "PNG")
    put(top / "photo.jpg_large", "JPEG")
    put(top / "photo.jpg?w=640", "WEBP")
    (top / "README").write_text("BM is how a bitmap begins")
    return Counts(4, 0, 1)


def no_permission(top: Path) -> Counts:
    put(top / "a.jpg")
    put(top / "b.jpg").chmod(0)
    put(top / "private/c.jpg").parent.chmod(0)
    return Counts(1, 2)


def wrong_extensions(top: Path) -> Counts:
    put(top / "png.jpg", "PNG")
    put(top / "webp.png", "WEBP")
    (top / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (top / "pdf.png").write_bytes(b"%PDF-1.7\n")
    (top / "video.jpg").write_bytes(b"\0\0\0\x20ftypisom" + bytes(99))
    return Counts(2, 3)


def broken_downloads(top: Path) -> Counts:
    whole = put(top / "a.jpg").read_bytes()
    for name in ("b.jpg", "c.jpg.part", "d.crdownload"):
        (top / name).write_bytes(whole[: len(whole) // 2])
    (top / "zeros.jpg").write_bytes(bytes(len(whole)))
    os.mkfifo(top / "pipe.jpg")
    put(top / "a folder.jpg/e.jpg")
    return Counts(2, 5)


def a_phone(top: Path) -> Counts:
    put(top / "IMG_1.JPG")
    heic = "HEIF" in readable_formats()
    if heic:
        put(top / "IMG_2.HEIC", "HEIF")
    else:
        (top / "IMG_2.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (top / "IMG_2.MOV").write_bytes(b"\0\0\0\x14ftypqt  ")
    (top / "IMG_2.AAE").write_text("<?xml version='1.0'?>")
    (top / "IMG_1.xmp").write_text("<x:xmpmeta/>")
    return Counts(1 + heic, 0, 4 - heic)


FOLDERS: tuple[Callable[[Path], Counts], ...] = (
    a_folder_a_person, every_extension, odd_names, a_link_that_leads_back, links, empty_files, hidden_files,
    a_zip_of_macos, a_zip_of_windows, copies, tiny_images, scans, turned_phones, animations, deep_and_clear,
    huge_photos, no_extensions, no_permission, wrong_extensions, broken_downloads, a_phone,
)  # fmt: skip


def counted(make: Callable[[Path], Counts], work: Path, embedder: Any) -> tuple[Counts, Counts]:
    """What `embed` counts in a folder, and what is right."""
    from mgn_deploy.gallery.embed import embed_folder

    folder = work / make.__name__
    folder.mkdir()
    right = make(folder)
    report = embed_folder(folder, work / f"{make.__name__}-store", embedder)
    for path in folder.iterdir():
        if path.is_dir():
            path.chmod(0o700)  # so that it can be removed
    return Counts(report.embedded, len(report.failed), report.skipped.total()), right


def main() -> None:
    """Embed each folder by the library and print its counts."""
    from mgn_deploy.bundle.bundle import Bundle
    from mgn_deploy.embedder import Embedder
    from tests.hostile import permissions_apply
    from tests.trials.small import export_small

    faults = 0
    with tempfile.TemporaryDirectory(prefix="mgn-folders-") as top:
        work = Path(top)
        export_small(work / "weights", work / "bundle")
        embedder = Embedder.open(Bundle.open(work / "bundle"))
        for make in FOLDERS:
            with permissions_apply():  # to root, too
                found, right = counted(make, work, embedder)
            faults += found != right
            print(f"{make.__name__}: {found}" + ("" if found == right else f", and not {right}"))
    print(f"{len(FOLDERS)} folders, {faults} faults")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
