"""Ctrl-C and SIGTERM: the step at hand is finished and saved first. A second Ctrl-C ends at once.

Python runs a signal's handler in the main thread, and only when that comes back from the device:
after a step, or after a whole compilation. So a thread of its own hears of signals too, says so,
and ends the process at once where nothing would be lost by it.

Processes of one run stop at the same step, whichever of them heard of it: they agree.
"""

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable

from gpt2_flax.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What the run is doing, and with it what a signal does.
PREPARING = "preparing"  # Interrupted is raised: what was begun is taken back
STARTING = "starting"  # the first step is compiled: a process by itself ends at once
RUNNING = "running"  # it is noted, for the loop to see
FINISHING = "finishing"  # nothing: the model is written out, which takes seconds
GRACE_SECONDS = 2
LAG = 2  # polls that an agreement is under way: the device never waits for it


class StopRequest:
    """Within it, SIGINT and SIGTERM are a request to stop.

    asked: the signal that the loop is to obey, None for none; it changes in `poll` alone.
    """

    def __init__(self):
        self.asked: int | None = None
        self.signal: int | None = None  # that came to this process
        self.phase = PREPARING
        self.of_several = False  # whether the process may wait for others, deaf to signals
        self.largest: Callable | None = None
        self.under_way: deque = deque()

    def agree_by(self, largest: Callable) -> None:
        """Let processes agree: by the largest of all processes' ints, of each poll."""
        self.largest = largest

    def poll(self) -> int | None:
        """Set and return `asked`. All processes must call it equally often."""
        if self.largest is None:
            self.asked = self.signal
        else:
            self.under_way.append(self.largest(self.signal or 0))
            if len(self.under_way) > LAG:
                self.asked = self.asked or int(self.under_way.popleft()) or None
        return self.asked

    def __enter__(self):
        self.heard, self.told = os.pipe()
        os.set_blocking(self.told, False)
        self.listener = threading.Thread(target=self.listen, name="stopping", daemon=True)
        self.listener.start()
        self.fd_before = signal.set_wakeup_fd(self.told, warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.fd_before)
        os.close(self.told)
        self.listener.join()
        os.close(self.heard)

    def note(self, number, frame):
        """In the main thread, when that has time."""
        self.signal = number
        if self.phase == PREPARING:
            raise Interrupted(number)

    def listen(self):
        """In the thread: hear of signals at once."""
        n_heard = 0
        while number := os.read(self.heard, 1):  # nothing, once the other end is closed
            if number[0] not in SIGNALS:
                continue
            n_heard += 1
            if self.phase == PREPARING and self.of_several:
                time.sleep(GRACE_SECONDS)  # in which what was begun is taken back
                if self.phase == PREPARING:
                    os._exit(128 + number[0])
            # Another process may have made the step already that this one compiles.
            if self.phase == STARTING and not self.of_several:
                tell("stopped: nothing was done yet that is not saved")
                os._exit(128 + number[0])
            if n_heard > 1 and number[0] == signal.SIGINT:
                tell("stopped at once")
                os._exit(128 + number[0])
            if self.phase in (STARTING, RUNNING) and n_heard == 1:
                tell("stopping: the step is finished and saved first")
            if self.phase == FINISHING:
                tell("the run is complete; its model is being written")


def tell(words: str) -> None:
    with contextlib.suppress(OSError):  # Ctrl-C also ends the `tee` that reads this
        os.write(2, f"\n{words}\n".encode())
