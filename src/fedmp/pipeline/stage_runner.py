"""The usual case: a device that runs one stage."""

from __future__ import annotations

from collections.abc import Callable

from fedmp.pipeline.options import RunnerOptions
from fedmp.pipeline.runner import DeviceRunner
from fedmp.pipeline.transport import Transport
from fedmp.records import TimedAction
from fedmp.stages import Stage
from fedmp.tasks import Task

__all__ = ["StageRunner"]

_DEFAULT_OPTIONS = RunnerOptions()


class StageRunner(DeviceRunner):
    """A device that runs one stage: its number is its stage's.

    Args:
        stage: this device's stage, with weights.
        task: the loss; used on the last stage.
        transport: to the other stages; None if the model is one stage.
        options: how to run it.
        seed: of dropout and other random calls; None leaves them to torch's global generator.
        observe: called with every timed action; None measures nothing.
        device_name: for the timed actions.
    """

    def __init__(
        self,
        stage: Stage,
        task: Task,
        transport: Transport | None = None,
        *,
        options: RunnerOptions = _DEFAULT_OPTIONS,
        seed: int | None = None,
        observe: Callable[[TimedAction], None] | None = None,
        device_name: str = "",
    ) -> None:
        blueprint = stage.blueprint
        if transport is None and blueprint.num_stages > 1:
            raise ValueError(f"{blueprint.num_stages} stages need a transport between them")
        super().__init__(
            [stage],
            task,
            transport,
            device=blueprint.index,
            placement=[(index,) for index in range(blueprint.num_stages)],
            options=options,
            seed=seed,
            observe=observe,
            device_name=device_name,
        )
        self.stage = stage
