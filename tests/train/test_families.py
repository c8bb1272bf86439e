"""Each backbone trains, is evaluated on all of its text, is read back and writes."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSeq2SeqLM

from moesaic.data import PrefixBlocks, load_corpus, load_tokenizer
from moesaic.hf import active_params, is_sparse, moe_layers
from moesaic.train import Evaluator, history, load_trained, train
from moesaic.train.build import build_model, training_arguments
from moesaic.train.config import BACKBONES
from moesaic.train.trainer import MoeTrainer
from tests.hf.test_forward import sparse
from tests.hf.tiny import assert_equal_tensors


def settings(family):
    return {"backbone": family, "heads": None if family == "lstm" else 2}


@pytest.mark.parametrize("family", BACKBONES)
def test_a_pair_of_each_backbone_learns_and_comes_back(tiny, family):
    config = tiny(twin=True, steps=40, save_every=40, eval_every=40, lr=1e-2, **settings(family))
    summary = train(config)
    for kind in ("moe", "dense"):
        auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
        loaded = auto.from_pretrained(config.out / kind / "model")
        again = load_trained(config.out / kind)
        assert is_sparse(loaded) == (kind == "moe")
        assert active_params(loaded) == summary[kind]["active_params"]
        inputs = {"input_ids": torch.randint(257, (2, 12)), "labels": torch.randint(257, (2, 12))}
        assert torch.equal(loaded(**inputs).logits, again.model(**inputs).logits)
        # A guess among all bytes costs 8.
        assert summary[kind]["bits_per_byte"]["mean"] < 7
        written = loaded.generate(inputs["input_ids"][:, :5], max_new_tokens=7, min_new_tokens=7, do_sample=False)
        assert written.shape == (2, 8 if family == "t5" else 12)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_bits_per_byte_of_an_encoder_decoder_are_of_all_the_text(tiny, text, tokenizer, batch_size):
    corpus = load_corpus(text)
    own = load_tokenizer(tokenizer, corpus)
    blocks = PrefixBlocks(corpus.held_out, own, 24)
    model = build_model("moe", tiny(backbone="t5"), own).eval()
    bits = dict.fromkeys(blocks.domains, 0.0)
    for domain in blocks.domains:
        documents = [document for document in corpus.held_out if document.domain == domain]
        ids = [id_ for it in documents for id_ in (*own.encode(it.text, add_special_tokens=False), own.eos_token_id)]
        for start in range(0, len(ids), 12):
            prefix = torch.tensor([[own.bos_token_id, *ids[max(0, start - 11) : start]]])
            target = torch.tensor([ids[start : start + 12]])
            fed = torch.cat([torch.tensor([[own.eos_token_id]]), target[:, :-1]], dim=1)
            with torch.no_grad():
                logits = model(input_ids=prefix, decoder_input_ids=fed).logits
            bits[domain] += float(F.cross_entropy(logits[0].double(), target[0], reduction="sum")) / math.log(2)
        bits[domain] /= sum(len(document.text.encode()) for document in documents)
    result = Evaluator(blocks, batch_size=batch_size)(model).bits_per_byte
    assert {domain: result[domain] for domain in bits} == pytest.approx(bits, rel=1e-5)


def test_gradient_accumulation_is_a_mean_for_t5_too(tiny):
    off = {"aux_coefficients": {"switch": 0.0}, "clip": 1e9, "log_every": 1, **settings("t5")}
    firsts = []
    for name, sizes in (("whole", (4, 1)), ("cut", (2, 2))):
        config = tiny(name, batch_size=sizes[0], grad_accumulation=sizes[1], **off)
        train(config)
        firsts.append(next(line for line in history.read(config.out / "history.jsonl") if line["kind"] == "train"))
    whole, cut = firsts
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_a_state_space_does_not_decay(tiny):
    config = tiny(backbone="jamba")
    model = build_model("moe", config, load_tokenizer("bytes"))
    trainer = MoeTrainer(model=model, args=training_arguments(config, config.out), eval_dataset=[])
    decayed = set(trainer.get_decay_parameter_names(model))
    for name, parameter in model.named_parameters():
        assert (name in decayed) == (parameter.ndim > 1 and not name.endswith("A_log")), name


class Images(torch.utils.data.Dataset):
    """Bright on the left, bright on the right, or dim: three classes that a few patches tell."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(count) % 3
        self.images = 0.1 * torch.randn(count, 3, 8, 8, generator=generator)
        self.images[self.labels == 0, :, :, :4] += 1
        self.images[self.labels == 1, :, :, 4:] += 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


@pytest.mark.parametrize("recipe", ["switch", "mixtral", "deepseek-v3"])
def test_a_vision_transformer_trains_on_its_patches_and_comes_back(tiny, recipe):
    config = tiny(steps=40, batch_size=6, grad_accumulation=1, lr=1e-2, save_every=20, log_every=10)
    model, images = sparse("vit", recipe), Images(60)
    seen = []
    for layer in moe_layers(model).values():
        layer.register_forward_hook(lambda _module, _arguments, output: seen.append(output[1].num_tokens))
    args = training_arguments(config, config.out)
    args.eval_strategy = "no"
    MoeTrainer(model=model, args=args, train_dataset=images).train()
    assert set(seen) == {6 * 5}  # four patches and the class token of each image
    model.eval()
    assert (model(images.images).logits.argmax(-1) == images.labels).float().mean() > 0.9
    loaded = AutoModelForImageClassification.from_pretrained(config.out / "checkpoint-40")
    assert_equal_tensors(model.state_dict(), loaded.state_dict())
    assert torch.equal(model(images.images).logits, loaded(images.images).logits)
