"""A bundle's calibration: what a similarity of its embeddings says, and where to draw the line.

`calibration.json` lies beside the bundle's files and belongs to one bundle id; the bundle's own id and hashes do not
depend on it. `calibrate` writes it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import UserError, first_problem
from mgn_deploy.files import write_text
from mgn_deploy.identity.fit import Knots, Method, evidence, probability
from mgn_deploy.identity.rates import Interval, Rate, Strict, few_people, needed_pairs

CALIBRATION = "calibration.json"
DEFAULT_FAR = 1e-3


class Scores(Strict):
    """How good a method's probabilities are on people that it was not fitted on."""

    brier: float
    log_loss: float


class Reliability(Strict):
    """Held-out pairs whose probability was from `low` to `high`: the mean of it, and how many were genuine."""

    low: float
    high: float
    mean_probability: float
    genuine_share: float  # with the weight of the prior
    pairs: int


class CameraPair(Strict):
    """The same for the images of two cameras alone."""

    cameras: tuple[int, int]
    people: int
    genuine: int
    impostor: int
    eer: Interval
    rates: list[Rate]


class Pooled(Strict):
    """What the mean similarity to `images` images of one person says; `rates`, `evidence` and `tail` as a
    calibration's."""

    images: int = Field(ge=2)
    people: int
    genuine: int
    impostor: int
    rates: list[Rate] = Field([])
    evidence: Knots = Field(min_length=1)
    tail: list[tuple[float, float]] = Field(min_length=1)


class CalibrationData(Strict):
    """What a calibration was learned from. `genuine` and `impostor` are the pairs used, `..._total` those there are."""

    source: str
    subsets: list[str]
    images_sha256: str
    images: int
    people: int
    cameras: int
    same_camera: bool
    genuine: int
    genuine_total: int
    impostor: int
    impostor_total: int
    seed: int


class Decision(NamedTuple):
    """A threshold, and the false-accept rate that it stands for.

    It is a higher rate than was asked for where there are too few pairs; `problem` says so, or that there are too few
    people. `images` are those whose mean similarity the threshold was learned of.
    """

    far: float
    threshold: float
    problem: str | None
    images: int = 1


class Calibration(Strict):
    """What similarities of one bundle's embeddings say. It is immutable; any thread may use it.

    Attributes:
        bundle_id: of the bundle that it belongs to.
        backend: the engine that embedded the images.
        prior: the share of genuine pairs that `probability` assumes unless it is told another.
        method: which way to learn the evidence was better on people that it was not fitted on.
        evidence: (similarity, evidence) knots of a piecewise linear function: see `identity/fit.py`.
        tail: (false-accept rate, threshold), by falling rate.
        pooled: the same for means over several images of a person, by rising number, where people have so many.
    """

    schema_version: Literal[1] = 1
    bundle_id: str
    backend: str
    data: CalibrationData
    prior: float = Field(gt=0, lt=1)
    method: Method
    evidence: Knots = Field(min_length=1)
    cross_validation: dict[Method, Scores]
    reliability: list[Reliability]
    rates: list[Rate]
    eer: Interval
    eer_threshold: Interval
    tail: list[tuple[float, float]] = Field(min_length=1)
    pooled: list[Pooled] = Field([])
    camera_pairs: list[CameraPair] = Field([])
    notes: list[str] = Field([])
    tools: dict[str, str] = Field({})
    date: str

    @classmethod
    def find(cls, bundle: Bundle) -> Calibration | None:
        """A bundle's calibration; None where it has none.

        Raises:
            UserError: the file is broken, of a later schema, or of another bundle.
        """
        path = bundle.folder / CALIBRATION
        again = "calibrate again (`mgn-deploy calibrate`) or delete it"
        try:
            found = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            raise UserError(
                f"{path} is not a calibration that this mgn-deploy reads ({first_problem(error)}): {again}"
            ) from None
        if found.bundle_id != bundle.id:
            raise UserError(
                f"{path} belongs to bundle {found.bundle_id[:12]} and this one is {bundle.id[:12]}: {again}"
            )
        return found

    @classmethod
    def open(cls, bundle: Bundle) -> Calibration:
        """A bundle's calibration.

        Raises:
            UserError: there is none, or what `find` refuses.
        """
        found = cls.find(bundle)
        if found is None:
            raise UserError(f"{bundle.folder} has no {CALIBRATION}: {how_to_calibrate(bundle)}")
        return found

    def write(self, bundle: Bundle) -> None:
        """Write it beside a bundle's files; an earlier one is replaced once the new one is whole.

        Raises:
            UserError: it belongs to another bundle, or the folder cannot be written.
        """
        if self.bundle_id != bundle.id:
            raise UserError(f"this calibration belongs to bundle {self.bundle_id[:12]}, not to {bundle.id[:12]}")
        write_text(bundle.folder / CALIBRATION, self.model_dump_json(indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as `calibration.json` holds it."""
        return self.model_dump(mode="json")

    def log_likelihood_ratio(self, similarities: np.ndarray | float, images: np.ndarray | int = 1) -> np.ndarray:
        """log(P(similarity | same person) / P(similarity | two people)) of similarities of any shape, float64.

        Args:
            similarities: of two images, or means over several images of a person.
            images: over how many, an integer for all or one for each. What was learned of fewer images stands for more.
        """
        found = evidence(similarities, self.evidence)
        for one in self.pooled:
            found = np.where(np.asarray(images) >= one.images, evidence(similarities, one.evidence), found)
        return found

    def probability(self, similarities: np.ndarray | float, prior: float | None = None) -> np.ndarray:
        """P(same person) of cosine similarities of any shape, float64.

        Args:
            similarities: between two images' embeddings.
            prior: the share of genuine pairs among those that are compared; None: the calibration's.

        Raises:
            UserError: a prior that is not between 0 and 1.
        """
        prior = self.prior if prior is None else check_prior(prior)
        return probability(self.log_likelihood_ratio(similarities), prior)

    def decide(self, far: float, images: int = 1) -> Decision:
        """The threshold for a false-accept rate, interpolated on its logarithm.

        Where the calibration has too few pairs for so low a rate, it is the strictest threshold that they support, and
        `problem` says so, as it does where the pairs are enough and their people too few.

        Args:
            far: the rate.
            images: over how many of a person the similarity is the mean. A threshold for fewer is stricter, so it
                stands in where the calibration has none for so many or for so low a rate.

        Raises:
            UserError: `far` is not between 0 and 1.
        """
        check_far(far)
        of, people, tail = 1, self.data.people, self.tail
        for one in self.pooled:
            if one.images <= images and one.tail[-1][0] * (1 - 1e-9) <= far:
                of, people, tail = one.images, one.people, one.tail
        rates, thresholds = np.array(tail).T
        if far < rates[-1] * (1 - 1e-9):
            return Decision(
                float(rates[-1]),
                float(thresholds[-1]),
                f"a false-accept rate of {far:.3g} needs {needed_pairs(far):,} impostor pairs and the calibration has "
                f"{self.data.impostor:,}: its strictest threshold stands for {rates[-1]:.3g}",
            )
        threshold = float(np.interp(-np.log(far), -np.log(rates), thresholds))
        return Decision(far, threshold, few_people(people, far, of), of)


def how_to_calibrate(bundle: Bundle) -> str:
    """The command that gives a bundle probabilities and thresholds."""
    return f"`mgn-deploy calibrate --data KIND:DIR --bundle {bundle.folder}` learns one from labelled images"


def check_far(far: float) -> float:
    """Raise UserError unless a false-accept rate lies between 0 and 1."""
    if not 0 < far < 1:
        raise UserError(f"a false-accept rate lies between 0 and 1, as 1e-3 does, and {far:g} does not")
    return far


def check_prior(prior: float) -> float:
    """Raise UserError unless a prior lies between 0 and 1."""
    if not 0 < prior < 1:
        raise UserError(f"the prior is a share of genuine pairs between 0 and 1, as 0.5 is, and {prior:g} is not")
    return prior


def check_same_id(what: str, bundle_id: str, other: str) -> None:
    """Raise UserError where `what` belongs to another bundle than the embeddings."""
    if bundle_id != other:
        raise UserError(
            f"{what} belongs to bundle {bundle_id[:12]} and the images were embedded by {other[:12]}: use one bundle "
            "for both"
        )
