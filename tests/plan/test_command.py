"""``moesaic plan``: tables, JSON, pictures, and what it says to bad arguments."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesaic import zoo
from moesaic.cli.app import run
from moesaic.plan import find
from moesaic.telemetry import RoutingTrace, TraceMetadata


def told(capsys, *words):
    code = run(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def figures(capsys, *words):
    code, out, err = told(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


LAYOUT = ("--devices=64", "--ep=8", "--tp=2", "--pp=4", "--fsdp=2", "--batch=64")


def test_a_line_with_every_degree_is_planned(capsys):
    code, out, _ = told(capsys, "mixtral-8x7b", "--train", *LAYOUT, "--capacity", "1.25", "--routing", "zipf:1.1")
    assert code == 0
    for word in ("optimizer", "recompute", "all-to-all", "what binds", "MFU at the bound", "dropped rows", "Assumes:"):
        assert word in out


def test_what_is_printed_as_json_adds_up(capsys):
    found = figures(capsys, "mixtral-8x7b", *LAYOUT)
    assert found["memory_total"] == pytest.approx(sum(found["memory"].values()))
    assert found["memory_p99_total"] >= found["memory_total"]
    assert found["fits"] is True
    times = found["times"]
    assert found["step_s_bound"] == max(times["compute"], times["memory"], times["inside"], times["across"])
    assert found["tokens_per_s_bound"] == pytest.approx(64 * 4096 / found["step_s_bound"])
    assert found["device"]["source"]
    assert found["assumes"]


def test_another_number_of_experts_is_another_model(capsys):
    more = figures(capsys, "mixtral-8x7b", "--experts", "16", "--top-k", "1")
    plain = figures(capsys, "mixtral-8x7b")
    assert more["model"] == "mixtral-8x7b with 16 experts, top 1"
    assert more["flops"]["experts"] * 2 == plain["flops"]["experts"]
    assert more["memory"]["weights"] > 1.9 * plain["memory"]["weights"]


def test_serving_offload_search_and_comparison_are_printed(capsys):
    code, out, _ = told(capsys, "qwen3-30b-a3b", "--serve", "--devices", "2", "--ep", "2", "--batch", "1,16")
    assert code == 0
    assert "82.4 of 128" in out
    found = figures(capsys, "qwen3-30b-a3b", "--serve", "--device", "rtx4090", "--fast-memory", "24")
    assert 0 < found["rates"]["lru"] < found["rates"]["best"] < 1
    code, out, _ = told(capsys, "olmoe-1b-7b", "--search", "--devices", "2", "--batch", "8")
    assert code == 0
    assert "layouts fit into 90%" in out
    ranked = figures(capsys, "olmoe-1b-7b", "--serve", "--search", "--devices", "2", "--batch", "8")
    assert [plan["layout"]["devices"] for plan in ranked] == [2] * len(ranked)
    code, out, _ = told(capsys, "--compare", "olmoe-1b-7b", "mixtral-8x7b")
    assert code == 0
    assert "Side by side" in out


@pytest.mark.parametrize("words", [["olmoe-1b-7b"], ["olmoe-1b-7b", "--serve"]], ids=["train", "serve"])
def test_a_picture_is_drawn(capsys, tmp_path, words):
    pytest.importorskip("matplotlib", reason="a picture needs matplotlib")
    path = tmp_path / "made" / "plan.svg"
    assert told(capsys, *words, "--plot", str(path))[0] == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    assert len(text) > 5000


def test_choices_of_a_trace_decide(capsys, tmp_path):
    """All tokens on the experts of the first of two devices: it has twice the mean."""
    tokens, layers, top_k = 64, 16, 8
    choices = np.tile(np.arange(top_k), (tokens, layers, 1))
    position, layer, choice = (index.ravel() for index in np.indices(choices.shape))
    ones = np.ones(choices.size)
    trace = RoutingTrace(
        metadata=TraceMetadata(
            model="m", layer_names=tuple(f"l{it}" for it in range(layers)), num_experts=(64,) * layers, top_k=top_k
        ),
        sequence=position // 16,
        position=position % 16,
        layer=layer,
        choice=choice,
        token_id=-ones,
        expert=choices.ravel(),
        weight=ones,
        score=ones,
        kept=ones.astype(bool),
        domain=-ones,
    )
    path = trace.save(tmp_path / "routing.parquet")
    found = figures(capsys, "olmoe-1b-7b", "--devices", "2", "--ep", "2", "--routing", str(path), "--capacity", "2")
    assert found["busiest_load"] == pytest.approx(2)
    assert found["p99_load"] == pytest.approx(2)
    # Places for twice the mean, and eight times the mean comes.
    assert found["mean_drop_rate"] == pytest.approx(0.75)
    served = figures(capsys, "olmoe-1b-7b", "--serve", "--batch", "64", "--routing", str(path))
    assert served["decode"][0]["experts_touched"] == 8


def test_a_configuration_on_disk_is_a_model(tmp_path):
    from transformers import MixtralConfig

    MixtralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    ).save_pretrained(tmp_path)  # fmt: skip
    shape = find(str(tmp_path))
    (experts,) = set(shape.mixtures)
    assert (experts.num_experts, experts.top_k, experts.hidden, shape.width, shape.depth) == (4, 2, 96, 64, 2)
    assert find(str(tmp_path / "config.json")).num_params == shape.num_params
    assert find("mixtral-8x7b") == zoo.get("mixtral-8x7b")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            "mixtral-8x7b --devices 12 --tp 8",
            "devices must be a multiple of tp * pp = 8 * 1 = 8, got 12. 8 or 16 would fit.",
        ),
        (
            "mixtral-8x7b --devices 12 --ep 3",
            "ep must divide the 8 experts of a layer of mixtral-8x7b, got 3. These do: 1, 2, 4, 8.",
        ),
        ("", "A model was needed, got none. Try mixtral-8x7b; moesaic zoo lists the others."),
        (
            "mixtral-8x7b olmoe-1b-7b",
            "One model can be planned at a time, got 2. Add --compare to set them side by side.",
        ),
        ("mixtral-8x7b --compare", "--compare needs at least 2 models, got mixtral-8x7b alone. Name another one."),
        ("mixtral-8x7b --fast-memory 24", "--fast-memory 24 is for serving, and --serve was not given. Add --serve."),
        (
            "mixtral-8x7b --batch 1,2",
            "--batch for training must be one number, got '1,2'. Give the sequences of one step.",
        ),
        (
            "mixtral-8x7b --batch many",
            "--batch must be numbers such as 64 or 1,16,256, got 'many'. Leave out spaces.",
        ),
        (
            "mixtral-8x7b --plot plan.gif",
            "A plot's name must end with .svg, .png or .pdf, got 'plan.gif'. Try plan.svg.",
        ),
        (
            "deepseek-v3 --experts 100",
            "experts must be a multiple of the model's 8 groups, got 100. 96 would fit.",
        ),
        (
            "mixtral-8x7b --dtype fp8 --device a100-80g",
            "a100-80g has no peak for fp8, only for bf16, fp16, fp32, int8. Choose one of these dtypes.",
        ),
    ],
)
def test_bad_arguments_are_told_what_would_do(capsys, words, text):
    code, _, err = told(capsys, *words.split())
    assert (code, err) == (2, f"moesaic: {text}\n")


def test_planning_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, moesaic.plan; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
