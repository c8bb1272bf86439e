"""Generation with a cache is generation without one, padded or not."""

import pytest
import torch

from moesaic.hf import observe
from tests.hf.test_forward import sparse
from tests.hf.tiny import DROPLESS, TEXT


def prompts(sequences=2, positions=5):
    return torch.randint(3, 61, (sequences, positions))


def generate(model, input_ids, mask=None, **kwargs):
    mask = torch.ones_like(input_ids) if mask is None else mask
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **kwargs}
    new = model.generate(input_ids, attention_mask=mask, **settings)
    return new if model.config.is_encoder_decoder else new[:, input_ids.shape[1] :]


@pytest.mark.parametrize("recipe", DROPLESS)
@pytest.mark.parametrize("family", TEXT)
def test_the_cache_changes_no_token(family, recipe):
    model, input_ids = sparse(family, recipe), prompts()
    assert torch.equal(generate(model, input_ids), generate(model, input_ids, use_cache=False))


@pytest.mark.parametrize("recipe", [*DROPLESS, "switch"])
@pytest.mark.parametrize("family", TEXT)
def test_padding_on_the_left_changes_no_token(family, recipe):
    model, input_ids = sparse(family, recipe), prompts()
    more = torch.cat([prompts(positions=3), input_ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 5)], dim=1).long()
    if family == "t5":  # positions in T5's encoder are distances: padding stands on the right
        more, mask = more.roll(-3, dims=1), mask.flip(1)
    assert torch.equal(generate(model, more, mask), generate(model, input_ids))


@pytest.mark.parametrize("family", TEXT)
def test_every_step_is_observed_and_its_padding_told(family):
    model, input_ids, seen = sparse(family), prompts(), []
    mask = torch.ones_like(input_ids)
    mask[0, 0 if family != "t5" else -1] = 0
    with observe(model, seen.append):
        generate(model, input_ids, mask)
    tokens = [(one.index, one.routing.num_tokens, int(one.routing.valid_T.sum())) for one in seen]
    layers = 4 if family == "t5" else 2
    if family == "t5":
        assert tokens[:2] == [(0, 10, 9), (1, 10, 9)]
        assert tokens[2:] == [(2, 2, 2), (3, 2, 2)] * 6
    elif family == "lstm":  # no cache: the whole text each time
        assert tokens == [(layer, more, more - 1) for more in range(10, 22, 2) for layer in (0, 1)]
    else:
        assert tokens[:layers] == [(0, 10, 9), (1, 10, 9)]
        assert tokens[layers:] == [(0, 2, 2), (1, 2, 2)] * 5


def test_beams_are_searched_as_without_a_cache():
    model, input_ids = sparse("llama"), prompts()
    with_cache = generate(model, input_ids, num_beams=3)
    assert torch.equal(with_cache, generate(model, input_ids, num_beams=3, use_cache=False))
