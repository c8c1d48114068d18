# SPDX-License-Identifier: Apache-2.0
"""Compiled blocks: one graph for all of them, and the numbers of those that are not compiled."""

from typing import Any

import pytest
from torch import Tensor
from torch._dynamo.utils import counters

from fastvideo.models import wan_forward
from fastvideo.models.execution import Execution
from tests.gradients import gradients, relative
from tests.unit.models import test_wan_forward as wan

FUSED = 5e-5
"""What another order of operations in fused kernels may change, relative."""


def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**given)
    return output


@pytest.mark.timeout(400)
def test_compiled_blocks_compute_the_same_from_one_graph() -> None:
    found = {}
    for how in (Execution(), Execution("selective", compile=True)):
        model = wan.build("t2v")
        wan_forward.attach(model, how)
        counters.clear()
        found[how] = gradients(run, model, wan.inputs("t2v"), fixed=("timestep",))
    plain, compiled = found.values()
    assert counters["stats"]["unique_graphs"] == 1, "two blocks share it"
    assert not counters["graph_break"]
    for name, gradient in plain.items():
        assert relative(compiled[name], gradient) <= FUSED, name
