# SPDX-License-Identifier: Apache-2.0
"""Who may hold a run's lock, alone or together, and who is waited for."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from fastvideo import atomic
from fastvideo.errors import UserError
from tests.tiny_world import start_fork, wait_for


def taken(lock: Path, *, wait_s: float = 0.0) -> bool:
    """Whether another process can hold the lock alone."""

    def take() -> int:
        try:
            with atomic.alone(lock, busy="busy", wait_s=wait_s):
                return 3
        except UserError:
            return 4

    return wait_for(start_fork(take, environment={})) == 3


def test_the_lock_is_held_until_the_last_that_shares_it_is_gone(tmp_path: Path) -> None:
    lock, told = tmp_path / "lock", tmp_path / "told"

    def rank() -> None:
        with atomic.together(lock, wait_s=5) as held:
            told.write_text(str(held))
            time.sleep(60)

    def parent() -> None:
        with atomic.alone(lock, busy="busy") as file:
            atomic.share(file, busy="busy")
            child = start_fork(rank, environment={})
            (tmp_path / "child").write_text(str(child))
            time.sleep(60)

    holder = start_fork(parent, environment={})
    until(told.exists)
    assert told.read_text() == "True"
    child = int((tmp_path / "child").read_text())
    begin_s = time.monotonic()
    assert not taken(lock, wait_s=30)
    assert time.monotonic() - begin_s < 5, "the holder runs: nothing to wait for"
    os.kill(holder, signal.SIGKILL)
    wait_for(holder)
    assert not taken(lock, wait_s=0.2), "its child still holds it"
    waiting = start_fork(lambda: 3 if taken(lock, wait_s=30) else 4, environment={})
    time.sleep(0.3)
    os.kill(child, signal.SIGKILL)
    assert wait_for(waiting) == 3, "waited for the child of a dead holder"


def test_one_that_holds_it_alone_keeps_late_ones_out(tmp_path: Path) -> None:
    with atomic.alone(tmp_path / "lock", busy="busy"):
        child = start_fork(lambda: late(tmp_path / "lock"), environment={})
        assert wait_for(child) == 0


def test_a_dead_holder_with_our_own_process_id_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    child = start_fork(lambda: late_leaver(lock), environment={})
    until(lambda: lock.exists() and lock.read_text() == "shared")
    lock.write_text(f"{socket.gethostname()} {os.getpid()}\n")  # containers: 1 at each start
    with atomic.alone(lock, busy="busy", wait_s=10):
        pass
    assert wait_for(child) == 0


def late_leaver(lock: Path) -> None:
    with atomic.together(lock, wait_s=1):
        lock.write_text("shared")
        time.sleep(0.5)


def late(lock: Path) -> int:
    with atomic.together(lock, wait_s=0.2) as held:
        return int(held)


def test_the_message_is_the_callers(tmp_path: Path) -> None:
    def hold() -> None:
        with atomic.alone(tmp_path / "lock", busy=""):
            (tmp_path / "held").touch()
            time.sleep(60)

    holder = start_fork(hold, environment={})
    until((tmp_path / "held").exists)
    with (
        pytest.raises(UserError, match="it trains"),
        atomic.alone(tmp_path / "lock", busy="it trains"),
    ):
        pass
    os.kill(holder, signal.SIGKILL)
    wait_for(holder)


def until(condition: object) -> None:
    assert callable(condition)
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
