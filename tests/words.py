# SPDX-License-Identifier: Apache-2.0
"""All words that the processes of a job left."""

from fastvideo.launch.folder import PartFolder
from fastvideo.launch.word import Word


def read_words(folder: PartFolder) -> list[Word]:
    """All words that were left in the folder of a part, by task, restart and node."""
    found = filter(None, map(Word.read, folder.ended.glob("*.json")))
    return sorted(found, key=lambda word: (word.task, word.restart, word.node))
