"""Processes that another launcher has started: torchrun, or srun of SLURM."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.distributed.rendezvous import rendezvous

_FIRST_PORT, _PORTS = 49152, 16384  # the private ones


@dataclass(frozen=True)
class Launched:
    """This process's place among those of a job, in the words of ``torch.distributed``.

    Attributes:
        by: name of the launcher.
        rank, world_size: of all processes.
        local_rank, local_world_size: of the processes of this machine, as many as on any other.
        address, port: where the process of rank 0 waits for the others.
        attempt: how often torchrun has started them anew.
    """

    by: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    attempt: int = 0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Launched | None":
        """The place that the environment names; None for a process that stands alone.

        torchrun's variables go before SLURM's. Those of a SLURM job are of no meaning in its batch
        script, only in what srun starts, which has those of a step as well.

        Args:
            environ: the environment's variables.

        Raises:
            ValueError: if a variable is missing or no number, with its name, or SLURM's machines
                run different numbers of tasks, or torchrun could not start the processes anew.
        """
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return cls._from_torchrun(environ)
        if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
            return cls._from_slurm(environ)
        return None

    @classmethod
    def _from_torchrun(cls, environ: Mapping[str, str]) -> "Launched | None":
        world_size = _number(environ, "WORLD_SIZE")
        if world_size == 1:
            return None
        # What processes have left in torchrun's own store would meet those that it starts anew on
        # other ports (PyTorch's issue 135712), and each machine counts for itself.
        alone = environ.get("GROUP_WORLD_SIZE", "1") == "1"
        shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if not alone and shared and environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            raise ValueError(
                "torchrun --max-restarts on several machines needs --rdzv-backend c10d and the"
                " variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: PyTorch cannot start processes"
                " anew without (its issue 135712). Set it on each machine."
            )
        return cls(
            "torchrun",
            _number(environ, "RANK"),
            world_size,
            _number(environ, "LOCAL_RANK"),
            _number(environ, "LOCAL_WORLD_SIZE"),
            _text(environ, "MASTER_ADDR"),
            _number(environ, "MASTER_PORT"),
            int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if alone else 0,
        )

    @classmethod
    def _from_slurm(cls, environ: Mapping[str, str]) -> "Launched | None":
        world_size = _number(environ, "SLURM_STEP_NUM_TASKS")
        if world_size == 1:
            return None
        each = _text(environ, "SLURM_STEP_TASKS_PER_NODE")
        if not (found := re.fullmatch(r"(\d+)(\(x\d+\))?", each)):
            raise ValueError(
                f"SLURM_STEP_TASKS_PER_NODE is '{each}', expected the same number of tasks on each"
                " machine; give srun --ntasks-per-node."
            )
        if "MASTER_PORT" in environ:
            port = _number(environ, "MASTER_PORT")
        else:
            port = _FIRST_PORT + _number(environ, "SLURM_JOB_ID") % _PORTS
        return cls(
            "srun",
            _number(environ, "SLURM_PROCID"),
            world_size,
            _number(environ, "SLURM_LOCALID"),
            int(found[1]),
            environ.get("MASTER_ADDR") or first_host(_text(environ, "SLURM_STEP_NODELIST")),
            port,
        )

    def check(self) -> None:
        """Compares with this machine's GPUs.

        Raises:
            ValueError: if there is not one for each of the processes here.
        """
        gpus = torch.cuda.device_count()
        if torch.cuda.is_available() and self.local_world_size > gpus:
            raise ValueError(
                f"{self.by} has started {self.local_world_size} processes on this machine, but each"
                f" sees {gpus} GPUs; start as many at most, and let each see all of them (srun"
                " --gpus-per-node, not --gpus-per-task)."
            )

    def join(self) -> None:
        """Waits for the other processes and makes Detectron2's groups with them, as its own
        ``launch`` does; the process leaves them by its end."""
        on_gpu = torch.cuda.is_available()
        place = {"rank": self.rank, "world_size": self.world_size}
        url = f"tcp://{self.address}:{self.port}"
        store, *_ = next(rendezvous(url, **place, timeout=DEFAULT_TIMEOUT))
        dist.init_process_group(
            backend="NCCL" if on_gpu else "GLOO",
            store=dist.PrefixStore(f"attempt_{self.attempt}", store),
            timeout=DEFAULT_TIMEOUT,
            **place,
        )
        comm.create_local_process_group(self.local_world_size)
        if on_gpu:
            torch.cuda.set_device(self.local_rank)
        comm.synchronize()


def first_host(nodes: str) -> str:
    """The first machine of a list as SLURM writes it, as ``scontrol show hostnames`` does.

    >>> first_host("gpu[03-05,9],login")
    'gpu03'
    """
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.match(r"(?:\[[^]]*\]|[^,\[])*", nodes)[0])


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise ValueError(
            f"the environment names this process one of several but lacks {name}; start it by"
            " torchrun or srun, or unset RANK and WORLD_SIZE."
        )
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    value = _text(environ, name)
    if not value.isdecimal():
        raise ValueError(f"the environment's {name} is '{value}', expected a whole number.")
    return int(value)
