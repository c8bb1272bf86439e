"""From a config to an untrained model and to transformers' arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments, set_seed

from moesaic.core.errors import ConfigError
from moesaic.routers import DomainHashRouter
from moesaic.train.backbone import Backbone, twin_hidden
from moesaic.train.config import TrainConfig
from moesaic.train.start import first_kind, first_model, freeze

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def training_arguments(config: TrainConfig, output: Path) -> TrainingArguments:
    """Give transformers' arguments for a config, set to spend no time on what Moesaic does itself."""
    on_cuda = torch.cuda.is_available()
    is_bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and on_cuda)
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accumulation,
        learning_rate=config.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=config.warmup or 0,
        weight_decay=config.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=config.clip,
        optim="adamw_torch_fused",
        bf16=is_bfloat16,
        use_cpu=not on_cuda,
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.save_every or 0,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_num_workers=0,
        dataloader_pin_memory=on_cuda,
        remove_unused_columns=False,
        # Experts without rows have gradients of 0, not none: there is nothing to search for.
        ddp_find_unused_parameters=False,
    )
    # More GPUs are used through torchrun, one process each; nn.DataParallel would copy the routers every step.
    args._n_gpu = min(1, args.n_gpu)
    return args


def check_models(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, domains: Sequence[str]) -> None:
    """Build all of a run's models without memory, so that what cannot be built is refused before a file is touched.

    Args:
        config: of the run.
        tokenizer: of its models.
        domains: of its text.
    Raises:
        ConfigError: if the recipe, the backbone or the twin refuses its numbers, or the recipe has experts for fewer
            domains than the text has; if the model to go on from does not fit the other settings.
    """
    if config.init is not None:
        first_kind(config)
        return
    with torch.device("meta"):
        for kind in ("moe", "dense") if config.twin else ("moe",):
            _check_domains(build_model(kind, config, tokenizer), config.recipe, domains)


def _check_domains(model: PreTrainedModel, recipe: str, domains: Sequence[str]) -> None:
    for router in model.modules():
        # Experts of one domain are for all text; those of more domains than the text has stay idle.
        if isinstance(router, DomainHashRouter) and 1 < router.num_domains < len(domains):
            raise ConfigError(
                f"recipe {recipe} needs experts for each of the text's {len(domains)} domains ({', '.join(domains)}), "
                f"got num_domains={router.num_domains}. Raise num_domains, or give 1 to tell no domains apart."
            )


def build_model(kind: str, config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build the untrained MoE, or its dense twin of at least as many active parameters; or read the one to go on from.

    What is not to be trained is frozen.
    """
    model = _build(kind, config, tokenizer) if config.init is None else first_model(config)
    freeze(model, config.trainable)
    return model


def _build(kind: str, config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from moesaic.hf import active_params, sparsify

    backbone = Backbone(
        family=config.backbone,
        width=config.width,
        layers=config.layers,
        heads=config.heads or 1,
        hidden=config.hidden or 2 * config.width,
        context=config.context,
        vocab_size=len(tokenizer),
        end_token=int(tokenizer.eos_token_id),
        init_std=config.init_std or 0.02,
    )
    arguments: dict[str, Any] = {
        "hidden": backbone.hidden,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "layers": config.sparse_layers,
        "init_std": backbone.init_std,
        "aux_coefficients": config.aux_coefficients,
        "balance": config.balance,
        **config.options,
    }
    sparse: PreTrainedModel = sparsify(backbone.build(), config.recipe, **arguments)
    if kind == "moe":
        return sparse
    set_seed(config.seed)
    return replace(backbone, hidden=twin_hidden(backbone, active_params(sparse))).build()
