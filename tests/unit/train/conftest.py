# SPDX-License-Identifier: Apache-2.0
"""Real shards of a few small random clips, written without any model."""

import json
from pathlib import Path

import pytest
import torch

from fastvideo import state
from fastvideo.data.shard import SHARD_SCHEMA, Contents, Row, write_shard
from fastvideo.state import SCHEMA_VERSION, ShardStore

CAPTIONS = {"a.mp4": 3, "b.mp4": 1, "c.mp4": 2, "d.mp4": 1, "e.mp4": 1, "h.mp4": 2, "i.mp4": 1}
"""How many captions each clip has; those from ``h`` on are held out."""


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    """One complete shard; latents (4, 2, 4, 4) far from unit normal, embeddings (L, 8)."""
    store = ShardStore(tmp_path_factory.mktemp("shards"))
    generator = torch.Generator().manual_seed(0)
    rows = [_row(name, count, generator) for name, count in CAPTIONS.items()]
    contents = Contents("made up", {})
    write_shard(store.shard(0), rows, schema=SHARD_SCHEMA, contents=contents, point="shard")
    clips = [
        {"id": name, "state": "accepted", "split": "train" if name < "h" else "heldout"}
        for name in CAPTIONS
    ]
    store.clips.write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    store.manifest.write_bytes(b"not read")
    plan = {
        "schema": SCHEMA_VERSION,
        "manifest_bytes": store.manifest.stat().st_size,
        "clips_bytes": store.clips.stat().st_size,
        "shards": {"0": {"fingerprint": contents.fingerprint}},
    }
    store.plan.write_text(json.dumps(plan))
    state.complete_plan(store)
    return store


def _row(name: str, num_captions: int, generator: torch.Generator) -> Row:
    embeddings = [torch.randn(3 + i, 8, generator=generator) for i in range(num_captions)]
    tensors = {
        "vae_latent": 5 + 3 * torch.randn(4, 2, 4, 4, generator=generator),
        "text_embedding": embeddings[0],
    }
    values = {
        "id": name,
        "file_name": name,
        "caption": "first",
        "media_type": "video",
        "width": 32,
        "height": 32,
        "num_frames": 2,
        "duration_sec": 1.0,
        "fps": 8.0,
    }
    if num_captions > 1:
        tensors["more_text_embeddings"] = torch.cat(embeddings[1:])
        values["more_text_lengths"] = [len(embedding) for embedding in embeddings[1:]]
        values["more_captions"] = ["another"] * (num_captions - 1)
    return Row(tensors, values)
