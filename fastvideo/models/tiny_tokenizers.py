# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of each family's kind, made by rule; any text has tokens, none is unknown."""

import re
import string

from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

LETTERS = string.ascii_lowercase
PAIRS = [(first, second) for first in LETTERS for second in LETTERS]
LLAMA_SPECIALS = (
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<pad>",
)
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text into words."""


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's kind of tokenizer over letters and pairs of letters; other characters by their bytes."""
    singles = sorted({*string.digits, *string.ascii_letters, *string.punctuation, "▁"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(piece, -8.0) for piece in singles]
    pieces += [("".join(pair), -9.0) for pair in PAIRS]
    tokenizer = Tokenizer(token_models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's kind of tokenizer: bytes, pairs of letters, and the words of the prompt template.

    HunyuanVideo's pipeline puts the caption into a template and drops as many leading embeddings
    as the template has tokens in Llama 3's vocabulary, 95. There each of its words is one token,
    and so it is here: what remains starts with the caption's first token.
    """
    prefix = DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")[0]
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    between_specials = re.split(r"<\|\w+\|>", prefix)
    template = [word for text in between_specials for word, _ in words.pre_tokenize_str(text)]
    merges = [("Ċ", "Ċ"), *(("Ġ", letter) for letter in LETTERS), *PAIRS]  # line feed, space
    tokens = dict.fromkeys([*_bytes(), *map("".join, merges), *template, *LLAMA_SPECIALS])
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(token_models.BPE(ids, merges, ignore_merges=True))
    tokenizer.add_special_tokens(list(LLAMA_SPECIALS))
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    start = LLAMA_SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, ids[start])]
    )
    assert len(tokenizer.encode(prefix).ids) == DEFAULT_PROMPT_TEMPLATE["crop_start"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=1024,
    )


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer over bytes and pairs of letters, within and at the end of words."""
    end = "</w>"
    merges = [(first, second + end) for first, second in PAIRS] + PAIRS
    singles = [*_bytes(), *(letter + end for letter in _bytes())]
    tokens = [*singles, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=77,
    )


def _bytes() -> list[str]:
    """One printable letter for each byte, as byte-level tokenizers write them."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())
