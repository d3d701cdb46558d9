"""Several processes that simulate one job, as `torchrun` or SLURM started them: who they are, and how they talk.

Rank 0 runs the round loop; the others train what they are told. What travels is plain JSON and tensors, as between
all parts of fedmp, by `torch.distributed` on any backend and device.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from safetensors.torch import load, save

from fedmp.component import Component
from fedmp.errors import ConfigError, RoundError

__all__ = [
    "Message",
    "RankSettings",
    "Ranks",
    "begin",
    "following",
    "join_ranks",
    "leading",
    "place_in_environment",
]

Message = tuple[dict[str, Any], dict[str, torch.Tensor]]

_FIRST_PORT = 20_000


class RankSettings(Component):
    """How ranks talk, where there are several.

    Args:
        backend: of torch.distributed.
        device: on which messages travel: "cpu" for gloo, "cuda" for nccl, which takes the rank's own.
        timeout_s: after which a rank that has said nothing is taken for lost; longer than any round.
    """

    backend: Literal["gloo", "nccl"] = "gloo"
    device: str = "cpu"
    timeout_s: float = Field(default=1800.0, gt=0)


def place_in_environment() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun or `srun` tells; (0, 1) for a process by itself."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


@contextlib.contextmanager
def join_ranks(settings: RankSettings) -> Iterator[Ranks | None]:
    """Come together with the other ranks; None for a process by itself.

    A process group that the program has made already is used; one made here lives as long as the process, for its
    later jobs.

    Raises:
        ConfigError: the environment does not say where rank 0 is.
        RoundError: the ranks do not find each other, or one is lost.
    """
    rank, size = place_in_environment()
    if size == 1:
        yield None
        return
    if not dist.is_initialized():
        device = torch.device(settings.device)
        if device.type == "cuda" and device.index is None:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))))
        address, port = _meeting_point()
        try:
            dist.init_process_group(
                settings.backend,
                init_method=f"tcp://{address}:{port}" if "MASTER_ADDR" not in os.environ else "env://",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=settings.timeout_s),
            )
        except (RuntimeError, ValueError) as error:
            raise RoundError(
                f"rank {rank} of {size} found no rank 0 at {address}:{port}: {' '.join(str(error).split())[:200]}"
            ) from error
        atexit.register(_leave)
    yield Ranks(dist.get_rank(), dist.get_world_size(), torch.device(settings.device))


class Ranks:
    """The processes of one job; rank 0 tells, the others answer.

    Args:
        rank, size: this one's, and how many there are.
        device: on which messages travel.

    Attributes:
        has_begun: whether rank 0 has heard that all can begin.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self._device = device
        self.has_begun = False

    @property
    def is_first(self) -> bool:
        """Whether it is the one that runs the round loop, prints, and writes the run directory."""
        return self.rank == 0

    def tell(self, head: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Tell all others; rank 0 only.

        Raises:
            RoundError: a rank is lost.
        """
        body = self._packed(head, tensors)
        with self._explained("the others"):
            dist.broadcast(torch.tensor([len(body)], device=self._device), src=0)
            dist.broadcast(body, src=0)

    def hear(self) -> Message:
        """What rank 0 tells.

        Raises:
            RoundError: rank 0 is lost.
        """
        with self._explained("rank 0"):
            length = torch.zeros(1, dtype=torch.int64, device=self._device)
            dist.broadcast(length, src=0)
            body = torch.empty(int(length), dtype=torch.uint8, device=self._device)
            dist.broadcast(body, src=0)
        return _unpacked(body)

    def answer(self, head: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Tell rank 0 alone.

        Raises:
            RoundError: rank 0 is lost.
        """
        body = self._packed(head, tensors or {})
        with self._explained("rank 0"):
            dist.send(torch.tensor([len(body)], device=self._device), dst=0)
            dist.send(body, dst=0)

    def answer_of(self, rank: int) -> Message:
        """What one of the others tells rank 0.

        Raises:
            RoundError: that rank is lost.
        """
        with self._explained(f"rank {rank}"):
            length = torch.zeros(1, dtype=torch.int64, device=self._device)
            dist.recv(length, src=rank)
            body = torch.empty(int(length), dtype=torch.uint8, device=self._device)
            dist.recv(body, src=rank)
        return _unpacked(body)

    def add(self, flat: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' vectors, at rank 0; elsewhere of no use.

        Raises:
            RoundError: a rank is lost.
        """
        moved = flat.to(self._device)
        with self._explained("the others"):
            dist.reduce(moved, dst=0)
        return moved.cpu()

    def _packed(self, head: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        text = json.dumps(head).encode()
        body = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        joined = bytearray(len(text).to_bytes(8, "little") + text + body)
        return torch.frombuffer(joined, dtype=torch.uint8).to(self._device)

    @contextlib.contextmanager
    def _explained(self, whom: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo and nccl raise nothing more precise
            raise RoundError(
                f"rank {self.rank} of {self.size} lost {whom}: a process has ended, or was silent for too long "
                f"({' '.join(str(error).split())[:160]}). Committed rounds are kept: go on with resume=DIR"
            ) from error


@contextlib.contextmanager
def leading(ranks: Ranks) -> Iterator[Callable[..., None]]:
    """Rank 0's job: the others are told how it ends, whichever way it does.

    Yields:
        A function that tells them that it went well, with a head and tensors.
    """
    try:
        yield lambda head, tensors: ranks.tell({"do": "end", "error": "", **head}, tensors)
    except BaseException as error:
        with contextlib.suppress(RoundError):  # they may be what was lost
            if not ranks.has_begun:
                _hear_all(ranks)
            ranks.tell({"do": "end", "error": str(error) or type(error).__name__}, {})
        raise


@contextlib.contextmanager
def following(ranks: Ranks) -> Iterator[Callable[[str], Path]]:
    """Another rank's preparation: rank 0 is told how it ends, whichever way it does.

    Yields:
        A function that says that it went well, with the fingerprint of the model, and returns the run directory.
    """
    try:
        yield partial(_ready, ranks)
    except _EndedError:
        raise
    except BaseException as error:
        with contextlib.suppress(RoundError):
            ranks.answer({"error": f"rank {ranks.rank} of {ranks.size}: {error or type(error).__name__}"})
            ranks.hear()
        raise


def begin(ranks: Ranks, fingerprint: str, path: Path) -> None:
    """Let the other ranks begin; for rank 0.

    Args:
        ranks: all of them.
        fingerprint: of the model, which must be that of all.
        path: of the run directory, where clients keep what they keep.

    Raises:
        ConfigError: a rank cannot begin, or has another job.
    """
    for rank, told in enumerate(_hear_all(ranks), start=1):
        if "error" in told:
            raise ConfigError(told["error"])
        if told["fingerprint"] != fingerprint:
            raise ConfigError(
                f"rank {rank} of {ranks.size} has another model (fingerprint {told['fingerprint']}, here "
                f"{fingerprint}); start all ranks with the same command, code and data"
            )
    ranks.tell({"do": "begin", "run_dir": str(path.absolute())}, {})


def _hear_all(ranks: Ranks) -> list[dict[str, Any]]:
    """Whether each of the others can begin."""
    ranks.has_begun = True
    return [ranks.answer_of(rank)[0] for rank in range(1, ranks.size)]


def _ready(ranks: Ranks, fingerprint: str) -> Path:
    ranks.answer({"fingerprint": fingerprint})
    told, _ = ranks.hear()
    if told["do"] == "end":
        raise _EndedError(f"rank {ranks.rank} of {ranks.size} ends, because the job has: {told['error']}")
    return Path(told["run_dir"])


class _EndedError(RoundError):
    """Rank 0 has ended the job before its first round."""


def _unpacked(body: torch.Tensor) -> Message:
    joined = body.cpu().numpy().tobytes()
    end = 8 + int.from_bytes(joined[:8], "little")
    return json.loads(joined[8:end]), load(joined[end:])


def _meeting_point() -> tuple[str, int]:
    """Where rank 0 listens.

    Raises:
        ConfigError: nothing says.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is not None and port is not None:
        return address, int(port)
    nodes = re.match(r"([^\[,]+)(?:\[(\d+))?", os.environ.get("SLURM_STEP_NODELIST", ""))
    if nodes is None:
        raise ConfigError(
            "several ranks, but neither MASTER_ADDR and MASTER_PORT nor SLURM's variables say where rank 0 is; "
            "start them with torchrun or srun"
        )
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    return nodes[1] + (nodes[2] or ""), int(port or _FIRST_PORT + job % _FIRST_PORT)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
