"""Loss-free balancing in a model: the bias is there where it is asked for, saved and loaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic import ConfigError, recipes
from moesaic.hf import controllers, sparsify
from moesaic.hf.layers import is_sparse
from moesaic.hf.register import register
from moesaic.routers import TokenChoiceRouter
from tests.hf.tiny import OPTIONS, assert_equal_tensors, batch, build
from tests.laws.settings import plain

WITH_BIAS = [
    name for name in recipes.names() if isinstance(getattr(plain(name).layer(), "router", None), TokenChoiceRouter)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", WITH_BIAS)
def test_a_bias_goes_with_every_top_k_router_and_is_saved_with_it(recipe, dtype, tmp_path):
    register()
    model = sparsify(build("llama").to(dtype), recipe, **OPTIONS[recipe], balance={"switch": 0.1, "bias": 0.02})
    steered = controllers(model)
    assert [one.controller.rate for one in steered] == [0.02, 0.02]
    for one in steered:
        one.controller.step(torch.tensor([9, 1, 0, 2]).repeat(one.controller.router.num_experts // 4))
    biases = {name: value for name, value in model.state_dict().items() if name.endswith("router.bias_E")}
    assert len(biases) == 2
    assert all(value.dtype == torch.float32 and bool(value.any()) for value in biases.values())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_equal_tensors(model.state_dict(), loaded.state_dict())
    assert [one.controller.rate for one in controllers(loaded)] == [0.02, 0.02]
    if dtype is torch.float32:  # a cast of Llama rounds its rotary frequencies, loading does not
        inputs = batch("llama")
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


def test_a_bias_is_refused_where_tokens_do_not_choose_and_the_model_stays_dense():
    dense = build("llama")
    with pytest.raises(ConfigError, match=r"^Loss-free balancing adds a bias .*, got HashRouter, which has no place"):
        sparsify(dense, "hash", **OPTIONS["hash"], balance={"bias": 0.02})
    assert not is_sparse(dense)
