"""Phil Wang's soft-moe-pytorch and our recipe `soft-moe` with the same weights: the same outputs and gradients.

The two differ in two conventions; the authors' code (google-research/vmoe) and ours agree in both:

- theirs puts an RMS norm, ``sqrt(D) * unit(x) * gamma``, before everything, so normalised tokens enter the slots. Ours
  uses the length of 1 for the logits only. A model that normalises before the layer, as transformer blocks do, gives
  theirs and ours the same slots.
- theirs has learned gains ``gamma_D`` on tokens and on slots in place of one scale, and starts with logits D times as
  large: both norms bring in a ``sqrt(D)``. So ``scale = D * gamma`` where the gain of the slots is uniform and that of
  the tokens is 1.

Their noise is Gumbel's and asked for at each call, ours is normal, as the authors'; a layer without noise is compared.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic import Context, recipes
from moesaic.experts import SequentialExperts
from moesaic.soft import SoftMoE
from tests.tolerances import assert_close

pytestmark = pytest.mark.parity
peer = pytest.importorskip(
    "soft_moe_pytorch",
    reason="soft-moe-pytorch is not installed: `make parity` installs it and runs this file",
)

D, E, S, NUM_SEQUENCES = 16, 4, 3, 2
lengths = pytest.mark.parametrize("length", [1, 7, 63])
gains = pytest.mark.parametrize("gain", [1.0, 0.25, 1 / D])


def build(*, gain: float = 1.0, stacked: bool = False) -> tuple[SoftMoE, nn.Module]:
    """Ours and theirs with the same weights; ``stacked`` is the recipe as it is, whose experts have no bias."""
    theirs = peer.SoftMoE(D, num_experts=E, num_slots=S, expert_mult=2)
    modules = theirs.experts.experts
    if stacked:
        ours = recipes.get("soft-moe").layer(D, hidden=2 * D, num_experts=E, slots_per_expert=S)
    else:
        ours = SoftMoE(D, SequentialExperts(copy.deepcopy(modules)), slots_per_expert=S)
    with torch.no_grad():
        for e, (up, _, _, down) in enumerate(modules if stacked else ()):
            ours.experts.up_EDF[e] = up.weight.t()
            ours.experts.down_EFD[e] = down.weight.t()
            up.bias.zero_()
            down.bias.zero_()
        theirs.slot_norm.gamma.fill_(gain)
        ours.slot_DES.copy_(theirs.slot_embeds.permute(2, 0, 1))
        ours.scale.fill_(D * gain)
    return ours, theirs


def rms_norm(x: Tensor) -> Tensor:
    return D**0.5 * F.normalize(x, dim=-1)


def run(ours: SoftMoE, x_BPD: Tensor, valid_BP: Tensor | None = None) -> Tensor:
    """Ours on a batch of sequences."""
    num_sequences, length = x_BPD.shape[:2]
    context = Context(sequence_T=torch.arange(num_sequences).repeat_interleave(length))
    y_TD, _ = ours(x_BPD.flatten(0, 1), None if valid_BP is None else valid_BP.flatten(), context)
    return y_TD.view_as(x_BPD)


def slots_seen(experts: nn.Module, call) -> Tensor:
    """What a call gives the experts."""
    seen = []
    handle = experts.register_forward_hook(lambda _module, arguments, _output: seen.append(arguments[0]))
    call()
    handle.remove()
    return seen[0]


@lengths
@gains
@pytest.mark.parametrize("stacked", [False, True], ids=["their experts", "the recipe"])
def test_theirs_is_ours_on_rms_normed_tokens_with_a_scale_of_width_times_their_gain(length, gain, stacked):
    ours, theirs = build(gain=gain, stacked=stacked)
    x_BPD = torch.randn(NUM_SEQUENCES, length, D, requires_grad=True)
    z_BPD = x_BPD.detach().clone().requires_grad_()
    actual, expected = run(ours, rms_norm(x_BPD)), theirs(z_BPD)
    assert float(expected.detach().abs().mean()) > 0.005
    assert_close(actual, expected, "outputs")

    probe_BPD = torch.randn_like(actual)
    actual.backward(probe_BPD)
    expected.backward(probe_BPD)
    assert_close(x_BPD.grad, z_BPD.grad, "gradient of the input")
    assert_close(ours.slot_DES.grad, theirs.slot_embeds.grad.permute(2, 0, 1), "gradient of the slots")
    # scale = D * gamma, and all D entries of gamma move together: each carries 1 / D of it.
    assert_close(ours.scale.grad, theirs.slot_norm.gamma.grad.mean(), "gradient of the scale")
    for e, module in enumerate(theirs.experts.experts):
        if stacked:
            assert_close(ours.experts.up_EDF.grad[e], module[0].weight.grad.t(), "gradient of up")
            assert_close(ours.experts.down_EFD.grad[e], module[3].weight.grad.t(), "gradient of down")
            continue
        for mine, other in zip(ours.experts[e].parameters(), module.parameters(), strict=True):
            assert_close(mine.grad, other.grad, f"gradient of expert {e}")


@pytest.mark.parametrize("token_length", [0.5, 3.0])
def test_on_tokens_as_they_are_their_slots_are_ours_times_sqrt_width_over_the_length_of_a_token(token_length):
    """So the mixtures over tokens and over slots are the same, and only what is mixed differs."""
    ours, theirs = build()
    x_BPD = token_length * F.normalize(torch.randn(NUM_SEQUENCES, 7, D), dim=-1)
    our_slots = slots_seen(ours.experts, lambda: run(ours, x_BPD)).view(E, NUM_SEQUENCES, S, D).transpose(0, 1)
    their_slots = slots_seen(theirs.experts, lambda: theirs(x_BPD))
    assert_close(our_slots * D**0.5 / token_length, their_slots, "slots")
    assert not torch.allclose(run(ours, x_BPD), theirs(x_BPD), atol=1e-3)


def test_padding_gets_zeros_from_ours_and_the_mean_of_all_slots_from_theirs():
    ours, theirs = build()
    x_BPD = torch.randn(NUM_SEQUENCES, 7, D)
    valid_BP = torch.arange(7) < torch.tensor([[4], [6]])
    actual, expected = run(ours, rms_norm(x_BPD), valid_BP), theirs(x_BPD, mask=valid_BP)
    assert_close(actual[valid_BP], expected[valid_BP], "outputs of tokens")
    assert (actual[~valid_BP] == 0).all()
    worked = []
    handle = theirs.experts.register_forward_hook(lambda _module, _arguments, output: worked.append(output))
    theirs(x_BPD, mask=valid_BP)
    handle.remove()
    mean_BPD = worked[0].mean(dim=(1, 2))[:, None].expand_as(x_BPD)
    assert_close(expected[~valid_BP], mean_BPD[~valid_BP], "outputs of padding")


def test_both_start_from_their_own_scale_theirs_the_width_and_ours_1():
    theirs = peer.SoftMoE(D, num_experts=E, num_slots=S)
    ours = recipes.get("soft-moe").layer(D, hidden=2 * D, num_experts=E, slots_per_expert=S)
    assert ours.scale == 1
    assert theirs.norm.scale * theirs.slot_norm.scale == D
    assert (theirs.norm.gamma == 1).all()
    assert (theirs.slot_norm.gamma == 1).all()
