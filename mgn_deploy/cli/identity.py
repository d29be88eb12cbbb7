"""`mgn-deploy calibrate`, `compare`, `enrol`, `identify` and `people`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgn_deploy.cli.options import AllowUnproven, Backend, Batch, Bundle, Data, Json, Seed
from mgn_deploy.console import print_json, print_result, print_table, progress, say

if TYPE_CHECKING:
    from mgn_deploy.identity.calibration import Calibration
    from mgn_deploy.identity.identify import Identification
    from mgn_deploy.identity.rates import Interval

Far = Annotated[float, typer.Option("--far", help="Share of strangers that may be accepted, as in 1e-3.")]
PeopleFolder = Annotated[Path, typer.Option("--people", help="The folder of enrolled people.")]
Prior = Annotated[float | None, typer.Option(help="Share of pairs that are one person; without it the calibration's.")]


def calibrate(
    data: Data,
    bundle: Bundle,
    subset: Annotated[
        list[str] | None,
        typer.Option(help="query, gallery, train or multi-query, may be repeated; query and gallery without it."),
    ] = None,
    prior: Annotated[float, typer.Option(help="Share of pairs that are one person, for probabilities.")] = 0.5,
    same_camera: Annotated[
        bool, typer.Option("--same-camera", help="Also use pairs of images by one camera, which are easier.")
    ] = False,
    max_pairs: Annotated[int, typer.Option(min=1000, help="Most pairs of a kind; of more, as many are drawn.")] = (
        2_000_000
    ),
    bootstrap: Annotated[int, typer.Option(min=2, help="Draws of people for the intervals.")] = 300,
    seed: Seed = 0,
    backend: Backend = "auto",
    batch: Batch = 8,
    allow_unproven: AllowUnproven = False,
    json: Json = False,
) -> None:
    """Learn probabilities and thresholds for a bundle.

    Written as calibration.json beside the bundle's files. Use people that the model was not trained on.
    """
    from mgn_deploy.datasets import open_data
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.identity.calibrate import calibrate as run
    from mgn_deploy.identity.calibrate import checked_subsets
    from mgn_deploy.identity.calibration import CALIBRATION

    subsets = checked_subsets(subset or ("query", "gallery"))
    images = open_data(data, subsets)
    embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    with progress("") as update:
        made = run(
            images,
            embedder,
            subsets,
            prior=prior,
            same_camera=same_camera,
            max_pairs=max_pairs,
            replicates=bootstrap,
            seed=seed,
            batch_size=batch,
            progress=update,
        )
    made.write(embedder.bundle)
    say(f"{bundle / CALIBRATION}: from {made.data.people} people of {', '.join(subsets)}")
    if json:
        print_json(made.to_dict())
    else:
        _print_calibration(made)


def compare(
    first: Annotated[Path, typer.Argument(help="An image of a person.")],
    second: Annotated[Path, typer.Argument(help="Another image.")],
    bundle: Bundle,
    far: Far = 1e-3,
    prior: Prior = None,
    backend: Backend = "auto",
    allow_unproven: AllowUnproven = False,
    json: Json = False,
) -> None:
    """Tell whether two images show the same person."""
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.identity.compare import compare_images

    embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    result = compare_images(first, second, embedder, far=far, prior=prior)
    if result.note:
        say(result.note)
    told = f"similarity {result.similarity:.4f}"
    if result.probability is not None:
        verdict = "the same person" if result.same else "not the same person"
        told = (
            f"{verdict}: {told}, threshold {result.threshold:.4f} at FAR {result.far:g}; "
            f"probability {result.probability:.3g} where {result.prior:.0%} of pairs are one person"
        )
    print_result(json, result.to_dict(), told)


def enrol(
    name: Annotated[str, typer.Argument(help="The person's name.")],
    images: Annotated[list[Path], typer.Argument(help="Images of the person, or folders of them.")],
    people: PeopleFolder,
    bundle: Bundle,
    backend: Backend = "auto",
    batch: Batch = 8,
    allow_unproven: AllowUnproven = False,
    json: Json = False,
) -> None:
    """Enrol a person by images, or add images to one.

    An image that cannot be read ends the command, and nobody is enrolled.
    """
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.identity.enrol import enrol_images

    embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    result = enrol_images(name, images, people, embedder, batch_size=batch)
    told = f"{result.person.name}: {result.added} new, {len(result.person.embeddings)} in all, in {people}"
    print_result(json, result.to_dict(), told)


def identify(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    people: PeopleFolder,
    bundle: Bundle,
    far: Annotated[
        float, typer.Option("--far", help="Share of strangers that may be given a name, by the whole list.")
    ] = 1e-3,
    together: Annotated[bool, typer.Option("--together", help="All images show one person.")] = False,
    prior: Annotated[float, typer.Option(help="Share of images that show anybody enrolled.")] = 0.5,
    candidates: Annotated[int, typer.Option(min=1, help="People listed for each image in the JSON.")] = 3,
    backend: Backend = "auto",
    batch: Batch = 8,
    allow_unproven: AllowUnproven = False,
    json: Json = False,
) -> None:
    """Name the enrolled people on images, or say unknown."""
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.identity.enrol import identify_images

    embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    with progress() as update:
        answers, found = identify_images(
            images,
            people,
            embedder,
            far=far,
            together=together,
            prior=prior,
            candidates=candidates,
            batch_size=batch,
            progress=update,
        )
    for note in dict.fromkeys(answer.note for answer in answers if answer.note):
        say(note)
    if json:
        unread = [{"path": str(path), "reason": reason} for path, reason in found.failed]
        identified = [answer.to_dict() for answer in answers]
        print_json({"identifications": identified, "failed": unread, "skipped": dict(found.skipped)})
    else:
        _print_answers(answers)


people = typer.Typer(help="List, rename or remove enrolled people.", no_args_is_help=True)


@people.command("list", epilog="Example:\n\nmgn-deploy people list --people people")
def list_people(people: PeopleFolder, json: Json = False) -> None:
    """List everybody who is enrolled."""
    from mgn_deploy.identity.people import People

    opened = People.open(people)
    found = opened.load().people
    if json:
        print_json({"bundle_id": opened.bundle_id, "people": [person.to_dict() for person in found]})
    else:
        rows = [[person.name, str(len(person.embeddings)), person.enrolled] for person in found]
        print_table(["name", "images", "enrolled"], rows, title=f"{people}: bundle {opened.bundle_id[:12]}")


@people.command(epilog="Example:\n\nmgn-deploy people rename Anna Anne --people people")
def rename(
    name: Annotated[str, typer.Argument(help="Who is renamed.")],
    new_name: Annotated[str, typer.Argument(help="The new name.")],
    people: PeopleFolder,
    json: Json = False,
) -> None:
    """Give an enrolled person another name."""
    from mgn_deploy.identity.people import People

    person = People.open(people).rename(name, new_name)
    print_result(json, person.to_dict(), f"{name} is {person.name}")


@people.command(epilog="Example:\n\nmgn-deploy people remove Anna --people people")
def remove(
    name: Annotated[str, typer.Argument(help="Who is forgotten.")], people: PeopleFolder, json: Json = False
) -> None:
    """Forget an enrolled person; the embeddings are deleted."""
    from mgn_deploy.identity.people import People

    person = People.open(people).remove(name)
    print_result(json, person.to_dict(), f"{person.name} is no longer enrolled in {people}")


def _print_calibration(made: Calibration) -> None:
    def spread(value: Interval, form: str, times: int = 100) -> str:
        low, middle, high = (f"{times * one:{form}}" for one in (value.low, value.value, value.high))
        return f"{middle} ({low} to {high})"

    data = made.data
    kind = "" if data.same_camera else " by two cameras"
    print_table(
        ["pairs", "FAR", "threshold", "TAR, percent", "measured FAR, percent"],
        [
            [
                pairs,
                f"{rate.far:g}" + (" (few people)" if rate.problem else ""),
                spread(rate.threshold, ".4f", times=1),
                spread(rate.tar, ".2f"),
                spread(rate.measured_far, ".3g"),
            ]
            for pairs, rates in [
                ("all", made.rates),
                *((f"means over {one.images} images", one.rates) for one in made.pooled),
                *((f"cameras {pair.cameras[0]}, {pair.cameras[1]}", pair.rates) for pair in made.camera_pairs),
            ]
            for rate in rates
        ],
        title=f"{data.source}: {data.people} people, {data.images} images of {', '.join(data.subsets)}, "
        f"{data.genuine:,} pairs of one person and {data.impostor:,} of two{kind}; 95% intervals over people",
    )
    print(f"equal error rate {spread(made.eer, '.2f')} percent")
    print_table(
        ["probability", "mean", "share of one person", "pairs"],
        [
            [
                f"{row.low:.1f} to {row.high:.1f}",
                f"{row.mean_probability:.3f}",
                f"{row.genuine_share:.3f}",
                f"{row.pairs:,}",
            ]
            for row in made.reliability
        ],
        title=f"probabilities by {made.method} on held-out people where {made.prior:.0%} of pairs are one person: "
        + "; ".join(
            f"{name} Brier {score.brier:.4f}, log loss {score.log_loss:.4f}"
            for name, score in made.cross_validation.items()
        ),
    )


def _print_answers(answers: list[Identification]) -> None:
    for answer in answers:
        images = ", ".join(map(repr, answer.queries))
        best = answer.candidates[0]
        if answer.known is None:
            print(f"{images}: most like {best.name}, similarity {best.similarity:.4f}")
        elif answer.known:
            print(f"{images}: {answer.name}, p = {answer.probability:.2f}")
        else:
            print(f"{images}: unknown (below the threshold: most like {best.name}, p = {best.probability:.2f})")
