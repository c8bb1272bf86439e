"""What two processes do for test_data_parallel.py, each with ``RANK`` set; a test starts them with :func:`launch`."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch
from transformers import TrainerCallback, set_seed

from moesaic import recipes
from moesaic.core.errors import MoesaicError
from moesaic.data import TokenBlocks, load_corpus, load_tokenizer
from moesaic.train import BalanceCallback, Evaluator, MoeTrainer, TrainConfig, finite, ranks, state, train
from moesaic.train.build import build_model, training_arguments
from moesaic.train.order import collate

CONTEXT, BATCH = 24, 2
_TINY = {"width": 16, "layers": 2, "heads": 2, "hidden": 16, "num_experts": 4, "top_k": 2, "context": CONTEXT}


def _of_recipe(name):
    options = {"jitter": 0.0} if "jitter" in recipes.get(name).options else {}
    return {"recipe": name, "options": options}


# Balance losses are weighed far above what recipes ask for, so that a wrong factor is not lost in the rest.
_LOUD = {
    "mixtral": {"switch": 0.5},
    "switch": {"switch": 0.5},
    "deepseek-v3": {"sequence": 0.5},
    "relu": {"l1": 1e7},
}
# Each has a loss of another kind, and draws nothing at random in training.
OWN_LOSS = ("switch", "mixtral", "deepseek-v3", "relu")
_OFF = {"mixtral": {"switch": 0.0}, "deepseek-v3": {"sequence": 0.0}}
CASES = {
    # Sums over tokens or means over sequences: as one process with the batches of both.
    "tokens": {**_of_recipe("mixtral"), "aux_coefficients": _OFF["mixtral"], "uneven": True},
    "tokens, bias": {**_of_recipe("deepseek-v3"), "aux_coefficients": _OFF["deepseek-v3"], "uneven": True},
    "sequences": {**_of_recipe("deepseek-v3"), "aux_coefficients": _LOUD["deepseek-v3"]},
    "accumulated": {**_of_recipe("mixtral"), "aux_coefficients": _OFF["mixtral"], "grad_accumulation": 2},
    "idle experts": {**_of_recipe("mixtral"), "aux_coefficients": _OFF["mixtral"], "num_experts": 64},
    # Statistics of a batch: the mean over ranks, weighted by predicted tokens.
    **{f"batch, {name}": {**_of_recipe(name), "aux_coefficients": _LOUD[name]} for name in OWN_LOSS},
    "batch, uneven": {**_of_recipe("mixtral"), "aux_coefficients": _LOUD["mixtral"], "uneven": True},
    # The load is that of all ranks and of the step so far.
    "global batch": {**_of_recipe("qwen3-moe"), "aux_coefficients": {"global-batch": 0.5}},
    "global batch, accumulated": {
        **_of_recipe("qwen3-moe"),
        "aux_coefficients": {"global-batch": 0.5},
        "grad_accumulation": 2,
    },
    # One coefficient for all layers.
    "sparsity": {**_of_recipe("relu"), "aux_coefficients": {"l1": 0.0}, "uneven": True},
    "own buffers": {**_of_recipe("deepseek-v3"), "aux_coefficients": _LOUD["deepseek-v3"], "broadcast": False},
}


def config_of(case, out, **changes):
    own = {key: value for key, value in CASES[case].items() if key not in ("uneven", "broadcast")}
    length = {"steps": 2, "batch_size": BATCH, "clip": 1e9, "eval_every": 9}
    return TrainConfig(out=out, **{**_TINY, **length, **own, **changes})


def sequences(case):
    """As many as two steps of two ranks read at most; some much shorter than others if uneven."""
    generator = torch.Generator().manual_seed(3)
    items = []
    for index in range(16):
        ids_P = torch.randint(256, (CONTEXT,), generator=generator)
        length = CONTEXT - 5 * (index % 4) if CASES[case].get("uneven") else CONTEXT
        mask_P = (torch.arange(CONTEXT) < length).long()
        labels_P = ids_P.masked_fill(mask_P == 0, -100)
        items.append({"input_ids": ids_P, "labels": labels_P, "attention_mask": mask_P})
    return items


class Keep(TrainerCallback):
    """Keeps the gradients of the first step, and what controllers move after each."""

    def __init__(self):
        self.gradients = {}
        self.biases = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            # An expert without rows has a gradient of 0, not none.
            self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        moved = ("bias_E", "moe.coefficient")
        found = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(moved)}
        self.biases |= {f"bias {state.global_step} {name}": bias_E for name, bias_E in found.items()}


def two_steps(case, out, **changes):
    """Gradients of the first of two steps, and the selection biases after each."""
    config = config_of(case, out, **changes)
    set_seed(config.seed)
    model = build_model("moe", config, load_tokenizer("bytes"))
    arguments = training_arguments(config, out)
    arguments.ddp_broadcast_buffers = CASES[case].get("broadcast")
    keep = Keep()
    data = {"train_dataset": sequences(case), "eval_dataset": [], "data_collator": collate}
    trainer = MoeTrainer(model=model, args=arguments, callbacks=[BalanceCallback(), keep], keep=1, **data)
    trainer.save_model = trainer._save_checkpoint = lambda *args, **kwargs: None
    trainer.train()
    return {**keep.gradients, **keep.biases}


def evaluations(text, out):
    """Of a model without training, on all held-out blocks and on a single one, which one rank alone reads."""
    config = config_of("sequences", out)
    set_seed(config.seed)
    tokenizer = load_tokenizer("bytes")
    model = build_model("moe", config, tokenizer)
    blocks = TokenBlocks(load_corpus(text).held_out, tokenizer, CONTEXT)
    every, one = Evaluator(blocks, batch_size=3), Evaluator(blocks, batch_size=3)
    one._chosen = one._chosen[:1]
    figures = [evaluator(model) for evaluator in (every, one)]
    return [[dict(f.bits_per_byte), f.load_max_over_mean, f.drop_rate] for f in figures]


def failures(text, out):
    """What each rank raises where rank 1 alone has no space for a checkpoint, or a loss that is NaN."""
    first = os.environ["RANK"] == "0"
    said = {}
    settings = {"data": text, "steps": 4, "save_every": 1, "recipe": "mixtral", "options": {}, "eval_every": 9}

    real_save, saves = state.save_rng, []

    def save_rng(*args):
        saves.append(1)
        if not first and len(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(*args)

    state.save_rng = save_rng
    said["disk"] = _raised(config_of("tokens", out / "disk", **settings))
    state.save_rng = real_save

    real_keep, losses = finite.FiniteGuard._keep, []

    def keep(self, module, inputs, kwargs, output):
        losses.append(1)
        if not first and len(losses) == 3:
            output.loss = output.loss * float("nan")
        real_keep(self, module, inputs, kwargs, output)

    finite.FiniteGuard._keep = keep
    said["loss"] = _raised(config_of("tokens", out / "loss", **settings))
    finite.FiniteGuard._keep = real_keep
    return said


def _raised(config):
    try:
        train(config)
    except MoesaicError as error:
        return [type(error).__name__, str(error)]
    return None


def launch(text: Path, out: Path, module: str = "tests.train.ranks_worker") -> list[dict]:
    """Run a module, this one by default, in two processes that meet over gloo, and read what each found."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", module, str(text), str(out)]
    started = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], **pipes))
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def main(text: str, out: Path) -> None:
    torch.set_num_threads(1)
    ranks.join()
    for case in CASES:
        safetensors.torch.save_file(two_steps(case, out / "trainer"), out / f"{case}-{ranks.own()}.safetensors")
    found = {"evaluations": evaluations(text, out), "failures": failures(text, out)}
    (out / f"{ranks.own()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
