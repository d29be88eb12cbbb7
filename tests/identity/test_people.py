"""The folder of enrolled people: what is kept, what is refused, and what a crash or a second writer leaves."""

import io
import json
import multiprocessing
import os
import tempfile
import threading

import numpy as np
import pytest
from bomb import Bomb
from made_up_people import BUNDLE, embeddings_of

from mgn_deploy.errors import UserError
from mgn_deploy.identity.people import People
from mgn_deploy.identity.person import check_name
from mgn_deploy.serve.people import PeopleList

ROWS = embeddings_of(4, 3, dim=8)[0]


@pytest.fixture
def people(tmp_path):
    return People.create(tmp_path / "people", BUNDLE, 8)


def enrolled(people):
    return {person.name: len(person.embeddings) for person in people.load().people}


def test_who_is_enrolled_is_read_back_by_name(people):
    people.enrol("Berta", ROWS[3:6], ["a", "b", "c"])
    people.enrol("Anna", ROWS[:1], ["d"])
    loaded = people.load()
    assert loaded.names == ["Anna", "Berta"]
    assert (loaded.people[1].embeddings == ROWS[3:6]).all()
    assert loaded.people[1].images == ("a", "b", "c")
    assert (loaded.rows == np.concatenate([ROWS[:1], ROWS[3:6]])).all()
    assert loaded.starts.tolist() == [0, 1]
    assert People.open(people.folder).load().names == ["Anna", "Berta"]


def test_further_images_are_added_and_those_that_are_enrolled_are_not(people):
    people.enrol("Anna", ROWS[:2], ["a", "b"])
    person = people.enrol("Anna", ROWS[1:4], ["b", "c", "c"])
    assert person.images == ("a", "b", "c")
    assert (people.load().people[0].embeddings == ROWS[:3]).all()


def test_a_person_is_renamed_and_removed(people):
    people.enrol("Anna", ROWS[:1], ["a"])
    people.enrol("Berta", ROWS[1:2], ["b"])
    people.rename("Anna", "Änne")
    assert enrolled(people) == {"Berta": 1, "Änne": 1}
    with pytest.raises(UserError, match="has a 'Berta' already"):
        people.rename("Änne", "Berta")
    people.remove("Berta")
    assert enrolled(people) == {"Änne": 1}
    assert len(list(people.folder.glob("person-*"))) == 1
    for change in (lambda: people.remove("Berta"), lambda: people.rename("Berta", "B")):
        with pytest.raises(UserError, match="nobody named 'Berta' is enrolled"):
            change()


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a" * 101,
        "../etc",
        "a/b",
        "a\\b",
        ".hidden",
        "-rf",
        "a\n",
        "a\0b",
        " a",
        "a ",
        "\u202egnp",
        "\u200b",
        "\udcff",
    ],
)
def test_names_that_cannot_be_are_refused_and_nothing_is_written(people, name):
    with pytest.raises(UserError, match="a person's name"):
        people.enrol(name, ROWS[:1], ["a"])
    assert sorted(path.name for path in people.folder.iterdir()) == [".lock", "manifest.json"]


@pytest.mark.parametrize("name", ["Anna", "person 12", "张伟", "O'Neil, Ann-Marie (2)", "a" * 100, "👩‍🚀"[:1]])
def test_names_of_people_are_taken(name):
    assert check_name(name) == name


def test_a_name_in_another_unicode_form_is_the_same_person(people):
    people.enrol("\u00c4nne", ROWS[:1], ["a"])
    people.enrol("A\u0308nne", ROWS[1:2], ["b"])
    assert enrolled(people) == {"\u00c4nne": 2}
    people.remove("A\u0308nne")
    assert enrolled(people) == {}


@pytest.mark.parametrize(
    "rows, sentence",
    [
        (np.zeros((1, 9), np.float32), "embeddings of 8 finite numbers"),
        (np.full((1, 8), np.nan, np.float32), "embeddings of 8 finite numbers"),
        (np.zeros((0, 8), np.float32), "at least one image"),
        (np.zeros(8, np.float32), "one embedding for each"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(people, rows, sentence):
    with pytest.raises(UserError, match=sentence):
        people.enrol("Anna", rows, ["a"] * len(rows))
    assert enrolled(people) == {}


def test_another_bundles_folder_is_refused(people):
    with pytest.raises(UserError, match="belongs to bundle aaaaaaaaaaaa and the images were embedded by bbbbbbbbbbbb"):
        People.create(people.folder, "b" * 64, 8)


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UserError, match="exists and holds no enrolled people"):
        People.create(tmp_path / "photos", BUNDLE, 8)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    with pytest.raises(UserError, match="holds no enrolled people: `mgn-deploy enrol NAME"):
        People.open(tmp_path / "photos")
    with pytest.raises(UserError, match="holds no enrolled people"):
        People.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("{", "is not the manifest of a people folder"),
        ('{"schema_version": 1, "bundle_id": "a"}', "dim: Field required"),
        ('{"kind": "people", "schema_version": 2, "bundle_id": "a", "dim": 8}', "schema_version: Input should be 1"),
        ('{"kind": "people", "schema_version": 1, "bundle_id": "a", "dim": 0}', "dim: Input should be greater"),
    ],
)
def test_a_manifest_of_something_else_is_one_sentence(people, content, sentence):
    (people.folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        People.open(people.folder)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


ABOUT = {"name": "Anna", "images": ["a"], "enrolled": "2026-01-01"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a zip",
        npz(embeddings=ROWS[:1])
        .replace(b"PK\x03\x04\x2d\0\0\0", b"PK\x03\x04\x2d\0\1\0")
        .replace(b"PK\1\2\x2d\3\x2d\0\0\0", b"PK\1\2\x2d\3\x2d\0\1\0"),  # encrypted, by its flags
        npz(embeddings=ROWS[:1]),
        npz(embeddings=ROWS[:2], about=np.array(json.dumps(ABOUT))),
        npz(embeddings=ROWS[:1].astype(np.float64), about=np.array(json.dumps(ABOUT))),
        npz(embeddings=np.full((1, 8), np.inf, np.float32), about=np.array(json.dumps(ABOUT))),
        npz(embeddings=ROWS[:1], about=np.array(json.dumps({**ABOUT, "name": "../a"}))),
        npz(embeddings=ROWS[:1], about=np.array("[]")),
    ],
)
def test_a_damaged_person_is_one_sentence_that_names_the_file(people, content):
    people.enrol("Anna", ROWS[:1], ["a"])
    (path,) = people.folder.glob("person-*")
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name} is damaged: delete it and enrol the person again"):
        people.load()


def test_a_pickle_in_a_persons_file_is_not_run(people, tmp_path):
    people.enrol("Anna", ROWS[:1], ["a"])
    (path,) = people.folder.glob("person-*")
    path.write_bytes(npz(embeddings=np.array([Bomb(tmp_path / "ran")], object), about=np.array(json.dumps(ABOUT))))
    with pytest.raises(UserError, match="is damaged"):
        people.load()
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_that_may_not_be_listed_is_not_taken_for_an_empty_one():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o711)
        people = People.create(f"{folder}/people", BUNDLE, 32)
        os.chmod(people.folder, 0o711)
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match="cannot be read: Permission denied"):
                people.load()
        finally:
            os.seteuid(0)


def test_what_a_killed_writer_left_is_not_a_person(people):
    people.enrol("Anna", ROWS[:1], ["a"])
    (people.folder / ".mgn-x.tmp").write_bytes(b"half")
    assert enrolled(people) == {"Anna": 1}


def _enrol(folder, number):
    People.open(folder).enrol("Anna", ROWS[number : number + 1], [str(number)])
    People.open(folder).enrol(f"person {number}", ROWS[number : number + 1], ["x"])


def test_processes_that_enrol_at_once_lose_nothing(people):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_enrol, args=(people.folder, number)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert enrolled(people) == {"Anna": 6, **{f"person {number}": 1 for number in range(6)}}


def test_threads_that_enrol_at_once_lose_nothing(people):
    threads = [threading.Thread(target=_enrol, args=(people.folder, number)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert enrolled(people)["Anna"] == 8


def test_a_person_who_is_removed_while_the_folder_is_listed_is_not_there(people: People):
    people.enrol("Anna", np.eye(1, people.dim, dtype=np.float32), ["0" * 64])
    listed = PeopleList(people.folder, people.bundle_id, people.dim)
    (people.folder / "person-of-before.npz").symlink_to("nowhere")  # a name whose file is gone
    assert [person.name for person in listed.load().people] == ["Anna"]
