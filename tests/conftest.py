# SPDX-License-Identifier: Apache-2.0
"""Makes skips loud where they must not happen, and keeps every test offline and on one thread.

A suite is a folder here: unit, integration, slurm, containers, gpu. Its tests may skip on a machine
that lacks what they need, and ``--require SUITE[,SUITE]`` turns such skips into failures where the
machine is meant to have it.
"""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

# Before torch is imported: two test runs side by side must not fight for the same cores.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    # On processors with AVX2 alone MKL rounds by where numbers lie in memory, unless told not to.
    MKL_CBWR="AUTO,STRICT",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    # torch's compiler starts threads that a test's forked processes would wait for in vain.
    TORCHINDUCTOR_COMPILE_THREADS="1",
)

TESTS = Path(__file__).parent
SUITES = ("unit", "integration", "slurm", "containers", "gpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        metavar="SUITE[,SUITE]",
        default="",
        help=f"a skip in these suites is a failure; suites: {', '.join(SUITES)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    unknown = sorted(_required(config) - set(SUITES))
    if unknown:
        raise pytest.UsageError(
            f"--require: no suite {', '.join(unknown)}; use {', '.join(SUITES)}"
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _suite(item) == "gpu":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail"):
        _forbid_skip(report, item)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_skip(report, collector)
    return report


def _forbid_skip(
    report: pytest.TestReport | pytest.CollectReport, node: pytest.Item | pytest.Collector
) -> None:
    """Turn a skip in a required suite into a failure that shows the reason."""
    suite = _suite(node)
    if report.outcome != "skipped" or suite not in _required(node.config):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"--require {suite} forbids this skip: {reason}"


def _required(config: pytest.Config) -> set[str]:
    return set(filter(None, config.getoption("--require").split(",")))


def _suite(node: pytest.Item | pytest.Collector) -> str:
    """Name of the folder of tests/ that holds ``node``, empty outside of them."""
    if not node.path.is_relative_to(TESTS):
        return ""
    return next(iter(node.path.relative_to(TESTS).parts), "")
