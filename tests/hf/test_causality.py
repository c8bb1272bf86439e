"""In a causal model a prediction depends on later tokens exactly where the recipe says that it does."""

import warnings

import pytest
import torch

from moesaic import recipes
from moesaic.hf import domains, sparsify
from tests.hf.tiny import OPTIONS, build

EXPECTED = {"causal": (False, False), "in evaluation": (True, False), "never": (True, True)}
# Room for all: what a capacity drops depends on the rest of the batch by its nature.
ROOMY = ("capacity_factor", "eval_capacity_factor")


@pytest.mark.parametrize("recipe", recipes.names())
def test_a_prediction_looks_ahead_exactly_where_the_recipe_says_so(recipe):
    published = recipes.get(recipe).options
    roomy = {} if recipe == "expert-choice" else {name: 50.0 for name in ROOMY if name in published}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = sparsify(build("llama"), recipe, **OPTIONS[recipe] | roomy)
    input_ids = torch.randint(model.config.vocab_size, (2, 12))
    other_ids = input_ids.clone()
    other_ids[:, 8:] = (other_ids[:, 8:] + 7) % model.config.vocab_size
    found = []
    for training in (True, False):
        model.train(training)
        logits = []
        for ids in (input_ids, other_ids):
            torch.manual_seed(1)
            with domains(0), torch.no_grad():
                logits.append(model(input_ids=ids).logits[:, :8])
        found.append(float((logits[0] - logits[1]).abs().max()) > 1e-5)
    assert tuple(found) == EXPECTED[recipes.get(recipe).causality]
