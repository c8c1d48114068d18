# SPDX-License-Identifier: Apache-2.0
"""A folder appears whole, and takes the place of none that no marker gives up."""

from pathlib import Path

import pytest

from fastvideo.errors import UserError
from fastvideo.export_folder import replacing_folder


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link"])
def test_a_folder_that_came_in_the_meantime_stays(tmp_path: Path, kind: str) -> None:
    """As in hours of merging; what was made goes."""
    out = tmp_path / "out"
    with (
        pytest.raises(UserError, match=f"{out}: exists; remove it or choose another name"),
        replacing_folder(out, point="test") as temporary,
    ):
        (temporary / "ours").touch()
        if kind == "file":
            out.write_text("theirs")
        elif kind == "link":
            out.symlink_to(tmp_path / "nowhere")
        else:
            out.mkdir()
        if kind == "folder":
            (out / "theirs").touch()
    assert list(tmp_path.iterdir()) == [out]
    assert kind != "file" or out.read_text() == "theirs"
    assert kind != "folder" or [path.name for path in out.iterdir()] == ["theirs"]


def test_a_folder_with_a_marker_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("old", "new"):
        with replacing_folder(out, point="test", marker=out / "marker") as temporary:
            (temporary / name).touch()
            (temporary / "marker").touch()
    assert sorted(path.name for path in out.iterdir()) == ["marker", "new"]
