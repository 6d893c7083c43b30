"""Whom the roll call names, from positions and check-ins alone; the runs are in tests/launch/test_roll_call.py."""

import os
import socket
import threading
import time

import pytest

from megaptune.errors import SetupError
from megaptune.run import roll_call
from megaptune.run.roll_call import STAGES, LateRanks, describe_late, describe_missing, require_free

READING, READY = STAGES.index("reading the backbone"), STAGES.index("working towards the first step")


def test_the_rank_that_others_are_ahead_of_is_late_after_the_timeout():
    judge = LateRanks(3, timeout_s=10)
    assert judge.update([(0, 0)] * 3, now=1) == []
    ahead = [(READING, 2), (READING, 2), (READING, 1)]
    assert judge.update(ahead, now=5) == []
    assert judge.update(ahead, now=14) == []
    assert judge.update(ahead, now=16) == [2]


def test_a_rank_that_moves_has_its_time_again():
    judge = LateRanks(2, timeout_s=10)
    judge.update([(READY, 9), (READING, 1)], now=1)
    assert judge.update([(READY, 9), (READING, 2)], now=10) == []
    assert judge.update([(READY, 9), (READING, 2)], now=19) == []
    assert judge.update([(READY, 9), (READING, 2)], now=21) == [1]


def test_the_time_counts_from_when_others_got_ahead():
    """All read the same weights for long: nobody is late until somebody is done."""
    judge = LateRanks(2, timeout_s=10)
    judge.update([(READY, 1), (READY, 1)], now=1)
    judge.update([(READY, 1), (READY, 1)], now=100)
    assert judge.update([(READY, 2), (READY, 1)], now=101) == []
    assert judge.update([(READY, 2), (READY, 1)], now=112) == [1]


def test_when_none_is_ahead_all_hang_before_the_backbone_is_ready_and_may_be_busy_after():
    for stage, late in ((READING, [0, 1]), (READY, [])):
        judge = LateRanks(2, timeout_s=10)
        judge.update([(stage, 1), (stage, 1)], now=1)
        assert judge.update([(stage, 1), (stage, 1)], now=12) == late


def test_a_late_rank_is_told_with_host_stage_and_what_to_look_at():
    told = describe_late([1], [(READY, 3), (READING, 1)], ["n1", "n2"], 30)
    assert told == (
        "the other ranks waited 30 s (launch.first_step_timeout_s): rank 1 (n2) was last seen reading the backbone; "
        "look at that host, its disk and its network"
    )


def test_ranks_that_cannot_connect_get_a_hint_at_the_interface():
    told = describe_late([0, 1], [(0, 0), (0, 0)], ["n1", "n2"], 30)
    assert told.startswith("no rank moved for 30 s (launch.first_step_timeout_s): rank 0 (n1) was last seen connecting")
    assert "name the interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME" in told


def test_missing_ranks_are_told_with_the_hosts_that_the_launcher_meant():
    told = describe_missing([2, 3], {0: "n1", 1: "n1"}, {0: "n1", 1: "n1", 2: "n2", 3: "n2"})
    assert told == "2 of 4 ranks did not join: rank 2 on n2, rank 3 on n2; there are n1 with ranks 0, 1"
    assert describe_missing([1], {0: "n1"}, {}) == "1 of 2 ranks did not join: rank 1; there are n1 with rank 0"


def test_many_missing_ranks_are_counted():
    told = describe_missing(list(range(1, 20)), {0: "n1"}, {})
    assert "rank 8 and 11 more; there are n1 with rank 0" in told


def test_a_port_in_use_is_refused_with_its_holder():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(SetupError) as refusal:
            require_free(port)
    assert f"port {port} cannot be used on rank 0's host {socket.gethostname()}: Address already in use" in str(
        refusal.value
    )
    assert f"(process {os.getpid()}); choose another MASTER_PORT" in str(refusal.value)
    require_free(port)


def test_without_ranks_to_wait_for_marks_do_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roll_call, "_current", None)
    roll_call.mark("training")
    roll_call.arrive()
    roll_call.close()


def test_the_end_of_the_watch_waits_for_a_request_that_is_under_way():
    """A thread inside torch's store when the interpreter ends takes the process with it (SIGABRT)."""
    asked, answered = threading.Event(), threading.Event()

    class SlowStore:
        def clone(self):
            return self

        def set(self, key, value):
            asked.set()
            time.sleep(0.3)
            answered.set()

        def check(self, keys):
            return False

    call = roll_call.RollCall(SlowStore(), rank=1, world_size=2, hosts=["n1", "n2"])
    call.watch(timeout_s=30)
    assert asked.wait(10)
    call.close()
    assert answered.is_set()
