"""The robot arm of 1994: accelerations from angles, velocities and torques, by trees, networks and CART."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import ConfigError, DataError
from moesaic.lab.classic.record import Record

if TYPE_CHECKING:
    from moesaic.classic.data import Data
    from moesaic.classic.mixture import Mixture

VARIANCE = 0.1
"""Of every expert's noise, where targets have variance 1: about what is left when the trees are fitted."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """States of an arm and what they lead to, all with mean 0 and variance 1 over the rows to train on.

    Attributes:
        train: rows to fit, with the constant behind the inputs.
        x_TD: inputs of the rows to test, likewise.
        y_TO: accelerations of the rows to test.
    """

    train: Data
    x_TD: NDArray[np.float64]
    y_TO: NDArray[np.float64]

    def relative_error(self, told_TO: NDArray[np.float64], y_TO: NDArray[np.float64]) -> float:
        """Squared error over that of telling the training rows' mean, for each joint, then averaged."""
        return float((((told_TO - y_TO) ** 2).mean(axis=0) / (y_TO**2).mean(axis=0)).mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One row of the tables.

    Attributes:
        name: as it is called on the page.
        table: ``batch``, an update in each pass over the rows; or ``on-line``, one after each row.
        how: how it learns.
        runs: with seeds 0, 1, …; None for as many as the experiment says.
        passes: over the rows.
        steps: learning rates that are tried for ``search`` passes with another seed; the least training error wins.
        search: those passes.
        published: relative error and passes in the paper.
    """

    name: str
    table: Literal["batch", "on-line"]
    how: Literal["linear", "network", "em", "least-squares", "gradient", "rls", "cart"]
    runs: int | None = None
    passes: int = 100
    steps: tuple[float, ...] = ()
    search: int = 20
    published: tuple[float, float | None] = (float("nan"), None)


SYSTEMS = (
    System(name="linear", table="batch", how="linear", runs=1, passes=1, published=(0.31, 1)),
    System(
        name="back-propagation",
        table="batch",
        how="network",
        runs=3,
        passes=800,
        steps=(0.1, 0.3, 1.0),
        published=(0.09, 5500),
    ),
    System(name="tree, algorithm 1", table="batch", how="em", passes=100, published=(0.10, 35)),
    System(name="tree, algorithm 2", table="batch", how="least-squares", passes=100, published=(0.12, 39)),
    System(
        name="tree, gradient",
        table="batch",
        how="gradient",
        runs=3,
        passes=1500,
        steps=(0.3, 1.0, 3.0),
    ),
    System(name="CART", table="batch", how="cart", runs=1, passes=1, published=(0.17, None)),
    System(name="linear", table="on-line", how="rls", runs=1, passes=2, published=(0.32, 1)),
    System(
        name="back-propagation",
        table="on-line",
        how="network",
        runs=3,
        passes=25,
        steps=(0.003, 0.01, 0.03),
        search=2,
        published=(0.08, 63),
    ),
    System(name="tree, least squares", table="on-line", how="rls", passes=6, published=(0.12, 2)),
    System(
        name="tree, gradient",
        table="on-line",
        how="gradient",
        runs=3,
        passes=25,
        steps=(0.0003, 0.001, 0.003),
        search=2,
        published=(0.15, 104),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RobotArm:
    """The experiment.

    Attributes:
        runs: of each system whose start is random, with seeds 0, 1, …
        branching: of the trees.
        hidden: units of the networks.
        systems: what is compared.
    """

    runs: int = 10
    branching: tuple[int, ...] = (2, 2, 2, 2)
    hidden: int = 60
    systems: tuple[System, ...] = SYSTEMS

    def plan(self, source: str) -> dict[str, Any]:
        """What figures depend on, the number of runs apart: more may follow."""
        return {**asdict(replace(self, runs=0)), "source": source}

    def runs_of(self, system: System) -> int:
        """How often it is run."""
        return self.runs if system.runs is None else min(self.runs, system.runs)

    @property
    def total(self) -> int:
        """Runs in all."""
        return 1 + sum(self.runs_of(system) + len(system.steps) for system in self.systems)

    def run(
        self, arm: Arm, record: Record, done: Callable[[str], None] = lambda _name: None
    ) -> dict[str, list[dict[str, Any]]]:
        """Choose steps, then run every system.

        Args:
            arm: the rows.
            record: where figures are kept.
            done: called after each run with what it was.
        Returns:
            For each table and name, as in ``batch, linear``, its runs: the step and the relative error before the
            first pass and after each. Under ``seconds`` what a pass in batches takes, by name.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for system in self.systems:
            key = f"{system.table}, {system.name}"

            def once(what: str, make: Callable[[], dict[str, Any]], key: str = key) -> dict[str, Any]:
                got: dict[str, Any] = record.once(f"{key}, {what}", make)
                done(f"{key}, {what}")
                return got

            tried = {step: once(f"trial of {step:g}", partial(self._trial, system, arm, step)) for step in system.steps}
            # One that ran away has nothing at the end of its curve.
            step = min(tried, key=lambda step: tried[step]["curve"][-1] or np.inf) if tried else 0.0
            seeds = range(self.runs_of(system))
            found[key] = [
                once(f"step {step:g}, seed {seed}", partial(self._judged, system, arm, step, seed)) for seed in seeds
            ]
        found["seconds"] = [record.once("seconds", partial(self._seconds, arm))]
        done("seconds of a pass")
        return found

    def _seconds(self, arm: Arm) -> dict[str, float]:
        """What a pass in batches takes, in the middle of seven."""
        found = {}
        for system in self.systems:
            if system.table == "batch" and system.how in {"em", "least-squares", "gradient", "network"}:
                passes = self._mixtures(system, arm, 1e-3, 0)
                next(passes)
                each = []
                for _ in range(7):
                    began = time.perf_counter()
                    next(passes)
                    each.append(time.perf_counter() - began)
                found[system.name] = float(np.median(each))
        return found

    def _trial(self, system: System, arm: Arm, step: float) -> dict[str, Any]:
        return {"step": step, "curve": self.curve(system, arm, step, 1000, on_training=True)}

    def _judged(self, system: System, arm: Arm, step: float, seed: int) -> dict[str, Any]:
        return {"step": step, "curve": self.curve(system, arm, step, seed)}

    def curve(
        self, system: System, arm: Arm, step: float, seed: int, *, on_training: bool = False
    ) -> list[float | None]:
        """Relative error before the first pass and after each; None once it is not finite.

        Args:
            system: what learns.
            arm: what is learned.
            step: of a gradient.
            seed: of the start.
            on_training: on training rows, for as many passes as a trial of a step has; else on those to test.
        """
        if system.how == "cart":
            return [arm.relative_error(_cart(arm), arm.y_TO)]
        passes = system.search if on_training else system.passes
        x_TD, y_TO = (arm.train.x_TD, arm.train.y_TO) if on_training else (arm.x_TD, arm.y_TO)
        curve: list[float | None] = []
        try:
            # A step that is too long runs away, and says so at the end of the pass.
            with np.errstate(over="ignore", invalid="ignore"):
                for mixture in islice(self._mixtures(system, arm, step, seed), passes + 1):
                    curve.append(arm.relative_error(mixture.mean(x_TD), y_TO))
        except ConfigError:
            curve.append(None)
        return curve

    def _mixtures(self, system: System, arm: Arm, step: float, seed: int) -> Iterator[Mixture]:
        from moesaic.classic.em import EM
        from moesaic.classic.gate import by_least_squares, by_newton
        from moesaic.classic.gradient import Gradient
        from moesaic.classic.noise import Noise
        from moesaic.classic.objective import cooperative, mixture
        from moesaic.classic.online import Online

        random = np.random.RandomState(seed)
        noise = Noise(kind="fixed", floor_O=np.ones(arm.y_TO.shape[1]))
        begin = self._begin(system, arm, random)
        if system.how in {"em", "least-squares", "linear"}:
            gates = by_least_squares if system.how == "least-squares" else by_newton
            yield from (one for one, _ in EM(noise=noise, gates=gates).passes(begin, arm.train))
        if system.how == "rls":
            learner = Online(mixture=begin, noise=noise, decay=0.99)
            yield begin
            while True:
                learner.learn(arm.train)
                yield learner.now()
        is_batch, is_network = system.table == "batch", system.how == "network"
        gradient = Gradient(
            error=cooperative if is_network else mixture,
            noise=noise,
            learning_rate=step,
            momentum=0.9 if is_batch and is_network else 0.0,
            batch_size=None if is_batch else 1,
        )
        yield from (one for one, _ in gradient.passes(begin, arm.train, random))

    def _begin(self, system: System, arm: Arm, random: np.random.RandomState) -> Mixture:
        from moesaic.classic.family import GAUSSIAN
        from moesaic.classic.noise import Noise
        from moesaic.classic.start import Start
        from moesaic.classic.tree import Tree

        num_outputs = arm.y_TO.shape[1]
        is_alone = system.how in {"network", "linear"} or system.name == "linear"
        start = Start(
            kind="small" if is_alone else "random",
            tree=Tree.full(() if is_alone else self.branching),
            family=GAUSSIAN,
            noise=Noise(kind="fixed", floor_O=np.ones(num_outputs)),
            variance_O=np.full(num_outputs, VARIANCE),
            hidden=self.hidden if system.how == "network" else None,
        )
        return start(arm.train, random, 0.0)


QUICK = RobotArm(
    runs=2,
    branching=(2, 2),
    hidden=12,
    systems=tuple(
        replace(one, passes=min(one.passes, 6 if one.table == "on-line" else 40), steps=one.steps[:2], search=2)
        for one in SYSTEMS
    ),
)
"""In seconds, to see that it runs."""


def _cart(arm: Arm) -> NDArray[np.float64]:
    """scikit-learn's regression tree, pruned as a fifth of the rows tell, then grown on all of them."""
    from sklearn.tree import DecisionTreeRegressor

    x_TD, y_TO = arm.train.x_TD[:, :-1], arm.train.y_TO
    held_out = np.arange(len(x_TD)) % 5 == 0
    fit_x, fit_y = x_TD[~held_out], y_TO[~held_out]
    path = DecisionTreeRegressor(random_state=0, min_samples_leaf=5).cost_complexity_pruning_path(fit_x, fit_y)
    strengths = np.unique(np.quantile(path.ccp_alphas, np.linspace(0, 0.999, 12)))

    def tree(strength: float) -> Any:
        return DecisionTreeRegressor(random_state=0, min_samples_leaf=5, ccp_alpha=strength)

    def missed(strength: float) -> float:
        told = tree(strength).fit(fit_x, fit_y).predict(x_TD[held_out])
        return float(((told - y_TO[held_out]) ** 2).mean())

    told_TO: NDArray[np.float64] = tree(min(strengths, key=missed)).fit(x_TD, y_TO).predict(arm.x_TD[:, :-1])
    return told_TO


def arrived(curve: list[float | None]) -> tuple[float, int]:
    """The least error of a run, and the first pass that is within 5 % of it: the paper's convergence."""
    errors = np.array([np.inf if error is None else error for error in curve])
    return float(errors.min()), int(np.flatnonzero(errors <= 1.05 * errors.min())[0])


def read_arm(path: Path) -> Arm:
    """Rows from an ``.npz`` file with the arrays X (rows, inputs) and Y (rows, outputs); the last quarter is to test.

    Raises:
        DataError: if it is not there, or something else.
    """
    try:
        # No pickle is read: an array of objects is refused.
        with np.load(path, allow_pickle=False) as kept:
            X, y_TO = np.asarray(kept["X"], dtype=np.float64), np.asarray(kept["Y"], dtype=np.float64)
        assert X.ndim == y_TO.ndim == 2
        assert len(X) == len(y_TO) >= 8
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise DataError(
            f"The arm needs an .npz file with arrays X (rows, inputs) and Y (rows, outputs); {path} could not be read "
            f"so: {error!r}. A simulator of the Puma 560's forward dynamics gives one."
        ) from error
    return framed(X, y_TO)


def planar_arm(num_rows: int = 1200, seed: int = 0) -> Arm:
    """An arm of two links in a plane, a metre and a kilogram each: to see that the experiment runs."""
    random = np.random.RandomState(seed)
    angle_TO = random.uniform(-np.pi, np.pi, size=(num_rows, 2))
    speed_TO, torque_TO = random.uniform(-2, 2, size=(num_rows, 2)), random.uniform(-10, 10, size=(num_rows, 2))
    bend = angle_TO[:, 1]
    cosine, sine = np.cos(bend), np.sin(bend)
    mass = np.stack(
        [np.stack([3 + 2 * cosine, 1 + cosine], axis=1), np.stack([1 + cosine, 1 + 0 * cosine], axis=1)], axis=1
    )
    whirl = np.stack(
        [-sine * (2 * speed_TO[:, 0] + speed_TO[:, 1]) * speed_TO[:, 1], sine * speed_TO[:, 0] ** 2], axis=1
    )
    reach = np.cos(angle_TO.sum(axis=1))
    weight = 9.81 * np.stack([2 * np.cos(angle_TO[:, 0]) + reach, reach], axis=1)
    y_TO = np.linalg.solve(mass, (torque_TO - whirl - weight)[..., None])[..., 0]
    return framed(np.concatenate([angle_TO, speed_TO, torque_TO], axis=1), y_TO)


def framed(X: NDArray[np.float64], y_TO: NDArray[np.float64]) -> Arm:
    """The first three quarters to train on and the rest to test, in the units that training rows give."""
    from moesaic.classic.data import Data, Frame

    count = 3 * len(X) // 4
    weight_T = np.ones(count)
    frame = Frame.of(X[:count], y_TO[:count], weight_T)
    train = Data(x_TD=frame.inputs(X[:count]), y_TO=frame.targets(y_TO[:count]), weight_T=weight_T)
    return Arm(train=train, x_TD=frame.inputs(X[count:]), y_TO=frame.targets(y_TO[count:]))
