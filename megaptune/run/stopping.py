"""Asking a run to stop: a signal to any one rank, or a file called ``stop`` in the run directory.

The wish is summed over ranks with each step's gradient, so all ranks leave at the same step. DeepSpeed's launcher
passes SIGTERM to one rank after another, half a minute apart; the file reaches rank 0 without the launcher.
"""

import signal
from pathlib import Path
from types import FrameType

from megaptune.errors import StoppedEarly


class StopRequest:
    """Context manager: inside it SIGTERM and SIGINT are noted; a second SIGINT interrupts at once."""

    def __init__(self, stop_file: Path | None) -> None:
        self.stop_file, self.reason = stop_file, ""

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        """Whether this rank has been asked."""
        if not self.reason and self.stop_file is not None and self.stop_file.exists():
            self.reason = f"the file {self.stop_file.name}"
        return bool(self.reason)

    def leave(self) -> None:
        """:raises StoppedEarly: always; state has been saved by now."""
        if self.stop_file is not None:
            self.stop_file.unlink(missing_ok=True)
        raise StoppedEarly(
            f"stopped on request ({self.reason or 'another rank was asked'}); the same command continues"
        )
