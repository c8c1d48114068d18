# SPDX-License-Identifier: Apache-2.0
"""One of the processes that torchrun starts on a node: trains, and says how that ended.

``python -m fastvideo.train.node.rank BRIEF AGENT_PID``; torch is imported once signals and logs are
set.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fastvideo import log
from fastvideo.errors import (
    EXIT_DONE,
    EXIT_UNEXPECTED,
    EXIT_USER_ERROR,
    Failed,
    Stopped,
    UserError,
)
from fastvideo.state import RunDir, ShardStore
from fastvideo.train.node import lifeline
from fastvideo.train.node.brief import Brief
from fastvideo.train.node.outcome import Outcome
from fastvideo.train.node.pulse import ENDED, START, Pulse
from fastvideo.train.process import Process
from fastvideo.train.stop import StopRequest


def main(path: Path, *, agent: int) -> NoReturn:
    """Train as the brief at ``path`` says, and exit."""
    brief = Brief.read(path)
    # Set by torchrun; nothing else looks at them.
    rank, local_rank, count = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    with lifeline.tied(agent, lock=brief.directory.lock):
        _open_log(brief.launch.rank_log(rank), shown=rank == 0)
        pulse = Pulse(brief.pulses, rank=rank, local_rank=local_rank)
        pulse.beat(0, START)
        stop = StopRequest(RunDir(Path(brief.recipe["run_dir"])), asked=brief.launch.stop)
        process = Process(stop=stop, pulse=pulse, rank=rank, local_rank=local_rank, count=count)
        last = dataclasses.replace(
            _tried(lambda: _train(brief, process)), rank=rank, step=pulse.step
        )
        pulse.tell(last.text())
        pulse.beat(pulse.step, ENDED)
        with contextlib.suppress(OSError):  # a full disk, say
            last.write(brief.launch)
            with open(brief.launch.rank_log(rank), "a", encoding="utf-8") as file:
                file.write(last.traceback)  # the parent shows the first of all ranks
        codes = {"finished": EXIT_DONE, "stopped": EXIT_DONE, "user_error": EXIT_USER_ERROR}
        _leave(codes.get(last.kind, EXIT_UNEXPECTED))


def _open_log(path: Path, *, shown: bool) -> None:
    """Send everything to ``path``; what rank 0 says goes to the parent's stderr as well.

    Stacks go there on SIGUSR1 and when the interpreter crashes.
    """
    if shown:
        os.dup2(1, 2)  # stdout is the parent's stderr here, and a terminal keeps its progress bar
        log.setup(also=path)
    else:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
        log.setup()
    stacks = open(path, "a", encoding="utf-8")  # noqa: SIM115 for as long as the process lives
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)


def _train(brief: Brief, process: Process) -> None:
    from fastvideo.train import worker

    recipe = brief.load_recipe()
    plan = ShardStore(recipe.shards.path).read_plan()
    if plan is None:
        raise UserError(f"{recipe.shards.path}: the shards were changed; run preprocess")
    transformer, about = brief.transformer, brief.about
    worker.train(recipe, transformer=transformer, plan=plan, about=about, process=process)


def _tried(action: Callable[[], None]) -> Outcome:
    """How it ended, with the traceback of what nobody expected; of nobody and no step yet."""
    told = functools.partial(Outcome, 0, step=0)
    try:
        action()
    except Stopped as stopped:
        return told("stopped", message=str(stopped), by_person=stopped.by_person)
    except UserError as error:
        return told("user_error", message=str(error))
    except Failed as failure:
        return told("failed", message=str(failure))
    except Exception as error:  # told to the node's parent
        message = f"{type(error).__name__}: {error}"
        return told("error", message=message, traceback=traceback.format_exc())
    return told("finished")


def _leave(code: int) -> NoReturn:
    """Exit at once: everything is on disk, and libraries abort or hang when a partner is gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), agent=int(sys.argv[2]))
