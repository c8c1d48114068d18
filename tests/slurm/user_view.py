# SPDX-License-Identifier: Apache-2.0
"""How an ordinary user of the test cluster gets to see a checkout that only root may enter.

Nothing of the host is changed: in the cluster's own mounts, open folders that hold only what the
user needs cover those that are in the way.
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
    for path in _needed():
        place = _shown(path, folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            place.mkdir()
        else:
            place.touch()
        controller.run(["mount", "--rbind", path, place])
    for cover in {cover for path in _needed() if (cover := _closed_to_others(path))}:
        controller.run(["mount", "--rbind", _shown(cover, folder), cover])


def give_own_tmp(machine: Machine, *, folder: Path) -> None:
    """Give a machine a ``/tmp`` and shared memory that no other one sees."""
    for path in (TMP, Path("/dev/shm")):
        machine.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", path])
    # The checkout may lie there.
    for shown in _shown(TMP, folder).glob("*"):
        machine.run(["mkdir", TMP / shown.name])
        machine.run(["mount", "--rbind", shown, TMP / shown.name])


def _shown(path: Path, folder: Path) -> Path:
    """Where ``path`` is kept, in a tree that holds what the user needs and nothing else."""
    return folder / "shown" / path.relative_to("/")


def _needed() -> list[Path]:
    """The checkout, its environment, and the Python that this environment refers to.

    Of a folder that is closed to others its contents, which then appear in an open one.
    """
    environment = CHECKOUT / ".venv"
    python = (environment / "bin" / "python").resolve()
    paths = {CHECKOUT.resolve(), environment.resolve(), python.parents[1]}
    outer = {path for path in paths for other in paths - {path} if path.is_relative_to(other)}
    needed = sorted(path for path in paths - outer if path != Path("/usr"))
    return [part for path in needed for part in ([path] if _is_open(path) else path.iterdir())]


def _is_open(folder: Path) -> bool:
    return folder.stat().st_mode & 0o005 == 0o005


def _closed_to_others(path: Path) -> Path | None:
    """Outermost folder above ``path`` that only its owner may enter."""
    above = reversed(path.parents)
    return next((folder for folder in above if not folder.stat().st_mode & 0o001), None)
