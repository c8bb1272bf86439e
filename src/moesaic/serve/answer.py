"""One answer while it is written: each turn reads what is new and draws one token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TemperatureLogitsWarper, TopPLogitsWarper

from moesaic.hf import Seen, intervene, observe
from moesaic.serve.events import Ask, Event, Finished, Piece, PromptRead, Routed, Token
from moesaic.serve.heard import Heard
from moesaic.serve.model import ServedModel, keeps_cache, takes_logits_to_keep
from moesaic.serve.refusal import FAILED, RefusedError
from moesaic.serve.seen import routed_tokens
from moesaic.serve.text import StopText, TextStream


class Answer:
    """Writes one answer, a token for each call of :meth:`advance`, so that several can be written in turns.

    Args:
        served: the model.
        ask: what it is asked for.
        heard: gathers what experts took.
        emit: called with each event, in the thread that calls :meth:`advance`.
    """

    def __init__(self, served: ServedModel, ask: Ask, heard: Heard, emit: Callable[[Event], None]) -> None:
        self._served, self._ask, self._heard, self._emit = served, ask, heard, emit
        self._text, self._stop = TextStream(served.decode), StopText(ask.stops)
        self._generator = torch.Generator().manual_seed(ask.seed)
        self._cache = None
        if keeps_cache(served.model):
            self._cache = DynamicCache(config=served.model.config.get_text_config())
        self._read: list[int] = []
        self._last: int | None = None
        self._written = 0
        self._routed: list[Routed] = []

    def advance(self) -> bool:
        """Write one more token; True when the answer is complete.

        Raises:
            ConfigError: if the interventions are not possible.
            RefusedError: if the model predicts nothing that can be drawn from.
        """
        if self._last is None:
            logits_V = self._forward(list(self._ask.prompt))
            self._emit_prompt()
        else:
            logits_V = self._forward([self._last])
            if self._ask.wants_routing and self._give_routed():
                return True
        token = self._draw(logits_V)
        self._last = token
        self._written += 1
        if token in self._served.ends:
            return self._finish("stop")
        return False if self._ask.wants_routing else self._give(token)

    def _forward(self, new: list[int]) -> Tensor:
        """Read tokens; give the logits of the next one."""
        model, self._read = self._served.model, [*self._read, *new]
        ids = new if self._cache is not None else self._read
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([ids], device=model.device),
            "attention_mask": torch.ones(1, len(self._read), dtype=torch.int64, device=model.device),
            "use_cache": self._cache is not None,
        }
        if self._cache is not None:
            inputs["past_key_values"] = self._cache
        if takes_logits_to_keep(model):
            inputs["logits_to_keep"] = 1
        with torch.inference_mode(), self._listening(ids, len(new)), self._changed():
            logits: Tensor = model(**inputs).logits
        return logits[0, -1].float().cpu()

    @contextmanager
    def _listening(self, ids: list[int], num_new: int) -> Iterator[None]:
        """Take down what the newest tokens chose."""
        seen: list[Seen] = []
        with observe(self._served.model, seen.append):
            yield
        for one in seen:
            own = not self._ask.interventions
            self._heard.add(one.index, one.routing, ids, num_new, is_own_choice=own)
        if self._ask.wants_routing:
            self._routed = routed_tokens(seen, len(self._served.layers), len(ids))[-num_new:]

    def _changed(self) -> AbstractContextManager[None]:
        """The interventions of this answer, in force for one forward."""
        asked = self._ask.interventions
        return intervene(self._served.model, *asked) if asked else nullcontext()

    def _emit_prompt(self) -> None:
        if not self._ask.wants_routing:
            return
        text = TextStream(lambda ids: str(self._served.tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
        pieces = [text.put(token) for token in self._ask.prompt]
        pieces[-1] += text.end()
        read = zip(self._ask.prompt, pieces, self._routed, strict=True)
        self._emit(
            PromptRead(tokens=[Token(token_id=token, text=piece, routed=routed) for token, piece, routed in read])
        )

    def _draw(self, logits_V: Tensor) -> int:
        if not bool(torch.isfinite(logits_V).any()) or bool(logits_V.isnan().any()):
            raise RefusedError(
                FAILED, "The model's predictions are not finite numbers, so nothing can be drawn. Check its weights."
            )
        if self._ask.temperature == 0:
            return int(logits_V.argmax())
        scores: Any = logits_V.unsqueeze(0)
        ids: Any = None
        scores = TemperatureLogitsWarper(float(self._ask.temperature))(ids, scores)
        if self._ask.top_p < 1:
            scores = TopPLogitsWarper(float(self._ask.top_p))(ids, scores)
        return int(torch.multinomial(scores.softmax(dim=-1)[0], 1, generator=self._generator))

    def _give(self, token: int) -> bool:
        """Give the text of a token that has just been written."""
        text, stopped = self._stop.put(self._text.put(token))
        is_last = stopped or self._written == self._ask.max_tokens
        if is_last and not stopped:
            more, stopped = self._stop.put(self._text.end())
            text += more + ("" if stopped else self._stop.end())
        if text:
            self._emit(Piece(text=text))
        return self._end("stop" if stopped else "length") if is_last else False

    def _give_routed(self) -> bool:
        """Give a token that has been read by now, with its experts."""
        assert self._last is not None
        text = self._text.put(self._last)
        is_last = self._written == self._ask.max_tokens
        text += self._text.end() if is_last else ""
        self._emit(Piece(text=text, token=Token(token_id=self._last, text=text, routed=self._routed[-1])))
        return self._end("length") if is_last else False

    def _finish(self, reason: str) -> bool:
        """The model itself ended the answer: give what was held back."""
        text, stopped = self._stop.put(self._text.end())
        text += "" if stopped else self._stop.end()
        if text:
            self._emit(Piece(text=text))
        return self._end(reason)

    def _end(self, reason: str) -> bool:
        self._emit(Finished(reason=reason, prompt_tokens=len(self._ask.prompt), completion_tokens=self._written))
        return True
