"""The configuration of a SLURM on one machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")  # addresses as names need no entry in /etc/hosts
GPUS_PER_NODE = 8
CPUS_PER_NODE = 128
MEMORY_PER_NODE_MB = 1_000_000
PORTS = 64  # the controller's, one per node, and the rest for srun

# Fictional hardware is accepted because of config_overrides; it is only counted, never used.
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SrunPortRange={srun_ports}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10

StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed_jobs.txt
MailProg=/bin/true
MpiDefault=none

SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
# A job's number often becomes a port or a file name, so two clusters should not count alike.
FirstJobId={first_job_id}

GresTypes=gpu
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} State=UNKNOWN \
CPUs={cpus} Sockets=2 CoresPerSocket={cores} ThreadsPerCore=1 RealMemory={memory} Gres=gpu:a800:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

_GRES_CONF = """\
AutoDetect=off
NodeName={nodes} Name=gpu Type=a800 File={folder}/nvidia[0-{last_gpu}]
"""


def write_config(folder: Path, first_port: int) -> Path:
    """Writes everything the daemons read into ``folder``, which only this cluster uses.

    Args:
        folder: existing, and with a short path: it holds a Unix socket.
        first_port: of ``PORTS`` free ones.

    Returns:
        the value for ``SLURM_CONF``.
    """
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(os.urandom(1024))
    for number in range(GPUS_PER_NODE):  # SLURM wants files of these names that are devices
        (folder / f"nvidia{number}").symlink_to("/dev/null")
    values = {
        "folder": folder,
        "host": socket.gethostname().partition(".")[0],
        "nodes": "127.0.0.[1-2]",
        "controller_port": first_port,
        "node_ports": f"[{first_port + 1}-{first_port + 2}]",
        "srun_ports": f"{first_port + 3}-{first_port + PORTS - 1}",
        "first_job_id": first_port,
        "cpus": CPUS_PER_NODE,
        "cores": CPUS_PER_NODE // 2,
        "memory": MEMORY_PER_NODE_MB,
        "gpus": GPUS_PER_NODE,
        "last_gpu": GPUS_PER_NODE - 1,
    }
    (folder / "state").mkdir()
    (folder / "gres.conf").write_text(_GRES_CONF.format(**values))
    path = folder / "slurm.conf"
    path.write_text(_SLURM_CONF.format(**values))
    return path


class PortBlock:
    """``PORTS`` neighbouring ports that nobody uses, below those that the system hands out itself.

    Attributes:
        first: the lowest.
    """

    def __init__(self) -> None:
        for first in range(20_000, 32_000, PORTS):
            # A name that at most one process of this network can hold, and that goes with the process.
            self._claim = socket.socket(socket.AF_UNIX)
            try:
                self._claim.bind(f"\0megatron_lpa-test-ports-{first}")
                for port in range(first, first + PORTS):
                    with socket.socket() as probe:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        probe.bind(("0.0.0.0", port))
            except OSError:
                self._claim.close()
                continue
            self.first = first
            return
        raise RuntimeError(f"no {PORTS} neighbouring ports are free between 20000 and 32000")

    def release(self) -> None:
        self._claim.close()
