"""Whatever stops a run, going on ends with the bits of a run that nothing stopped."""

import errno
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from moesaic import recipes
from moesaic.core import checkpoint
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.train import TrainingStoppedError, resume, state, train
from moesaic.train.trainer import MoeTrainer
from tests.hf.tiny import options_of

from .runs import assert_equal_runs, timeless, train_and_kill

# A controller that moves a buffer each step; noise on the router's input and a capacity that drops; a plain loss.
RECIPES = [
    ("deepseek-v3", {"top_k": 2}),
    ("switch", {"options": {"jitter": 0.1, "capacity_factor": 0.75}}),
    ("mixtral", {"backbone": "gpt2", "tokenizer": "bpe:270"}),
    ("mixtral", {"balance": {"bias": 0.01}}),
    ("switch", {"backbone": "lstm", "heads": None}),
    ("deepseek-v3", {"backbone": "t5", "top_k": 2, "moe_layers": "every-2"}),
]


class CrashError(Exception):
    """Stands for whatever ends a process."""


def train_and_crash(monkeypatch, config, *, micro_batch):
    """Train, and break off before a micro-batch."""
    real, calls = MoeTrainer.training_step, []

    def crashing(*args, **kwargs):
        calls.append(1)
        if len(calls) == micro_batch:
            raise CrashError
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MoeTrainer, "training_step", crashing)
        with pytest.raises(CrashError):
            train(config)


@pytest.mark.parametrize(("recipe", "settings"), RECIPES)
@pytest.mark.parametrize("micro_batch", [3, 9, 10, 16])
def test_a_run_that_broke_off_ends_as_if_it_had_not(tiny, monkeypatch, recipe, settings, micro_batch):
    """Two micro-batches a step, checkpoints at 3, 6 and 8: breaks before, right after, between and at the end."""
    whole = tiny("whole", recipe=recipe, **settings)
    train(whole)
    broken = tiny("broken", recipe=recipe, **settings)
    train_and_crash(monkeypatch, broken, micro_batch=micro_batch)
    torch.manual_seed(99)
    summary = resume(broken.out)
    assert_equal_runs(whole.out, broken.out, 8)
    assert [line["step"] for line in timeless(broken.out) if line["kind"] == "train"] == [2, 4, 6, 8]
    assert summary == resume(broken.out)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_trains_and_goes_on_bit_for_bit(tiny, monkeypatch, recipe):
    """Whatever it keeps in buffers, draws at random, or asks of the batch; the corpus tells two domains."""
    settings = {name: value for name, value in options_of(recipe).items() if name in ("num_experts", "top_k")}
    settings |= {"steps": 4, "save_every": 2}
    whole, broken = (tiny(out, recipe=recipe, **settings) for out in ("whole", "broken"))
    with warnings.catch_warnings():
        if recipes.get(recipe).causality == "never":
            warnings.simplefilter("ignore", UserWarning)
        summary = train(whole)
        train_and_crash(monkeypatch, broken, micro_batch=6)
        torch.manual_seed(99)
        resume(broken.out)
    assert_equal_runs(whole.out, broken.out, 4)
    assert 0 < summary["moe"]["bits_per_byte"]["mean"] < 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "home", "name", "count"),
    [
        (0, "trainer", "training_step", 11),
        (1, "checkpoint", "seal", 3),  # 1 is the tokenizer; 3 the second checkpoint, all its files written
        (0, "checkpoint", "_put_in_place", 3),  # sealed, not renamed
        (1, "checkpoint", "prune", 2),  # renamed, the older ones still there
        (0, "checkpoint", "write_atomically", 1),  # everything done but the summary
    ],
)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not(tiny, which, home, name, count):
    recipe, settings = RECIPES[which]
    whole = tiny("whole", recipe=recipe, **settings)
    train(whole)
    killed = tiny("killed", recipe=recipe, **settings)
    train_and_kill(killed, home, name, count)
    resume(killed.out)
    assert_equal_runs(whole.out, killed.out, 8)


def test_the_controllers_have_moved_so_that_the_comparison_says_something(tiny):
    config = tiny(recipe="deepseek-v3", top_k=2)
    train(config)
    weights = state.read_tensors(config.out / "model" / "model.safetensors")
    biases = [tensor for name, tensor in weights.items() if "bias_E" in name]
    assert len(biases) == config.layers
    assert all(bias.dtype == torch.float32 and bias.abs().max() > 0 for bias in biases)


def test_a_pair_goes_on_with_the_model_that_was_running(tiny, monkeypatch):
    whole, broken = tiny("whole", twin=True), tiny("broken", twin=True)
    expected = train(whole)
    train_and_crash(monkeypatch, broken, micro_batch=16 + 9)
    made = (broken.out / "moe" / "summary.json").stat().st_mtime_ns
    summary = resume(broken.out)
    assert (broken.out / "moe" / "summary.json").stat().st_mtime_ns == made
    for kind in ("moe", "dense"):
        assert_equal_runs(whole.out / kind, broken.out / kind, 8)
        assert summary[kind]["bits_per_byte"] == expected[kind]["bits_per_byte"]


def test_a_damaged_checkpoint_is_skipped_and_named(tiny, monkeypatch, capsys):
    whole, broken = tiny("whole"), tiny("broken")
    train(whole)
    train_and_crash(monkeypatch, broken, micro_batch=15)
    damaged = broken.out / "checkpoints" / "checkpoint-6" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resume(broken.out, show=True)
    said = " ".join(capsys.readouterr().err.split())
    size = damaged.stat().st_size
    assert f"Skipped a damaged checkpoint: checkpoint-6/optimizer.safetensors should be {size}" in said
    assert "checkpoint-3." in said.replace(" ", "")
    assert_equal_runs(whole.out, broken.out, 8)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tiny, monkeypatch):
    whole, full = tiny("whole"), tiny("full")
    train(whole)
    real, calls = state.save_optimizer, []

    def save_optimizer(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_optimizer", save_optimizer)
        with pytest.raises(CheckpointError) as error:
            train(full)
    message = str(error.value)
    assert message.startswith("The disk is full (")
    assert message.endswith(
        "checkpoint-6 could not be saved; checkpoint-3 is still good. Free some space. "
        f"Then go on with: moesaic train --resume --out {full.out}"
    )
    assert [path.name for path in (full.out / "checkpoints").iterdir()] == ["checkpoint-3"]
    resume(full.out)
    assert_equal_runs(whole.out, full.out, 8)


def test_a_disk_that_fills_up_while_the_history_is_written_is_one_line(tiny, monkeypatch):
    config = tiny()

    def full(self, line, state):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("moesaic.train.history.HistoryCallback._write", full)
    with pytest.raises(CheckpointError) as error:
        train(config)
    assert str(error.value) == (
        f"The disk is full at {config.out}; no checkpoint was saved before that. Free some space. "
        f"Then go on with: moesaic train --resume --out {config.out}"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tiny, monkeypatch, number):
    whole, stopped = tiny("whole"), tiny("stopped")
    train(whole)
    real, calls = MoeTrainer.training_step, []

    def training_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(MoeTrainer, "training_step", training_step)
        with pytest.raises(TrainingStoppedError) as error:
            train(stopped)
    assert len(calls) == 10
    assert signal.getsignal(number) is before
    assert str(error.value) == (
        f"Stopped at step 5 of 8 as asked; {stopped.out}/checkpoints/checkpoint-5 is saved. "
        f"Go on with: moesaic train --resume --out {stopped.out}"
    )
    resume(stopped.out)
    assert_equal_runs(whole.out, stopped.out, 8)


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts; shells start what runs in the background without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_signal_stops_at_once(tiny, monkeypatch):
    config = tiny()
    real, calls = MoeTrainer.training_step, []

    def training_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            # Not os.kill: another thread may take both before Python looks, and two then count as one.
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(MoeTrainer, "training_step", training_step)
    with pytest.raises(TrainingStoppedError) as error:
        train(config)
    assert len(calls) == 9
    assert str(error.value) == (
        f"Stopped at once as asked; the last good checkpoint is {config.out}/checkpoints/checkpoint-3. "
        f"Go on with: moesaic train --resume --out {config.out}"
    )


def test_another_setting_that_reaches_the_weights_is_refused_by_name(tiny):
    config = tiny()
    train(config)
    with pytest.raises(ConfigError) as error:
        resume(config.out, changes={"steps": 20})
    assert str(error.value) == (
        f"the run in {config.out} was started with steps=8, resuming asked for steps=20, which would give another "
        "model. Leave steps out, or start a new run."
    )
    for same_or_free in ({"lr": config.lr}, {"save_every": 1, "log_every": 3, "eval_every": 2, "keep": 5}):
        resume(config.out, changes=same_or_free)


def test_settings_that_reach_no_weight_may_change(tiny, monkeypatch):
    whole, broken = tiny("whole"), tiny("broken")
    train(whole)
    train_and_crash(monkeypatch, broken, micro_batch=9)
    resume(broken.out, changes={"save_every": 1, "keep": 4, "eval_every": 3})
    kept = sorted(path.name for path in (broken.out / "checkpoints").iterdir())
    assert kept == [f"checkpoint-{step}" for step in (5, 6, 7, 8)]
    left, right = (state.read_tensors(run.out / "model" / "model.safetensors") for run in (whole, broken))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_data_that_have_changed_are_refused(tiny, tmp_path, monkeypatch):
    own = tmp_path / "own.txt"
    own.write_text("\n\n".join(f"the {word} of the {word}" for word in "abcdefghijklmnopqrstuvwxyz" * 4))
    config = tiny(data=str(own))
    train_and_crash(monkeypatch, config, micro_batch=9)
    own.write_text(own.read_text().replace("the z", "one z"))
    with pytest.raises(ConfigError, match=r"own\.txt have changed since the run was started: their fingerprint was"):
        resume(config.out)


def test_a_callback_that_is_closed_leaves_nobody_listening(tiny):
    from moesaic.hf import scope

    train(tiny(recipe="deepseek-v3", top_k=2))
    assert scope._LISTENERS.get() == ()


def test_checkpoints_hold_no_pickle(tiny):
    config = tiny()
    train(config)
    suffixes = {path.suffix for path in config.out.rglob("*") if path.is_file()}
    assert not suffixes & set(checkpoint.PICKLES)


@pytest.mark.slow
def test_the_printed_command_is_enough_to_go_on_from_another_folder(tiny, tmp_path):
    config = tiny(steps=120, save_every=120, eval_every=120)
    out = tmp_path / "stopped"
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in config.settings().items() if _is_plain(value)]
    command = [sys.executable, "-m", "moesaic", "train", "--no-report", "--out", str(out), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not (out / "history.jsonl").exists() or len((out / "history.jsonl").read_text()) < 100:
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in said
    command = said.strip().splitlines()[-1].partition("Go on with: ")[2].split()
    done = subprocess.run([sys.executable, "-m", *command, "--no-report"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train(config)
    assert_equal_runs(config.out, out, 120)


def _is_plain(value):
    return isinstance(value, int | float | str) and not isinstance(value, bool)
