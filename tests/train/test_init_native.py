"""Training that goes on from a mixture of transformers: adopted, so that balance, figures and traces are as ours."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import moesaic as mz
from moesaic.cli.app import run
from moesaic.convert.shrink.prune import prune_experts
from moesaic.core.errors import ConfigError
from moesaic.data import load_tokenizer
from moesaic.hf.native.rows import ROWS
from moesaic.train import TrainConfig, history, resume, train

from .runs import assert_equal_runs
from .test_init import TINY, llama

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
SIZES = {
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SIZES |= {"num_key_value_heads": 2, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


def mixtral(folder):
    return saved(MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES)), folder)


def deepseek(folder):
    own = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    return saved(DeepseekV3ForCausalLM(DeepseekV3Config(moe_intermediate_size=16, **SIZES, **LATENT, **own)), folder)


def saved(model, folder):
    with torch.no_grad():
        for index, weight in enumerate(model.parameters()):
            weight.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return str(folder)


def config(tmp_path, name, init, text, **changes):
    return TrainConfig(out=tmp_path / name, init=init, data=str(text), **{**TINY, "log_every": 1, **changes})


def stopped_after_one_step(finished, folder):
    """As if it had been killed after its first step."""
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-2")
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    return folder


def test_a_run_has_the_figures_of_its_experts_and_ends_as_a_model_of_the_family(tmp_path, text):
    start = mixtral(tmp_path / "start")
    summary = train(config(tmp_path, "run", start, text, balance={"switch": 0.01, "z": 1e-3}))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kind"] == "moe"
    assert summary["moe"]["load_max_over_mean"] >= 1
    # Two of four experts: half of what is in experts is not met.
    in_experts = 2 * 4 * 3 * 16 * 24
    assert summary["moe"]["active_params"] == summary["moe"]["total_params"] - in_experts // 2
    for line in [one for one in history.read(tmp_path / "run" / "history.jsonl") if one["kind"] == "train"]:
        assert set(line["aux"]) == {"switch", "z"}
        assert list(line["load"]) == list(line["router_entropy"]) == LAYERS
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(written) is MixtralForCausalLM
    on_disk = safetensors.torch.load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert on_disk.keys() == safetensors.torch.load_file(f"{start}/model.safetensors").keys()
    with torch.no_grad(), mz.record(written) as trace:
        written(torch.arange(7)[None])
    assert list(trace.metadata.layer_names) == LAYERS
    assert trace.num_rows == 7 * len(LAYERS) * 2


def test_the_balance_losses_of_every_layer_are_in_the_loss_and_move_the_routers(tmp_path, text):
    start = mixtral(tmp_path / "start")
    for name, balance in (("with", {"switch": 0.5}), ("without", None)):
        train(config(tmp_path, name, start, text, steps=1, balance=balance))
    balanced, plain = (history.read(tmp_path / name / "history.jsonl")[0] for name in ("with", "without"))
    assert balanced["loss"] - plain["loss"] == pytest.approx(0.5 * 2 * balanced["aux"]["switch"], rel=1e-4)
    assert plain["aux"] == {}
    assert plain["load"] == balanced["load"]
    routers = [
        safetensors.torch.load_file(tmp_path / name / "checkpoints" / "checkpoint-1" / "model.safetensors")[
            "model.layers.0.mlp.gate.weight"
        ]
        for name in ("with", "without")
    ]
    assert not torch.equal(*routers)


def test_a_selection_bias_is_stepped_and_saved_and_a_stopped_run_resumes_to_the_same_bits(tmp_path, text):
    start = deepseek(tmp_path / "start")
    train(config(tmp_path, "whole", start, text, balance={"bias": 1e-2, "sequence": 1e-3}))
    cut = stopped_after_one_step(tmp_path / "whole", tmp_path / "cut")
    resume(cut)
    assert_equal_runs(tmp_path / "whole", cut, 2)
    after = safetensors.torch.load_file(cut / "checkpoints" / "checkpoint-1" / "model.safetensors")
    for layer in LAYERS:
        bias_E = after[f"{layer}.gate.e_score_correction_bias"]
        # One step of 0.01, up or down, shifted so that it adds up to 0.
        assert 0.005 <= float(bias_E.abs().max()) <= 0.02
        assert float(bias_E.sum()) == pytest.approx(0, abs=1e-7)
    assert type(AutoModelForCausalLM.from_pretrained(cut / "model")) is DeepseekV3ForCausalLM


def test_a_run_in_mid_training_is_made_smaller_and_goes_on_with_its_balance(tmp_path, text):
    whole = train(config(tmp_path, "run", mixtral(tmp_path / "start"), text, balance={"switch": 0.01}))
    cut = stopped_after_one_step(tmp_path / "run", tmp_path / "cut")
    ids = torch.arange(3, 35).view(1, 32)
    for place, out in ((cut, "less"), (tmp_path / "less", "again")):  # what was converted can be converted again
        prune_experts(place, 3, batches=[ids], out=tmp_path / out)
    record = json.loads((tmp_path / "again" / "run.json").read_text())
    assert (record["kind"], record["settings"]["balance"]) == ("moe", {"switch": 0.01})
    summary = resume(tmp_path / "again")
    last = history.read(tmp_path / "again" / "history.jsonl")[-2]
    assert last["step"] == 2
    assert [len(shares) for shares in last["load"].values()] == [3, 3]
    assert last["aux"]["switch"] > 0
    assert summary["moe"]["total_params"] == whole["moe"]["total_params"] - 2 * (3 * 16 * 24 + 16)


@pytest.mark.parametrize(("is_sparse", "has"), [(False, "has no MoE layers"), (True, "balances its layers as its")])
def test_balance_is_refused_for_models_that_have_none_or_their_own(is_sparse, has, tmp_path, text):
    start = str(llama(tmp_path / "start", sparse=is_sparse))
    with pytest.raises(ConfigError) as error:
        train(config(tmp_path, "run", start, text, balance={"switch": 0.25}))
    assert str(error.value).startswith(
        "balance beside init is for mixtures of transformers, got balance={'switch': 0.25} and the model in "
        f"{start}, which {has}"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ({"bias": 1e-3}, "moves a selection bias, and MixtralTopKRouter at model.layers.0.mlp.gate has none"),
        ({"swich": 0.1}, "balance must name terms of moesaic.balance.TERMS"),
    ],
)
def test_balance_that_cannot_be_is_refused_before_anything_is_written(balance, message, tmp_path, text):
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path, "run", mixtral(tmp_path / "start"), text, balance=balance))
    assert not (tmp_path / "run").exists()


def test_a_mixture_that_cannot_be_described_is_refused_and_not_taken_for_dense(tmp_path, text, monkeypatch):
    start = mixtral(tmp_path / "start")
    monkeypatch.delitem(ROWS, "MixtralTopKRouter")
    with pytest.raises(ConfigError, match="adopt needs routers that Moesaic can describe, got experts"):
        train(config(tmp_path, "run", start, text))
    assert not (tmp_path / "run").exists()


def test_the_command_line_takes_balance_beside_a_mixture(tmp_path, text, capsys):
    short = ["--steps=1", "--context=32", "--batch-size=2", "--eval-tokens=64", "--warmup=0", "--no-report", "--json"]
    given = ["--init", mixtral(tmp_path / "start"), "--balance", "switch=0.01", "--data", str(text)]
    assert run(["train", *given, *short, "--out", str(tmp_path / "run")]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["moe"]
