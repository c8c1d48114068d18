# SPDX-License-Identifier: Apache-2.0
"""What the launcher's environment may say of several nodes."""

import pytest

from fastvideo.errors import UserError
from fastvideo.train.node.nodes import Nodes, read_nodes, read_rank

TWO = {
    "FASTVIDEO_NODES": "2",
    "FASTVIDEO_NODE_RANK": "1",
    "FASTVIDEO_RENDEZVOUS": "node1:29500",
    "FASTVIDEO_LAUNCH_ID": "1234-0",
}


def test_the_four_variables_say_it_all_and_none_means_alone() -> None:
    assert read_nodes({"RANK": "3", "WORLD_SIZE": "8"}) == Nodes(), "others' variables mean nothing"
    assert read_nodes(TWO) == Nodes(2, 1, "node1:29500", "1234-0")
    assert read_nodes({**TWO, "FASTVIDEO_RENDEZVOUS": "[fe80::1]:29500"}).rendezvous
    assert read_nodes(TWO).shifted(1).rendezvous == "node1:29501"
    assert Nodes().shifted(1) == Nodes()


def test_a_rank_may_be_left_to_the_variable_that_counts_the_nodes() -> None:
    told = {**TWO, "FASTVIDEO_NODE_RANK": "$SLURM_PROCID"}
    assert read_nodes({**told, "SLURM_PROCID": "1"}).rank == 1
    assert read_nodes({**told, "SLURM_PROCID": "0"}).rank == 0
    for value, said in (("", "SLURM_PROCID is not set"), ("x", "SLURM_PROCID=x: is not a whole")):
        with pytest.raises(UserError, match=said):
            read_nodes({**told, "SLURM_PROCID": value})
    with pytest.raises(UserError, match="count from 0 to 1"):
        read_nodes({**told, "SLURM_PROCID": "2"})
    assert read_rank({}) == 0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FASTVIDEO_NODES", "0", "not a whole number from 1"),
        ("FASTVIDEO_NODES", "two", "not a whole number"),
        ("FASTVIDEO_NODES", "", "set without FASTVIDEO_NODES"),
        ("FASTVIDEO_NODE_RANK", "2", "count from 0 to 1"),
        ("FASTVIDEO_NODE_RANK", "-1", "not a whole number from 0"),
        ("FASTVIDEO_NODE_RANK", "", "set without FASTVIDEO_NODE_RANK"),
        ("FASTVIDEO_RENDEZVOUS", "node1", "not host:port"),
        ("FASTVIDEO_RENDEZVOUS", ":29500", "not host:port"),
        ("FASTVIDEO_RENDEZVOUS", "node1:99999", "not host:port"),
        ("FASTVIDEO_RENDEZVOUS", "tcp://node1:1", "not host:port"),
        ("FASTVIDEO_RENDEZVOUS", "", "set without FASTVIDEO_RENDEZVOUS"),
        ("FASTVIDEO_LAUNCH_ID", "../1234", "names a folder"),
        ("FASTVIDEO_LAUNCH_ID", "", "set without FASTVIDEO_LAUNCH_ID"),
    ],
)
def test_a_wrong_or_missing_variable_is_named(name: str, value: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_nodes({**TWO, name: value})
    assert name in str(caught.value)
