# SPDX-License-Identifier: Apache-2.0
"""What the test cluster is like, and the files that tell Slurm so."""

import random
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
CONTROLLER = f"{NETWORK}.1"
LOGIN = f"{NETWORK}.2"


@dataclass(frozen=True)
class Settings:
    """The cluster; times are what Slurm lets pass before it does something."""

    nodes: int = 4
    cpus: int = 4
    """Of each node, whatever the machine has."""
    gpus: int = 2
    """Of each node; fake ones, which Slurm counts and hands out."""
    accounting: bool = True
    """Whether sacct works."""
    preempt_user_signal: bool = False
    """Whether a preempted job gets the signal of its ``--signal`` instead of SIGTERM."""
    grace_s: int = 30
    """From the signal of a preemption to the end of the job."""
    kill_wait_s: int = 20
    """From SIGTERM to SIGKILL."""
    node_timeout_s: int = 8
    """From a node's last answer to its being down."""
    min_job_age_s: int = 300
    """How long a job that ended is still known to squeue and scontrol."""
    max_array: int = 1001
    """One above the largest number of a task."""

    @property
    def node_names(self) -> list[str]:
        """``n1``, ``n2``, ..."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]


def address(node: str) -> str:
    """Address of ``n3``."""
    return f"{NETWORK}.{10 + int(node[1:])}"


def hosts(settings: Settings) -> str:
    """The file hosts."""
    names = {CONTROLLER: "ctl", LOGIN: "login"} | {
        address(node): node for node in settings.node_names
    }
    return "127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for ip, name in names.items())


def write_slurm_conf(settings: Settings, *, folder: Path) -> None:
    """Write the files of ``folder/slurm``; the first job's id stays if it was drawn before."""
    etc = folder / "slurm"
    first_job = folder / "etc" / "first_job"
    if not first_job.exists():
        # Clusters that all begin with job 1 hide mistakes with files named by ids of jobs.
        first_job.write_text(str(random.randrange(1000, 900_000)))
    gpus = f"Name=gpu File={folder}/gpu/fake[0-{settings.gpus - 1}]\n" if settings.gpus else ""
    texts = {
        "slurm.conf": _slurm_conf(settings, folder, int(first_job.read_text())),
        "gres.conf": gpus,
        # slurmd 22.05 starts a cgroup plugin in any case; this one touches nothing.
        "cgroup.conf": "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n",
        "slurmdbd.conf": _slurmdbd_conf(folder),
    }
    for name, text in texts.items():
        # At once: a slurmd that still reads for an earlier reconfiguration dies of half a file.
        new = etc / f".{name}"
        new.touch(mode=0o600 if name == "slurmdbd.conf" else 0o644)
        new.write_text(text)
        new.replace(etc / name)


def _slurm_conf(settings: Settings, folder: Path, first_job: int) -> str:
    gpus = f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
    nodes = "\n".join(
        f"NodeName={node} NodeAddr={address(node)} NodeHostname={node} CPUs={settings.cpus}"
        f" RealMemory=16000{gpus} State=UNKNOWN"
        for node in settings.node_names
    )
    # Credentials of 5 s: for so long a job that is queued again has to wait, 120 by default.
    return f"""\
ClusterName=lab
SlurmctldHost=ctl({CONTROLLER})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
FirstJobId={first_job}
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
{_accounting(settings, folder)}
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
{"SlurmctldParameters=preempt_send_user_signal" if settings.preempt_user_signal else ""}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxArraySize={settings.max_array}
MinJobAge={settings.min_job_age_s}
KillWait={settings.kill_wait_s}
MessageTimeout=5
SlurmdTimeout={settings.node_timeout_s}
ReturnToService=2
PropagateResourceLimits=NONE
{nodes}
PartitionName=DEFAULT Nodes=ALL DefMemPerCPU=512 MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=10 PreemptMode=REQUEUE GraceTime={settings.grace_s}
PartitionName=high PriorityTier=100 PreemptMode=OFF
"""


def _accounting(settings: Settings, folder: Path) -> str:
    if not settings.accounting:
        return "AccountingStorageType=accounting_storage/none"
    # The lasting connection to slurmdbd takes munge's socket from StoragePass, not from AuthInfo.
    return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={CONTROLLER}
AccountingStoragePass={folder}/munge.sock
AccountingStorageTRES=gres/gpu"""


def _slurmdbd_conf(folder: Path) -> str:
    return f"""\
DbdHost=ctl
DbdAddr={CONTROLLER}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""
