"""Who is there, and who is late: ranks check in at a store before they are joined, and say how far they are until the
first step.

A collective waits for a rank that never comes, or that hangs while it reads weights from a dead file server, and does
not say for which. Here rank 0 names it, with its host, and every rank leaves with exit code 3.

``join`` opens the store, ``mark`` and ``arrive`` are called by the run as it goes, ``watch`` starts the thread that
compares the ranks' positions once a second until all have made their first step.
"""

import contextlib
import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore

from megaptune.errors import SetupError, first_line

STAGES = (
    "connecting to the other ranks",
    "preparing the data",
    "reading the backbone",
    "handing the backbone to DeepSpeed",
    "working towards the first step",
    "training",
)
"""What a rank is doing, in order; the last one ends the watch."""

_READY = STAGES.index("working towards the first step")
_INTERVAL_S = 1.0
_GRACE_S = 10.0

Position = tuple[int, int]
"""How far a rank is: the index of its stage, and the exchanges with other ranks that it has begun."""


class RollCall:
    """The ranks of a run at their store. ``hosts`` are the names that they checked in with, by rank."""

    def __init__(self, store: TCPStore, rank: int, world_size: int, hosts: list[str]) -> None:
        self.store = store
        self.rank, self.world_size, self.hosts = rank, world_size, hosts
        self.stage = self.exchanges = 0
        self.on_failure: Callable[[str], None] = lambda reason: None
        self._closed = threading.Event()
        self._watching: threading.Thread | None = None

    @property
    def group_store(self) -> PrefixStore:
        """Where the process group finds its members."""
        return PrefixStore("group", self.store)

    # -- watching ------------------------------------------------------------------------------------------------

    def watch(self, timeout_s: float) -> None:
        """Start the thread that ends the process when some rank keeps the others waiting for ``timeout_s``."""
        # A connection of its own: the main thread may sit in a blocking request of the other.
        store: Any = self.store  # torch's stubs lack clone
        watcher = _Watcher(self, store.clone(), timeout_s)
        self._watching = threading.Thread(target=watcher.run, name="roll call", daemon=True)
        self._watching.start()

    def close(self) -> None:
        """End the watch: the run is over, well or not.

        A thread that comes back from a request of the store while the interpreter ends would abort the process.
        """
        self._closed.set()
        if self._watching not in (None, threading.current_thread()):
            self._watching.join(_GRACE_S)


class _Watcher:
    """The thread's side. Rank 0 judges; the others publish where they are and listen for the verdict."""

    def __init__(self, call: RollCall, store: Any, timeout_s: float) -> None:
        self.call, self.store, self.timeout_s = call, store, timeout_s
        self.published: Position | None = None

    def run(self) -> None:
        judge = LateRanks(self.call.world_size, self.timeout_s)
        while not self.call._closed.wait(_INTERVAL_S):
            # A store that is there but silent (rank 0 is stopped) blocks this thread; the timer does not ask it.
            silence = threading.Timer(self.timeout_s + _GRACE_S, self.leave_silent_store)
            silence.daemon = True
            silence.start()
            try:
                if self.look(judge):
                    return
            except DistError:
                self.lost_store()
                return
            finally:
                silence.cancel()

    def look(self, judge: "LateRanks") -> bool:
        """Publish, listen and, on rank 0, judge; whether the watch is over."""
        call = self.call
        position = (call.stage, call.exchanges)
        if position != self.published:
            self.store.set(f"at/{call.rank}", json.dumps(position))
            self.published = position
        if self.store.check(["late"]):
            self.leave(**json.loads(self.store.get("late")))
        if call.rank:
            return self.store.check(["stepped"])
        answers = self.store.multi_get([f"at/{rank}" for rank in range(call.world_size)])
        positions = [tuple(json.loads(answer)) for answer in answers]
        if all(stage == len(STAGES) - 1 for stage, _ in positions):
            self.store.set("stepped", "1")
            return True
        late = judge.update(positions, time.monotonic())
        if late:
            reason = describe_late(late, positions, call.hosts, self.timeout_s)
            self.store.set("late", json.dumps({"reason": reason, "late": late}))
        return False

    def leave(self, reason: str, late: list[int]) -> None:
        """End the process. Rank 0 tells first and keeps the store until the others have heard."""
        call = self.call
        if call._closed.is_set():
            return
        if call.rank in late:
            faulthandler.dump_traceback()  # where this rank hangs
        with contextlib.suppress(DistError):
            if call.rank == 0:
                self.tell(reason)
                self.store.set("told", "1")
                _poll(lambda: self.store.add("heard", 0) >= call.world_size - 1, 3.0)
            else:
                self.store.add("heard", 1)
                _poll(lambda: self.store.check(["told"]), _GRACE_S)
        _exit()

    def lost_store(self) -> None:
        """The store went with rank 0. The launcher or the main thread's own error may end this rank first."""
        if self.call.stage == len(STAGES) - 1 or self.call._closed.wait(_GRACE_S):
            return
        self.tell(f"rank 0 ({self.call.hosts[0]}) is gone; rank {self.call.rank} was {STAGES[self.call.stage]}")
        _exit()

    def leave_silent_store(self) -> None:
        if not self.call._closed.is_set():
            self.tell(f"rank 0 ({self.call.hosts[0]}) does not answer any more: its process or host hangs")
            _exit()

    def tell(self, reason: str) -> None:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        self.call.on_failure(reason)


class LateRanks:
    """Finds the ranks that keep others waiting, from their positions over time."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.positions: list[Position | None] = [None] * world_size
        self.behind_since: list[float | None] = [None] * world_size
        self.moved = 0.0

    def update(self, positions: list[Position], now: float) -> list[int]:
        """The ranks that did not move for ``timeout_s`` with others ahead of them.

        All of them when none is ahead and none moved for so long, before the backbone is ready: then they hang in a
        collective of the libraries, which moves nobody. Later they may be evaluating.
        """
        leader = max(positions)
        for rank, position in enumerate(positions):
            if position != self.positions[rank]:
                self.positions[rank], self.behind_since[rank], self.moved = position, None, now
            if position < leader and self.behind_since[rank] is None:
                self.behind_since[rank] = now
        late = [rank for rank, since in enumerate(self.behind_since) if since and now - since > self.timeout_s]
        if not late and leader[0] < _READY and now - self.moved > self.timeout_s:
            return list(range(len(positions)))
        return late


def describe_late(late: list[int], positions: list[Position], hosts: list[str], timeout_s: float) -> str:
    """One message: who, where, at which stage, and what to look at."""
    seen = ", ".join(f"rank {rank} ({hosts[rank]}) was last seen {STAGES[positions[rank][0]]}" for rank in late[:8])
    more = f", and {len(late) - 8} more" if len(late) > 8 else ""
    stage = STAGES[min(positions[rank][0] for rank in late)]
    hint = "look at that host, its disk and its network"
    if stage == STAGES[0]:
        hint = (
            "check that the hosts reach each other, and name the interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        )
    if len(late) == len(positions):
        return f"no rank moved for {timeout_s:g} s (launch.first_step_timeout_s): {seen}{more}; {hint}"
    return f"the other ranks waited {timeout_s:g} s (launch.first_step_timeout_s): {seen}{more}; {hint}"


# -- joining ---------------------------------------------------------------------------------------------------------


def join(
    rank: int,
    world_size: int,
    address: str,
    port: int,
    device: str,
    timeout_s: float,
    expected_hosts: Callable[[], Mapping[int, str]] = dict,
) -> RollCall:
    """Check in at ``address:port``, where rank 0 (or torchrun's agent) keeps the store, and wait for all.

    :param device: "cuda" or "cpu"; all ranks must have the same.
    :param expected_hosts: which host the launcher meant for which rank, as far as it says.
    :raises SetupError: on every rank that came, when one did not, or when the place is taken or not to be found.
    """
    global _current
    deadline = time.monotonic() + timeout_s
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _open(rank, world_size, address, port, serves, timeout_s)
    me = {"host": socket.gethostname(), "device": device}
    store.set(f"at/{rank}", json.dumps((0, 0)))
    store.set(f"present/{rank}", json.dumps(me))
    with _rank_0_may_leave(rank, address, port):
        if rank == 0:
            verdict = _call(store, world_size, deadline, timeout_s, expected_hosts)
            store.set("roll", json.dumps(verdict))
        else:
            # Rank 0 started its own wait at another moment, at most this rank's whole wait later.
            if not _poll(lambda: store.check(["roll"]), deadline - time.monotonic() + timeout_s):
                raise SetupError(f"{address}:{port} answers, but no rank 0 calls the roll there: is another job there?")
            verdict = json.loads(store.get("roll"))
            store.add("heard roll", 1)
    if verdict["error"]:
        if rank == 0:
            _poll(lambda: store.add("heard roll", 0) >= verdict["present"] - 1, 3.0)
        raise SetupError(verdict["error"]).shared()
    _current = RollCall(store, rank, world_size, verdict["hosts"])
    return _current


@contextlib.contextmanager
def _rank_0_may_leave(rank: int, address: str, port: int) -> Any:
    try:
        yield
    except DistError as error:
        raise SetupError(
            f"rank {rank}: rank 0 at {address}:{port} left during the roll call: {first_line(error)}"
        ) from None


def _call(
    store: TCPStore, world_size: int, deadline: float, timeout_s: float, expected_hosts: Callable[[], Mapping[int, str]]
) -> dict[str, Any]:
    """Rank 0's part: wait for every rank; the verdict that all ranks act on."""
    missing = list(range(world_size))

    def all_present() -> bool:
        missing[:] = [rank for rank in missing if not store.check([f"present/{rank}"])]
        return not missing

    _poll(all_present, deadline - time.monotonic())
    present = {rank: json.loads(store.get(f"present/{rank}")) for rank in range(world_size) if rank not in missing}
    error = ""
    if missing:
        error = describe_missing(missing, {rank: here["host"] for rank, here in present.items()}, expected_hosts())
        error += f" (launch.join_timeout_s is {timeout_s:g}); look at those hosts' logs, or start them"
    without = [f"rank {rank} ({here['host']})" for rank, here in present.items() if here["device"] != "cuda"]
    if not error and 0 < len(without) < len(present):
        error = f"{', '.join(without[:8])} found no CUDA device, the other ranks did: check the driver on that host"
    return {"error": error, "present": len(present), "hosts": [here["host"] for here in present.values()]}


def describe_missing(missing: list[int], present: Mapping[int, str], expected: Mapping[int, str]) -> str:
    """Names ranks that did not check in, with the hosts that the launcher meant for them where it says so."""
    names = [f"rank {rank}" + (f" on {expected[rank]}" if rank in expected else "") for rank in missing[:8]]
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    hosts: dict[str, list[str]] = {}
    for rank, host in present.items():
        hosts.setdefault(host, []).append(str(rank))
    there = "; ".join(
        f"{host} with rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks[:8])}" for host, ranks in hosts.items()
    )
    count = f"{len(missing)} of {len(missing) + len(present)} ranks did not join"
    return f"{count}: {', '.join(names)}{more}; there are {there}"


def _open(rank: int, world_size: int, address: str, port: int, serves: bool, timeout_s: float) -> TCPStore:
    place, deadline = f"MASTER_ADDR:MASTER_PORT {address}:{port}", time.monotonic() + timeout_s
    if serves:
        require_free(port)
    elif not _poll(lambda: _listens(address, port), timeout_s):
        raise SetupError(
            f"rank {rank} on {socket.gethostname()} found nobody at {place} within {timeout_s:g} s: is rank 0 running, "
            "does that name resolve here, and does a firewall stand between the hosts?"
        )
    opened: list[TCPStore | RuntimeError] = []

    def connect() -> None:
        try:
            timeout = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
            opened.append(TCPStore(address, port, world_size, serves, timeout=timeout, wait_for_workers=False))
        except RuntimeError as error:
            opened.append(error)

    # In a thread: torch waits without limit for the answer of something that listens there and is no store.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(max(5.0, deadline - time.monotonic()))
    if not opened:
        raise SetupError(f"rank {rank}: what listens at {place} is not rank 0 of this run; choose another MASTER_PORT")
    if not isinstance(opened[0], TCPStore):
        raise SetupError(f"rank {rank} cannot join at {place}: {first_line(opened[0])}") from None
    return opened[0]


def require_free(port: int) -> None:
    """:raises SetupError: naming who holds ``port`` on this host, where the system tells."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return
        except OSError as error:
            reason = error.strerror
    raise SetupError(
        f"port {port} cannot be used on rank 0's host {socket.gethostname()}: {reason}{_holder(port)}; "
        "choose another MASTER_PORT (deepspeed --master_port, torchrun --master-port)"
    )


def _holder(port: int) -> str:
    import psutil  # comes with DeepSpeed

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f", held by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def _poll(done: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(SetupError.exit_code)


# -- what the run calls ----------------------------------------------------------------------------------------------

_current: RollCall | None = None


def mark(stage: str) -> None:
    """This rank is now doing ``stage``, one of :data:`STAGES`."""
    if _current is not None:
        _current.stage = max(_current.stage, STAGES.index(stage))


def on_failure(work: Callable[[str], None]) -> None:
    """What this rank does with the reason before the watch ends the process."""
    if _current is not None:
        _current.on_failure = work


def arrive() -> None:
    """This rank begins an exchange with the others."""
    if _current is not None:
        _current.exchanges += 1


def close() -> None:
    """The run is over: no rank is waited for any more."""
    if _current is not None:
        _current.close()
