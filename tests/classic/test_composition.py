"""They work wherever scikit-learn's own do: pipelines, searches, processes, pickles, tables; and refuse as it does."""

import pickle
import subprocess
import sys

import joblib
import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.ensemble import BaggingRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from moesaic.classic import (
    AdaptiveMixtureClassifier,
    AdaptiveMixtureRegressor,
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
)
from moesaic.core.errors import ConfigError
from tests.classic.test_classifiers import corners
from tests.classic.test_regressors import kinked

REGRESSORS = [AdaptiveMixtureRegressor(2, random_state=0), HierarchicalMixtureRegressor((2,), random_state=0)]
CLASSIFIERS = [AdaptiveMixtureClassifier(random_state=0), HierarchicalMixtureClassifier((2, 2), random_state=0)]


def rows_for(model):
    return kinked() if model in REGRESSORS else corners()


@pytest.mark.parametrize("model", [*REGRESSORS, *CLASSIFIERS], ids=lambda model: type(model).__name__)
def test_a_pipeline_fits_and_is_searched(model):
    X, y = rows_for(model)
    pipeline = make_pipeline(StandardScaler(), clone(model))
    assert pipeline.fit(X, y).score(X, y) > 0.9
    name = type(model).__name__.lower()
    key = "num_experts" if "adaptive" in name else "branching"
    grid = {f"{name}__{key}": [1, 2] if key == "num_experts" else [(), (2,)], f"{name}__alpha": [0.01, 1.0]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(X, y)
    assert search.best_params_[f"{name}__{key}"] in (2, (2,))
    assert len(cross_val_score(pipeline, X, y, cv=4)) == 4


@pytest.mark.parametrize("model", [*REGRESSORS, *CLASSIFIERS], ids=lambda model: type(model).__name__)
def test_joblib_runs_several_side_by_side(model):
    X, y = rows_for(model)
    with joblib.parallel_config("threading", n_jobs=2):
        side_by_side = cross_val_score(model, X, y, cv=3)
    np.testing.assert_allclose(side_by_side, cross_val_score(model, X, y, cv=3))


def test_pickles_say_the_same_in_another_process(tmp_path):
    asked = [(clone(model).fit(*rows_for(model)), rows_for(model)[0][:5]) for model in (*REGRESSORS, *CLASSIFIERS)]
    path = tmp_path / "models.pkl"
    path.write_bytes(pickle.dumps(asked))
    script = (
        "import pickle, sys\n"
        "for model, X in pickle.load(open(sys.argv[1], 'rb')):\n"
        "    print(*model.predict(X), *model.gate(X).ravel().round(12))"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    said = [" ".join(map(str, (*model.predict(X), *model.gate(X).ravel().round(12)))) for model, X in asked]
    assert done.stdout.splitlines() == said
    assert pickle.loads(path.read_bytes())[0][0].mixture_.family is asked[0][0].mixture_.family


def test_gates_are_features_with_names_for_what_comes_next():
    X, y = corners()
    experts = HierarchicalMixtureClassifier((2, 2), random_state=0).set_output(transform="pandas")
    told = experts.fit(X, y).transform(X)
    assert list(told.columns) == [f"hierarchicalmixtureclassifier{number}" for number in range(4)]
    np.testing.assert_allclose(told.to_numpy(), experts.gate(X))
    chain = make_pipeline(
        HierarchicalMixtureClassifier((2, 2), random_state=0), PolynomialFeatures(), LogisticRegression()
    )
    assert chain.fit(X, y).score(X, y) > 0.55


def test_they_can_be_bagged():
    X, y = kinked()
    bag = BaggingRegressor(HierarchicalMixtureRegressor((2,)), n_estimators=3, random_state=0).fit(X, y)
    assert bag.score(X, y) > 0.95


def test_names_of_columns_are_kept_and_asked_for():
    import pandas

    X, y = corners()
    table = pandas.DataFrame(X, columns=["left", "right"])
    model = HierarchicalMixtureClassifier((2, 2), random_state=0).fit(table, pandas.Series(y))
    assert model.feature_names_in_.tolist() == ["left", "right"]
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(table.rename(columns={"left": "wrong"}))


@pytest.mark.parametrize("model", [*REGRESSORS, *CLASSIFIERS], ids=lambda model: type(model).__name__)
def test_sparse_and_missing_inputs_are_refused_in_scikit_learn_s_words(model):
    X, y = rows_for(model)
    with pytest.raises(TypeError, match="Sparse data was passed for X, but dense data is required"):
        clone(model).fit(csr_array(X), y)
    missing = X.copy()
    missing[0, 0] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        clone(model).fit(missing, y)


SETTINGS = [
    (REGRESSORS[0], {"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0."),
    (REGRESSORS[0], {"num_experts": True}, "num_experts must be a whole number of at least 1, got True."),
    (REGRESSORS[0], {"hidden": 2.5}, "hidden must be a whole number of at least 1, got 2.5."),
    (REGRESSORS[0], {"alpha": -1.0}, "alpha must be a number of at least 0, got -1.0."),
    (REGRESSORS[0], {"learning_rate": 0}, "learning_rate must be a number above 0, got 0."),
    (REGRESSORS[0], {"tol": float("nan")}, "tol must be a number of at least 0, got nan."),
    (REGRESSORS[0], {"variance": "own"}, "variance must be 'shared' or 'expert', got 'own'."),
    (REGRESSORS[0], {"variance": 0.0}, "variance must be a number above 0, got 0.0."),
    (REGRESSORS[0], {"error": "huber"}, "error must be 'cooperative' or 'competitive' or 'mixture', got 'huber'."),
    (REGRESSORS[0], {"solver": "least-squares"}, "solver must be 'em' or 'lbfgs' or 'gradient', got 'least-squares'."),
    (REGRESSORS[0], {"expert": "logistic"}, "expert must be 'linear' or 'mlp', got 'logistic'."),
    (REGRESSORS[0], {"init": "zeros"}, "init must be 'random' or 'small', got 'zeros'."),
    (
        REGRESSORS[0],
        {"error": "competitive"},
        "solver='em' needs error='mixture', whose likelihood it climbs; got error='competitive'. "
        "Take solver='lbfgs' or 'gradient'.",
    ),
    (
        REGRESSORS[0],
        {"expert": 7},
        "expert must be 'linear', 'mlp' or an estimator with fit and predict, got 7.",
    ),
    (
        CLASSIFIERS[0],
        {"expert": REGRESSORS[0]},
        "expert must be 'logistic', 'mlp' or an estimator with fit and predict_proba, got "
        "AdaptiveMixtureRegressor(num_experts=2, random_state=0).",
    ),
    (
        CLASSIFIERS[0],
        {"expert": LogisticRegression(), "solver": "lbfgs"},
        "solver='lbfgs' needs experts with a gradient, got LogisticRegression(). Take solver='em'.",
    ),
    (
        REGRESSORS[1],
        {"branching": (2, 1)},
        "branching must have a whole number of at least 2 for each level, as in (2, 2, 2); got (2, 1). Leave it empty "
        "for one expert.",
    ),
    (REGRESSORS[1], {"link": "bernoulli"}, "link must be 'gaussian' or 'poisson', got 'bernoulli'."),
    (REGRESSORS[1], {"decay": 1.0}, "decay must be a number between 0 and 1, without the ends; got 1.0."),
    (REGRESSORS[1], {"link": "poisson"}, "link='poisson' needs targets of at least 0, got -1."),
]


@pytest.mark.parametrize(("model", "setting", "words"), SETTINGS)
def test_a_setting_that_cannot_be_used_says_what_could(model, setting, words):
    X, y = rows_for(model)
    y[0] = -1.0 if model in REGRESSORS else y[0]
    y[1:] = np.abs(y[1:]) if model in REGRESSORS else y[1:]
    with pytest.raises(ConfigError) as error:
        clone(model).set_params(**setting).fit(X, y)
    assert str(error.value) == words


def test_an_expert_has_to_take_weights():
    from sklearn.neighbors import KNeighborsRegressor

    with pytest.raises(ConfigError) as error:
        AdaptiveMixtureRegressor(expert=KNeighborsRegressor()).fit(*kinked())
    assert str(error.value) == (
        "An expert learns from its share of each row: its fit needs sample_weight, which KNeighborsRegressor() "
        "does not take."
    )


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (-1.0, "sample_weight must not be negative, got -1."),
        (0.0, "sample_weight needs a row whose weight is not zero, got zeros alone."),
    ],
)
def test_weights_that_are_none_are_refused(weight, words):
    X, y = kinked(20)
    # scikit-learn from 1.8 on says the second itself.
    with pytest.raises(ValueError, match=r"zero|negative") as error:
        HierarchicalMixtureRegressor().fit(X, y, sample_weight=np.full(20, weight))
    assert str(error.value) in {words, "Sample weights must contain at least one non-zero number."}
