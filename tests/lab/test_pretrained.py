"""The experiment on pretrained weights, on a tiny random model that is made on the spot."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.data import load_corpus
from moesaic.lab.pretrained import Experiment, Plan, Story
from moesaic.lab.pretrained.experiment import MODELS
from moesaic.lab.pretrained.quick import QUICK, tiny_model
from moesaic.lab.pretrained.starts import ALONE, DENSE, PAIRED, SPLIT, kinds_of_token


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for domain in ("prose", "sums"):
        (folder / domain).mkdir()
        for n in range(40):
            text = f"Paragraph {n} tells of {n * n} things." if domain == "prose" else f"{n} + {n} = {2 * n}"
            (folder / domain / f"{n}.txt").write_text(text)
    return load_corpus(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def done(source, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    said = []
    story = Experiment(source, out, plan=QUICK, corpus=corpus, say=said.append).run()
    return story, out, said


def test_every_model_is_measured_on_its_way_and_before_and_after(done):
    story, _, said = done
    assert set(story.looks) == set(MODELS)
    for curve in story.looks.values():
        assert [tokens for tokens, _, _ in curve] == [step * QUICK.tokens_per_step for step in QUICK.look_steps]
    assert set(story.bits) == {DENSE, SPLIT, *(f"{name}, trained" for name in MODELS)}
    assert len({len(bits) for bits in story.bits.values()} | {len(story.documents)}) == 1
    assert any("No questions" in line for line in said)


def test_upcycled_models_start_as_the_dense_one_with_the_active_parameters_that_they_say(done):
    story, _, _ = done
    dense = story.looks[DENSE][0]
    for name in (ALONE, PAIRED):
        assert story.receipts[name]["largest_logit_difference"] < 1e-4
        assert story.looks[name][0][1] == pytest.approx(dense[1], rel=1e-5)
    # Its router: 8 * 16 numbers in the one layer.
    assert story.sizes[ALONE]["active_params"] == story.sizes[DENSE]["active_params"] + 128
    # A second network and the router: 3 * 16 * 32 and 4 * 16 numbers in the one layer.
    assert story.sizes[PAIRED]["active_params"] == story.sizes[DENSE]["active_params"] + 1536 + 64
    assert story.sizes[SPLIT]["active_params"] < story.sizes[DENSE]["active_params"]


def test_only_the_networks_that_become_experts_are_trained(done, source):
    _, out, _ = done
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out / "models" / "dense-trained").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "layers.1.mlp" in name}
    copies = AutoModelForCausalLM.from_pretrained(out / "models" / "upcycled-one-copy-trained").state_dict()
    # Both halves of a copy still have one and the same row, which has the length that it was given.
    weight_ED = copies["model.layers.1.mlp.moe.router.weight"]
    assert torch.equal(weight_ED[::2], weight_ED[1::2])
    torch.testing.assert_close(weight_ED.norm(dim=1), torch.ones(8))


def test_copies_are_pruned_and_merged_without_loss_before_training(done):
    story, _, _ = done
    whole = story.smaller[f"{PAIRED}, whole"]
    for how in ("pruned", "merged"):
        assert story.smaller[f"{PAIRED}, {how}"] == pytest.approx(whole, rel=1e-4)
    assert set(story.smaller) == {
        f"{when}, {how}" for when in (PAIRED, f"{PAIRED}, trained") for how in ("whole", "pruned", "merged")
    }


def test_what_is_there_is_not_made_again(done, source, corpus):
    story, out, _ = done
    said = []
    again = Experiment(source, out, corpus=corpus, say=said.append).run()
    assert again == story
    assert [line for line in said if "bits" in line or "convert" in line] == []
    with pytest.raises(ConfigError, match="Give the same numbers, or another folder"):
        Experiment(source, out, plan=replace(QUICK, steps=9), corpus=corpus)


def test_figures_come_back_from_their_file(done, tmp_path):
    story, _, _ = done
    assert Story.load(story.save(tmp_path / "a.json")) == story


@pytest.mark.parametrize("content", [None, "{", '{"plan": {"layers": []}}', '{"plan": {"colour": 1}}'])
def test_figures_that_cannot_be_read_are_refused(content, tmp_path):
    path = tmp_path / "figures.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match="The figures of the experiment could not be read"):
        Story.load(path)


def test_an_unknown_model_is_refused(source, corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"models must be of dense; .*, got 'huge'\."):
        Experiment(source, tmp_path, plan=QUICK, corpus=corpus, models=["huge"])


def test_kinds_of_tokens_are_found_and_each_is_sent_to_its_own_row():
    """Four clusters around a common mean that is ten times as long as they are apart."""
    draw = torch.Generator().manual_seed(0)
    centre_ED = torch.randn(4, 16, generator=draw)
    kind_T = torch.arange(400) % 4
    x_TD = 10 * torch.randn(16, generator=draw) + centre_ED[kind_T] + 0.1 * torch.randn(400, 16, generator=draw)
    rows_ED = kinds_of_token(x_TD, 4)
    chosen_T = (x_TD @ rows_ED.T).argmax(dim=1)
    assert len({(int(kind), int(row)) for kind, row in zip(kind_T, chosen_T, strict=True)}) == 4
    assert len(set(chosen_T.tolist())) == 4


def test_the_plan_trains_networks_of_its_layers_alone():
    import re

    names = {
        "model.layers.20.mlp.up_proj.weight": True,
        "model.layers.2.mlp.up_proj.weight": False,
        "model.layers.20.mlp.moe.experts.up_EDF": True,
        "model.layers.20.mlp.moe.router.weight": False,
        "model.layers.20.self_attn.q_proj.weight": False,
    }
    assert {name: re.search(Plan().trainable, name) is not None for name in names} == names
    assert Plan(steps=100, looks=5).look_steps == (0, 25, 50, 75, 100)
