"""Published designs by name. Reading this folder in the order of the table is reading the history of the field."""

from __future__ import annotations

from moesaic.core.errors import ConfigError
from moesaic.recipes.arctic import ARCTIC
from moesaic.recipes.attention import ATTENTION
from moesaic.recipes.base import BASE
from moesaic.recipes.cosine import COSINE
from moesaic.recipes.dbrx import DBRX
from moesaic.recipes.deepseek_moe import DEEPSEEK_MOE
from moesaic.recipes.deepseek_v2 import DEEPSEEK_V2
from moesaic.recipes.deepseek_v3 import DEEPSEEK_V3
from moesaic.recipes.dense import DENSE
from moesaic.recipes.ds_moe import DS_MOE
from moesaic.recipes.evo_moe import EVO_MOE
from moesaic.recipes.expert_choice import EXPERT_CHOICE
from moesaic.recipes.glam import GLAM
from moesaic.recipes.gpt_oss import GPT_OSS
from moesaic.recipes.grok_1 import GROK_1
from moesaic.recipes.gshard import GSHARD
from moesaic.recipes.hash import HASH
from moesaic.recipes.hierarchical_2017 import HIERARCHICAL_2017
from moesaic.recipes.jamba import JAMBA
from moesaic.recipes.llama4 import LLAMA4
from moesaic.recipes.llama_moe import LLAMA_MOE
from moesaic.recipes.lora_moe import LORA_MOE
from moesaic.recipes.lory import LORY
from moesaic.recipes.minimax_01 import MINIMAX_01
from moesaic.recipes.mixlora import MIXLORA
from moesaic.recipes.mixtral import MIXTRAL
from moesaic.recipes.mod import MOD
from moesaic.recipes.moe_plus_plus import MOE_PLUS_PLUS
from moesaic.recipes.mole import MOLE
from moesaic.recipes.olmoe import OLMOE
from moesaic.recipes.openmoe import OPENMOE
from moesaic.recipes.pangu_sigma import PANGU_SIGMA
from moesaic.recipes.pr_moe import PR_MOE
from moesaic.recipes.qwen1_5_moe import QWEN1_5_MOE
from moesaic.recipes.qwen3_moe import QWEN3_MOE
from moesaic.recipes.recipe import Recipe
from moesaic.recipes.reinforce import REINFORCE
from moesaic.recipes.relu import RELU
from moesaic.recipes.residual_moe import RESIDUAL_MOE
from moesaic.recipes.shazeer_2017 import SHAZEER_2017
from moesaic.recipes.sinkhorn import SINKHORN
from moesaic.recipes.skywork import SKYWORK
from moesaic.recipes.smear import SMEAR
from moesaic.recipes.soft_moe import SOFT_MOE
from moesaic.recipes.st_moe import ST_MOE
from moesaic.recipes.strictly_balanced_2017 import STRICTLY_BALANCED_2017
from moesaic.recipes.switch import SWITCH
from moesaic.recipes.thor import THOR
from moesaic.recipes.top_p import TOP_P

__all__ = ["Recipe", "get", "names"]

_RECIPES = {
    recipe.name: recipe
    for recipe in (
        DENSE,
        SHAZEER_2017,
        HIERARCHICAL_2017,
        STRICTLY_BALANCED_2017,
        GSHARD,
        SWITCH,
        BASE,
        HASH,
        THOR,
        GLAM,
        EVO_MOE,
        RESIDUAL_MOE,
        PR_MOE,
        SINKHORN,
        REINFORCE,
        EXPERT_CHOICE,
        ST_MOE,
        COSINE,
        PANGU_SIGMA,
        SMEAR,
        SOFT_MOE,
        LORA_MOE,
        MIXTRAL,
        DEEPSEEK_MOE,
        OPENMOE,
        GROK_1,
        TOP_P,
        DBRX,
        QWEN1_5_MOE,
        JAMBA,
        MOD,
        DS_MOE,
        MOLE,
        MIXLORA,
        ARCTIC,
        DEEPSEEK_V2,
        LORY,
        ATTENTION,
        SKYWORK,
        LLAMA_MOE,
        OLMOE,
        MOE_PLUS_PLUS,
        RELU,
        DEEPSEEK_V3,
        MINIMAX_01,
        LLAMA4,
        QWEN3_MOE,
        GPT_OSS,
    )
}


def names() -> list[str]:
    """The names of all recipes, oldest first."""
    return list(_RECIPES)


def get(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in _RECIPES:
        raise ConfigError(
            f"recipe must be one of {', '.join(_RECIPES)}, got {name!r}. List them with `moesaic recipes`."
        )
    return _RECIPES[name]
