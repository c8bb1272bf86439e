"""Losses on the weights of routers that give each token as many experts as they like."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.routing import Routing, missing_extra


def l1_loss(routing: Routing, *, load_weighted: bool = True) -> Tensor:
    """Shrink the weights of ReLU routing: ``E / (k T^2) * sum_e (sum_t g_te) n_e`` over T tokens.

    ``n_e`` is the number of tokens for which expert e is active (no gradient), k the target of active experts per
    token: busy experts are pushed harder. Where every expert is active for ``k T / E`` tokens, this is the plain L1
    norm, the mean over tokens of ``sum_e g_te``. It has no value of balance, as it grows with the weights.

    Args:
        routing: of a :class:`~moesaic.routers.ReLURouter`.
        load_weighted: False takes the plain L1 norm, which balances nothing.
    Raises:
        ConfigError: if a load-weighted loss finds no target in ``routing.extras["top_k"]``.

    Source: Wang et al. 2024, ReMoE, L1 regularization with load balancing, and the authors' code.
    """
    if not load_weighted:
        return routing.importance_E.sum() / routing.valid_T.sum().clamp_min(1)
    if "top_k" not in routing.extras:
        raise missing_extra("top_k", "The load-weighted L1 loss", "ReLURouter")
    return active_share_loss(routing) / routing.extras["top_k"]


def active_share_loss(routing: Routing) -> Tensor:
    """Push down the weights of experts that are often active: ``E * sum_e G_e A_e``.

    ``G_e`` is the mean over tokens of expert e's weight, 0 where it is inactive, and ``A_e`` the share of tokens for
    which it is active (no gradient). Where all experts are used alike and a token's weights add up to 1, this is the
    number of experts per token: 1 for balanced top-1, E for a dense mixture. While every token has every expert it is
    that constant and pushes nothing.

    Source: the authors' code of EvoMoE (Nie et al. 2021), ``E^2 * mean_e(G_e A_e)``.
    """
    num_tokens = routing.valid_T.sum().clamp_min(1)
    active_E = routing.load_E.to(routing.weight_N.dtype) / num_tokens
    return routing.num_experts * (routing.importance_E / num_tokens * active_E).sum()
