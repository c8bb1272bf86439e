"""Compiled with torch.compile, an adopted model computes, balances, reports and replays as without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import moesaic as mz
from moesaic import hf
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.test_adopt_training_losses import labelled
from tests.hf.tiny import gradients, recompute

# Of what it traces, Dynamo asks more than the code does, and warns of what it then sees.
pytestmark = [written_for_this_transformers, pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

LAYERS = {"mixtral": 1, "deepseek_v3": 2}  # of DeepSeek's the first is dense


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def backward(model, run, inputs):
    model.zero_grad()
    seen: list[hf.Seen] = []
    with hf.observe(model, seen.append), mz.record(model) as trace:
        output = run(**inputs)
        output.loss.backward()
    return output, gradients(model), seen, trace


@pytest.mark.parametrize(("family", "recomputes"), [("mixtral", True), ("deepseek_v3", False)])
def test_outputs_gradients_losses_and_reports_are_those_without(family, recomputes):
    made = tiny(family, num_hidden_layers=LAYERS[family])
    model, inputs = mz.adopt(made.model, balance={"switch": 0.5, "z": 0.1}).train(), labelled(made)
    if recomputes:
        recompute(model)
    expected, gradient, seen, trace = backward(model, model, inputs)
    compiled = torch.compile(model, backend="eager")
    # Compiled while nobody listens: whoever comes later must hear all the same.
    assert float(compiled(**inputs).aux_loss.detach()) == pytest.approx(float(expected.aux_loss.detach()))
    for _ in range(2):
        output, found, heard, recorded = backward(model, compiled, inputs)
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(output.aux_loss, expected.aux_loss)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
        assert [one.index for one in heard] == [one.index for one in seen] == [0]
        for name in ("token_id", "sequence", "position", "expert"):
            assert np.array_equal(getattr(recorded, name), getattr(trace, name))


def test_a_compiled_model_replays_and_compiles_nothing_anew():
    made = tiny("mixtral", num_hidden_layers=1)
    model, inputs = mz.adopt(made.model, balance={"switch": 0.5}), made.inputs
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        with mz.record(model) as trace:
            expected = compiled(**inputs).logits
        graphs = counters["stats"]["unique_graphs"]
        for _ in range(9):  # torch compiles a function 8 times at most, then never again
            with hf.replay(model, trace), mz.record(model) as again:
                output = compiled(**inputs)
            torch.testing.assert_close(output.logits, expected)
            assert output.get("aux_loss") is None  # nothing is trained
            assert np.array_equal(again.expert, trace.expert)
    assert counters["stats"]["unique_graphs"] == graphs > 0
