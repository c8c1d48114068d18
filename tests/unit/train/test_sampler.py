# SPDX-License-Identifier: Apache-2.0
"""Which videos are made side by side, which are forgotten, and what is shown of them."""

from pathlib import Path

import numpy as np
import pytest

from fastvideo.config.train import Samples
from fastvideo.state import RunDir
from fastvideo.train.sampler import Video, forget_after, rounds, strip


def videos(*steps: int) -> list[Video]:
    return [Video(i, Path(f"{i}.mp4"), {"num_inference_steps": n}) for i, n in enumerate(steps)]


@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_videos_of_a_round_take_equally_many_steps_and_each_is_made_once(groups: int) -> None:
    dealt = list(rounds(videos(50, 50, 20, 50, 20, 50), groups=groups))
    for together in dealt:
        assert len(together) <= groups
        assert len({video.about["num_inference_steps"] for video in together}) == 1
    made = [video.index for together in dealt for video in together]
    assert sorted(made) == list(range(6))
    assert len(dealt) == {1: 6, 2: 3, 3: 3, 8: 2}[groups]


def test_videos_are_due_before_the_first_step_at_multiples_and_after_the_last() -> None:
    spec = Samples(every_steps=4)
    assert [step for step in range(11) if spec.due(step, steps=10)] == [0, 4, 8, 10]
    assert spec.due(10, steps=9), "a run that was to be shorter"


def test_what_comes_after_the_start_of_a_run_is_forgotten(tmp_path: Path) -> None:
    directory = RunDir(tmp_path).training()

    def sampled() -> dict[int, list[str]]:
        for step in (0, 2, 4):
            directory.sampled(step).mkdir(parents=True, exist_ok=True)
            directory.sampled_marker(step).touch()
            (directory.sampled(step) / "0000.mp4").touch()
        return left()

    def left() -> dict[int, list[str]]:
        folders = directory.sample_folders()
        return {step: sorted(p.name for p in path.iterdir()) for step, path in folders.items()}

    both = sampled()[0]
    forget_after(directory, 2)
    assert left() == {0: both, 2: both}
    sampled()
    forget_after(directory, 0)
    assert left() == {0: ["0000.mp4"]}, "the base model may be another: looked at one by one"


def test_a_strip_is_six_frames_beside_each_other_from_the_first_to_the_last() -> None:
    frames = np.arange(81, dtype=np.uint8)[:, None, None, None] * np.ones((1, 48, 64, 3), np.uint8)
    shown = strip(frames)
    assert shown.shape == (48, 6 * 64, 3)
    assert [int(shown[0, x, 0]) for x in range(0, 6 * 64, 64)] == [0, 16, 32, 48, 64, 80]
    assert strip(np.zeros((3, 480, 832, 3), np.uint8)).shape == (240, 3 * 416, 3)
    assert strip(np.zeros((1, 32, 32, 3), np.uint8)).shape == (32, 32, 3)
