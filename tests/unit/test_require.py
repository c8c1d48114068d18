# SPDX-License-Identifier: Apache-2.0
"""Tests of --require: skips stay skips where they are allowed and fail where they are not."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"
SKIPS = {
    "call": "import pytest\ndef test_it() -> None:\n    pytest.skip('no slurmctld')\n",
    "mark": "import pytest\n@pytest.mark.skip(reason='no slurmctld')\ndef test_it(): ...\n",
    "fixture": (
        "import pytest\n@pytest.fixture\ndef cluster():\n    pytest.skip('no slurmctld')\n"
        "def test_it(cluster): ...\n"
    ),
    "module": "import pytest\npytest.skip('no slurmctld', allow_module_level=True)\n",
    "import": "import pytest\npytest.importorskip('no_such', reason='no slurmctld')\n",
}


@pytest.fixture
def house(pytester: pytest.Pytester) -> pytest.Pytester:
    tests = pytester.mkdir("tests")
    (tests / "conftest.py").write_text(CONFTEST.read_text())
    return pytester


def add(house: pytest.Pytester, path: str, text: str) -> None:
    file = house.path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def run(house: pytest.Pytester, *args: str) -> pytest.RunResult:
    return house.runpytest_inprocess("-p", "no:cacheprovider", *args)


@pytest.mark.parametrize("form", SKIPS)
def test_a_skip_in_a_required_suite_fails_with_its_reason(
    house: pytest.Pytester, form: str
) -> None:
    add(house, "tests/slurm/test_submit.py", SKIPS[form])
    result = run(house, "--require", "slurm")
    assert result.ret != 0
    assert result.parseoutcomes().get("skipped", 0) == 0
    result.stdout.fnmatch_lines(["*--require slurm forbids this skip:*no slurmctld*"])


@pytest.mark.parametrize("form", SKIPS)
def test_a_skip_elsewhere_stays_a_skip(house: pytest.Pytester, form: str) -> None:
    add(house, "tests/slurm/test_submit.py", SKIPS[form])
    add(house, "tests/unit/test_sum.py", "def test_sum(): assert 1 + 1 == 2\n")
    result = run(house, "--require", "unit,integration")
    result.assert_outcomes(passed=1, skipped=1)
    assert result.ret == 0


def test_an_expected_failure_is_no_skip(house: pytest.Pytester) -> None:
    add(
        house,
        "tests/unit/test_bug.py",
        "import pytest\n@pytest.mark.xfail\ndef test_bug(): assert False\n",
    )
    result = run(house, "--require=unit", "tests/unit")
    result.assert_outcomes(xfailed=1)


def test_an_unknown_suite_is_refused(house: pytest.Pytester) -> None:
    result = run(house, "--require", "unti")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--require: no suite unti; use unit, integration*"])


@pytest.mark.parametrize("required", [False, True])
def test_gpu_tests_need_a_cuda_device(house: pytest.Pytester, required: bool) -> None:
    add(house, "torch.py", "class cuda:\n    is_available = staticmethod(lambda: False)\n")
    add(house, "tests/gpu/test_kernel.py", "def test_kernel(): ...\n")
    house.makepyprojecttoml("[tool.pytest.ini_options]\npythonpath = '.'\n")
    result = house.runpytest_subprocess(*(["--require", "gpu"] if required else []))
    result.assert_outcomes(errors=int(required), skipped=int(not required))
