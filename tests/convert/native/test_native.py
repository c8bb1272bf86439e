"""An exported model says what ours said, in a process that knows nothing of Moesaic; where none can, it is said why."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, LlamaModel, MixtralForCausalLM

import moesaic as mz
from moesaic.convert import export
from moesaic.convert.native.fit import choose
from moesaic.convert.native.homes import HOMES, UNREACHABLE
from moesaic.convert.proof.probe import equal_routes, measure, probe_batch
from moesaic.core.errors import CheckpointError, ConfigError
from tests.convert.backbones import dense, sparse

# Where a sparse model of each backbone goes. The maths of the layer decides, not the recipe's name.
SHARED = {"num_shared": 2}
DEVICES = {"num_devices": 2, "devices_per_token": 1}
DROPLESS = {"eval_capacity_factor": 4.0}
EXPORTS = {
    "llama, mixtral": ("llama", "mixtral", {}, "mixtral"),
    "llama, dbrx's layer is mixtral's": ("llama", "dbrx", {}, "mixtral"),
    "llama, minimax's too": ("llama", "minimax-01", {}, "mixtral"),
    "mistral with its window": ("mistral", "mixtral", {}, "mixtral"),
    "llama, gated shared expert": ("llama", "qwen1.5-moe", SHARED, "qwen2_moe"),
    "qwen2, gated shared expert": ("qwen2", "qwen1.5-moe", SHARED, "qwen2_moe"),
    "qwen2, no shared expert": ("qwen2", "mixtral", {}, "qwen2_moe"),
    "llama, bare scores": ("llama", "olmoe", {}, "qwen2_moe"),
    "llama, gelu": ("llama", "grok-1", {}, "qwen2_moe"),
    "llama, bare shared expert and bare scores": ("llama", "deepseek-moe", SHARED, "qwen2_moe"),
    "llama, bare shared expert": ("llama", "arctic", {}, "granitemoeshared"),
    "llama, sigmoid and bias": ("llama", "deepseek-v3", {}, "glm4_moe"),
    "llama, groups": ("llama", "deepseek-v3", {"num_experts": 8, "num_groups": 4, "groups_kept": 2}, "glm4_moe"),
    "llama, sigmoid, no shared expert": ("llama", "deepseek-v3", {"num_shared": 0}, "glm4_moe"),
    "qwen3": ("qwen3", "qwen3-moe", {}, "qwen3_moe"),
    "qwen3, bare scores": ("qwen3", "olmoe", {}, "qwen3_moe"),
    "qwen3, dense layers between": ("qwen3", "qwen3-moe", {"layers": "every-2"}, "qwen3_moe"),
    "qwen3, sigmoid and bias": ("qwen3", "deepseek-v3", SHARED, "dots1"),
    "olmo2": ("olmo2", "olmoe", {}, "flex_olmo"),
    "granite": ("granite", "mixtral", {}, "granitemoe"),
    "granite, bare shared expert": ("granite", "arctic", {}, "granitemoeshared"),
    "latent attention": ("youtu", "deepseek-v3", {"layers": [1]}, "deepseek_v3"),
    "latent attention, device groups": ("youtu", "deepseek-v2", DEVICES, "deepseek_v2"),
    "ernie, softmax and bias": ("ernie4_5", "mixtral", {"balance": {"bias": 0.01}}, "ernie4_5_moe"),
    "lfm2, convolutions": ("lfm2", "deepseek-v3", {"num_shared": 0, "layers": [1, 2]}, "lfm2_moe"),
    "jamba, every other layer": ("jamba", "jamba", {"layers": "every-2"}, "jamba"),
    "t5": ("t5", "switch", DROPLESS, "switch_transformers"),
    "t5, every other block": ("t5", "switch", DROPLESS | {"layers": "every-2"}, "switch_transformers"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPORTS)
def test_the_native_model_says_the_same_and_routes_the_same(case):
    base, recipe, options, family = EXPORTS[case]
    model = sparse(base, recipe, **options)
    converted = export(model)
    assert converted.model.config.model_type == family
    assert type(converted.model).__module__.startswith("transformers.models.")
    assert converted.receipt.largest_logit_difference < 1e-5 * max(1, converted.receipt.largest_logit)
    # The stock model as it runs for users: float32, grouped products, a batch with padding.
    batch = probe_batch(model.config, "random")
    assert int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
    ours, native = measure(model, batch), measure(converted.model, batch)
    assert (ours.logits - native.logits).abs().max() < 1e-5 * max(1, ours.logits.abs().max())
    assert len(native.routes) == len(mz.hf.moe_layers(model))
    assert equal_routes(ours, native) == 1


def test_every_family_of_the_table_is_exported_to_by_a_test_and_in_the_docs():
    assert {family for *_, family in EXPORTS.values()} == {home.family for home in HOMES}
    page = (Path(__file__).parents[3] / "docs" / "convert.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (`[^|]*`) \|", page, re.MULTILINE)
    assert {family: re.findall(r"`(\w+)`", bases) for family, bases in rows} == {
        home.family: list(home.backbones) for home in HOMES
    }


def test_what_a_family_has_and_the_layer_lacks_changes_nothing_and_is_told():
    half, zeros = (
        export(sparse("llama", recipe, **given)).receipt for recipe, given in (("deepseek-moe", SHARED), ("olmoe", {}))
    )
    assert "stands at one half" in half.notes[0]
    assert zeros.notes[0] == "the family's shared expert is there with weights of zero"
    exact = export(sparse("llama", "qwen1.5-moe", **SHARED)).receipt
    assert exact.notes == ("balance losses and controllers are for training and do not go along",)


def test_a_family_may_be_named_and_fits_or_not():
    model = sparse("qwen3", "deepseek-v3")
    assert export(model, "glm4_moe").model.config.use_qk_norm
    with pytest.raises(
        ConfigError, match=r"qwen3_moe has no place for sigmoid scores, weights times 2\.5, a selection bias, a"
    ):
        export(model, "qwen3_moe")
    with pytest.raises(ConfigError, match="family must be 'auto' or one of mixtral, "):
        export(model, "mixtrl")


# --- in a process without Moesaic -------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
torch.set_num_threads(1)
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    faults = {key: sorted(map(str, value)) for key, value in info.items() if value}
    assert not faults, (folder.name, faults)
    assert [type(model).__name__] == config.architectures
    with torch.no_grad():
        logits = model.eval()(**load_file(folder.with_suffix(".batch"))).logits
    save_file({"logits": logits}, folder.with_suffix(".said"))
assert not [name for name in sys.modules if name.startswith("moesaic")]
"""


def test_folders_load_with_the_stock_auto_classes_where_there_is_no_moesaic(tmp_path):
    """All families at once: one start of Python takes longer than all the rest."""
    expected = {}
    for base, recipe, options, family in EXPORTS.values():
        if family in expected:
            continue
        model = sparse(base, recipe, **options)
        export(model, out=tmp_path / family)
        batch = dict(probe_batch(model.config, "random"))
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in batch.items()}, tmp_path / f"{family}.batch"
        )
        with torch.no_grad():
            expected[family] = model(**batch).logits, batch
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(tmp_path)], check=True, capture_output=True, text=True
    )
    for family, (logits, batch) in expected.items():
        said = safetensors.torch.load_file(tmp_path / f"{family}.said")["logits"]
        valid = batch["attention_mask"].bool() if family != "switch_transformers" else ...
        assert (said - logits)[valid].abs().max() < 1e-5 * max(1, logits.abs().max()), family


NAMES_ON_DISK = {
    ("llama", "mixtral"): {
        "model.layers.0.block_sparse_moe.gate.weight": (4, 16),
        "model.layers.1.block_sparse_moe.experts.3.w1.weight": (24, 16),
        "model.layers.1.block_sparse_moe.experts.3.w2.weight": (16, 24),
        "model.layers.1.block_sparse_moe.experts.3.w3.weight": (24, 16),
    },
    ("qwen2", "qwen1.5-moe"): {
        "model.layers.0.mlp.experts.2.gate_proj.weight": (24, 16),
        "model.layers.0.mlp.shared_expert.down_proj.weight": (16, 96),
        "model.layers.0.mlp.shared_expert_gate.weight": (1, 16),
    },
    ("llama", "deepseek-v3"): {
        "model.layers.1.mlp.gate.e_score_correction_bias": (4,),
        "model.layers.1.mlp.experts.0.up_proj.weight": (24, 16),
        "model.layers.1.mlp.shared_experts.up_proj.weight": (24, 16),
    },
    ("granite", "arctic"): {
        "model.layers.0.block_sparse_moe.input_linear.weight": (4, 48, 16),
        "model.layers.0.block_sparse_moe.router.layer.weight": (4, 16),
        "model.layers.0.shared_mlp.input_linear.weight": (32, 16),
    },
}  # fmt: skip


@pytest.mark.parametrize(("base", "recipe"), NAMES_ON_DISK)
def test_files_have_the_names_that_servers_expect(tmp_path, base, recipe):
    export(sparse(base, recipe), out=tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    for name, shape in NAMES_ON_DISK[base, recipe].items():
        assert tuple(tensors[name].shape) == shape
    assert not [name for name in tensors if "moe." in name.replace("_moe.", "") or name.endswith(("EDF", "EFD"))]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForCausalLM")
    # Servers would look for layers that predict further tokens.
    assert config.get("num_nextn_predict_layers", 0) == 0
    assert "moesaic" not in json.dumps(config)


def test_weights_keep_their_type_and_a_folder_is_read_step_by_step(tmp_path):
    model = sparse("llama", "deepseek-v3").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    receipt = export(tmp_path / "ours", out=tmp_path / "native").receipt
    tensors = safetensors.torch.load_file(tmp_path / "native" / "model.safetensors")
    biases = {name for name in tensors if name.endswith("e_score_correction_bias")}
    assert {tensors[name].dtype for name in biases} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in biases} == {torch.bfloat16}
    assert json.loads((tmp_path / "native" / "config.json").read_text())["dtype"] == "bfloat16"
    assert any("may compute in the model's type" in note for note in receipt.notes)
    assert receipt.largest_logit_difference < 1e-5 * max(1, receipt.largest_logit)


def test_an_exported_model_generates_what_ours_does():
    model = sparse("llama", "mixtral")
    native = export(model).model
    assert isinstance(native, MixtralForCausalLM)
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **settings), native.generate(prompt, **settings))


# --- what has no home -------------------------------------------------------------------------------------------------

HOMELESS = {
    ("llama", "top-p"): "has a home for its router (TopPRouter)",
    ("llama", "llama4"): "has a home for weights that multiply what goes into an expert",
    ("llama", "soft-moe"): "has a home for a layer that is no table of tokens and experts (SoftMoE)",
    ("llama", "st-moe"): "has a home for its router (SampledTopKRouter) and what runs after the experts",
    ("llama", "mod"): "has a home for its router (DepthRouter)",
    ("llama", "gpt-oss"): "mixtral has no place for a bias of the router's logits, biased and bounded experts",
    ("gpt2", "mixtral"): "mixtral has no place for the attention of gpt2",
    ("jamba", "mixtral"): "jamba has no place for weights that add up to one. Other families have another attention",
    ("llama", "deepseek-v2"): "qwen2_moe has no place for weights times 16, groups of experts",
}


@pytest.mark.filterwarnings("ignore:In recipe .* a token's experts depend on later tokens")
@pytest.mark.parametrize(("base", "recipe"), HOMELESS)
def test_where_no_family_computes_the_same_the_part_without_a_home_is_named(base, recipe):
    options = DEVICES if recipe == "deepseek-v2" else {}
    with pytest.raises(ConfigError) as error:
        export(sparse(base, recipe, **options))
    assert HOMELESS[base, recipe] in str(error.value)


def test_capacity_has_no_home_and_may_be_left_out_with_the_gap_measured():
    model = sparse("t5", "switch", eval_capacity_factor=1.0, min_capacity=1)
    with pytest.raises(ConfigError, match=r"capacity dropping \(eval_capacity_factor=1; 4 would drop nothing\)"):
        export(model)
    receipt = export(model, dropless=True).receipt
    assert receipt.promised is None
    assert receipt.largest_logit_difference > 1e-3
    assert receipt.notes[0] == (
        "left out: capacity dropping (eval_capacity_factor=1; 4 would drop nothing); rows that it dropped are kept"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": [4, 8]}, "MoE layers that differ in num_experts"),
        ({"layers": [1], "family": "mixtral"}, "mixtral has no place for dense layers between its MoE layers (1)"),
        ({"activation": "gelu", "layers": [1]}, "dense layers with silu beside experts with gelu"),
    ],
)
def test_layers_that_a_family_cannot_tell_apart_are_named(options, message):
    family = options.pop("family", "auto")
    with pytest.raises(ConfigError) as error:
        export(sparse("llama", "mixtral", **options), family)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "mixtral has no place for model.layers.0.self_attn.k_proj.bias"),
        ("llama", {"head_dim": 12}, "qwen2_moe has no place for attention heads of width 12"),
        ("mistral", {"sliding_window": 5}, "qwen2_moe has no place for attention within a window of 5 tokens"),
    ],
)
def test_a_backbone_that_does_not_fit_is_named(base, changes, message):
    family = message.partition(" ")[0]
    with pytest.raises(ConfigError) as error:
        export(sparse(base, "mixtral" if family == "mixtral" else "olmoe", backbone=changes), family)
    assert message in str(error.value)


@pytest.mark.parametrize("family", UNREACHABLE)
def test_families_that_no_dense_model_leads_to_say_why(family):
    with pytest.raises(ConfigError, match=f"No sparse model can be exported to {family}: its "):
        export(sparse("llama", "mixtral"), family)


def test_a_router_of_zeros_is_refused():
    model = mz.sparsify(dense("llama"), "grok-1", num_experts=4, top_k=2)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.moe\.router\.weight with all weights 0"):
        export(model)


def test_only_our_models_are_exported(tmp_path):
    with pytest.raises(ConfigError, match=r"export needs a model made with moesaic\.sparsify, got LlamaForCausalLM"):
        export(dense("llama"))
    headless = mz.sparsify(LlamaModel(dense("llama").config), "mixtral", num_experts=4)
    assert type(export(headless).model).__name__ == "MixtralModel"


def test_a_native_model_that_would_say_something_else_is_refused(tmp_path, monkeypatch):
    """The table may be wrong: the measurement is not."""
    import moesaic.convert.native.export as native

    def wrong(*args):
        fit = choose(*args)
        fit.config.rope_parameters["rope_theta"] = 3.0
        return fit

    monkeypatch.setattr(native, "choose", wrong)
    with pytest.raises(CheckpointError, match="export to mixtral promises logits within 1e-05"):
        export(sparse("llama", "mixtral"), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_llama_with_long_rotary_positions_keeps_them():
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    for recipe in ("mixtral", "deepseek-v3"):
        native = export(sparse("llama", recipe, backbone={"rope_parameters": rope})).model
        assert native.config.rope_parameters["rope_type"] == "llama3"


def test_the_folder_of_a_run_is_exported(tmp_path):
    model = sparse("llama", "mixtral")
    model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"kind": "moe"}))
    export(tmp_path / "run", out=tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "mixtral"
