# SPDX-License-Identifier: Apache-2.0
"""What a recipe will take on a cluster, from configs alone: no torch, no weights, no GPU."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastvideo import state
from fastvideo.config.cluster import Cluster
from fastvideo.config.devices import DEVICES, Device, find_device
from fastvideo.config.recipe import Recipe
from fastvideo.cost import disk, duration, flops, layout
from fastvideo.cost.fit import Setting, nearest_fit
from fastvideo.cost.layout import Layout
from fastvideo.cost.memory import GIB, Memory, memory, micro_batch
from fastvideo.cost.transformer import (
    count_adapters,
    latent_shape,
    parameters,
    tokens_of,
    trained_parameters,
)
from fastvideo.errors import UserError
from fastvideo.models.lora_size import comfyui_bytes
from fastvideo.models.published import Config, transformer_configs
from fastvideo.plan.text import copies, counted, size_of
from fastvideo.state import ShardStore


@dataclass(frozen=True)
class Machine:
    """Where training is to run; ``device`` is None where it is not known, and on CPUs."""

    nodes: int
    per_node: int
    device: Device | None
    host_gib: int | None = None
    """Host memory of a node, where the cluster says it."""
    is_cpu: bool = False
    """Whether the recipe asks for CPUs; then what fits is not judged."""
    assumed: bool = False
    """Whether nothing said how many processes there are."""

    @property
    def processes(self) -> int:
        """All of them."""
        return self.nodes * self.per_node

    def host(self, needed: Memory) -> int:
        """Host memory of a node, bytes."""
        return self.per_node * (needed.host + (needed.peak if self.is_cpu else 0))


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
            "is_cpu": machine.is_cpu,
            "host_gib": machine.host_gib,
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
    if recipe.train.device == "cpu":  # the launcher does not look for GPUs then
        nodes, host_gib = (cluster.nodes, cluster.memory_gib) if cluster else (1, None)
        return Machine(nodes, asked or 1, None, host_gib, is_cpu=True), []
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
    return Machine(cluster.nodes, asked or gpus or 1, device, cluster.memory_gib), problems


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
        "trained_parameters": trained_parameters(recipe, config),
        "adapters": count_adapters(recipe, config),
        "flops_per_sample": {**asdict(model), "dense_equivalent": model.dense_equivalent},
        "flops_per_step": model.actual * batch,
        "hardware_flops_per_step": hardware.actual * batch,
        "step_s": step_s,
        "hours": step_s * recipe.train.steps / 3600 if step_s else None,
        "assumed_efficiency": duration.EFFICIENCY,
        "layout": None,
        "memory": None,
        "fits": None,
        "fits_host": None,
        "smallest_device": None,
    }
    wrong = layout.problems(recipe, config, processes=processes)
    remarks.problems.extend(wrong)
    return found if wrong else {**found, **_placed(recipe, config, machine, folder, remarks)}


SAMPLES = (
    "train.samples: not counted are the working memory of decoding, which generate.vae_tiling "
    "bounds, and the time of sampling"
)


def _placed(
    recipe: Recipe, config: Config, machine: Machine, folder: str, remarks: Remarks
) -> dict[str, Any]:
    """The layout and what each GPU and each host holds."""
    device = machine.device
    chosen, smallest = _chosen(recipe, config, machine)
    needed = memory(recipe, config, processes=machine.processes, shard=chosen.shard)
    host, fits, fits_host = machine.host(needed), None, None
    if device:
        fits = needed.peak <= device.memory_gib * GIB
    if machine.host_gib and not machine.is_cpu:
        fits_host = host <= machine.host_gib * GIB
    remark = None
    if fits is False or (smallest is None and not machine.is_cpu):
        remark = f"{layout.describe(needed)} on each GPU, {_way_out(recipe, config, machine)}"
        if device and needed.total <= device.memory_gib * GIB:
            remark += "; or train.samples=null, for only sampling needs so much"
    elif fits_host is False:
        remark = _host_way_out(recipe, config, machine, needed)
    if remark:
        kind = remarks.notes if machine.assumed else remarks.problems
        kind.append(f"{folder}: {_asked(chosen)} needs {remark}")
    if needed.sampling:
        remarks.notes.append(SAMPLES)
    return {
        "layout": {**asdict(chosen), "data": chosen.data},
        "memory": {**asdict(needed), "total": needed.total, "host_of_node": host},
        "fits": fits,
        "fits_host": fits_host,
        "smallest_device": smallest.name if smallest else None,
    }


def _chosen(recipe: Recipe, config: Config, machine: Machine) -> tuple[Layout, Device | None]:
    """The layout, and the smallest GPU that would do: with the layout that it gets itself.

    Where the GPU is not known, the layout is that of the smallest one.
    """
    processes = machine.processes

    def on(device: Device | None) -> Layout:
        gib = device.memory_gib if device else None
        return layout.choose(recipe, config, processes=processes, memory_gib=gib)

    def is_enough(device: Device) -> bool:
        needed = memory(recipe, config, processes=processes, shard=on(device).shard)
        return needed.peak <= device.memory_gib * GIB

    if machine.is_cpu:
        return on(None), None
    smallest = next((device for device in DEVICES if is_enough(device)), None)
    if machine.device or not layout.is_open(recipe, processes=processes):
        return on(machine.device), smallest
    shown = smallest or DEVICES[-1]
    found = on(shown)
    reason = f"DDP or FSDP, as the GPU allows; on {shown.name} {found.reason}"
    return replace(found, reason=reason), smallest


def _asked(chosen: Layout) -> str:
    return f"parallel.replicate={chosen.replicate} parallel.shard={chosen.shard}"


def _way_out(recipe: Recipe, config: Config, machine: Machine) -> str:
    """Say what the GPU has and the nearest setting that fits, on more GPUs if it must be."""
    device = machine.device
    verdict = "{name} has {gib:.1f} GiB; " if device else "no known GPU has that; on {name} "
    device = device or find_device("H100-80GB")
    assert device is not None
    verdict = verdict.format(name=device.name, gib=device.memory_gib)
    found = _nearest(recipe, config, machine, memory_gib=device.memory_gib)
    if found is None:
        most = machine.processes * MORE[-1]
        return f"{verdict}no layout of up to {most} fits: use smaller clips or larger GPUs"
    return f"{verdict}use {found}"


def _host_way_out(recipe: Recipe, config: Config, machine: Machine, needed: Memory) -> str:
    """Say what the host has and the nearest setting that fits, on GPUs as large."""
    device, host_gib = machine.device, machine.host_gib
    gib = device.memory_gib if device else needed.peak / GIB
    found = _nearest(recipe, config, machine, memory_gib=gib)
    ways = [found] if found else []
    alone = machine.per_node * (needed.host - needed.staged)
    off = "train.checkpoint.asynchronous=false"
    assert host_gib is not None
    if needed.staged and alone <= host_gib * GIB and off not in (found or ""):
        ways.append(off)
    ways = ways or ["fewer processes on each node (parallel.processes), or nodes with more memory"]
    return (
        f"{size_of(machine.host(needed))} of host memory on each node, for each of "
        f"{counted(machine.per_node, 'process')} {_host_parts(needed)}; memory_gib of the cluster "
        f"is {host_gib}; use {'; or '.join(ways)}"
    )


MORE = (1, 2, 4, 8, 16)
"""So many times the processes are tried."""


def _nearest(recipe: Recipe, config: Config, machine: Machine, *, memory_gib: float) -> str | None:
    """Write the nearest setting that fits, on as few GPUs as can be."""
    host_gib = machine.host_gib / machine.per_node if machine.host_gib else None

    def search(recipe: Recipe) -> str | None:
        for number in (machine.processes * factor for factor in MORE):
            setting = nearest_fit(
                recipe,
                config,
                processes=number,
                memory_gib=memory_gib,
                host_gib=host_gib,
                offload=not machine.assumed,
            )
            if setting is not None:
                return _written(setting, number if number > machine.processes else None)
        return None

    found = search(recipe)
    if found is None and recipe.train.optimizer.kind == "apex_adamw":  # takes whole weights only
        found = search(_with_adamw(recipe))
        found = found and f"train.optimizer.kind=adamw, for apex_adamw fits nowhere, with {found}"
    return found


def _written(setting: Setting, processes: int | None) -> str:
    more = f" on {processes} GPUs" if processes else ""
    needed = setting.memory
    held = f", and of the host for each process {_host_parts(needed)}" if needed.host else ""
    return f"{setting.overrides}{more}: {layout.describe(needed)}{held}"


def _host_parts(needed: Memory) -> str:
    """What a process has in host memory."""
    return f"{size_of(needed.host)}{copies(needed.host, needed.staged)}"


def _with_adamw(recipe: Recipe) -> Recipe:
    optimizer = recipe.train.optimizer.model_copy(update={"kind": "adamw"})
    train = recipe.train.model_copy(update={"optimizer": optimizer})
    return recipe.model_copy(update={"train": train})


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
        "export_bytes": sum(_export_bytes(recipe, config) for config in configs.values()),
    }


def _export_bytes(recipe: Recipe, config: Config) -> int:
    more = comfyui_bytes(recipe, config) if recipe.export.comfyui else 0
    return disk.export_bytes(recipe, config) + more
