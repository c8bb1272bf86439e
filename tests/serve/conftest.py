"""Tiny models behind a real server on a free port of this machine."""

from __future__ import annotations

import httpx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import moesaic as mz
from moesaic.hf import LstmConfig, LstmForCausalLM
from moesaic.serve import Settings, prepare, running
from tests.hf.tiny import build

HOSTILE = ("<img src=x onerror=window.hacked=1>", "<script>window.hacked=1</script>", "\u202egnp.exe")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('A user must speak first') }}{% endif %}"
    "assistant:"
)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}


def tokenizer(*, chat=False):
    """Bytes, and a few tokens that would be markup."""
    made = mz.data.load_tokenizer("bytes")
    made.add_tokens(list(HOSTILE))
    if chat:
        made.chat_template = TEMPLATE
    return made


def plain(family):
    """A model that has not been prepared for serving, with weights large enough that experts differ."""
    torch.manual_seed(0)
    size = len(tokenizer())
    if family == "mixtral":
        config = MixtralConfig(vocab_size=size, num_local_experts=4, num_experts_per_tok=2, **SIZES)
        return MixtralForCausalLM(config).eval()
    if family == "gpt2":
        config = GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3)
        dense = GPT2LMHeadModel(config)
    elif family == "lstm":
        config = LstmConfig(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, initializer_range=0.3
        )
        dense = LstmForCausalLM(config)
    elif family == "jamba":
        dense = build("jamba", vocab_size=size)
    else:
        dense = LlamaForCausalLM(LlamaConfig(vocab_size=size, **SIZES))
    return mz.sparsify(dense, "mixtral", num_experts=4, top_k=2).eval()


def make(family="llama", *, chat=False, ends=False):
    """A model that is ready to be served; unless ``ends``, no token ends its answers."""
    found = prepare(plain(family), tokenizer(chat=chat), name="tiny")
    return found if ends else mz.serve.ServedModel(**{**fields(found), "ends": frozenset()})


def fields(found):
    return {name: getattr(found, name) for name in found.__dataclass_fields__}


@pytest.fixture(scope="session")
def tiny():
    return make(chat=True)


@pytest.fixture(scope="session")
def url(tiny):
    """The address of a service."""
    with running(tiny, Settings(port=0, max_tokens=200)) as address:
        yield address


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=30) as made:
        yield made
