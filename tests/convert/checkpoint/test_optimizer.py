"""A run that is transformed in mid-training goes on with the moments of the weights that it kept."""

import json
import shutil

import pytest
import safetensors.torch
import torch

import moesaic as mz
from moesaic.convert.checkpoint import run_folder
from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.native.export import export
from moesaic.convert.proof.check import check_folder
from moesaic.convert.proof.receipt import Receipt
from moesaic.convert.run import convert
from moesaic.convert.steps import Change, Step
from moesaic.core.errors import CheckpointError
from moesaic.train import config as train_config
from moesaic.train import folder, resume, train
from tests.train.conftest import small, text  # noqa: F401  # a fixture
from tests.train.runs import assert_equal_runs

PAIR = {"options": {"jitter": 0.1, "capacity_factor": 0.75}, "twin": True}


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):  # noqa: F811
    """Gives finished runs of 8 steps, each trained once for all tests, none of which changes it."""
    known = {}

    def run(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            config = small(tmp_path_factory.mktemp("runs") / "run", text, **settings)
            known[key] = (config.out, train(config))
        return known[key]

    return run


@pytest.fixture
def broken_off(finished, tmp_path):
    """Makes runs as if they had been broken off after the checkpoint of step 6."""

    def make(**settings):
        path = tmp_path / "broken"
        shutil.copytree(finished(**settings)[0], path)
        home = path / "moe" if settings.get("twin") else path
        for gone in (home / "checkpoints" / "checkpoint-8", home / "model", path / "dense"):
            shutil.rmtree(gone, ignore_errors=True)
        for summary in (path / "summary.json", home / "summary.json"):
            summary.unlink(missing_ok=True)
        assert [one.name for one in (home / "checkpoints").iterdir()] == ["checkpoint-6"]
        return path

    return make


def convert_run(path, out, *steps, **given):
    source = open_source(path)
    return convert(source, Change(**{"method": "test", "config": source.config, "steps": steps} | given), out)


def state_of(path):
    rest = json.loads((path / "optimizer.json").read_text())
    tensors = safetensors.torch.load_file(path / "optimizer.safetensors")
    return {
        name: {key.split(".", 1)[1]: tensor for key, tensor in tensors.items() if key.split(".", 1)[0] == str(index)}
        for index, name in enumerate(rest["names"])
    }


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("deepseek-v3", {"top_k": 2}),
        ("switch", PAIR),
        ("mixtral", {"backbone": "gpt2", "balance": {"bias": 0.01}}),
    ],
)
def test_doing_nothing_in_mid_training_changes_no_bit_of_the_end(finished, broken_off, tmp_path, recipe, settings):
    whole, _ = finished(recipe=recipe, **settings)
    path = broken_off(recipe=recipe, **settings)
    receipt = convert_run(path, tmp_path / "converted", promises=0.0).receipt
    parameters = len(state_of(tmp_path / "converted" / "checkpoints" / "checkpoint-6"))
    assert receipt.optimizer == f"moments of {parameters} parameters went along"
    torch.manual_seed(99)
    resume(tmp_path / "converted")
    assert_equal_runs(whole / "moe" if settings.get("twin") else whole, tmp_path / "converted", 8)


def test_a_converted_run_is_a_run(broken_off, tmp_path):
    path = broken_off(recipe="mixtral")
    convert_run(path, tmp_path / "converted")
    run = folder.read(tmp_path / "converted")
    assert run.kind == "moe"
    assert run.config.init == str(tmp_path / "converted")
    assert run.config.steps == folder.read(path).config.steps
    record = json.loads((tmp_path / "converted" / "run.json").read_text())
    assert record["converted"] == "test"
    assert check_folder(tmp_path / "converted") == Receipt.load(tmp_path / "converted" / "checkpoints" / "checkpoint-6")
    # And it can be converted again, moved elsewhere or not.
    (tmp_path / "converted").rename(tmp_path / "moved")
    assert convert_run(tmp_path / "moved", tmp_path / "again", promises=0.0).receipt.optimizer is not None
    assert resume(tmp_path / "again")["moe"]["bits_per_byte"]


def test_moments_go_where_the_weights_go(broken_off, tmp_path):
    """Experts in another order, in one layer: moments in that order; the other layer as it was."""
    path = broken_off(recipe="mixtral")
    before = state_of(path / "checkpoints" / "checkpoint-6")
    home = "model.layers.0.mlp.moe"
    names = tuple(
        f"{home}.{name}" for name in ("router.weight", "experts.gate_EDF", "experts.up_EDF", "experts.down_EFD")
    )
    order = torch.tensor([2, 0, 3, 1])

    def shuffle(tensors):
        return {name: tensor[order] for name, tensor in tensors.items()}

    step = Step(takes=names, gives=names, run=shuffle, moments=shuffle)
    receipt = convert_run(path, tmp_path / "converted", step, promises=1e-5).receipt
    assert receipt.equal_routes < 1
    after = state_of(tmp_path / "converted" / "checkpoints" / "checkpoint-6")
    assert after.keys() == before.keys()
    for name, entries in before.items():
        for key, tensor in entries.items():
            expected = tensor[order] if name in names and key != "step" else tensor
            assert torch.equal(after[name][key], expected), (name, key)
    summary = resume(tmp_path / "converted")
    assert summary["moe"]["tokens"]


def test_a_shuffled_run_ends_where_the_unshuffled_one_does(finished, broken_off, tmp_path):
    """Renaming experts changes nothing, moments included: the same held-out bits, to float tolerance."""
    expected = finished(recipe="mixtral")[1]["moe"]["bits_per_byte"]
    path = broken_off(recipe="mixtral")
    steps = []
    for layer in range(2):
        home = f"model.layers.{layer}.mlp.moe"
        names = tuple(
            f"{home}.{name}" for name in ("router.weight", "experts.gate_EDF", "experts.up_EDF", "experts.down_EFD")
        )

        def shuffle(tensors):
            return {name: tensor.flip(0) for name, tensor in tensors.items()}

        steps.append(Step(takes=names, gives=names, run=shuffle, moments=shuffle))
    convert_run(path, tmp_path / "with", *steps)
    assert resume(tmp_path / "with")["moe"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    convert_run(path, tmp_path / "without", *(Step(takes=s.takes, gives=s.gives, run=s.run) for s in steps))
    assert resume(tmp_path / "without")["moe"]["bits_per_byte"] != pytest.approx(expected, rel=1e-5)


def test_what_is_new_starts_from_nothing(broken_off, tmp_path):
    path = broken_off(recipe="mixtral")
    name = "model.layers.1.mlp.moe.router.weight"
    step = Step(takes=(name,), gives=(name,), run=lambda tensors: {name: torch.randn_like(tensors[name])})
    receipt = convert_run(path, tmp_path / "converted", step).receipt
    state = state_of(tmp_path / "converted" / "checkpoints" / "checkpoint-6")
    assert receipt.optimizer == f"moments of {len(state) - 1} parameters went along, 1 start from zero"
    assert all(not tensor.any() for tensor in state[name].values())
    assert state[name]["exp_avg"].shape == (4, 16)
    assert resume(tmp_path / "converted")["moe"]["bits_per_byte"]


def test_a_native_model_has_the_state_beside_its_weights(broken_off, tmp_path):
    path = broken_off(recipe="mixtral")
    before = state_of(path / "checkpoints" / "checkpoint-6")
    receipt = export(path, out=tmp_path / "native").receipt
    assert "went along" in receipt.optimizer
    assert not (tmp_path / "native" / "run.json").exists()
    after = state_of(tmp_path / "native")
    gate_up = after["model.layers.0.mlp.experts.gate_up_proj"]["exp_avg_sq"]
    home = "model.layers.0.mlp.moe.experts"
    assert torch.equal(gate_up[:, :16], before[f"{home}.gate_EDF"]["exp_avg_sq"].transpose(1, 2))
    assert torch.equal(gate_up[:, 16:], before[f"{home}.up_EDF"]["exp_avg_sq"].transpose(1, 2))
    assert torch.equal(after["model.norm.weight"]["exp_avg"], before["model.norm.weight"]["exp_avg"])


def test_a_finished_run_is_a_model_without_a_state(finished, tmp_path):
    receipt = convert_run(finished(recipe="mixtral")[0], tmp_path / "converted").receipt
    assert receipt.optimizer is None
    assert (tmp_path / "converted" / "config.json").is_file()
    assert not (tmp_path / "converted" / "run.json").exists()


def test_moments_of_another_shape_are_refused(broken_off, tmp_path):
    path = broken_off(recipe="mixtral")
    name = "model.layers.0.mlp.moe.router.weight"
    step = Step(takes=(name,), gives=(name,), run=dict, moments=lambda tensors: {name: tensors[name][:2]})
    with pytest.raises(CheckpointError, match=r"the shape \(4, 16\) and its exp_avg the shape \(2, 16\)"):
        convert_run(path, tmp_path / "converted", step)
    assert not (tmp_path / "converted").exists()


def test_a_state_that_names_no_parameters_does_not_go_along_and_the_receipt_says_so(broken_off, tmp_path):
    home = broken_off(recipe="mixtral") / "checkpoints" / "checkpoint-6"
    rest = json.loads((home / "optimizer.json").read_text())
    del rest["names"]
    (home / "optimizer.json").write_text(json.dumps(rest))
    (home / "manifest.json").unlink()
    receipt = convert_run(home, tmp_path / "converted").receipt
    assert "does not tell which parameter it belongs to" in receipt.optimizer


def test_the_words_for_a_run_are_those_of_training():
    for name in ("RUN", "MODEL", "CHECKPOINTS", "TOKENIZER", "HISTORY", "OWN_MODEL"):
        assert getattr(run_folder, name) == getattr(folder, name)
    assert set(train_config._OF_THE_MODEL) | {"init"} == set(run_folder.OF_THE_MODEL)


def test_a_pruned_run_goes_on_with_the_moments_of_the_experts_that_it_kept(broken_off, tmp_path):
    path = broken_off(recipe="deepseek-v3", top_k=2)
    before = state_of(path / "checkpoints" / "checkpoint-6")
    batches = [{"input_ids": torch.randint(3, 250, (4, 24))} for _ in range(2)]
    receipt = mz.prune_experts(path, 3, batches=batches, out=tmp_path / "smaller").receipt
    home = tmp_path / "smaller" / "checkpoints" / "checkpoint-6"
    after = state_of(home)
    assert receipt.optimizer == f"moments of {len(after)} parameters went along"
    old = safetensors.torch.load_file(path / "checkpoints" / "checkpoint-6" / "model.safetensors")
    new = safetensors.torch.load_file(home / "model.safetensors")
    for layer in range(2):
        moe = f"model.layers.{layer}.mlp.moe"
        name = f"{moe}.router.weight"
        # Which experts stayed is read off their rows of the router.
        kept = [int((old[name] == row).all(dim=1).nonzero()[0]) for row in new[name]]
        assert len(kept) == 3
        for part in ("router.weight", "experts.gate_EDF", "experts.up_EDF", "experts.down_EFD"):
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(after[f"{moe}.{part}"][key], before[f"{moe}.{part}"][key][kept])
        assert torch.equal(after[f"{moe}.shared.up_DF"]["exp_avg"], before[f"{moe}.shared.up_DF"]["exp_avg"])
    summary = resume(tmp_path / "smaller")
    assert (
        summary["moe"]["total_params"] == sum(tensor.numel() for tensor in new.values()) - 2 * 3
    )  # biases are buffers


def test_an_upcycled_run_goes_on_with_the_moments_of_the_dense_network(finished, tmp_path):
    """The twin of a pair, in mid-training, becomes a mixture of four copies of its networks."""
    shutil.copytree(finished(recipe="switch", **PAIR)[0], tmp_path / "pair")
    path = tmp_path / "pair" / "dense"
    # As it was after step 6: neither the last checkpoint nor the final model was written.
    for gone in ("checkpoints/checkpoint-8", "model"):
        shutil.rmtree(path / gone)
    (path / "summary.json").unlink()
    before = state_of(path / "checkpoints" / "checkpoint-6")
    receipt = mz.upcycle(path, "mixtral", num_experts=4, top_k=2, out=tmp_path / "sparse").receipt
    after = state_of(tmp_path / "sparse" / "checkpoints" / "checkpoint-6")
    assert receipt.largest_logit_difference < 1e-5
    assert receipt.optimizer == f"moments of {len(after) - 2} parameters went along, 2 start from zero"
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        assert not after[f"{mlp}.moe.router.weight"]["exp_avg"].any()
        for key in ("exp_avg", "exp_avg_sq"):
            old = before[f"{mlp}.down_proj.weight"][key].T
            assert all(torch.equal(one, old) for one in after[f"{mlp}.moe.experts.down_EFD"][key])
    assert folder.read(tmp_path / "sparse").kind == "moe"
    summary = resume(tmp_path / "sparse")
    assert summary["moe"]["load_max_over_mean"]
