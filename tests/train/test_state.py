import random

import numpy as np
import pytest
import torch

from moesaic.core.errors import CheckpointError
from moesaic.train import state


def optimizer_after(steps, *, fused, seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    groups = [{"params": list(layers[0].parameters()), "weight_decay": 0.1}, {"params": list(layers[1].parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), fused=fused)
    for _ in range(steps):
        layers(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_comes_back_bit_for_bit(tmp_path, fused):
    saved = optimizer_after(3, fused=fused)
    state.save_optimizer(saved, tmp_path)
    loaded = optimizer_after(0, fused=fused, seed=1)
    state.load_optimizer(loaded, tmp_path)
    before, after = saved.state_dict(), loaded.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for index, entries in before["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, after["state"][index][key])
            assert value.dtype == after["state"][index][key].dtype


class Named(torch.nn.Module):
    """The same parameters in one order or the other."""

    def __init__(self, order):
        super().__init__()
        for name in order:
            setattr(self, name, torch.nn.Parameter(torch.randn({"first": 2, "second": 3}[name])))


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def test_state_with_names_finds_its_parameters_in_whatever_order_they_stand(tmp_path):
    model, turned = Named(["first", "second"]), Named(["second", "first"])
    saved, loaded = optimizer_of(model), optimizer_of(turned)
    (model.first.sum() * 2 + model.second.sum() * 3).backward()
    saved.step()
    state.save_optimizer(saved, tmp_path, model)
    state.load_optimizer(loaded, tmp_path, turned)
    for name in ("first", "second"):
        before, after = saved.state[getattr(model, name)], loaded.state[getattr(turned, name)]
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(loaded.state[turned.first]["exp_avg"][:1], loaded.state[turned.second]["exp_avg"][:1])


def test_state_with_names_of_another_model_is_refused_by_name(tmp_path):
    model = Named(["first", "second"])
    state.save_optimizer(optimizer_of(model), tmp_path, model)
    other = Named(["first"])
    with pytest.raises(CheckpointError, match=r"1 differ, the first is second\. Resume with"):
        state.load_optimizer(optimizer_of(other), tmp_path, other)


def test_no_pickle_is_written(tmp_path):
    state.save_optimizer(optimizer_after(1, fused=False), tmp_path)
    state.save_rng(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    state.save_optimizer(optimizer_after(1, fused=False), tmp_path)
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(CheckpointError) as error:
        state.load_optimizer(other, tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/optimizer.json has 2 + 2 parameters in its groups, this model has 1. "
        "Resume with the settings that the run was started with."
    )


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(3).tolist()

    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # leaves half a pair of normal numbers waiting in Python and NumPy
    state.save_rng(tmp_path)
    expected = draw()
    draw()
    state.load_rng(tmp_path)
    assert draw() == expected


def test_a_schedule_goes_on_where_it_was(tmp_path):
    first = optimizer_after(0, fused=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: 1 / (step + 3))
    for _ in range(5):
        first.step()
        schedule.step()
    state.save_scheduler(schedule, tmp_path)
    again = torch.optim.lr_scheduler.LambdaLR(optimizer_after(0, fused=False), lambda step: 1 / (step + 3))
    state.load_scheduler(again, tmp_path)
    assert again.get_last_lr() == schedule.get_last_lr()
    assert again.last_epoch == 5


def test_a_file_cut_short_is_named(tmp_path):
    state.save_rng(tmp_path)
    path = tmp_path / "rng.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"rng\.safetensors is not a readable safetensors file"):
        state.load_rng(tmp_path)
    (tmp_path / "rng.json").write_text("{")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"rng\.safetensors is not a readable safetensors file"):
        state.load_rng(tmp_path)
