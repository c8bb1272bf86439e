"""``bench scale`` and ``bench model`` on the smallest of sizes."""

import torch

from moesaic.bench import model as model_module
from moesaic.bench.model import ADOPTED, SPARSE, TWIN, Modelling, agreement, model
from moesaic.bench.scale import Scaling, scale

from .conftest import CPU, TINY


def test_scale_gives_a_row_for_each_contender_and_size():
    plan = Scaling(
        base=TINY, dtypes=(torch.float32,), tokens=(8, 16), experts=(4, 8), skews=(1.0,), rounds=5, device=CPU
    )
    by_tokens, by_experts, by_skew = scale(plan).groups
    assert [line.name for line in by_tokens.lines] == ["moesaic, T=8", "moesaic, T=16", "dense, T=8", "dense, T=16"]
    assert by_tokens.line("dense, T=16").ratios == (1.0,) * 5
    names = [line.name for line in by_experts.lines]
    assert names == [
        f"{name}, E={count}" for name in ("moesaic", "transformers grouped_mm", "dense") for count in (4, 8)
    ]
    skewed = [line.name for line in by_skew.lines if line.name.startswith("moesaic")]
    assert skewed == ["moesaic, balanced", "moesaic, Zipf 1"]
    assert all(len(line.samples) == 5 for group in (by_tokens, by_experts, by_skew) for line in group.lines)


def _modelling(case):
    return Modelling(cases=(case,), dtypes=(torch.float32,), layers=1, context=8, vocab_size=32, rounds=5, device=CPU)


def test_models_train_beside_their_twin_and_beside_transformers_implementations():
    sparsified, adopted = model(_modelling(TINY)).groups
    assert [line.name for line in sparsified.lines] == [SPARSE, TWIN]
    assert sparsified.line(TWIN).ratios == (1.0,) * 5
    names = [line.name for line in adopted.lines]
    assert names == [ADOPTED, "transformers eager", "transformers grouped_mm", "transformers batched_mm"]
    assert all(line.samples for line in adopted.lines)
    assert adopted.limit in names[1:]
    assert adopted.line(adopted.limit).ratios == (1.0,) * 5


def test_all_implementations_of_a_model_compute_the_same_logits_and_gradients():
    errors = agreement(_modelling(TINY), TINY)
    assert set(errors) == {ADOPTED, "transformers grouped_mm", "transformers batched_mm"}
    assert max(errors.values()) < 1e-5


def test_a_model_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(model_module, "agreement", lambda *_: {ADOPTED: 0.5, "transformers grouped_mm": 1e-7})
    adopted = model(_modelling(TINY)).groups[1]
    assert adopted.line(ADOPTED).samples == ()
    assert adopted.line(ADOPTED).note == "not timed, since it computes something else: off by 5.0e-01"
