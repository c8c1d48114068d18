# SPDX-License-Identifier: Apache-2.0
"""A plan in words: sizes in GiB, estimates named as such."""

from collections.abc import Mapping
from typing import Any

from fastvideo.cost import disk
from fastvideo.cost.memory import GIB

NO_PARTS = ("total", "sampling", "host", "staged", "host_of_node")
"""Keys of a transformer's memory that are no part of what a GPU holds in a step."""


def describe(planned: Mapping[str, Any]) -> str:
    """The plan for people; sizes in GiB, estimates named as such."""
    lines = _about(planned)
    for name, figures in planned["transformers"].items():
        lines += _figures(name, figures, planned["machine"])
    stored, data = planned["disk"], planned["data"]
    clip = size_of(data["bytes_per_clip"])
    each = max(stored["checkpoint_bytes"].values())
    assumed = "" if data["measured"] else f", a caption counted as {disk.CAPTION_TOKENS} tokens"
    lines.append(
        f"disk        checkpoints {size_of(stored['checkpoints_bytes'])}: at most "
        f"{stored['checkpoints']} of {size_of(each)} for each transformer; export "
        f"{size_of(stored['export_bytes'])}; shards {clip} a clip{assumed}"
    )
    if data["clips"] is None:
        lines.append("epoch       unknown until preprocess has planned the clips")
    elif data["clips"]:
        lines.append(
            f"epoch       {data['clips']} clips, {data['steps_per_epoch']:.1f} steps; "
            f"{data['epochs']:.1f} epochs in all"
        )
    for kind in ("notes", "problems"):
        if planned[kind]:
            lines += [kind, *(f"  {remark}" for remark in planned[kind])]
    return "\n".join(lines)


def _about(planned: Mapping[str, Any]) -> list[str]:
    model, machine, batch = planned["model"], planned["machine"], planned["batch"]
    device = machine["device"]
    gpu = (
        f"{device['name']}, {device['memory_gib']:.1f} GiB"
        if device
        else "unknown: name one as device of a cluster, see --cluster"
    )
    where = "on CPUs, as train.device says" if machine["is_cpu"] else f"GPU {gpu}"
    lines = [
        f"model       {model['family']} {model['task']}; configs: {model['config']}",
        f"machine     {counted(machine['nodes'], 'node')}, "
        f"{counted(machine['processes'], 'process')}, {where}",
    ]
    for clip in planned["buckets"]:
        others = f", {clip['image_tokens']} of the image" if clip["image_tokens"] else ""
        lines.append(
            f"clip        {clip['num_frames']} x {clip['height']} x {clip['width']}, latent "
            f"{' x '.join(map(str, clip['latent']))}: {clip['video_tokens']} tokens, "
            f"{clip['text_tokens']} of the text{others}"
        )
    lines.append(
        f"batch       {counted(batch['global'], 'sample')} a step: "
        f"{counted(batch['groups'], 'group')} with "
        f"{counted(batch['micro_batches_per_step'], 'micro-batch')} of {batch['micro']}"
    )
    return lines


def _figures(name: str, figures: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    work, chosen = figures["flops_per_sample"], figures["layout"]
    attention = work["attention"] / work["dense_equivalent"]
    model, hardware = figures["flops_per_step"], figures["hardware_flops_per_step"]
    lines = [
        name,
        f"  size      {figures['parameters']:,} parameters{_trained(figures)}",
        f"  compute   {_flop(figures['flops_per_step'])} a step, {attention:.0%} of it attention"
        + (f"; {_flop(hardware)} with what is computed again" if hardware > model else ""),
    ]
    if chosen is not None:
        needed = figures["memory"]
        parts = ", ".join(
            f"{part} {size_of(size)}"
            for part, size in needed.items()
            if size and part not in NO_PARTS
        )
        each = "process" if machine["is_cpu"] else "GPU"
        lines += [
            f"  layout    replicate {chosen['replicate']} x shard {chosen['shard']}, sequence "
            f"{chosen['sequence']}; {chosen['reason']}",
            f"  memory    {size_of(needed['total'])} of each {each}: {parts}",
        ]
        if needed["sampling"]:
            held = size_of(needed["sampling"])
            lines.append(f"  samples   {held} of each {each} while videos are made, by an estimate")
        lines += _host_lines(figures, machine)
    if chosen is not None and not machine["is_cpu"]:
        smallest = figures["smallest_device"] or "none that is known"
        verdict = _verdict(figures["fits"])
        lines.append(f"  fits      {verdict}; the smallest GPU that would do: {smallest}")
    if figures["step_s"] is not None:
        lines.append(
            f"  time      about {figures['step_s']:.3g} s a step, {figures['hours']:.3g} hours, if "
            f"{figures['assumed_efficiency']:.0%} of {machine['device']['name']}'s peak is reached "
            "(an assumption)"
        )
    return lines


def _trained(figures: Mapping[str, Any]) -> str:
    """What trains where it is not everything."""
    if not figures["adapters"]:
        return ""
    adapters = counted(figures["adapters"], "adapter")
    return f", frozen beside {adapters}; {figures['trained_parameters']:,} train"


def _host_lines(figures: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    """What waits in host memory; none if nothing does."""
    needed, host_gib = figures["memory"], machine["host_gib"]
    if not needed["host_of_node"]:
        return []
    each = needed["host_of_node"] * machine["nodes"] // machine["processes"]
    return [
        f"  host      {size_of(needed['host_of_node'])} of each node: for each process "
        + size_of(each)
        + copies(each, needed["staged"])
        + (f"; a node has {host_gib} GiB" if host_gib else "")
    ]


def copies(host: int, staged: int) -> str:
    """Which part of a process's host memory asynchronous checkpoints take."""
    part = "all" if staged == host else size_of(staged)
    return f", {part} of it copies of checkpoints" if staged else ""


def _verdict(fits: bool | None) -> str:
    return {True: "yes", False: "no", None: "not judged without a device"}[fits]


def size_of(size: int) -> str:
    """Bytes, written as GiB or MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.3g} MiB"


def _flop(count: int) -> str:
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count / 1e9:.4g} GFLOP"


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 node``, ``2 processes``."""
    plural = f"{noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"
    return f"{number} {noun if number == 1 else plural}"
