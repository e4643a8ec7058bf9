"""Being asked to stop: SIGTERM and Ctrl-C, on every process at one agreed step."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """`reached(step)` is True from the step at which all processes should save and leave.

    Several processes agree through JAX's preemption service, which watches SIGTERM itself and picks a step none has passed.
    One process only notes the signal. A second Ctrl-C ends it at once.
    """

    def __init__(self):
        self._asked = False
        self._previous = {}

    def __enter__(self):
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self._asked = True
        signal.signal(number, self._previous[number])

    def reached(self, step: int) -> bool:
        """Whether to stop before doing step `step`; every process must call it with the same steps."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)
