"""Routers that know which expert serves a token: fitted to what experts give, or to prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.convert.weights.stack import DenseFFN, ExpertStack
from moesaic.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gate:
    """Logits as a function of tokens: ``W x + b``, or ``V tanh(W x)`` where the router has a hidden layer.

    Attributes:
        weight_ED: W.
        bias_E: b; None where there is none.
        mix_EE: V; None where there is no hidden layer.
    """

    weight_ED: Tensor
    bias_E: Tensor | None = None
    mix_EE: Tensor | None = None

    def logits(self, x_TD: Tensor) -> Tensor:
        """What the router will say."""
        logits_TE = F.linear(x_TD, self.weight_ED, self.bias_E)
        return logits_TE if self.mix_EE is None else F.linear(logits_TE.tanh(), self.mix_EE)

    def with_spread(self, x_TD: Tensor, spread: float) -> Gate:
        """The same choices with logits of another size: over experts, they have this standard deviation on average.

        Experts that are slices of one network count fully, whoever is chosen, if logits lie close together.
        """
        found = float(self.logits(x_TD).std(dim=1).mean()) if len(self.weight_ED) > 1 else 0.0
        factor = spread / found if found > 0 else 1.0
        if self.mix_EE is not None:
            return Gate(weight_ED=self.weight_ED, mix_EE=self.mix_EE * factor)
        bias_E = None if self.bias_E is None else self.bias_E * factor
        return Gate(weight_ED=self.weight_ED * factor, bias_E=bias_E)

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The router's tensors, by name below the layer.

        Raises:
            ConfigError: if the layer's router is not of this form.
        """
        made = {"router.weight": self.weight_ED}
        if "router.mix_EE" in shapes:
            mix_EE = torch.eye(len(self.weight_ED)) if self.mix_EE is None else self.mix_EE
            made["router.mix_EE"] = mix_EE
        if "router.logit_bias_E" in shapes:
            made["router.logit_bias_E"] = torch.zeros(len(self.weight_ED)) if self.bias_E is None else self.bias_E
        if shapes.get("router.weight") != tuple(self.weight_ED.shape):
            raise ConfigError(
                f"A fitted gate needs a router whose logits are one linear map of the token, of shape "
                f"{tuple(self.weight_ED.shape)}, got {shapes.get('router.weight', 'none')}. Use gate='random', or a "
                "recipe as mixtral."
            )
        return made


def has_hidden_layer(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a layer's router is ``V tanh(W x)``, as LLaMA-MoE's and MoEfication's."""
    return "router.mix_EE" in shapes


def zero_gate(num_experts: int, width: int) -> Gate:
    """All experts alike."""
    return Gate(weight_ED=torch.zeros(num_experts, width))


def centers(ffn: DenseFFN, neuron_EF: Tensor) -> Gate:
    """Each expert's row is the mean of its neurons' rows, each of length 1; no data is needed.

    Source: MoEfication, "parameter center"; Qiu et al. 2023, "Emergent Mixture-of-Experts", avg-k.
    """
    first_DF = ffn.up_DF if ffn.gate_DF is None else ffn.gate_DF
    row_FD = F.normalize(first_DF.float().T, dim=1)
    return Gate(weight_ED=row_FD[neuron_EF].mean(dim=1))


def voices(stack: ExpertStack, hidden_by_expert: Sequence[Tensor]) -> Tensor:
    """How long what each expert would give to each token is, over the mean of the token's experts (T, E).

    It is what is lost if the expert is not chosen. Every token counts the same, however long what the network gives it.

    Args:
        stack: the experts.
        hidden_by_expert: for each expert, its neurons' activations (T, F).
    """
    given = [(hidden @ stack.down_EFD[e].float()).norm(dim=1) for e, hidden in enumerate(hidden_by_expert)]
    voice_TE = torch.stack(given, dim=1)
    return voice_TE / voice_TE.mean(dim=1, keepdim=True).clamp_min(1e-30)


def fit_linear(x_TD: Tensor, target_TE: Tensor, *, ridge: float = 1e-2, bias: bool = False) -> Gate:
    """The linear map that tells best how much each expert has to say, relative to the others (ridge regression).

    Only differences between experts choose: the mean over a token's experts is taken off the targets.

    Args:
        x_TD: tokens.
        target_TE: what to predict.
        ridge: penalty, as a part of the mean square of a coordinate of the tokens.
        bias: whether the router adds a number to each logit.
    """
    x_TD, target_TE = x_TD.double(), target_TE.double()
    target_TE = target_TE - target_TE.mean(dim=1, keepdim=True)
    shift_D, shift_E = torch.zeros_like(x_TD[0]), torch.zeros_like(target_TE[0])
    if bias:
        shift_D, shift_E = x_TD.mean(dim=0), target_TE.mean(dim=0)
    apart_TD = x_TD - shift_D
    square = apart_TD.T @ apart_TD
    square.diagonal().add_(max(ridge * float(square.diagonal().mean()), 1e-12))
    weight_DE = torch.linalg.solve(square, apart_TD.T @ (target_TE - shift_E))
    bias_E = shift_E - shift_D @ weight_DE if bias else None
    return Gate(weight_ED=weight_DE.T.float(), bias_E=None if bias_E is None else bias_E.float())


def with_hidden_layer(gate: Gate, x_TD: Tensor) -> Gate:
    """The same choices from ``V tanh(W x)``: V is the identity, and W so small that tanh bends nothing much.

    tanh keeps the order of its inputs, so that the choices are the same whatever its size.
    """
    size = float(gate.logits(x_TD).abs().max())
    return Gate(weight_ED=gate.weight_ED / max(size, 1e-12), mix_EE=torch.eye(len(gate.weight_ED)))


def train_gate(
    x_TD: Tensor, target_TE: Tensor, start: Gate, *, hidden_layer: bool, seed: int, epochs: int = 30
) -> Gate:
    """Train a gate to tell which experts are active, as MoEfication does.

    The loss is the binary cross-entropy between the logits and the targets over their largest; Adam with rate 0.01,
    batches of 512 tokens, from the experts' :func:`centers`. Tokens are divided by their mean length.

    Args:
        x_TD: tokens.
        target_TE: the sum of each expert's active neurons on each token, at least 0.
        start: where W starts; V starts at the identity.
        hidden_layer: ``V tanh(W x)`` instead of ``W x``.
        seed: draws the order of the tokens.
        epochs: times over the tokens.

    Source: thunlp/MoEfication, ``moefication/utils.py``.
    """
    length = float(x_TD.norm(dim=1).mean())
    x_TD, target_TE = x_TD.float() / length, (target_TE / target_TE.max().clamp_min(1e-12)).float()
    draw = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        weight_ED = start.weight_ED.clone().requires_grad_()
        mix_EE = torch.eye(len(weight_ED)).requires_grad_() if hidden_layer else None
        adam = torch.optim.Adam([weight_ED] if mix_EE is None else [weight_ED, mix_EE], lr=0.01)
        for _ in range(epochs):
            for token_M in torch.split(torch.randperm(len(x_TD), generator=draw), 512):
                logits = Gate(weight_ED=weight_ED, mix_EE=mix_EE).logits(x_TD[token_M])
                adam.zero_grad()
                loss = F.binary_cross_entropy_with_logits(logits, target_TE[token_M])
                torch.autograd.backward([loss])
                adam.step()
    return Gate(weight_ED=weight_ED.detach() / length, mix_EE=None if mix_EE is None else mix_EE.detach())


def from_prompts(positive: Sequence[Tensor], negative: Sequence[Tensor | None], scale: float = 1.0) -> Gate:
    """Each expert's row points to the mean of what its prompts give at the layer, less that of its negative prompts.

    Args:
        positive: for each expert, tokens of its prompts (tokens, D).
        negative: the same of prompts that it shall not serve; None for none.
        scale: length of the rows.

    Source: mergekit, ``moe/router.py``, "hidden". (mergekit reads the residual stream before the block; this reads what
    the router will.)
    """
    rows = []
    for wanted, unwanted in zip(positive, negative, strict=True):
        row_D = wanted.float().mean(dim=0)
        if unwanted is not None:
            row_D = row_D - unwanted.float().mean(dim=0)
        rows.append(F.normalize(row_D, dim=0, eps=1e-8) * scale)
    return Gate(weight_ED=torch.stack(rows))
