import json

import numpy as np

from moesaic.lens.film import film_data
from moesaic.lens.runs import read_run


def history(folder, shares_by_layer, losses):
    folder.mkdir()
    lines = [
        {
            "kind": "train",
            "step": 10 * at,
            "loss": loss,
            "load": {name: share[at] for name, share in shares_by_layer.items()},
        }
        for at, loss in enumerate(losses)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run("run", folder)


def test_every_frame_has_the_shares_of_its_step(tmp_path):
    rng = np.random.default_rng(0)
    share = {f"model.layers.{layer}.mlp": rng.dirichlet(np.ones(4), size=5).tolist() for layer in (1, 3)}
    (film,) = film_data([history(tmp_path / "a", share, [3.0, 2.5, 2.0, 1.5, float("nan")])])
    assert film["steps"] == [0, 10, 20, 30, 40]
    assert film["layers"] == ["layer 1", "layer 3"]
    assert film["loss"] == [3.0, 2.5, 2.0, 1.5, None]
    for frame in range(5):
        for layer, name in enumerate(share):
            assert np.allclose(film["share"][frame][layer], 1e4 * np.asarray(share[name][frame]), atol=0.5)


def test_a_long_film_of_a_large_model_is_thinned_and_keeps_its_ends(tmp_path):
    share = {f"model.layers.{layer}.mlp": [[1 / 64] * 64] * 500 for layer in range(10)}
    (film,) = film_data([history(tmp_path / "a", share, np.linspace(4, 2, 500).tolist())])
    assert len(film["layers"]) == 6
    assert (film["layers"][0], film["layers"][-1]) == ("layer 0", "layer 9")
    assert len(film["steps"]) <= 160
    assert (film["steps"][0], film["steps"][-1]) == (0, 4990)
    assert film["steps"] == sorted(set(film["steps"]))
    assert len(json.dumps(film)) < 1_000_000


def test_runs_without_loads_have_no_film(tmp_path):
    assert film_data([history(tmp_path / "a", {}, [3.0, 2.0])]) == []
    assert film_data([history(tmp_path / "b", {"x": [[0.5, 0.5]]}, [3.0])]) == []
