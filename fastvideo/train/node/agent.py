# SPDX-License-Identifier: Apache-2.0
"""The process in which torchrun's machinery starts and watches the processes of a node.

``python -m fastvideo.train.node.agent BRIEF``; torch is imported once nothing can kill it by
accident.
"""

import dataclasses
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastvideo import atomic
from fastvideo.train.node import lifeline
from fastvideo.train.node.brief import Brief
from fastvideo.train.node.nodes import RENDEZVOUS_S
from fastvideo.train.node.outcome import Death
from fastvideo.train.node.pulse import read_beats

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

SHUTDOWN_S = "10"
"""What is left of a failed launch gets so long to end."""


def main(path: Path) -> int:
    """Start the node's processes, wait for them, and write down which of them failed."""
    lifeline.deaf()
    brief = Brief.read(path)
    with lifeline.tied(brief.parent, lock=brief.directory.lock):
        deaths: list[Death] = []
        error = ""
        try:
            deaths = _launch(brief, path)
        except Exception as failure:  # whatever torchrun raises, the parent is to show it
            error = f"{type(failure).__name__}: {failure}"
            raise
        finally:
            report = {
                "deaths": [dataclasses.asdict(death) for death in deaths],
                "error": error or ("processes failed" if deaths else ""),
            }
            atomic.write_json(brief.launch.ended(brief.nodes.rank), report, point="ended")
        return 1 if deaths else 0


def _launch(brief: Brief, path: Path) -> list[Death]:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // brief.processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_S)
    # Of warnings of torch's C++ code there are two: names that a DNS does not know, and a setting
    # of DDP that is meant, see fastvideo.train.parallel.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = ["-m", "fastvideo.train.node.rank", str(path), str(os.getpid())]
    try:
        elastic_launch(_config(brief), sys.executable)(*arguments)
    except ChildFailedError as failed:
        beats = read_beats(brief.pulses)
        return [
            _death(rank, failure, step=beats[rank].step if rank in beats else 0)
            for rank, failure in failed.failures.items()
        ]
    return []


def _config(brief: Brief) -> "LaunchConfig":
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    nodes = brief.nodes
    alone = nodes.count == 1
    timeout = {"timeout": RENDEZVOUS_S}
    return LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=brief.processes,
        run_id=f"{brief.launch.root.name}-{brief.transformer}",
        # Several nodes get the ranks that their launcher's numbers say, so rank 0 is on node 0.
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else nodes.rendezvous,
        rdzv_configs=timeout if alone else {**timeout, "rank": nodes.rank},
        local_addr="127.0.0.1" if alone else None,
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle="SIGQUIT",  # all others are ignored here, or end it
    )


def _death(rank: int, failure: "ProcessFailure", *, step: int) -> Death:
    return Death(
        rank=rank,
        pid=failure.pid,
        host=socket.gethostname(),
        exit_code=failure.exitcode,
        signal=failure.signal_name() if failure.exitcode < 0 else "",
        time=float(failure.timestamp),
        step=step,
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
