"""The experiment in a minute, on a tiny random model: to see that all stages run, not to learn from its figures."""

from __future__ import annotations

from pathlib import Path

from moesaic.data import Corpus, load_corpus
from moesaic.data.split import fit
from moesaic.lab.pretrained.plan import Plan

QUICK = Plan(
    layers=(1,),
    num_experts=4,
    split_top_k=2,
    context=32,
    batch_size=4,
    steps=4,
    lr=1e-3,
    warmup=1,
    dtype="float32",
    looks=3,
    look_bytes=400,
    last_bytes=1000,
    calibration_blocks=4,
    questions=3,
)
"""Numbers for it."""


def little_text() -> Corpus:
    """A few pages of each domain of the text that ships with Moesaic."""
    whole = load_corpus("builtin")
    train = tuple(
        document
        for domain in whole.domains
        for document in fit([one for one in whole.train if one.domain == domain], size_bytes=20_000, seed=0)
    )
    return Corpus(train=train, held_out=whole.held_out, name="a little of builtin")


def tiny_model(folder: Path) -> Path:
    """Write a Llama of two narrow layers on bytes, with random weights, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moesaic.data import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    end = int(tokenizer.eos_token_id)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        # Large enough for experts to matter to the predictions.
        initializer_range=0.2,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
