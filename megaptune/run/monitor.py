"""What a run tells: metrics.jsonl (the record), TensorBoard (a view of it), the console (progress, and plain lines).

Only rank 0 has a speaking monitor; on the others every call does nothing.
"""

import json
import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megaptune.run.files import write_whole

TIMING = ("time_s", "examples_per_s", "tokens_per_s", "host_memory_gib", "device_memory_gib")
"""The keys of a metrics line that differ from one run to the next; all others repeat exactly."""


class Monitor:
    def __init__(self, speaks: bool, metrics_file: Path | None = None, tensorboard: Path | None = None) -> None:
        self.speaks = speaks
        width = None if sys.stdout.isatty() else 132
        self.console = Console(quiet=not speaks, soft_wrap=True, highlight=False, width=width)
        self._tensorboard_folder = tensorboard if speaks else None
        self._writers: dict[str, Any] = {}
        self._progress: Progress | None = None
        self._metrics = metrics_file.open("a+b") if speaks and metrics_file else None
        self._started = time.monotonic()

    # -- words ---------------------------------------------------------------------------------------------------

    def say(self, message: str) -> None:
        self.console.print(message, markup=False)

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", markup=False, style="yellow")

    def show(self, renderable: Any) -> None:
        self.console.print(renderable)

    # -- records -------------------------------------------------------------------------------------------------

    def record(self, kind: str, job: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; its numbers go to TensorBoard as ``job``'s curves."""
        if self._metrics is None:
            return
        line = {"kind": kind, "job": job, "step": step, **values, "time_s": round(time.monotonic() - self._started, 3)}
        self._metrics.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        writer = self._writer(job)
        if writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                    writer.add_scalar(f"{kind}/{name}", value, step)

    def text(self, job: str, tag: str, markdown: str, step: int = 0) -> None:
        writer = self._writer(job)
        if writer is not None:
            writer.add_text(tag, markdown, step)

    def hyperparameters(self, job: str, settings: dict[str, Any], figures: dict[str, float]) -> None:
        writer = self._writer(job)
        if writer is not None:
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
            writer.add_hparams(plain, {f"hparam/{name}": value for name, value in figures.items()}, run_name=".")

    def flush(self) -> None:
        """Bring the record to the disk: before a checkpoint that follows it."""
        if self._metrics is not None:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())

    def rewind(self, steps: dict[str, int]) -> None:
        """Forget what jobs recorded after the steps that they continue from, their test figures, and a torn line."""
        if self._metrics is not None:
            self._keep_lines(steps)
        if self._tensorboard_folder is not None:
            for job, step in steps.items():
                self._close_writer(job)
                self._writers[job] = self._open_writer(job, purge_step=step + 1)

    def _keep_lines(self, steps: dict[str, int]) -> None:
        assert self._metrics is not None
        self._metrics.seek(0)
        kept, dropped = [], False
        for raw in self._metrics:
            line = json.loads(raw) if raw.endswith(b"\n") else None
            stays = line is not None and (
                line["job"] not in steps or (line["kind"] != "test" and line["step"] <= steps[line["job"]])
            )
            dropped = dropped or not stays
            kept += [raw] if stays else []
        if dropped:
            path = Path(os.fsdecode(self._metrics.name))
            self._metrics.close()
            write_whole(path, b"".join(kept).decode())
            self._metrics = path.open("a+b")
        self._metrics.seek(0, os.SEEK_END)

    # -- progress ------------------------------------------------------------------------------------------------

    def begin(self, label: str, total: int, done: int) -> None:
        """A bar with the time left on a terminal; elsewhere :meth:`say` prints plain lines."""
        if self.speaks and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[last]}"),
            )
            self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self._progress.add_task(label, total=total, completed=done, last="")
            self._progress.start()

    def advance(self, done: int, last: str) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done, last=last)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @property
    def draws_progress(self) -> bool:
        return self._progress is not None

    def close(self) -> None:
        self.end()
        for job in list(self._writers):
            self._close_writer(job)
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        sys.stdout.flush()

    # -- TensorBoard ---------------------------------------------------------------------------------------------

    def _writer(self, job: str) -> Any:
        if self._tensorboard_folder is None:
            return None
        if job not in self._writers:
            self._writers[job] = self._open_writer(job, None)
        return self._writers[job]

    def _open_writer(self, job: str, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        assert self._tensorboard_folder is not None
        return SummaryWriter(str(self._tensorboard_folder / job), purge_step=purge_step)

    def _close_writer(self, job: str) -> None:
        writer = self._writers.pop(job, None)
        if writer is not None:
            writer.close()


class Pace:
    """Throughput and time left, from the last steps; the first ones, which warm up, do not count."""

    def __init__(self, total_steps: int, done: int, window: int = 50, warm_up: int = 2) -> None:
        self.total_steps, self.first = total_steps, done + warm_up
        self.marks: deque[tuple[int, float, float, float]] = deque(maxlen=window)
        self.examples = self.tokens = 0.0

    def mark(self, step: int, examples: float, tokens: float) -> None:
        self.examples += examples
        self.tokens += tokens
        if step >= self.first:
            self.marks.append((step, time.monotonic(), self.examples, self.tokens))

    def rates(self) -> dict[str, float]:
        """Examples and tokens per second over all ranks."""
        if len(self.marks) < 2:
            return {}
        (_, t0, e0, k0), (_, t1, e1, k1) = self.marks[0], self.marks[-1]
        elapsed = max(t1 - t0, 1e-9)
        return {"examples_per_s": round((e1 - e0) / elapsed, 2), "tokens_per_s": round((k1 - k0) / elapsed, 1)}

    def left(self) -> str:
        """The time left for the epochs that are planned, as h:mm:ss."""
        if len(self.marks) < 2:
            return "?"
        (s0, t0, *_), (s1, t1, *_) = self.marks[0], self.marks[-1]
        seconds = int((self.total_steps - s1) * (t1 - t0) / max(1, s1 - s0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def memory() -> dict[str, float]:
    """This process's peak memory: of the host, and of the device where there is one."""
    gib = 2**30
    found = {"host_memory_gib": round(peak_host_bytes() / gib, 3)}
    if torch.cuda.is_available():
        found["device_memory_gib"] = round(torch.cuda.max_memory_allocated() / gib, 3)
    return found


def peak_host_bytes() -> int:
    """The most memory that this process has held so far, pages of mapped files included.

    Not ``ru_maxrss``, which a process takes over from the one that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
