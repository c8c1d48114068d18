# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as their own files say, the same in preprocessing and sampling."""

from pathlib import Path
from typing import TYPE_CHECKING

from fastvideo.models.folder import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: Path, folder: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in ``folder`` of a model; ``tokenizer.json`` counts, not the class named.

    transformers 5 builds the classes that published models name by rules of its own: as
    ``LlamaTokenizerFast``, which HunyuanVideo's model_index.json names, Llama 3's byte-level
    vocabulary is split as Llama 2's was, and ``T5TokenizerFast`` has no byte fallback. Such a model
    would be trained and sampled on other tokens than it was made with.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    as_written = (path / folder / "tokenizer.json").is_file()
    kind = PreTrainedTokenizerFast if as_written else AutoTokenizer
    with loading(path, folder):
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
            path, subfolder=folder, local_files_only=True
        )
    return tokenizer
