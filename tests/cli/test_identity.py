"""`calibrate`, `compare`, `enrol`, `identify` and `people`, from image files to what is printed and left on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import mgn_deploy

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.datasets.drawn import draw_market1501
from mgn_deploy.identity.calibration import CALIBRATION, Calibration
from mgn_deploy.identity.people import People


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "people"
    draw_market1501(folder, train_identities=2, test_identities=12, cameras=3, images_per_camera=2)
    return folder


@pytest.fixture(scope="module")
def calibrated(bundle_folder, data, tmp_path_factory):
    """A bundle with a calibration, and what the command printed."""
    bundle = Path(shutil.copytree(bundle_folder, tmp_path_factory.mktemp("calibrated") / "bundle"))
    done = mgn_deploy("calibrate", "--data", f"market1501:{data}", "--bundle", bundle, "--bootstrap", 10, "--json")
    assert done.exit_code == 0, done.stderr
    return bundle, done


def of_person(data: Path, number: int) -> list[Path]:
    people = sorted({path.name[:4] for path in (data / "query").iterdir() if path.suffix == ".jpg"})
    return sorted((data / "bounding_box_test").glob(f"{people[number]}_c*.jpg"))


def refused(done, sentence):
    assert (done.exit_code, done.stdout) == (2, ""), done.stderr
    assert sentence in done.stderr.splitlines()[-1]


def test_calibrate_writes_what_it_prints_beside_a_bundle_that_stays_whole(calibrated):
    bundle, done = calibrated
    printed = json.loads(done.stdout)
    assert printed == json.loads((bundle / CALIBRATION).read_text())
    assert printed["bundle_id"] == Bundle.open(bundle).id
    assert (printed["data"]["people"], printed["data"]["cameras"]) == (12, 3)
    assert printed["data"]["subsets"] == ["query", "gallery"]
    assert "calibration.json: from 12 people of query, gallery" in done.stderr
    assert "warning: no threshold for a false-accept rate of 0.001" in done.stderr


def test_calibrate_prints_tables_of_thresholds_and_reliability(bundle_folder, data, tmp_path):
    bundle = shutil.copytree(bundle_folder, tmp_path / "bundle")
    done = mgn_deploy(
        "calibrate", "--data", f"market1501:{data}", "--bundle", bundle, "--bootstrap", 5, "--subset", "query",
        "--subset", "gallery", "--prior", 0.1, "--same-camera",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "95% intervals over people" in done.stdout
    assert "where 10% of pairs are one person: platt Brier" in done.stdout
    assert "means over 2 images │ 0.01 (few people) │" in done.stdout
    assert "FAR 0.01: 12 people, for means over 2 images, are few for so low a rate, 25 would be" in done.stderr
    assert "equal error rate" in done.stdout
    assert "warning: pairs by one camera are in it" in done.stderr


def test_calibrate_refuses_too_few_people_and_leaves_nothing(bundle_folder, data, tmp_path):
    bundle = Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))
    before = sorted(path.name for path in bundle.iterdir())
    done = mgn_deploy("calibrate", "--data", f"market1501:{data}", "--bundle", bundle, "--subset", "train")
    refused(done, "has 2 people")
    done = mgn_deploy("calibrate", "--data", f"market1501:{data}", "--bundle", bundle, "--subset", "test")
    refused(done, "no subset 'test': there are train, query, gallery, multi-query")
    assert sorted(path.name for path in bundle.iterdir()) == before


def test_compare_says_the_same_person_and_by_which_threshold(calibrated, data):
    bundle, _ = calibrated
    image = of_person(data, 0)[0]
    done = mgn_deploy("compare", image, image, "--bundle", bundle, "--far", 0.01)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("the same person: similarity 1.0000, threshold 0.")
    assert "at FAR 0.01; probability" in done.stdout
    done = mgn_deploy("compare", image, of_person(data, 5)[0], "--bundle", bundle, "--far", 0.01, "--json")
    made = Calibration.open(Bundle.open(bundle))
    result = json.loads(done.stdout)
    assert result["threshold"] == made.decide(0.01).threshold
    assert result["same"] == (result["similarity"] >= result["threshold"])
    assert result["probability"] == pytest.approx(float(made.probability(result["similarity"])))


def test_compare_without_a_calibration_says_how_to_get_one(bundle_folder, data):
    first, second = of_person(data, 0)[:2]
    done = mgn_deploy("compare", first, second, "--bundle", bundle_folder)
    assert done.exit_code == 0
    assert done.stdout.startswith("similarity 0.")
    assert "no probability without a calibration: `mgn-deploy calibrate --data KIND:DIR --bundle" in done.stderr


def test_compare_refuses_a_rate_that_is_none_and_an_image_that_is_none(calibrated, data, tmp_path):
    bundle, _ = calibrated
    image = of_person(data, 0)[0]
    refused(mgn_deploy("compare", image, image, "--bundle", bundle, "--far", 2), "lies between 0 and 1")
    (tmp_path / "a.jpg").write_text("text")
    refused(mgn_deploy("compare", image, tmp_path / "a.jpg", "--bundle", bundle), "a.jpg' cannot be embedded")


def test_people_are_enrolled_identified_renamed_and_removed(calibrated, data, tmp_path):
    bundle, _ = calibrated
    folder = tmp_path / "people"
    for number, name in enumerate(("Anna", "Berta")):
        images = of_person(data, number)
        done = mgn_deploy("enrol", name, *images, "--people", folder, "--bundle", bundle)
        assert done.exit_code == 0, done.stderr
        assert f"{name}: {len(images)} new, {len(images)} in all" in done.stdout
    again = mgn_deploy("enrol", "Anna", *of_person(data, 0), "--people", folder, "--bundle", bundle, "--json")
    assert json.loads(again.stdout)["added"] == 0

    image = of_person(data, 1)[0]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/notes.txt").touch()
    shutil.copy(image, tmp_path / "photos")
    done = mgn_deploy("identify", tmp_path / "photos", "--people", folder, "--bundle", bundle, "--far", 0.5, "--json")
    assert json.loads(done.stdout)["skipped"] == {".txt": 1}
    (answer,) = json.loads(done.stdout)["identifications"]
    assert answer["candidates"][0]["name"] == "Berta"
    assert answer["known"] == (answer["candidates"][0]["similarity"] >= answer["threshold"])
    text = mgn_deploy("identify", image, "--people", folder, "--bundle", bundle, "--far", 0.5).stdout
    assert (": Berta, p = " in text) == answer["known"]

    assert mgn_deploy("people", "rename", "Berta", "Beate", "--people", folder).stdout == "Berta is Beate\n"
    assert mgn_deploy("people", "remove", "Anna", "--people", folder, "--json").exit_code == 0
    listed = json.loads(mgn_deploy("people", "list", "--people", folder, "--json").stdout)
    assert [person["name"] for person in listed["people"]] == ["Beate"]
    refused(mgn_deploy("people", "remove", "Anna", "--people", folder), "nobody named 'Anna' is enrolled")


def test_an_unreadable_image_among_several_enrols_nobody(calibrated, data, tmp_path):
    bundle, _ = calibrated
    (tmp_path / "b.jpg").write_bytes(of_person(data, 0)[0].read_bytes()[:300])
    done = mgn_deploy(
        "enrol", "Anna", of_person(data, 0)[0], tmp_path / "b.jpg", "--people", tmp_path / "people", "--bundle", bundle
    )
    refused(done, "b.jpg' cannot be embedded")
    assert not (tmp_path / "people").exists()


def test_an_unreadable_image_among_several_is_named_and_the_others_are_identified(calibrated, data, tmp_path):
    bundle, _ = calibrated
    mgn_deploy("enrol", "Anna", of_person(data, 0)[0], "--people", tmp_path / "people", "--bundle", bundle)
    (tmp_path / "b.jpg").write_bytes(b"")
    asked = ["identify", of_person(data, 0)[1], tmp_path / "b.jpg", "--people", tmp_path / "people", "--bundle", bundle]
    done = mgn_deploy(*asked, "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert len(printed["identifications"]) == 1
    assert printed["failed"] == [{"path": str(tmp_path / "b.jpg"), "reason": "the file is empty"}]
    assert "warning: cannot be read: " in done.stderr
    refused(mgn_deploy("identify", tmp_path / "b.jpg", *asked[3:]), "not one of 1 images can be read")


def test_people_of_another_bundle_are_refused_before_anything_is_embedded(calibrated, data, tmp_path):
    bundle, _ = calibrated
    People.create(tmp_path / "people", "b" * 64, 8)
    image = of_person(data, 0)[0]
    for command in (["enrol", "Anna", image], ["identify", image]):
        done = mgn_deploy(*command, "--people", tmp_path / "people", "--bundle", bundle)
        refused(done, "belongs to bundle bbbbbbbbbbbb")
    assert People.open(tmp_path / "people").load().people == ()


def test_identify_without_a_calibration_names_nobody_and_says_why(bundle_folder, data, tmp_path):
    mgn_deploy("enrol", "Anna", of_person(data, 0)[0], "--people", tmp_path / "people", "--bundle", bundle_folder)
    done = mgn_deploy(
        "identify", of_person(data, 0)[1], "--people", tmp_path / "people", "--bundle", bundle_folder, "--together"
    )
    assert done.exit_code == 0
    assert "most like Anna, similarity" in done.stdout
    assert "no name and no probability without a calibration" in done.stderr


def test_a_doubtful_enrolment_is_noted(calibrated, data, tmp_path):
    bundle, _ = calibrated
    image = of_person(data, 0)[0]
    mgn_deploy("enrol", "Anna", image, "--people", tmp_path / "people", "--bundle", bundle)
    done = mgn_deploy("enrol", "Berta", image, "--people", tmp_path / "people", "--bundle", bundle, "--json")
    notes = json.loads(done.stdout)["notes"]
    assert notes == [
        "images of Berta that are enrolled as Anna too: 1; one name is wrong",
        "Berta looks like Anna, who is enrolled (similarity 1.00)",
    ]
    assert all(f"warning: {note}" in done.stderr for note in notes)


def test_validate_measures_the_open_set_with_the_calibrations_thresholds(calibrated, data):
    bundle, _ = calibrated
    asked = ["validate", "--data", f"market1501:{data}", "--bundle", bundle, "--no-reference", "--open-set"]
    done = mgn_deploy(*asked, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["open_set"]
    assert (found["people"], found["enrolled"], found["draws"]) == (12, 6, 100)
    names = ["FPIR 0.01", "FPIR 0.1", "calibration, FAR 0.01", "calibration, FAR 0.001"]
    assert [point["name"] for point in found["points"]] == names
    assert found["points"][0]["fpir"][0] <= 0.01
    assert "DIR, rank 1" in mgn_deploy(*asked).stdout


def test_search_shows_probabilities_where_the_bundle_is_calibrated(calibrated, data, tmp_path):
    bundle, _ = calibrated
    assert mgn_deploy("embed", data / "bounding_box_test", "-o", tmp_path / "s", "--bundle", bundle).exit_code == 0
    image = of_person(data, 0)[0]
    asked = ["search", image, tmp_path / "s", "--bundle", bundle, "-k", 3, "--far", 0.01]
    done = mgn_deploy(*asked, "--html", tmp_path / "p.html", "--json")
    assert done.exit_code == 0, done.stderr
    (found,) = json.loads(done.stdout)
    made = Calibration.open(Bundle.open(bundle))
    for one in found["results"]:
        assert one["same"] == (one["similarity"] >= made.decide(0.01).threshold)
        assert one["probability"] < float(made.probability(one["similarity"], 0.5))  # few pairs are of one person
        assert one["probability"] == pytest.approx(
            float(made.probability(one["similarity"], found["judged"]["prior"])), abs=1e-3
        )
    assert "the share 0.01 reaches it" in (tmp_path / "p.html").read_text()
    assert "above threshold" in mgn_deploy(*asked).stdout
    done = mgn_deploy(*asked, "--aqe", 2)
    assert "above threshold" not in done.stdout
    assert "warning: no probabilities: a calibration is of pairs of images" in done.stderr


def test_groups_and_a_map_of_a_store(calibrated, data, tmp_path):
    bundle, _ = calibrated
    command = ["embed", data / "bounding_box_test", "-o", tmp_path / "s", "--bundle", bundle, "--labels", "market1501"]
    assert mgn_deploy(*command).exit_code == 0
    groups, page, table = tmp_path / "g.parquet", tmp_path / "m.html", tmp_path / "m.parquet"
    done = mgn_deploy("cluster", tmp_path / "s", "-o", groups, "--html", tmp_path / "g.html", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["agreement"]["people"] == 13  # 0000 is a person where nobody says otherwise
    done = mgn_deploy("map", tmp_path / "s", "-o", page, "--groups", groups, "--export", table, "--limit", 20, "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["shown"] == 20 < printed["images"]
    assert all(path.stat().st_size > 1000 for path in (groups, page, table, tmp_path / "g.html"))
