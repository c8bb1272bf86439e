"""The whole experiment: convert, train on, measure before and after, make smaller. Each result is kept as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moesaic.core.errors import ConfigError
from moesaic.data.corpus import Corpus, Document
from moesaic.data.split import fit
from moesaic.lab.pretrained.documents import DocumentBits, bits_of_documents, bits_per_byte
from moesaic.lab.pretrained.going_on import autocast, go_on
from moesaic.lab.pretrained.plan import Plan, Story, this_machine
from moesaic.lab.pretrained.questions import SETS, answered_rightly, read_questions
from moesaic.lab.pretrained.starts import ALONE, DENSE, FASTER, MIXTURES, PAIRED, WHOLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from moesaic.convert.proof.receipt import Receipt
    from moesaic.data import TokenBlocks

FIGURES = "figures.json"
MODELS = (DENSE, *MIXTURES, DENSE + FASTER, ALONE + FASTER)
"""What is trained. The last two tell whether the first ones were as they are for their learning rate alone."""
Say = Callable[[str], None]


class Experiment:
    """Everything that its stages share.

    Args:
        source: folder of the dense model.
        out: where models and figures go; what is there already is not made again.
        plan: the numbers; None for those of the figures that are there, or else the default ones.
        corpus: what is trained on and held out; None for the text that ships with Moesaic.
        questions: folder with question sets; None to ask none.
        models: which to train; by default all of :data:`MODELS`.
        say: told what happens, in words.
    Raises:
        ConfigError: if figures that are there have another plan, or a model is unknown.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        *,
        plan: Plan | None = None,
        corpus: Corpus | None = None,
        questions: Path | None = None,
        models: Sequence[str] | None = None,
        say: Say = lambda _text: None,
    ) -> None:
        from moesaic.data import TokenBlocks, load_corpus, load_tokenizer

        self.source, self.out, self.say, self.question_folder = source, out, say, questions
        self.models = tuple(models or MODELS)
        for name in self.models:
            if name not in MODELS:
                raise ConfigError(f"models must be of {'; '.join(MODELS)}, got {name!r}. Pick among them.")
        self.story = self._story(plan)
        corpus = corpus or load_corpus("builtin")
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(source)
        self.blocks: TokenBlocks = TokenBlocks(corpus.train, self.tokenizer, self.plan.context)
        self.looked_at = held_out(corpus, self.plan.look_bytes)
        self.documents = held_out(corpus, self.plan.last_bytes)
        self.story = replace(
            self.story,
            looked_at=tuple((one.domain, one.num_bytes) for one in self.looked_at),
            documents=tuple((one.domain, one.num_bytes) for one in self.documents),
        )

    @property
    def plan(self) -> Plan:
        """The numbers."""
        return self.story.plan

    def _story(self, plan: Plan | None) -> Story:
        path = self.out / FIGURES
        if not path.exists():
            return Story(plan=plan or Plan(), source=self.source.name, machine=this_machine())
        found = Story.load(path)
        if plan is not None and plan != found.plan:
            raise ConfigError(
                f"the figures in {self.out} are of {found.plan}, got {plan}. Give the same numbers, or another folder."
            )
        return found

    def run(self) -> Story:
        """Go through all stages; those that the figures have are not run again.

        Raises:
            DataError: if question sets were asked for and cannot be read.
        """
        self.whole()
        for name in self.models:
            self.train(name)
        if self.question_folder is None:
            self.say("No questions: no folder with question sets was named.")
        if PAIRED in self.models:
            self.shrink()
        return self.story

    # --- stages -------------------------------------------------------------------------------------------------

    def whole(self) -> None:
        """Upcycle and split every layer of the dense model, and keep the receipts."""
        for name, make in WHOLE.items():
            if name not in self.story.receipts:
                self.say(f"{name}: converting")
                self._receipt(name, make(load(self.source), self.plan).receipt)

    def train(self, name: str) -> None:
        """Convert a model, measure it, train it on, measure it again."""
        after = f"{name}, trained"
        if self._is_measured(after):
            return
        final = self.out / "models" / _file(after)
        if final.is_dir():
            self._measure(after, load(final))
            return
        kind = name.removesuffix(FASTER)
        model = self._start(kind)
        # Upcycled models are the dense one at first, to the last digits: the receipt says so.
        if kind == DENSE or self.story.receipts[kind]["promised"] is None:
            self._measure(kind, model)
        curve: list[Any] = []

        def look(step: int) -> None:
            bits = self._bits(model, self.looked_at)
            curve.append([step * self.plan.tokens_per_step, bits_per_byte(bits), [one.bits for one in bits]])
            self._keep("looks", name, curve)
            self.say(f"{name}, step {step}: {curve[-1][1]['mean']:.4f} bits per byte")

        def said(step: int, loss: float) -> None:
            self.say(f"{name}, step {step} of {self.plan.steps}: loss {loss:.4f}")

        plan = replace(self.plan, lr=2 * self.plan.lr) if name.endswith(FASTER) else self.plan
        speed = go_on(model, self.blocks, plan, look=look, say=said)
        self._keep("sizes", name, sizes(model) | {"tokens_per_s": speed})
        self._save_model(model, final)
        self._measure(after, model)

    def shrink(self) -> None:
        """Prune and merge the mixture with a router to half its experts, before and after its training."""
        from moesaic.convert.shrink.merge import merge_experts
        from moesaic.convert.shrink.prune import prune_experts

        half = self.plan.num_experts // 2
        for when in (PAIRED, f"{PAIRED}, trained"):
            wanted = [f"{when}, {how}" for how in ("whole", "pruned", "merged")]
            if all(name in self.story.smaller for name in wanted):
                continue
            folder = self.out / "models" / _file(when)
            model = load(folder) if folder.is_dir() else self._start(PAIRED)
            text = self._calibration()
            self._shrunk(wanted[0], model)
            self._shrunk(wanted[1], prune_experts(model, half, batches=text, probe=None).model)
            self._shrunk(wanted[2], merge_experts(model, half, batches=text, align=False, probe=None).model)

    # --- parts --------------------------------------------------------------------------------------------------

    def _start(self, name: str) -> PreTrainedModel:
        model = load(self.source)
        if name == DENSE:
            return model
        self.say(f"{name}: converting")
        converted = MIXTURES[name](model, self._calibration(), self.plan)
        assert converted.model is not None
        self._receipt(name, converted.receipt)
        return converted.model

    def _receipt(self, name: str, receipt: Receipt) -> None:
        names = ("largest_logit_difference", "largest_logit", "promised", "probe_tokens", "notes")
        told = {"line": str(receipt)} | {one: getattr(receipt, one) for one in names}
        self._keep("receipts", name, told | {"notes": list(receipt.notes)})
        self.say(f"{name}: {receipt}")

    def _shrunk(self, name: str, model: PreTrainedModel | None) -> None:
        assert model is not None
        bits = self._bits(model, self.looked_at)
        self._keep("smaller", name, tuple(one.bits for one in bits))
        self.say(f"{name}: {bits_per_byte(bits)['mean']:.4f} bits per byte")

    def _is_measured(self, name: str) -> bool:
        asked = [one for one in self.story.answers.values() if name in one]
        return name in self.story.bits and (not self._asks(name) or len(asked) == len(SETS))

    def _asks(self, name: str) -> bool:
        return self.question_folder is not None and FASTER not in name

    def _measure(self, name: str, model: PreTrainedModel) -> None:
        if name not in self.story.bits:
            bits = self._bits(model, self.documents)
            self._keep("bits", name, tuple(one.bits for one in bits))
            self.say(f"{name}: {bits_per_byte(bits)['mean']:.4f} bits per byte")
        for kind in SETS if self._asks(name) else ():
            known: Mapping[str, str] = self.story.answers.get(kind, {})
            if name not in known:
                assert self.question_folder is not None
                drawn = read_questions(self.question_folder, kind, count=self.plan.questions, seed=self.plan.seed)
                right = answered_rightly(model, self.tokenizer, drawn, autocast=autocast(self.plan))
                self._keep("answers", kind, {**known, name: "".join(str(int(one)) for one in right)})
                self.say(f"{name}: {sum(right)} of {len(right)} of {kind}")

    def _bits(self, model: PreTrainedModel, documents: Sequence[Document]) -> tuple[DocumentBits, ...]:
        plan = self.plan
        return bits_of_documents(
            model,
            self.tokenizer,
            documents,
            context=plan.context,
            batch_size=plan.batch_size,
            autocast=autocast(plan),
        )

    def _calibration(self) -> list[dict[str, Any]]:
        """Sequences spread over the training text, as batches of one."""
        count = min(self.plan.calibration_blocks, len(self.blocks))
        chosen = [self.blocks[place * len(self.blocks) // count] for place in range(count)]
        return [{name: one[name][None] for name in ("input_ids", "attention_mask")} for one in chosen]

    def _save_model(self, model: PreTrainedModel, folder: Path) -> None:
        from moesaic.core.checkpoint import replacing

        with replacing(folder) as partial:
            model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)

    def _keep(self, what: str, name: str, value: Any) -> None:
        self.story = self.story.with_(what, name, value)
        self.story.save(self.out / FIGURES)


def held_out(corpus: Corpus, size_bytes: int) -> tuple[Document, ...]:
    """Whole held-out documents, of each domain at most so many bytes but one document at least."""
    chosen: list[Document] = []
    for domain in corpus.domains:
        mine = [document for document in corpus.held_out if document.domain == domain]
        chosen += fit(mine, size_bytes=size_bytes, seed=0) or mine[:1]
    return tuple(chosen)


def load(folder: Path) -> PreTrainedModel:
    """A model with its weights in float32."""
    from moesaic.train.load import load_trained

    model = load_trained(folder).model
    torch.nn.Module.float(model)
    return model


def sizes(model: PreTrainedModel) -> dict[str, float]:
    """Parameters in all, and those that a token meets."""
    from moesaic.hf import active_params

    return {"total_params": sum(one.numel() for one in model.parameters()), "active_params": active_params(model)}


def _file(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")
