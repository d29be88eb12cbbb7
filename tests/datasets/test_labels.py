"""`read_labels`: who is on an image, only where the user names a rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgn_deploy.datasets.labels import Label, read_labels
from mgn_deploy.errors import UserError


def test_without_a_rule_a_name_says_nothing():
    assert read_labels("none")("0002_c1s1_000451_03.jpg") is None


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("0002_c1s1_000451_03.jpg", Label(2, 1)),
        ("camera 3/0002_c1s1_000451_03.jpg", Label(2, 1)),
        ("0002_c1s1/photo.jpg", None),
        ("photo.jpg", None),
    ],
)
def test_market1501_reads_the_files_own_name(name, label):
    assert read_labels("market1501")(name) == label


def test_folder_numbers_people_by_the_bytes_of_their_folders_names():
    labels = read_labels("folder", ["zoe/1.jpg", "Ann/deep/2.jpg", "loose.jpg", "ann/3.jpg"])
    assert labels.people == {"Ann": 1, "ann": 2, "zoe": 3}
    assert labels("Ann/deep/2.jpg") == Label(1, None)
    assert labels("zoe/never seen.jpg") == Label(3, None)
    assert labels("loose.jpg") is None
    assert labels("nobody/1.jpg") is None


def test_people_who_have_a_number_keep_it_and_new_ones_come_after():
    assert read_labels("folder", ["a/1.jpg", "m/1.jpg", "z/1.jpg"], people={"m": 1, "gone": 5}).people == {
        "m": 1,
        "gone": 5,
        "a": 6,
        "z": 7,
    }


def table(tmp_path: Path, content: str | bytes, name: str = "labels.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_a_table_has_its_columns_in_any_order_among_others_behind_a_byte_order_mark(tmp_path, delimiter):
    lines = [["Camera", "note", "Identity", "Path"], ["4", "x", "17", "a/1.jpg"], ["", "y", "0", ".\\b\\2.jpg"]]
    content = "\ufeff" + "\r\n".join(delimiter.join(cells) for cells in lines) + "\r\n\r\n"
    labels = read_labels(table(tmp_path, content))
    assert labels("a/1.jpg") == Label(17, 4)
    assert labels("b/2.jpg") == Label(0, None)
    assert labels("c.jpg") is None
    assert labels.people == {}


def test_a_tables_people_and_cameras_may_be_words(tmp_path):
    labels = read_labels(table(tmp_path, 'path,identity,camera\n"a, b.jpg",zoe,north\nc.jpg,12,south\nd.jpg,,south\n'))
    assert labels.people == {"12": 1, "zoe": 2}
    assert labels.cameras == {"north": 1, "south": 2}
    assert labels("a, b.jpg") == Label(2, 1)
    assert labels("d.jpg") is None


def test_images_without_a_label_are_counted_and_the_first_is_named(tmp_path, said):
    labels = read_labels(table(tmp_path, "path,identity\na.jpg,1\n"))
    assert labels.unlabelled(["a.jpg", "b.jpg", "c.jpg"]) == ["b.jpg", "c.jpg"]
    assert len(said) == 1
    assert "says nothing of 2 of 3 images, 'b.jpg' the first" in said[0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "first line has to name the columns path, identity"),
        ("a.jpg,1\n", "first line has to name the columns path, identity"),
        ("path,path,identity\n", "each once"),
        ("path,identity\na.jpg,1\na.jpg,2\n", "line 3: 'a.jpg' has another label"),
        ("path,identity\na, b.jpg,1\n", "line 2: 3 cells under 2 columns"),
        ("path,identity\n,1\n", "line 2: the path is empty"),
        ("path,identity\na.jpg,-2\n", "identity -2 is not from -1 to 2147483647"),
        ("path,identity\na.jpg,99999999999\n", "identity 99999999999 is not from"),
        ('path,identity\n"a.jpg,1\n', "not a table"),
        ("path,identity\na.jpg,ü\n".encode("latin-1"), "is not UTF-8 .byte 20"),
    ],
)
def test_a_table_that_cannot_be_used_is_a_sentence(tmp_path, content, sentence):
    with pytest.raises(UserError, match=sentence):
        read_labels(table(tmp_path, content))


def test_an_unknown_rule_and_a_missing_table_are_sentences(tmp_path):
    with pytest.raises(UserError, match="--labels market: choose none, market1501, folder or a table"):
        read_labels("market")
    with pytest.raises(UserError, match="cannot be read"):
        read_labels(tmp_path / "no.csv")
