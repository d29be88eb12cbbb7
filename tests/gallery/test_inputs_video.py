"""A video and a tracker's boxes, on clips of drawn people whose boxes are known because they were drawn there."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import mgn_deploy
from PIL import Image

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.gallery import frames
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_inputs
from mgn_deploy.gallery.store import Store

SIZE = (320, 240)
FRAMES, GOP, RATE = 24, 8, 25


def box_of(track: int, frame: int) -> tuple[int, int, int, int]:
    """Where track 1 or 2 stands in a frame: both walk four pixels a frame, in opposite directions."""
    return (16 + 4 * frame, 40, 64, 144) if track == 1 else (240 - 4 * frame, 56, 56, 128)


@cache
def picture(frame: int) -> Image.Image:
    image = Image.new("RGB", SIZE, (96, 112, 96))
    for track in (1, 2):
        left, top, width, height = box_of(track, frame)
        image.paste(draw_crop(track, 1, frame % 3).resize((width, height)), (left, top))
    return image


def film(path: Path, codec: str = "libx264", **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.gop_size = GOP
        for frame in range(1, FRAMES + 1):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(frame))))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def filmed(tmp_path_factory) -> Path:
    return film(tmp_path_factory.mktemp("clip") / "clip.mp4", crf="8", sc_threshold="0")


@pytest.fixture
def clip(filmed, tmp_path) -> Path:
    """clip.mp4 of 24 frames with a key frame each eight, and beside it gt.txt."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(filmed.read_bytes())
    (tmp_path / "gt.txt").write_text("\n".join(lines(range(1, FRAMES + 1))))
    return path


def lines(frames) -> list[str]:
    """As MOTChallenge's gt.txt: by track, pixels from 1, a flag, the class and the visibility."""
    boxes = [(frame, track, *box_of(track, frame)) for track in (1, 2) for frame in frames]
    return [f"{f},{t},{x + 1},{y + 1},{w},{h},1,1,1.0" for f, t, x, y, w, h in boxes]


def source_of(clip: Path, boxes: str = "gt.txt"):
    return open_inputs([], video=clip, boxes=clip.parent / boxes)


def spoil(path: Path, frame: int) -> None:
    """Overwrite the packet of a frame, counted in the order of presentation."""
    with av.open(str(path)) as container:
        packets = sorted((p.pts, p.pos, p.size) for p in container.demux(video=0) if p.size)
    _, position, size = packets[frame - 1]
    content = bytearray(path.read_bytes())
    content[position : position + size] = bytes(37 * k % 256 for k in range(size))
    path.write_bytes(content)


def test_rows_are_the_boxes_of_their_frames(clip, tmp_path, embedder):
    report = embed_folder(source_of(clip), tmp_path / "s", embedder)
    assert (report.embedded, report.failed) == (2 * FRAMES, [])
    store = Store.open(tmp_path / "s")
    assert [row.name for row in store][:3] == ["clip.mp4#000001-1", "clip.mp4#000001-2", "clip.mp4#000002-1"]
    for row in store.rows[::5]:
        left, top, width, height = box_of(row.track, row.frame)
        assert row.box == (left, top, width, height)
        assert row.time_s == pytest.approx((row.frame - 1) / RATE)
        assert row.identity is None
        crop = picture(row.frame).crop((left, top, left + width, top + height))
        similarity = {frame: float(store[row.name] @ one) for frame, one in near(embedder, row, crop).items()}
        assert similarity[row.frame] > 0.97
        assert max(similarity, key=similarity.get) == row.frame


def near(embedder, row, crop) -> dict[int, np.ndarray]:
    """The drawn crop itself, and what the same box shows one frame earlier and later."""
    left, top, width, height = row.box
    box = (left, top, left + width, top + height)
    frames = [row.frame, *(f for f in (row.frame - 1, row.frame + 1) if 1 <= f <= FRAMES)]
    crops = [crop, *(picture(frame).crop(box) for frame in frames[1:])]
    return dict(zip(frames, embedder.embed(crops), strict=True))


def test_tracks_are_people_where_that_is_asked_for(clip, tmp_path, embedder):
    embed_folder(source_of(clip), tmp_path / "s", embedder, labels="track")
    assert {(row.track, row.identity) for row in Store.open(tmp_path / "s")} == {(1, 1), (2, 2)}


def test_tracks_of_one_video_stay_people_as_another_is_embedded(clip, tmp_path, embedder):
    embed_folder(source_of(clip), tmp_path / "s", embedder, labels="track")
    clip.with_name("later.mp4").write_bytes(clip.read_bytes())
    report = embed_folder(source_of(clip.with_name("later.mp4")), tmp_path / "s", embedder, labels="track")
    assert report.relabelled == 0
    assert all(row.identity == row.track for row in Store.open(tmp_path / "s"))


def test_flag_0_is_left_out_and_an_id_of_minus_1_is_no_track(clip):
    boxes = ["1,-1,11,11,50,90,0.8,-1,-1,-1", "1,-1,81,11,50,90,0.7,-1,-1,-1", "2,-1,1,1,50,90,0,-1,-1,-1"]
    (clip.parent / "det.txt").write_text("\n".join(boxes))
    source = source_of(clip, "det.txt")
    assert [(file.name, file.track) for file in source.files] == [
        ("clip.mp4#000001-box1", None),
        ("clip.mp4#000001-box2", None),
    ]
    assert source.skipped == {"boxes with flag 0": 1}


def test_a_tables_track_of_minus_1_is_nobodys_as_motchallenges_is(clip):
    (clip.parent / "boxes.csv").write_text("frame,track,left,top,width,height\n1,-1,10,10,50,90\n1,-1,80,10,50,90\n")
    source = source_of(clip, "boxes.csv")
    assert [(file.name, file.track) for file in source.files] == [
        ("clip.mp4#000001-box1", None),
        ("clip.mp4#000001-box2", None),
    ]


def test_a_table_with_a_column_frame_is_as_motchallenge(clip):
    rows = [f"{f},{t},{','.join(map(str, box_of(t, f)))}" for t in (1, 2) for f in range(1, FRAMES + 1)]
    (clip.parent / "boxes.csv").write_text("\n".join(["frame,track,left,top,width,height", *rows]))
    assert source_of(clip, "boxes.csv").files == source_of(clip).files


def test_an_unreadable_frame_is_named_and_the_others_keep_their_numbers(clip, tmp_path, embedder):
    embed_folder(source_of(clip), tmp_path / "whole", embedder)
    spoil(clip, 12)
    report = embed_folder(source_of(clip), tmp_path / "s", embedder)
    failed = dict(report.failed)
    assert failed["clip.mp4#000012-1"].startswith("the frame cannot be decoded")
    assert {name[9:15] for name in failed} <= {f"{frame:06d}" for frame in range(9, 17)}  # of the same key frame
    whole, store = Store.open(tmp_path / "whole"), Store.open(tmp_path / "s")
    assert len(store) >= 2 * 16
    assert all(np.array_equal(store[row.name], whole[row.name]) for row in store)


def test_boxes_outside_of_the_frame_or_after_the_last_one_fail_with_their_reason(clip, tmp_path, embedder):
    (clip.parent / "b.txt").write_text("2,1,400,10,50,90,1\n3,1,-40,1,80,90,1\n25,1,10,10,50,90,1\n")
    report = embed_folder(source_of(clip, "b.txt"), tmp_path / "s", embedder)
    assert dict(report.failed) == {
        "clip.mp4#000002-1": "the box has less than 4x4 pixels inside the 320x240 image",
        "clip.mp4#000025-1": "the video has 24 frames",
    }
    assert report.embedded == 1


def test_a_run_that_goes_on_decodes_from_the_last_key_frame_and_ends_with_the_same_rows(
    clip, tmp_path, embedder, monkeypatch
):
    (clip.parent / "first.txt").write_text("\n".join(lines(range(1, 19))))
    embed_folder(source_of(clip), tmp_path / "once", embedder)
    embed_folder(source_of(clip, "first.txt"), tmp_path / "s", embedder)
    decoded = []
    numbered = frames._numbered
    monkeypatch.setattr(
        frames, "_numbered", lambda *given: (decoded.append(found[0]) or found for found in numbered(*given))
    )
    report = embed_folder(source_of(clip), tmp_path / "s", embedder)
    assert (report.embedded, report.unchanged) == (12, 36)
    assert decoded == list(range(17, 25))
    once, store = Store.open(tmp_path / "once"), Store.open(tmp_path / "s")
    assert store.rows == once.rows
    assert np.array_equal(store.embeddings(), once.embeddings())
    assert embed_folder(source_of(clip), tmp_path / "s", embedder).embedded == 0
    assert decoded == list(range(17, 25))


def test_changed_bytes_of_the_same_size_and_time_are_found_by_verify_content(clip, tmp_path, embedder):
    (clip.parent / "few.txt").write_text("\n".join(lines([1, 20])))
    embed_folder(source_of(clip, "few.txt"), tmp_path / "s", embedder)
    status = clip.stat()
    spoil(clip, 12)
    os.utime(clip, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert embed_folder(source_of(clip, "few.txt"), tmp_path / "s", embedder).unchanged == 4
    assert embed_folder(source_of(clip, "few.txt"), tmp_path / "s", embedder, verify_content=True).embedded == 4
    assert embed_folder(source_of(clip, "few.txt"), tmp_path / "s", embedder, verify_content=True).unchanged == 4


@pytest.mark.parametrize("codec, suffix", [("mpeg4", "avi"), ("libvpx", "webm"), ("libx264", "avi"), ("libx264", "ts")])
def test_frames_have_the_same_numbers_in_every_container(tmp_path, codec, suffix):
    path = film(tmp_path / f"clip.{suffix}", codec, b="4M")
    clip = frames.read_clip(path)
    assert clip.frames == FRAMES
    for wanted in ([3, 24], [14, 20]):  # from the start, and from a key frame that has to be sought
        for number, frame in zip(wanted, frames.read_frames(clip, wanted), strict=True):
            shown = np.asarray(frame.to_image(), float)
            errors = {other: np.abs(shown - np.asarray(picture(other), float)).mean() for other in range(1, FRAMES + 1)}
            assert min(errors, key=errors.get) == number


def test_a_gap_between_timestamps_is_told(tmp_path, said):
    path = film(tmp_path / "clip.mkv", sc_threshold="0")
    assert said == []
    spoil(path, 12)  # the frame's header in the container, too: nothing tells that it was there
    assert frames.read_clip(path).frames < FRAMES
    assert any("1 gaps between the times of its frames" in sentence for sentence in said)


def test_a_cut_file_fails_what_is_missing(clip, tmp_path, embedder):
    path = film(tmp_path / "clip.ts")
    (tmp_path / "b.txt").write_text("\n".join(lines([2, 23])))
    whole = frames.read_clip(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    cut = frames.read_clip(path)
    assert 8 < cut.frames < whole.frames
    report = embed_folder(source_of(path, "b.txt"), tmp_path / "s", embedder)
    assert report.embedded == 2
    assert {reason for _, reason in report.failed} == {f"the video has {cut.frames} frames"}


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("none.mp4", None, "is no file: give a video"),
        ("bad.mp4", b"no video", "is no video that can be read"),
        ("bad.mp4", b"", "is no video that can be read"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "is no video that can be read"),
    ],
)
def test_what_is_no_video_is_a_sentence(clip, name, content, sentence):
    path = clip.parent / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_inputs([], video=path, boxes=clip.parent / "gt.txt")


def test_without_pyav_the_extra_is_named(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"a video is read by PyAV: .*pip install 'mgn-deploy\[video\]'"):
        open_inputs([], video=clip, boxes=clip.parent / "gt.txt")


def test_a_video_needs_boxes_of_frames_and_nothing_beside_it(clip, tmp_path):
    with pytest.raises(UserError, match="give a tracker's or detector's boxes"):
        open_inputs([], video=clip)
    with pytest.raises(UserError, match="is given beside images"):
        open_inputs([tmp_path], video=clip, boxes=clip.parent / "gt.txt")
    (tmp_path / "p.csv").write_text("path,left,top,width,height\na.jpg,1,1,50,90\n")
    with pytest.raises(UserError, match="has boxes of photos"):
        open_inputs([], video=clip, boxes=tmp_path / "p.csv")
    with pytest.raises(UserError, match="is a video: give it by --video"):
        open_inputs([clip])
    with pytest.raises(UserError, match="no image is given"):
        open_inputs([])


def test_embed_takes_a_video_on_the_command_line(clip, tmp_path, bundle_folder):
    options = ["--boxes", clip.parent / "gt.txt", "--labels", "track", "--bundle", bundle_folder]
    done = mgn_deploy("embed", "--video", clip, "-o", tmp_path / "s", *options, "--backend", "onnxruntime")
    assert done.exit_code == 0, done.output
    assert "48 embedded" in done.stdout
