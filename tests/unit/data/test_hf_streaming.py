# SPDX-License-Identifier: Apache-2.0
"""What comes from the Hub over a network that fails now and then, or for good."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import httpx2
import pytest

from fastvideo.config.source import HfSource
from fastvideo.data.footage import Origin
from fastvideo.data.hf import root
from fastvideo.data.hf.footage import DatasetFootage
from fastvideo.data.hf.root import HubRoot
from fastvideo.errors import UserError
from tests.hf_sets import COMMIT, embedded, write_rows

HUB = HubRoot("someone/clips", COMMIT)
CLIPS = DatasetFootage(HfSource(path=HUB.repository, streaming=True), HUB)
ROWS = [Origin("r.parquet", row) for row in range(4)]


class Flaky:
    """The Hub's file system on a folder; the first reads and listings fail as its client does."""

    def __init__(self, folder: Path, *, failures: int) -> None:
        self.folder, self.failures = folder, failures

    def open(self, path: str, mode: str, *, block_size: int) -> IO[bytes]:
        self.fail()
        return FlakyFile(
            (self.folder / path.removeprefix(f"{HUB.prefix}/")).read_bytes(), self.fail
        )

    def ls(self, path: str, *, detail: bool) -> list[dict[str, Any]]:
        self.fail()
        return [{"name": f"{HUB.prefix}/a.mp4", "type": "file", "size": 1, "blob_id": "0"}]

    def fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise httpx2.ReadTimeout("The read operation timed out")


class FlakyFile(io.BytesIO):
    def __init__(self, data: bytes, fail: Callable[[], None]) -> None:
        super().__init__(data)
        self.fail = fail

    def read(self, size: int | None = -1, /) -> bytes:
        self.fail()
        return super().read(size)


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set how often the network fails from here on."""
    (tmp_path / "a.mp4").write_bytes(b"a clip")
    write_rows(tmp_path / "r.parquet", embedded(tmp_path, *"abcd"), list("abcd"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def fail(times: int) -> None:
        files = Flaky(tmp_path, failures=times)
        monkeypatch.setattr(root, "_files", lambda: files)
        root._entries.cache_clear()

    return fail


@pytest.mark.parametrize("origins", [ROWS, [Origin("a.mp4")]], ids=["rows", "file"])
def test_what_fails_now_and_then_is_fetched_again(
    failing: Callable[[int], None], origins: list[Origin]
) -> None:
    failing(0)
    whole = list(CLIPS.read(origins))
    for times in (1, 2):
        failing(times)
        assert list(CLIPS.read(origins)) == whole
    failing(99)
    with pytest.raises(ConnectionError, match="ReadTimeout: The read operation timed out"):
        list(CLIPS.read(origins))


def test_a_listing_that_fails_is_a_failure_of_the_network(failing: Callable[[int], None]) -> None:
    failing(1)
    with pytest.raises(ConnectionError, match="ReadTimeout"):
        HUB.stamp("a.mp4")
    assert HUB.stamp("a.mp4")[0] == 1


def test_a_file_that_is_gone_is_not_waited_for(failing: Callable[[int], None]) -> None:
    failing(0)
    with pytest.raises(UserError, match=r"gone\.mp4: is gone since the manifest was planned"):
        list(CLIPS.read([Origin("gone.mp4")]))


@pytest.mark.parametrize("path", ["../other/x.csv", "a/../../x.csv", "/x.csv"])
def test_files_of_another_repository_are_not_read(path: str) -> None:
    with pytest.raises(UserError, match="which is elsewhere"):
        HUB.relative(f"hf://{HUB.prefix}/{path}")
    assert HUB.relative(f"hf://{HUB.prefix}/./a/../r.csv") == "r.csv"
