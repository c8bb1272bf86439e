"""The vowels of 1991: two experts out of many, and how many passes they take beside back-propagation."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import DataError
from moesaic.lab.classic.record import Record

if TYPE_CHECKING:
    from moesaic.classic.data import Data
    from moesaic.classic.mixture import Mixture

VOWELS = {"iy": 1.0, "ih": 0.0, "aa": 1.0, "ah": 0.0}
"""[i] and [ɪ] overlap, and so do [ɑ] and [ʌ]; one output tells the first of each pair from the second."""
TRAINING_SPEAKERS = 50
CRITERION = 0.08
"""Training ends when the squared error of the blended output is, on average, no more than this."""

# Means of the first two formants, in hertz, of men, women and children (Peterson and Barney 1952, table II).
_FORMANTS = {
    "iy": ((270, 2290), (310, 2790), (370, 3200)),
    "ih": ((390, 1990), (430, 2480), (530, 2730)),
    "aa": ((730, 1090), (850, 1220), (1030, 1370)),
    "ah": ((640, 1190), (760, 1400), (850, 1590)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Speech:
    """Formants of vowels.

    Attributes:
        x_TD: the first two, in kilohertz.
        y_T: the output wanted, by :data:`VOWELS`.
        is_training_T: whether the speaker is one of the first fifty.
        vowel_T: which vowel it is.
    """

    x_TD: NDArray[np.float64]
    y_T: NDArray[np.float64]
    is_training_T: NDArray[np.bool_]
    vowel_T: NDArray[np.str_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """One of the systems that are compared.

    Attributes:
        name: as it is called on the page.
        num_experts: E; 1 for a network alone.
        hidden: units of the network; None for linear experts.
        error: that is descended, one of the three of 1991; for a network alone, ``cooperative`` is the squared error
            and ``mixture`` the cross-entropy.
        shrink: what the first weights of a network are multiplied by.
    """

    name: str
    num_experts: int = 1
    hidden: int | None = None
    error: str = "mixture"
    shrink: float = 1.0

    @property
    def num_params(self) -> int:
        """Weights and biases, two inputs and one output."""
        if self.hidden is not None:
            return 3 * self.hidden + self.hidden + 1
        return 3 * self.num_experts * 2


LEARNERS = (
    Learner(name="4 experts", num_experts=4),
    Learner(name="8 experts", num_experts=8),
    Learner(name="network, 6 hidden", hidden=6, error="cooperative"),
    Learner(name="network, 12 hidden", hidden=12, error="cooperative"),
    Learner(name="network, 6 hidden, small weights at first", hidden=6, error="cooperative", shrink=0.1),
    Learner(name="network, 12 hidden, small weights at first", hidden=12, error="cooperative", shrink=0.1),
    Learner(name="network, 6 hidden, cross-entropy", hidden=6),
    Learner(name="4 experts, competitive error", num_experts=4, error="competitive"),
    Learner(name="4 experts, cooperative error", num_experts=4, error="cooperative"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vowels:
    """The experiment.

    Attributes:
        runs: of each learner, with seeds 0, 1, …
        steps: learning rates that are tried.
        search: runs with each of them, with other seeds.
        most: passes after which a run is given up.
        learners: what is compared.
    """

    runs: int = 25
    steps: tuple[float, ...] = (1.0, 3.0, 10.0)
    search: int = 3
    most: int = 6000
    learners: tuple[Learner, ...] = LEARNERS

    def plan(self, source: str) -> dict[str, Any]:
        """What figures depend on, the number of runs apart: more may follow."""
        return {**asdict(replace(self, runs=0)), "source": source}

    @property
    def total(self) -> int:
        """Runs in all."""
        return len(self.learners) * (self.runs + len(self.steps) * self.search)

    def run(
        self, speech: Speech, record: Record, done: Callable[[str], None] = lambda _name: None
    ) -> dict[str, list[dict[str, Any]]]:
        """Choose each learner's step, then run it.

        Args:
            speech: the vowels.
            record: where figures are kept.
            done: called after each run with what it was.
        Returns:
            For each learner's name its runs: passes, shares of training and test vowels told rightly, experts alive.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for learner in self.learners:

            def one(step: float, seed: int, learner: Learner = learner) -> dict[str, Any]:
                name = f"{learner.name}, step {step:g}, seed {seed}"
                got: dict[str, Any] = record.once(name, lambda: train(learner, speech, step, seed, self.most))
                done(name)
                return got

            seeds = range(1000, 1000 + self.search)
            tried = {step: [one(step, seed) for seed in seeds] for step in self.steps}
            step = min(tried, key=lambda step: _cost(tried[step]))
            found[learner.name] = [one(step, seed) for seed in range(self.runs)]
        return found


QUICK = Vowels(runs=3, steps=(3.0,), search=1, most=1500)
"""In seconds, to see that it runs."""


def _cost(runs: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """Runs that did not arrive come first, passes second."""
    return sum(not run["arrived"] for run in runs), fmean(run["passes"] for run in runs)


def train(learner: Learner, speech: Speech, step: float, seed: int, most: int) -> dict[str, Any]:
    """One run: batch gradient descent without momentum, an update in each pass, until the criterion is met."""
    mixture, passes, arrived = trained(learner, speech, step, seed, most)
    training = speech.is_training_T
    chance_T = mixture.mean(_inputs(speech.x_TD))[:, 0]
    right_T = (chance_T > 0.5) == (speech.y_T > 0.5)
    gate_E = np.exp(mixture.log_gate(_inputs(speech.x_TD[training]))).mean(axis=0)
    return {
        "step": step,
        "passes": passes,
        "arrived": arrived,
        "train": float(right_T[training].mean()),
        "test": float(right_T[~training].mean()),
        "alive": int((gate_E > 0.01).sum()),
    }


def trained(learner: Learner, speech: Speech, step: float, seed: int, most: int) -> tuple[Mixture, int, bool]:
    """The mixture at the end of a run, the passes that it took, and whether it met the criterion."""
    from moesaic.classic.gradient import Gradient
    from moesaic.classic.noise import Noise
    from moesaic.classic.objective import ERRORS

    data = _training(speech)
    random = np.random.RandomState(seed)
    noise = Noise(kind="fixed", floor_O=np.ones(1))
    gradient = Gradient(error=ERRORS[learner.error], noise=noise, learning_rate=step)
    passes = gradient.passes(_beginning(learner, data, random), data, random)
    for number, (mixture, _) in enumerate(passes):
        squared = float(((mixture.mean(data.x_TD) - data.y_TO) ** 2).mean())
        if squared <= CRITERION or number >= most:
            return mixture, number, squared <= CRITERION
    raise AssertionError("passes have no end of their own")


def _beginning(learner: Learner, data: Data, random: np.random.RandomState) -> Mixture:
    from moesaic.classic.expert import NetworkExperts
    from moesaic.classic.family import BERNOULLI
    from moesaic.classic.noise import Noise
    from moesaic.classic.start import Start
    from moesaic.classic.tree import Tree

    start = Start(
        kind="small",
        tree=Tree.full((learner.num_experts,) if learner.num_experts > 1 else ()),
        family=BERNOULLI,
        noise=Noise(kind="fixed", floor_O=np.ones(1)),
        variance_O=np.ones(1),
        hidden=learner.hidden,
    )
    mixture = start(data, random, 0.0)
    if isinstance(mixture.experts, NetworkExperts):
        hidden_EFD, output_EOF = mixture.experts.arrays
        return replace(mixture, experts=NetworkExperts(learner.shrink * hidden_EFD, learner.shrink * output_EOF))
    return mixture


def _training(speech: Speech) -> Data:
    from moesaic.classic.data import Data

    chosen = speech.is_training_T
    x_TD, y_T = speech.x_TD[chosen], speech.y_T[chosen]
    return Data(x_TD=_inputs(x_TD), y_TO=y_T[:, None], weight_T=np.ones(len(y_T)))


def _inputs(x_TD: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([x_TD, np.ones((len(x_TD), 1))], axis=1)


def read_vowels(path: Path) -> Speech:
    """Peterson and Barney's measurements, from a table with the columns Speaker, Vowel, F1 and F2.

    Raises:
        DataError: if it is not there, or something else.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["Vowel"] in VOWELS]
        speaker_T = np.array([int(row["Speaker"]) for row in rows])
        x_TD = np.array([[float(row["F1"]), float(row["F2"])] for row in rows]) / 1000
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"Vowels need a CSV file with the columns Speaker, Vowel (iy, ih, aa, ah), F1 and F2 in hertz; {path} "
            f"could not be read so: {error!r}. Peterson and Barney's measurements are such a table."
        ) from error
    is_training_T = speaker_T <= TRAINING_SPEAKERS
    if not is_training_T.any() or is_training_T.all():
        raise DataError(
            f"Vowels need speakers up to {TRAINING_SPEAKERS} to train on and others to test, got "
            f"{sorted(set(speaker_T.tolist()))} in {path}."
        )
    return _speech([row["Vowel"] for row in rows], x_TD, is_training_T)


def drawn_vowels(num_speakers: int = 75, seed: int = 0) -> Speech:
    """Vowels drawn around the published means of men, women and children: to see that the experiment runs."""
    random = np.random.RandomState(seed)
    vowels, x_TD, speakers = [], [], []
    for speaker in range(1, num_speakers + 1):
        kind = 0 if speaker <= 0.44 * num_speakers else 1 if speaker <= 0.8 * num_speakers else 2
        voice = random.normal(1.0, 0.04)
        for vowel, means in _FORMANTS.items():
            for _ in range(2):
                vowels.append(vowel)
                x_TD.append(np.array(means[kind]) / 1000 * voice * random.normal(1.0, 0.05, size=2))
                speakers.append(speaker)
    return _speech(vowels, np.array(x_TD), np.array(speakers) <= TRAINING_SPEAKERS)


def _speech(vowels: list[str], x_TD: NDArray[np.float64], is_training_T: NDArray[np.bool_]) -> Speech:
    y_T = np.array([VOWELS[vowel] for vowel in vowels])
    return Speech(x_TD=x_TD, y_T=y_T, is_training_T=is_training_T, vowel_T=np.array(vowels))
