# SPDX-License-Identifier: Apache-2.0
"""What a recipe will take on a cluster, from configs alone: no torch, no weights, no GPU."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastvideo import state
from fastvideo.config.cluster import Cluster
from fastvideo.config.devices import DEVICES, Device, find_device
from fastvideo.config.recipe import Recipe
from fastvideo.cost import disk, duration, flops, layout
from fastvideo.cost.fit import nearest_fit
from fastvideo.cost.layout import Layout
from fastvideo.cost.memory import GIB, memory, micro_batch
from fastvideo.cost.transformer import latent_shape, parameters, tokens_of
from fastvideo.errors import UserError
from fastvideo.models.published import Config, transformer_configs
from fastvideo.state import ShardStore


@dataclass(frozen=True)
class Machine:
    """Where training is to run; ``device`` is None where the cluster does not name it."""

    nodes: int
    per_node: int
    device: Device | None
    assumed: bool = False
    """Whether nothing said how many processes there are."""

    @property
    def processes(self) -> int:
        """All of them."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Remarks:
    """What keeps training from running as asked, and what is good to know."""

    problems: list[str]
    notes: list[str]


def plan(recipe: Recipe, cluster: Cluster | None = None) -> dict[str, Any]:
    """Say what training takes, and every reason why it cannot run as the recipe says.

    Args:
        recipe: What is trained.
        cluster: Where; without it one node with as many processes as the recipe says, or one, and
            GPUs that are not known.

    Returns:
        Plain values, sizes in bytes; docs/plan.md lists the keys.

    Raises:
        UserError: The model's folder is not what the recipe says, or damaged.
    """
    machine, problems = _machine(recipe, cluster)
    remarks = Remarks(problems, [])
    configs, source = transformer_configs(recipe)
    trained = {
        folder: _transformer(recipe, config, machine, folder, remarks)
        for folder, config in configs.items()
    }
    config = next(iter(configs.values()))
    tokens, clip = tokens_of(recipe, config), recipe.clip
    return {
        "model": {**recipe.model.model_dump(), "config": source},
        "machine": {
            "nodes": machine.nodes,
            "processes": machine.processes,
            "device": asdict(machine.device) if machine.device else None,
        },
        "buckets": [
            {
                **clip.model_dump(),
                "latent": list(latent_shape(recipe)),
                "video_tokens": tokens.video,
                "text_tokens": tokens.text,
                "image_tokens": tokens.image,
            }
        ],
        "batch": _batch(recipe, machine),
        "transformers": trained,
        "data": _data(recipe, config),
        "disk": _disk(recipe, configs),
        "problems": list(dict.fromkeys(remarks.problems)),
        "notes": list(dict.fromkeys(remarks.notes)),
    }


def _machine(recipe: Recipe, cluster: Cluster | None) -> tuple[Machine, list[str]]:
    asked = recipe.parallel.processes
    if cluster is None:
        parallel = recipe.parallel
        count = asked or (parallel.replicate or 1) * (parallel.shard or 1)
        said = asked or parallel.replicate or parallel.shard or parallel.sequence > 1
        return Machine(1, count, None, assumed=not said), []
    gpus = cluster.gpus_per_node
    problems: list[str] = []
    if asked and gpus and asked > gpus:
        problems.append(
            f"parallel.processes={asked}: a node of the cluster has {gpus} GPUs; use {gpus} or "
            "leave it empty"
        )
    device = find_device(cluster.device) if cluster.device else None
    return Machine(cluster.nodes, asked or gpus or 1, device), problems


# ---------------------------------------------------------------- one transformer


def _transformer(
    recipe: Recipe, config: Config, machine: Machine, folder: str, remarks: Remarks
) -> dict[str, Any]:
    """Figures of one transformer in training; what is wrong goes to ``remarks``."""
    processes, device = machine.processes, machine.device
    try:
        model = flops.training_flops(recipe, config)
        hardware = flops.hardware_flops(recipe, config)
    except KeyError as error:
        raise UserError(
            f"model.path={recipe.model.path}: {folder}/config.json has no {error.args[0]}; fetch "
            "it again"
        ) from None
    batch = recipe.train.global_batch_size
    step_s = duration.step_s(recipe, config, processes=processes, device=device) if device else None
    found: dict[str, Any] = {
        "parameters": parameters(config, recipe.model.family),
        "flops_per_sample": {**asdict(model), "dense_equivalent": model.dense_equivalent},
        "flops_per_step": model.actual * batch,
        "hardware_flops_per_step": hardware.actual * batch,
        "step_s": step_s,
        "hours": step_s * recipe.train.steps / 3600 if step_s else None,
        "assumed_efficiency": duration.EFFICIENCY,
        "layout": None,
        "memory": None,
        "fits": None,
        "smallest_device": None,
    }
    wrong = layout.problems(recipe, config, processes=processes)
    remarks.problems.extend(wrong)
    return found if wrong else {**found, **_placed(recipe, config, machine, folder, remarks)}


def _placed(
    recipe: Recipe, config: Config, machine: Machine, folder: str, remarks: Remarks
) -> dict[str, Any]:
    """The layout and what each GPU holds."""
    device = machine.device
    limit = device.memory_gib if device else DEVICES[-1].memory_gib
    chosen = layout.choose(
        recipe,
        config,
        processes=machine.processes,
        memory_gib=None if recipe.train.device == "cpu" else limit,
    )
    needed = memory(recipe, config, processes=machine.processes, shard=chosen.shard)
    fits = needed.total <= device.memory_gib * GIB if device else None
    enough = [known.name for known in DEVICES if known.memory_gib * GIB >= needed.total]
    if fits is False or not enough:
        what = f"{folder}: {_asked(chosen)} needs {layout.describe(needed)} on each GPU"
        kind = remarks.notes if machine.assumed else remarks.problems
        kind.append(f"{what}, {_way_out(recipe, config, machine)}")
    return {
        "layout": {**asdict(chosen), "data": chosen.data},
        "memory": {**asdict(needed), "total": needed.total},
        "fits": fits,
        "smallest_device": enough[0] if enough else None,
    }


def _asked(chosen: Layout) -> str:
    return f"parallel.replicate={chosen.replicate} parallel.shard={chosen.shard}"


def _way_out(recipe: Recipe, config: Config, machine: Machine) -> str:
    """Say what the GPU has and the nearest setting that fits, on more GPUs if it must be."""
    device, processes = machine.device, machine.processes
    verdict = "{name} has {gib:.1f} GiB; " if device else "no known GPU has that; on {name} "
    device = device or find_device("H100-80GB")
    assert device is not None
    verdict = verdict.format(name=device.name, gib=device.memory_gib)
    numbers = [processes * factor for factor in (1, 2, 4, 8, 16)]
    for number in numbers:
        setting = nearest_fit(
            recipe,
            config,
            processes=number,
            memory_gib=device.memory_gib,
            offload=not machine.assumed,
        )
        if setting is not None:
            more = f" on {number} GPUs" if number > processes else ""
            host = setting.memory.host
            held = f", and {host / GIB:.0f} GiB of the host for each process" if host else ""
            return (
                f"{verdict}use {setting.overrides}{more}: {layout.describe(setting.memory)}{held}"
            )
    return f"{verdict}no layout of up to {numbers[-1]} fits: use smaller clips or larger GPUs"


def _batch(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    micro = micro_batch(recipe, processes=machine.processes)
    groups = max(1, machine.processes // recipe.parallel.sequence)
    each = recipe.train.global_batch_size // groups
    return {
        "global": recipe.train.global_batch_size,
        "groups": groups,
        "micro": micro,
        "micro_batches_per_step": max(1, each // micro),
    }


# ---------------------------------------------------------------- data and disk


def _data(recipe: Recipe, config: Config) -> dict[str, Any]:
    """Clips and epochs, None until preprocessing has planned them; bytes of a clip."""
    found: dict[str, Any] = {
        "clips": None,
        "steps_per_epoch": None,
        "epochs": None,
        "bytes_per_clip": disk.sample_bytes(recipe, config),
        "measured": False,
        "shard_bytes": None,
    }
    store = ShardStore(recipe.shards.path)
    planned = store.read_plan()
    if planned is None:
        return found
    rows = [row for row in state.ledger(store, planned) if row.state in ("encoded", "pending")]
    clips = sum(row.split == "train" for row in rows)
    batch = recipe.train.global_batch_size
    found["clips"] = clips
    found["steps_per_epoch"] = clips / batch
    found["epochs"] = recipe.train.steps * batch / clips if clips else None
    size, written = _shard_bytes(store, planned)
    if written:
        found |= {"bytes_per_clip": round(size / written), "measured": True}
    return {**found, "shard_bytes": found["bytes_per_clip"] * len(rows)}


def _shard_bytes(store: ShardStore, planned: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes and rows of the shards that are there."""
    markers = [state.read_marker(store.shard(index)) for index in map(int, planned["shards"])]
    done = [marker for marker in markers if marker is not None]
    return sum(marker["bytes"] for marker in done), sum(len(marker["rows"]) for marker in done)


def _disk(recipe: Recipe, configs: Mapping[str, Config]) -> dict[str, Any]:
    one = {name: disk.checkpoint_bytes(recipe, config) for name, config in configs.items()}
    count = disk.checkpoint_count(recipe)
    return {
        "checkpoint_bytes": one,
        "checkpoints": count,
        "checkpoints_bytes": count * sum(one.values()),
        "export_bytes": sum(disk.export_bytes(recipe, config) for config in configs.values()),
    }


# ---------------------------------------------------------------- for people


def describe(planned: Mapping[str, Any]) -> str:
    """The plan for people; sizes in GiB, estimates named as such."""
    lines = _about(planned)
    for name, figures in planned["transformers"].items():
        lines += _figures(name, figures, planned["machine"])
    stored, data = planned["disk"], planned["data"]
    each = max(stored["checkpoint_bytes"].values())
    assumed = "" if data["measured"] else f", a caption counted as {disk.CAPTION_TOKENS} tokens"
    lines.append(
        f"disk        checkpoints {_size(stored['checkpoints_bytes'])}: at most "
        f"{stored['checkpoints']} of {_size(each)} for each transformer; export "
        f"{_size(stored['export_bytes'])}; shards {_size(data['bytes_per_clip'])} a clip{assumed}"
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
    lines = [
        f"model       {model['family']} {model['task']}; configs: {model['config']}",
        f"machine     {_count(machine['nodes'], 'node')}, "
        f"{_count(machine['processes'], 'process')}, GPU {gpu}",
    ]
    for clip in planned["buckets"]:
        others = f", {clip['image_tokens']} of the image" if clip["image_tokens"] else ""
        lines.append(
            f"clip        {clip['num_frames']} x {clip['height']} x {clip['width']}, latent "
            f"{' x '.join(map(str, clip['latent']))}: {clip['video_tokens']} tokens, "
            f"{clip['text_tokens']} of the text{others}"
        )
    lines.append(
        f"batch       {_count(batch['global'], 'sample')} a step: "
        f"{_count(batch['groups'], 'group')} with "
        f"{_count(batch['micro_batches_per_step'], 'micro-batch')} of {batch['micro']}"
    )
    return lines


def _figures(name: str, figures: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    work, chosen = figures["flops_per_sample"], figures["layout"]
    attention = work["attention"] / work["dense_equivalent"]
    model, hardware = figures["flops_per_step"], figures["hardware_flops_per_step"]
    lines = [
        name,
        f"  size      {figures['parameters']:,} parameters",
        f"  compute   {_flop(figures['flops_per_step'])} a step, {attention:.0%} of it attention"
        + (f"; {_flop(hardware)} with what is computed again" if hardware > model else ""),
    ]
    if chosen is not None:
        needed = figures["memory"]
        parts = ", ".join(
            f"{part} {_size(size)}"
            for part, size in needed.items()
            if size and part not in ("total", "host")
        )
        host = f"; {_size(needed['host'])} of the host for each" if needed["host"] else ""
        smallest = figures["smallest_device"] or "none that is known"
        lines += [
            f"  layout    replicate {chosen['replicate']} x shard {chosen['shard']}, sequence "
            f"{chosen['sequence']}; {chosen['reason']}",
            f"  memory    {_size(needed['total'])} of each GPU: {parts}{host}",
            f"  fits      {_verdict(figures['fits'])}; the smallest GPU that would do: {smallest}",
        ]
    if figures["step_s"] is not None:
        lines.append(
            f"  time      about {figures['step_s']:.3g} s a step, {figures['hours']:.3g} hours, if "
            f"{figures['assumed_efficiency']:.0%} of {machine['device']['name']}'s peak is reached "
            "(an assumption)"
        )
    return lines


def _verdict(fits: bool | None) -> str:
    return {True: "yes", False: "no", None: "not judged without a device"}[fits]


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.3g} MiB"


def _flop(count: int) -> str:
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count / 1e9:.4g} GFLOP"


def _count(number: int, noun: str) -> str:
    plural = f"{noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"
    return f"{number} {noun if number == 1 else plural}"
