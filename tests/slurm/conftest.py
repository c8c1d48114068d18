# SPDX-License-Identifier: Apache-2.0
"""The test cluster, one for all tests of this folder; each finds it idle."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, missing


@pytest.fixture(scope="session")
def started_lab() -> Iterator[Lab]:
    if reason := missing():
        pytest.skip(reason)
    with Lab() as lab:
        yield lab


@pytest.fixture
def lab(started_lab: Lab) -> Iterator[Lab]:
    """The cluster, idle and with the settings it was started with."""
    settings = started_lab.settings
    log = started_lab.folder / "log" / "slurmctld.log"
    begin = log.stat().st_size
    yield started_lab
    # Shown for tests that fail.
    print(log.read_bytes()[begin:].decode())
    started_lab.clear()
    if started_lab.settings != settings:
        started_lab.configure(settings)


@pytest.fixture
def folder(lab: Lab, request: pytest.FixtureRequest) -> Path:
    """A folder of the user that all nodes see."""
    return lab.new_folder(request.node.name)
