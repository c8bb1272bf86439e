"""Models beside the families: those that take another family's experts in, and a second model of a family."""

from __future__ import annotations

from tests.hf.families.family import Family, conditional
from tests.hf.families.inputs import embedded, image

BORROWED: dict[str, Family] = {
    "kimi_k25": conditional("Kimi_K25"),
    "nemotron_h_omni": Family(
        architecture="NemotronH_Omni_Reasoning_V3",
        home="text_config",
        changes={
            "audio_config": None,
            "vision_hidden_size": 32,
            "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 16},
            "text_config": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
        },
    ),
    "nemotron3_5_transcribe": conditional(
        "Nemotron3_5Transcribe",
        word_timestamp_config={"blank_token_id": 96, "num_key_value_heads": 4},
        audio_config={
            "asr_config": {"num_key_value_heads": 4},
            "diarization_config": {
                "head_config": {"audio_hidden_size": 32},
                "audio_config": {"num_key_value_heads": 4},
            },
        },
        text_config={"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    ),
    "qwen3_omni_moe/talker": Family(
        architecture="Qwen3OmniMoeTalkerModel",
        inputs=embedded,
        num_layers_moe=3,
        changes={"shared_expert_intermediate_size": 12},
    ),
    "vitpose": Family(
        architecture="VitPoseForPoseEstimation",
        home="backbone_config",
        inputs=image,
        num_layers_moe=3,
        changes={
            "backbone_config": {"image_size": (24, 16), "patch_size": (8, 8), "part_features": 8, "num_experts": 4}
        },
    ),
}
