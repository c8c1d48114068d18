# SPDX-License-Identifier: Apache-2.0
"""How an ordinary user of the test cluster gets to see a checkout that only root may enter.

Nothing of the host is changed: the folders in the way are covered by empty ones in the cluster's
own mounts, and only what the user needs is shown in these.
"""

from pathlib import Path

from tests.slurm.machine import Machine

CHECKOUT = Path(__file__).parents[2]
USER = "researcher"
UID = 4242
TMP = Path("/tmp")


def show_to_user(controller: Machine, *, folder: Path) -> None:
    """Add the user and uncover the checkout in the mounts that all machines start from.

    Args:
        controller: The machine inside of which all others are started.
        folder: Of the cluster; ``etc`` and ``home`` in it are there.
    """
    for name, line in {
        "passwd": f"{USER}:x:{UID}:{UID}:A user:{folder}/home:/bin/bash\n",
        "group": f"{USER}:x:{UID}:\n",
    }.items():
        host = Path("/etc", name).read_text()
        (folder / "etc" / name).write_text(host.rstrip("\n") + "\n" + line)
    # Names that are not in the file hosts would be asked for in the internet, 10 s each.
    (folder / "etc" / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    for name in ("passwd", "group", "nsswitch.conf", "hosts"):
        controller.run(["mount", "--bind", folder / "etc" / name, Path("/etc", name)])
    shown = _needed()
    for number, path in enumerate(shown):
        kept = folder / "shown" / str(number)
        kept.mkdir(parents=True)
        controller.run(["mount", "--rbind", path, kept])
    for cover in sorted({cover for path in shown if (cover := _closed_to_others(path))}):
        controller.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", cover])
        _bring_back(controller, cover, shown, folder)


def give_own_tmp(machine: Machine, *, folder: Path) -> None:
    """Give a machine a ``/tmp`` and shared memory that no other one sees."""
    for path in (TMP, Path("/dev/shm")):
        machine.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", path])
    _bring_back(machine, TMP, _needed(), folder)


def _bring_back(machine: Machine, cover: Path, shown: list[Path], folder: Path) -> None:
    for number, path in enumerate(shown):
        if path.is_relative_to(cover):
            machine.run(["mkdir", "-p", path])
            machine.run(["mount", "--rbind", folder / "shown" / str(number), path])


def _needed() -> list[Path]:
    """The checkout, its environment, and the Python that this environment refers to."""
    environment = CHECKOUT / ".venv"
    python = (environment / "bin" / "python").resolve()
    paths = {CHECKOUT.resolve(), environment.resolve(), python.parents[1]}
    outer = {path for path in paths for other in paths - {path} if path.is_relative_to(other)}
    return sorted(path for path in paths - outer if path != Path("/usr"))


def _closed_to_others(path: Path) -> Path | None:
    """Outermost folder above ``path`` that only its owner may enter."""
    above = reversed(path.parents)
    return next((folder for folder in above if not folder.stat().st_mode & 0o001), None)
