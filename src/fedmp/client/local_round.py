"""One round of a client on the stages of one process: global stages go in, an update, a report and a state come out.

Devices and the simulating engine run this same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from fedmp.client.state import ClientState, select, tensor_of, usable
from fedmp.client.training import LocalTrainer
from fedmp.client.work import LocalWork
from fedmp.data import Dataset
from fedmp.pipeline import BatchResult, DeviceRunner
from fedmp.records import DeviceReport
from fedmp.updates import difference, trained_names

__all__ = ["LocalRound", "RoundResult"]

_OWN, _BASE = "own/", "base/"

OnStep = Callable[[int, int, BatchResult], None]


@dataclass(frozen=True, eq=False)
class RoundResult:
    """What a round left.

    Attributes:
        update: difference to the global stages, by canonical name.
        report: what goes with it.
        state: what the client keeps, by name; empty where it keeps nothing.
    """

    update: Mapping[str, torch.Tensor]
    report: DeviceReport
    state: ClientState


class LocalRound:
    """Runs rounds of a client on the stages of one of its devices.

    Args:
        runner: of these stages.
        work: what to do.
        client: the client's name, which seeds the order of its batches.
        dataset: the client's data; stages in the middle need no tensors of it.
        num_samples: of the client.
    """

    def __init__(
        self, runner: DeviceRunner, work: LocalWork, *, client: str, dataset: Dataset | None, num_samples: int
    ) -> None:
        self._stages = runner.stages
        self._work = work
        self._scope = work.scope
        self._client = client
        self._num_samples = num_samples
        self._trainer = LocalTrainer(runner, work, client=client, dataset=dataset, num_samples=num_samples)
        self._names = tuple(dict.fromkeys(name for stage in self._stages for name in stage.blueprint.state))

    def concerns(self, state_name: str) -> bool:
        """Whether a tensor of the client's state is of these stages."""
        return tensor_of(state_name) in self._names

    def usable(self, state: ClientState, *, key: str, round: int) -> ClientState:
        """What of a state this round can go on with.

        Values of its own that are incomplete, or too old to be mixed with what comes in, are left out.

        Args:
            state: as the client kept it.
            key: of the state.
            round: about to begin.
        """
        return usable(state, self._scope, self._names, key=key, round=round)

    def needs_whole(self, state: ClientState) -> bool:
        """Whether all tensors of the stages must be pulled, since the state holds no values."""
        return self._scope.keeps_values and not any(name.startswith(_OWN) for name in state)

    def run(
        self,
        pulled: Mapping[str, torch.Tensor] | Callable[[], Mapping[str, torch.Tensor]],
        state: ClientState,
        *,
        round: int,
        on_step: OnStep = lambda *_: None,
    ) -> RoundResult:
        """Train for one round.

        Args:
            pulled: the round's global stages, as far as they travel, and the server's slots; or a function that waits
                for them, called when they are needed.
            state: what the client kept and can use.
            round: its number.
            on_step: called after each step with its number, the samples done so far, and the sums so far.

        Raises:
            TrainingError: the loss is not finite, or the weights are not in the end.
            PipelineError: another device of the client is gone.
        """
        own = select(state, _OWN)
        fetch = pulled if callable(pulled) else partial(dict, pulled)
        is_late = bool(own) and self._scope.delay_steps > 0
        received = {} if is_late else fetch()
        start = self._load(received, own)
        work = self._work.of_round(self._client, round)
        evaluation = self._trainer.evaluate(round=round) if work.evaluate_first else BatchResult()
        started_s = time.monotonic()

        def after_step(step: int, samples_done: int, sums: BatchResult) -> None:
            nonlocal received
            if is_late and step + 1 == min(self._scope.delay_steps, training_steps):
                received = self._mix_in(fetch())
            on_step(step, samples_done, sums)

        training_steps = work.num_steps(self._num_samples)
        training = self._trainer.train(round=round, pulled=received, state=state, on_step=after_step)
        trained = self._trained()
        base = {n: received[n] if n in received else state.get(_BASE + n) for n in trained}
        now = start if self._scope.is_overlapped else trained
        pushed = self._scope.pushed(trained, round)
        report = DeviceReport(
            num_examples=work.num_examples(self._num_samples),
            num_samples=self._num_samples,
            num_steps=training.num_steps,
            rate_sum=training.rate_sum,
            loss_sum=training.sums.loss_sum,
            weight=training.sums.weight,
            num_correct=training.sums.num_correct,
            evaluation_loss_sum=evaluation.loss_sum,
            evaluation_weight=evaluation.weight,
            evaluation_correct=evaluation.num_correct,
            train_s=time.monotonic() - started_s,
        )
        update = difference(
            {name: now[name] for name in pushed}, {n: b for n, b in base.items() if b is not None}
        )
        return RoundResult(update, report, {**training.state, **self._values(base)})

    def _load(
        self, pulled: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Put the round's starting values into the stages; returns them."""
        values = {}
        for name in self._names:
            if name not in own:
                values[name] = pulled[name]
            elif name not in pulled:
                values[name] = own[name]
            else:
                values[name] = self._mixed(own[name], pulled[name])
        for stage in self._stages:
            stage.load_state({name: values[name] for name in stage.blueprint.state})
        return values

    def _mix_in(self, pulled: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Mix what came in meanwhile into the present values; returns it."""
        with torch.no_grad():
            for stage in self._stages:
                names = [name for name in stage.blueprint.state if name in pulled]
                for name, tensor in zip(names, stage.state_tensors(names), strict=True):
                    tensor.copy_(self._mixed(tensor, pulled[name].to(tensor.device)))
        return pulled

    def _mixed(self, own: torch.Tensor, pulled: torch.Tensor) -> torch.Tensor:
        alpha = self._scope.mixing
        return alpha * own + (1 - alpha) * pulled if alpha and own.is_floating_point() else pulled

    def _trained(self) -> dict[str, torch.Tensor]:
        """What local training changed, each tensor from the stage that owns it."""
        trained: dict[str, torch.Tensor] = {}
        for stage in self._stages:
            owned = stage.owned_state()
            names = trained_names([stage.blueprint.state[name] for name in owned])
            trained.update({name: owned[name].cpu() for name in names})
        return trained

    def _values(self, base: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """The values that the client goes on with, and those from which its next updates count."""
        values = {}
        for stage in self._stages:
            names = self._scope.kept(stage.blueprint.state)
            for name, tensor in zip(names, stage.state_tensors(names), strict=True):
                values[_OWN + name] = tensor.detach().clone()
        if self._scope.fragments:
            values.update(
                {_BASE + name: tensor.clone() for name, tensor in base.items() if tensor is not None}
            )
        return values
