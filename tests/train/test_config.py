import json
from pathlib import Path

import pytest

from moesaic.core.errors import ConfigError
from moesaic.train import TrainConfig
from moesaic.train.config import BACKBONES
from moesaic.train.presets import PRESETS, preset

WRONG = [
    ({"width": 0}, "width must be at least 1, got 0. Raise width."),
    ({"steps": 2.5}, "steps must be a whole number, got 2.5. Pass steps without a fraction."),
    ({"layers": True}, "layers must be a whole number, got True. Pass layers without a fraction."),
    ({"context": 1}, "context must be at least 2, got 1. Raise context."),
    ({"seed": -3}, "seed must be 0 or more, got -3. Raise seed."),
    ({"lr": 0.0}, "lr must be a finite number above 0, got 0.0. Raise lr."),
    ({"clip": float("nan")}, "clip must be a finite number above 0, got nan. Raise clip."),
    ({"weight_decay": float("inf")}, "weight_decay must be 0 or more, got inf. Raise weight_decay."),
    (
        {"backbone": "bert"},
        "backbone must be one of llama, qwen3, gpt2, jamba, lstm, t5, got 'bert'. Pick one of them.",
    ),
    (
        {"backbone": "lstm", "heads": 3},
        "heads are for backbones with attention, which lstm has not, got 3. Leave heads out.",
    ),
    (
        {"backbone": "lstm", "layers": 1},
        "layers must be at least 2 for lstm, so that the MoE stands between two of them, got 1. Raise layers.",
    ),
    (
        {"backbone": "t5", "context": 25},
        "context must be even for t5, half of it for the encoder and half for the decoder, got 25. Try context=26.",
    ),
    (
        {"moe_layers": "every-3"},
        "moe_layers must be all, every-2 or indices such as 1,3, got 'every-3'. Pick one of them.",
    ),
    ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, got 'int8'. Pick one of them."),
    ({"heads": 12}, "heads must divide width=128, got 12. Try heads=4."),
    (
        {"heads": 128},
        "width / heads must be even for the rotary positions of llama, got 128 / 128 = 1. Change heads or width.",
    ),
    (
        {"warmup": 9, "steps": 7},
        "warmup must be shorter than steps=7, got 9. Lower warmup, or train longer.",
    ),
    (
        {"num_experts": 4, "options": {"num_experts": 6}},
        "num_experts is a setting of its own and must not be among the options, got options with num_experts=6. "
        "Pass num_experts (--num-experts) instead.",
    ),
    (
        {"num_experts": 3, "top_k": 5},
        "top_k must be between 1 and num_experts=3, got 5. Lower top_k, or add experts.",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_a_wrong_setting_names_what_was_needed_what_came_and_what_to_try(settings, message):
    with pytest.raises(ConfigError) as error:
        TrainConfig(out=Path("x"), **settings)
    assert str(error.value) == message


def test_an_unknown_recipe_and_an_unknown_option_are_refused():
    with pytest.raises(ConfigError, match="got 'quantum'"):
        TrainConfig(out=Path("x"), recipe="quantum")
    with pytest.raises(ConfigError, match="got jiter"):
        TrainConfig(out=Path("x"), options={"jiter": 0.1})


def test_settings_that_were_left_open_are_worked_out():
    config = TrainConfig(out=Path("x"), width=192, steps=100)
    assert (config.heads, config.hidden, config.warmup, config.eval_every, config.save_every) == (6, 384, 5, 10, 20)
    assert config.eval_tokens == 16384
    assert config.init_std == pytest.approx(0.04)
    assert TrainConfig(out=Path("x"), width=2048).init_std == 0.02


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_has_settings_that_come_back(backbone):
    config = TrainConfig(out=Path("x"), backbone=backbone, moe_layers="every-2")
    assert config.heads == (None if backbone == "lstm" else 4)
    assert TrainConfig.from_settings(json.loads(json.dumps(config.settings())), Path("x")) == config


def test_a_run_from_before_there_was_a_choice_of_layers_has_them_all():
    settings = TrainConfig(out=Path("x")).settings()
    del settings["moe_layers"]
    assert TrainConfig.from_settings(settings, Path("x")).sparse_layers == "all"
    assert TrainConfig(out=Path("x"), moe_layers="0,12").sparse_layers == [0, 12]


def test_settings_are_json_and_come_back_equal():
    config = TrainConfig(out=Path("x"), recipe="switch", options={"jitter": 0.1}, aux_coefficients={"switch": 0.5})
    other = TrainConfig(out=Path("x"), balance={"z": 0.5})
    assert TrainConfig.from_settings(json.loads(json.dumps(other.settings())), Path("x")) == other
    again = TrainConfig.from_settings(json.loads(json.dumps(config.settings())), Path("x"))
    assert again == config


def test_a_name_that_is_no_setting_is_refused():
    with pytest.raises(ConfigError, match=r"^'depth' is not a setting of a training run; there are .*layers"):
        TrainConfig.from_settings({"depth": 3}, Path("x"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_config(name):
    assert TrainConfig.from_settings(preset(name), Path("x")).steps > 0


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError) as error:
        preset("nightly")
    assert str(error.value) == "preset must be one of demo, got 'nightly'. Pick one of them."
