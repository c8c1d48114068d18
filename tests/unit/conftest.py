# SPDX-License-Identifier: Apache-2.0
"""What unit tests of jobs share."""

from pathlib import Path

import pytest

from tests import submitting
from tests.submitting import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Files of a user who submits, in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    return submitting.make(tmp_path, monkeypatch)
