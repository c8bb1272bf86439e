"""Classifiers of scikit-learn's digits."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from moesaic.core.errors import BackendError
from moesaic.hf import moe_layers
from moesaic.lab import Setup, every_recipe, images
from moesaic.lab.images import accuracy, build_classifier, digits, image_setup, needs_digits, run_images

with_digits = pytest.mark.skipif(find_spec("sklearn") is None, reason="needs scikit-learn")


@pytest.fixture
def setup():
    return image_setup(Setup(steps=2, num_experts=4))


@with_digits
def test_images_are_split_once_and_for_all():
    train, held_out = digits()
    assert (len(train), len(held_out)) == (1347, 450)
    assert {tuple(one["pixel_values"].shape) for one in train + held_out} == {(1, 8, 8)}
    pixels = torch.stack([one["pixel_values"] for one in train + held_out])
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)
    # Every digit is among both.
    for part in (train, held_out):
        assert {int(one["labels"]) for one in part} == set(range(10))
    assert torch.equal(digits()[1][0]["pixel_values"], held_out[0]["pixel_values"])


@with_digits
@pytest.mark.parametrize("name", ["twin", "switch", "soft-moe", "expert-choice", "smear", "lory"])
def test_a_run_has_figures(setup, name):
    one = run_images(name, 0, setup)
    assert one.kind == "images"
    assert 0 <= one.score <= 1
    assert one.tokens_per_s > 0
    assert one.options == ({"segment": 4} if name == "lory" else {})


def test_the_second_half_of_the_layers_is_sparse(setup):
    assert list(moe_layers(build_classifier("mixtral", setup))) == ["vit.layers.2.mlp", "vit.layers.3.mlp"]


def test_the_tokens_of_an_image_are_its_patches_and_one_more(setup):
    assert setup.context == 17
    assert setup.steps == 2


def test_accuracy_is_the_share_told_rightly(setup):
    model = build_classifier("twin", setup)
    items = [{"pixel_values": torch.rand(1, 8, 8), "labels": torch.tensor(0)} for _ in range(70)]
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.arange(10) == 0)
    assert accuracy(model, items) == 1.0
    items[69]["labels"] = torch.tensor(3)
    assert accuracy(model, items) == 69 / 70


def test_without_scikit_learn_nothing_is_begun(monkeypatch):
    monkeypatch.setattr(images, "find_spec", lambda _name: None)
    message = "Images need scikit-learn's digits, got no scikit-learn. Install it with: pip install 'moesaic[lab]'"
    with pytest.raises(BackendError) as error:
        needs_digits()
    assert str(error.value) == message
    with pytest.raises(BackendError, match="scikit-learn"):
        every_recipe(names=["switch"], seeds=[0], done=lambda *_: pytest.fail("a run was begun"))


@with_digits
@pytest.mark.slow
@pytest.mark.parametrize("name", ["twin", "soft-moe", "mixtral"])
def test_a_design_learns_to_tell_digits(name):
    assert run_images(name, 0, replace(image_setup(Setup()), steps=150)).score > 0.85
