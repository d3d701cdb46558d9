"""What a client keeps from round to round: a strategy's slots, its optimizer's moments, tensors of its own.

One flat mapping of named tensors a client and round. Which round's a client starts from is the coordinator's to say:
that of the last update of the client that counted, by the key that `fedmp.records.state_key` makes of its round and of
the generation of the pipeline that trained it. So a round that is redone starts from the same state again, and what
was learnt in a round that came to nothing is forgotten.

Files lie in `CLIENT/KEY/PART.safetensors`: each device writes a part, under the names of the whole model, and reads
from all parts, so that a client whose model is cut anew over other devices goes on exactly, where its devices share
the folder. Nothing is written where nothing is kept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedmp.records import round_of_key
from fedmp.strategy import Scope

__all__ = ["ClientState", "StateStore", "select", "tensor_of", "usable"]

ClientState = Mapping[str, torch.Tensor]


def select(state: ClientState, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def tensor_of(state_name: str) -> str:
    """The model's tensor that a tensor of a state belongs to.

    Names are `KIND/TENSOR` for values of tensors ("own", "base") and `KIND/WHAT/TENSOR` for all else.

    Example:
        >>> tensor_of("kept/control/head.weight"), tensor_of("own/head.weight")
        ('head.weight', 'head.weight')
    """
    kind, _, rest = state_name.partition("/")
    return rest if kind in ("own", "base") else rest.partition("/")[2]


def usable(state: ClientState, scope: Scope, names: Iterable[str], *, key: str, round: int) -> ClientState:
    """What of a client's state a round can go on with.

    Values of its own that are incomplete, or too old to be mixed with what comes in, are left out.

    Args:
        state: as the client kept it.
        scope: what of the model travels.
        names: of the model's tensors, or of those of some stages.
        key: of the state.
        round: about to begin.
    """
    is_old = bool(scope.fragments) and round_of_key(key) != round - 1
    if not is_old and all(f"own/{name}" in state for name in scope.kept(names)):
        return state
    return {name: tensor for name, tensor in state.items() if not name.startswith(("own/", "base/"))}


class StateStore:
    """States of clients, each in a folder of its own.

    Args:
        folder: of all clients; made when the first state is saved. None keeps states in memory alone.
        is_durable: flush files to the disk, so that they survive a loss of power as the coordinator's do.
    """

    def __init__(self, folder: Path | None, *, is_durable: bool = True) -> None:
        self._folder = folder
        self._is_durable = is_durable
        self._memory: dict[tuple[str, str], dict[str, dict[str, torch.Tensor]]] = {}

    def load(
        self, client: str, key: str, *, wanted: Callable[[str], bool] = lambda _: True
    ) -> dict[str, torch.Tensor]:
        """A client's state.

        Args:
            client: whose.
            key: which one; empty for none yet.
            wanted: which of its tensors to read, by name.

        Returns:
            Tensors by name; empty if there is no such state, or none here. A device that shares no folder with the
            client's others has only what it has saved itself.
        """
        if not key:
            return {}
        if self._folder is None:
            parts = self._memory.get((client, key), {}).values()
            return {name: tensor for part in parts for name, tensor in part.items() if wanted(name)}
        state: dict[str, torch.Tensor] = {}
        for path in sorted((self._folder / client / key).glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as body:
                    names = [name for name in body.keys() if wanted(name) and name not in state]  # noqa: SIM118
                    state.update({name: body.get_tensor(name) for name in names})
            except (OSError, SafetensorError):  # damaged: as good as not there
                continue
        return state

    def save(self, client: str, key: str, part: str, state: ClientState, *, base: str) -> None:
        """Save a part of a client's state, whole or not at all; no state writes nothing.

        Args:
            client, key: whose and which.
            part: names the device, or whatever has this part.
            state: tensors by name.
            base: the state from which the round started; all others but these two are deleted.
        """
        if not state:
            return
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        if self._folder is None:
            kept = {(client, base), (client, key)}
            self._memory = {k: v for k, v in self._memory.items() if k[0] != client or k in kept}
            copies = {name: tensor.clone() for name, tensor in state.items()}
            self._memory.setdefault((client, key), {})[part] = copies
            return
        home = self._folder / client
        path = home / key / f"{part}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.part")
        save_file(state, unfinished)
        if self._is_durable:
            _flush(unfinished)
        os.replace(unfinished, path)
        if self._is_durable:
            _flush(path.parent)
        for other in home.iterdir():
            if other.name not in (base, key):
                shutil.rmtree(other, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
