# SPDX-License-Identifier: Apache-2.0
"""The tiny model that integration tests share; none of them changes it."""

from pathlib import Path

import pytest

from fastvideo.models.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Wan2.1 text-to-video model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny(folder)
    return folder
