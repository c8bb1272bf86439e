"""Two processes that train together are one that trains on the batches of both, and behave as one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F
from transformers import set_seed

from moesaic import hf, recipes
from moesaic.core import checkpoint
from moesaic.core.errors import ConfigError
from moesaic.data import load_tokenizer
from moesaic.train import folder, history, resume
from moesaic.train.build import build_model
from moesaic.train.order import SeededOrder
from tests.tolerances import assert_close

from .ranks_worker import BATCH, CASES, OWN_LOSS, config_of, evaluations, launch, sequences, two_steps
from .runs import assert_equal_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(text, tmp_path_factory):
    """What two ranks found, and the folder of their gradients."""
    out = tmp_path_factory.mktemp("pair")
    return launch(text, out), out


def of_rank(pair, case, rank=0):
    return safetensors.torch.load_file(pair[1] / f"{case}-{rank}.safetensors")


def assert_gradients_close(actual, expected):
    for name, gradient in expected.items():
        if not name.startswith("bias "):
            assert_close(actual[name], gradient, name, torch.float32)


def per_rank(case, out):
    """Gradients of the documented statistic: each rank's balance loss, weighted by its share of predicted tokens."""
    config = config_of(case, out)
    set_seed(config.seed)
    model = build_model("moe", config, load_tokenizer("bytes")).train()
    order, items = SeededOrder(16, length=2 * BATCH, seed=config.seed), sequences(case)
    batch = {name: torch.stack([items[index][name] for index in order]) for name in items[0]}
    labels_BP = batch.pop("labels")[:, 1:]
    num_labels = int((labels_BP != -100).sum())
    for half in (slice(0, BATCH), slice(BATCH, 2 * BATCH)):
        with hf.balance(model) as terms:
            logits_BPV = model(**{name: tensor[half] for name, tensor in batch.items()}).logits[:, :-1]
        own_BP = labels_BP[half]
        total = F.cross_entropy(logits_BPV.transpose(1, 2), own_BP, ignore_index=-100, reduction="sum")
        share = int((own_BP != -100).sum()) / num_labels
        (total / num_labels + share * terms.total).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_hold_the_same_gradients_and_biases(pair, case):
    left, right = of_rank(pair, case, 0), of_rank(pair, case, 1)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize(
    "case", ["tokens", "tokens, bias", "sequences", "accumulated", "idle experts", "global batch", "sparsity"]
)
def test_two_ranks_have_the_gradient_of_one_with_the_batches_of_both(pair, case, tmp_path):
    accumulation = config_of(case, tmp_path).grad_accumulation
    whole = two_steps(case, tmp_path, batch_size=2 * BATCH * accumulation, grad_accumulation=1)
    assert_gradients_close(of_rank(pair, case), whole)


def test_micro_batches_of_all_ranks_share_the_load_of_the_step_so_far(pair, tmp_path):
    """Reference, 17.1 and 17.4 (3), (4): as one process whose micro-batches are those of both."""
    case = "global batch, accumulated"
    assert_gradients_close(of_rank(pair, case), two_steps(case, tmp_path, batch_size=2 * BATCH))
    without_buffer = two_steps(case, tmp_path, batch_size=4 * BATCH, grad_accumulation=1)
    with pytest.raises(AssertionError):
        assert_gradients_close(of_rank(pair, case), without_buffer)


def test_one_coefficient_for_all_layers_follows_the_load_of_all_ranks(pair, tmp_path):
    whole = two_steps("sparsity", tmp_path, batch_size=2 * BATCH)
    names = [name for name in whole if name.endswith("coefficient")]
    assert len(names) == 2 * 2
    assert all(torch.equal(of_rank(pair, "sparsity")[name], whole[name]) for name in names)
    published = recipes.get("relu").options["coefficient"]
    assert float(whole[names[0]]) != pytest.approx(published)


def test_an_expert_without_rows_on_any_rank_has_a_gradient_of_zero(pair):
    gradients = of_rank(pair, "idle experts")
    experts = [gradient for name, gradient in gradients.items() if name.endswith("down_EFD")]
    assert len(experts) == 2
    for gradient_EFD in experts:
        idle_E = (gradient_EFD == 0).flatten(1).all(dim=1)
        assert 0 < int(idle_E.sum()) < 64


@pytest.mark.parametrize("case", [*(f"batch, {name}" for name in OWN_LOSS), "batch, uneven"])
def test_the_balance_loss_is_the_mean_of_the_ranks_own(pair, case, tmp_path):
    assert_gradients_close(of_rank(pair, case), per_rank(case, tmp_path))


def test_a_statistic_of_the_batch_is_not_that_of_the_batches_of_both(pair, tmp_path):
    """What the comparison above would miss if the two were the same."""
    whole = two_steps("batch, mixtral", tmp_path, batch_size=2 * BATCH)
    with pytest.raises(AssertionError):
        assert_gradients_close(of_rank(pair, "batch, mixtral"), whole)


def test_controllers_step_on_the_load_of_all_ranks(pair, tmp_path):
    """Nothing but the load makes them equal: DDP's broadcast of rank 0's buffers, on by default, changes no bit."""
    whole = two_steps("sequences", tmp_path, batch_size=2 * BATCH)
    broadcast, own = of_rank(pair, "sequences"), of_rank(pair, "own buffers", 1)
    names = [name for name in whole if name.startswith("bias ")]
    assert len(names) == 2 * 2
    for name in names:
        assert whole[name].abs().max() > 0 or name.startswith("bias 2 ")
        assert torch.equal(broadcast[name], whole[name])
        assert torch.equal(own[name], whole[name])


def test_an_evaluation_is_that_of_one_process_even_where_a_rank_has_nothing_to_read(pair, text, tmp_path):
    expected = evaluations(text, tmp_path)
    for found in pair[0]:
        for (bits, load, dropped), (bits_alone, load_alone, dropped_alone) in zip(
            found["evaluations"], expected, strict=True
        ):
            assert bits == pytest.approx(bits_alone, rel=1e-6)
            assert (load, dropped) == (load_alone, dropped_alone)


def test_a_full_disk_on_one_rank_stops_both_and_leaves_the_last_good_checkpoint(pair):
    first, second = (found["failures"]["disk"] for found in pair[0])
    run = pair[1] / "disk"
    assert first == ["StoppedElsewhereError", "Rank 1 stopped and says why; rank 0 stops with it."]
    assert second == [
        "CheckpointError",
        f"The disk is full at {run}; the last good checkpoint is {run}/checkpoints/checkpoint-2. Free some space. "
        f"Then go on with: torchrun --nproc-per-node 2 -m moesaic train --resume --out {run}",
    ]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_the_rank_whose_loss_is_nan_says_so(pair):
    first, second = (found["failures"]["loss"] for found in pair[0])
    assert first[0] == "StoppedElsewhereError"
    assert second[0] == "NotFiniteError"
    assert second[1].startswith("The loss of step 3 is nan; ")


def test_a_run_of_two_processes_is_not_gone_on_with_by_one(pair, monkeypatch):
    from moesaic.train import run

    monkeypatch.setattr(run.Material, "load", None)
    out = pair[1] / "disk"
    with pytest.raises(ConfigError) as error:
        resume(out)
    assert str(error.value) == (
        f"the run in {out} was started with processes=2, resuming asked for processes=1, which would give another "
        f"model. Go on with: torchrun --nproc-per-node 2 -m moesaic train --resume --out {out}"
    )


# --- torchrun -------------------------------------------------------------------------------------------------------

_SETTINGS = (
    "--recipe deepseek-v3 --width 16 --layers 2 --heads 2 --hidden 16 --num-experts 4 --top-k 2 --context 24 "
    "--steps 90 --batch-size 2 --save-every 30 --eval-every 45 --log-every 2 --no-report"
)


def torchrun(out, *arguments):
    """Start ``moesaic train`` in two processes on a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "moesaic", "train", "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Give what it printed; never wait for ever."""
    try:
        return process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        # torchrun passes it on, and kills what does not heed it.
        process.terminate()
        process.communicate(timeout=60)
        raise


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("torchrun") / "whole"
    process = torchrun(out, "--data", str(text), *_SETTINGS.split())
    shown, said = finish(process)
    assert process.returncode == 0, said
    return out, shown, said


def test_torchrun_trains_into_one_folder_and_one_rank_speaks(whole):
    out, shown, said = whole
    assert shown.count("bits per byte, mean") == 1
    assert said.count("step 45, bits per byte") == said.count("step 90, bits per byte") == 1
    lines = history.read(out / "history.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(2, 91, 2))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [45, 90]
    assert lines[0]["tokens"] == 2 * 2 * 2 * 24
    assert folder.read(out).num_ranks == 2
    assert folder.read(out).summary["moe"]["tokens"] == 90 * 2 * 2 * 24
    names = {path.name for path in (out / "checkpoints" / "checkpoint-90").iterdir()}
    assert {"rng.safetensors", "rng-1.safetensors", "window.json", "window-1.json", "manifest.json"} <= names
    assert len(list((out / "tensorboard").iterdir())) == 1
    left, right = (
        safetensors.torch.load_file(out / "checkpoints" / "checkpoint-90" / name)
        for name in ("rng.safetensors", "rng-1.safetensors")
    )
    assert not torch.equal(left["cpu"], right["cpu"])


def stop(process, out, number):
    """Send torchrun a signal once the run has begun; give the step that it stopped at."""
    deadline = time.monotonic() + 40
    while not (out / "history.jsonl").exists() or not (out / "history.jsonl").stat().st_size:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = finish(process)
    stopped = re.findall(
        r"moesaic: Stopped at step (\d+) of 90 as asked; .*checkpoint-\1 is saved\. Go on with: ", said
    )
    assert len(stopped) == 1, said
    assert f"torchrun --nproc-per-node 2 -m moesaic train --resume --out {out}" in said
    return int(stopped[0])


def test_ctrl_c_on_torchrun_saves_on_all_ranks_and_the_run_goes_on_bit_for_bit(whole, text, tmp_path):
    out = tmp_path / "stopped"
    step = stop(torchrun(out, "--data", str(text), *_SETTINGS.split()), out, signal.SIGINT)
    process = torchrun(out, "--resume", "--no-report")
    _, said = finish(process)
    assert process.returncode == 0, said
    assert said.count(f"Going on from {out}/checkpoints/checkpoint-{step}.") == 1
    assert_equal_runs(whole[0], out, 90)


def test_sigterm_to_torchrun_saves_too(text, tmp_path):
    step = stop(torchrun(tmp_path / "run", "--data", str(text), *_SETTINGS.split()), tmp_path / "run", signal.SIGTERM)
    assert checkpoint.last_good(tmp_path / "run" / "checkpoints").step == step


def test_a_refusal_reaches_all_ranks_and_is_said_once(whole, text):
    out = whole[0]
    before = (out / "history.jsonl").read_text()
    process = torchrun(out, "--data", str(text), *_SETTINGS.split())
    _, said = finish(process)
    assert process.returncode == 1
    assert said.count(f"moesaic: {out} already holds a run.") == said.count("moesaic: ") == 1
    assert "rank0]" not in said
    assert "terminate called" not in said
    assert (out / "history.jsonl").read_text() == before
    assert Path(out / "summary.json").exists()
