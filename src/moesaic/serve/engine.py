"""One thread writes all answers, a token each in turn: nobody waits behind a long one, and no two meet in the model."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

from moesaic.core.errors import MoesaicError
from moesaic.serve.answer import Answer
from moesaic.serve.events import Ask, Event, Failed, Finished
from moesaic.serve.heard import Heard
from moesaic.serve.model import ServedModel
from moesaic.serve.refusal import BAD, BUSY, FAILED, STOPPING, RefusedError

_log = logging.getLogger("moesaic.serve")
_STOPPING = "The service is stopping, so this answer is not written to its end. Ask again when it is back."


class Job:
    """A request on its way; whoever asked may lose interest at any time.

    Args:
        ask: what is asked for.
        emit: called with each event, in the thread that writes.
    """

    def __init__(self, ask: Ask, emit: Callable[[Event], None]) -> None:
        self.ask = ask
        self.emit = emit
        self.start_s = time.monotonic()
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Write no more of the answer; harmless when it is complete."""
        self._cancelled.set()


class Engine:
    """Writes answers in turns, in a thread of its own.

    Args:
        served: the model.
        heard: gathers what experts took.
        max_active: answers that are written at a time.
        max_waiting: requests that wait beside them.
    Attributes:
        outcomes: answers by how they ended: ``stop``, ``length``, ``cancelled`` or ``failed``.
        prompt_tokens: read in complete answers.
        completion_tokens: written in complete answers.
    """

    def __init__(self, served: ServedModel, heard: Heard, *, max_active: int, max_waiting: int) -> None:
        self._served, self._heard = served, heard
        self._max_active, self._max_waiting = max_active, max_waiting
        self._waiting: deque[Job] = deque()
        self._active: deque[tuple[Job, Answer]] = deque()
        self._changed = threading.Condition()
        self._deadline_s: float | None = None
        self._mean_s = 1.0
        self._ending: Event | None = None
        self._thread = threading.Thread(target=self._run, name="moesaic-serve", daemon=True)
        self.outcomes = dict.fromkeys(("stop", "length", "cancelled", "failed"), 0)
        self.prompt_tokens = 0
        self.completion_tokens = 0

    @property
    def num_active(self) -> int:
        """Answers that are being written."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn to begin."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def submit(self, ask: Ask, emit: Callable[[Event], None]) -> Job:
        """Take a request.

        Args:
            ask: what is asked for.
            emit: called with each event, in another thread; :class:`Finished` or :class:`Failed` is the last.
        Raises:
            RefusedError: if too many wait already, or the service is stopping.
        """
        job = Job(ask, emit)
        with self._changed:
            if self._deadline_s is not None:
                raise RefusedError(STOPPING, "The service is stopping. Ask again when it is back.", wait_s=10)
            # Those who left while they waited hold no place.
            self._waiting = deque(one for one in self._waiting if not self._dropped(one))
            free = self._max_active - len(self._active)
            if len(self._waiting) >= self._max_waiting + max(free, 0):
                raise RefusedError(
                    BUSY,
                    f"The service writes {self._max_active} answers at a time and lets {self._max_waiting} requests "
                    "wait, and all these places are taken. Ask again later.",
                    code="overloaded",
                    wait_s=self._wait_s(),
                )
            self._waiting.append(job)
            self._changed.notify()
        return job

    def stop(self, grace_s: float) -> None:
        """Take no more requests; running answers may go on for a while, then break off with a word.

        Args:
            grace_s: seconds that they have.
        """
        with self._changed:
            self._deadline_s = time.monotonic() + grace_s
            self._changed.notify()

    def join(self) -> None:
        """Wait until the thread has ended, after :meth:`stop`."""
        self._thread.join()

    def _run(self) -> None:
        while self._admit():
            job, answer = self._active.popleft()
            # Still counted while its turn runs.
            self._active.append((job, answer))
            if self._turn(job, answer):
                self._active.remove((job, answer))
                # Whoever hears of the end and asks again at once shall find the place free.
                if self._ending is not None:
                    job.emit(self._ending)
                    self._ending = None

    def _admit(self) -> bool:
        """Let requests begin while there is room; sleep while there is nothing to do; False when all is over."""
        with self._changed:
            while not self._waiting and not self._active and self._deadline_s is None:
                self._changed.wait()
            late = self._deadline_s is not None and time.monotonic() >= self._deadline_s
            if self._deadline_s is not None:
                self._break_off([*self._waiting, *([job for job, _ in self._active] if late else [])])
                self._waiting.clear()
                if late:
                    self._active.clear()
            while self._waiting and len(self._active) < self._max_active:
                job = self._waiting.popleft()
                if not self._dropped(job):
                    self._active.append((job, Answer(self._served, job.ask, self._heard, self._emit_of(job))))
            return bool(self._active) or self._deadline_s is None

    def _turn(self, job: Job, answer: Answer) -> bool:
        """Write one token of an answer; True when it is over."""
        if self._dropped(job):
            return True
        try:
            return answer.advance()
        except MoesaicError as error:
            # What was asked to be switched off may turn out to leave a token without experts.
            refusal = (
                error
                if isinstance(error, RefusedError)
                else RefusedError(BAD if job.ask.interventions else FAILED, str(error))
            )
        except Exception as error:
            _log.exception("An answer failed")
            words = " ".join(str(error).split())[:200]
            refusal = RefusedError(FAILED, f"The model failed: {type(error).__name__}: {words}. See the service's log.")
        self._count("failed", job)
        self._ending = Failed(refusal=refusal)
        return True

    def _emit_of(self, job: Job) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            if isinstance(event, Finished):
                self.prompt_tokens += event.prompt_tokens
                self.completion_tokens += event.completion_tokens
                self._count(event.reason, job)
                self._ending = event
            else:
                job.emit(event)

        return emit

    def _dropped(self, job: Job) -> bool:
        """Whether nobody waits for a job; it is counted once."""
        if job.cancelled:
            with self._changed:
                self.outcomes["cancelled"] += 1
            return True
        return False

    def _break_off(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._count("failed", job)
            job.emit(Failed(refusal=RefusedError(STOPPING, _STOPPING, code="stopping", wait_s=10)))

    def _count(self, outcome: str, job: Job) -> None:
        with self._changed:
            self.outcomes[outcome] += 1
            # A mean that forgets: the newest answers tell best how long the next ones take.
            self._mean_s += 0.1 * (time.monotonic() - job.start_s - self._mean_s)

    def _wait_s(self) -> int:
        """When a place may be free: answers leave one after another."""
        return min(60, max(1, math.ceil(self._mean_s / max(1, self._max_active + self._max_waiting))))
