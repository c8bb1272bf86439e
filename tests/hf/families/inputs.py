"""What a forward of a family takes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.hf.families.sizes import TEXT_IDS

SEQUENCES, POSITIONS = 2, 7


def text(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Two sequences of token ids, the second with two positions of padding at its start."""
    numbers = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (SEQUENCES, POSITIONS), generator=numbers)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :2] = 0
    input_ids[1, :2] = model.config.get_text_config().pad_token_id
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def sequence_to_sequence(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """The same with padding at the end of the source, and a target to go on from."""
    numbers = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, POSITIONS)
    input_ids, decoder_input_ids = torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (2, *shape), generator=numbers)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -2:] = 0
    input_ids[1, -2:] = model.config.pad_token_id
    return {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}


def image(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Two images, of two data sets (vitpose_backbone has an expert for each)."""
    numbers = torch.Generator().manual_seed(seed)
    size = getattr(model.config, "backbone_config", model.config).image_size
    pixel_values = torch.randn(SEQUENCES, 3, *size, generator=numbers)
    return {"pixel_values": pixel_values, "dataset_index": torch.tensor([0, 3])}


def text_with_image(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """The text with an image of 4 x 4 patches in the first sequence, which takes the places of four tokens."""
    inputs = text(model, seed)
    inputs["input_ids"][0, 1:5] = model.config.image_token_id
    vision = model.config.vision_config
    numbers = torch.Generator().manual_seed(seed)
    pixels = torch.randn(16, vision.num_channels * vision.patch_size**2, generator=numbers)
    return inputs | {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def text_with_image_tokens(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """The text with some tokens that are said to be of an image, which go to other experts (ernie4_5_vl_moe)."""
    inputs = text(model, seed)
    of_image = torch.zeros_like(inputs["input_ids"])
    of_image[:, 2:5] = 1
    return inputs | {"moe_mm_token_type_ids": of_image}


def canvas(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """The text and the canvas that is to be refined, which the model would draw at random (diffusion_gemma)."""
    numbers = torch.Generator().manual_seed(seed + 1)
    size = (SEQUENCES, model.config.canvas_length)
    tokens = torch.randint(TEXT_IDS.start, TEXT_IDS.stop, size, generator=numbers)
    return text(model, seed) | {"decoder_input_ids": tokens}


def embedded(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """The text with random vectors in place of its token ids (qwen3_omni_moe's talker, which the thinker feeds)."""
    inputs = text(model, seed)
    numbers = torch.Generator().manual_seed(seed)
    vectors = torch.randn(SEQUENCES, POSITIONS, model.config.hidden_size, generator=numbers)
    return {"inputs_embeds": vectors, "attention_mask": inputs["attention_mask"]}
