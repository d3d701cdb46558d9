"""The time of a plan's step when its devices are slower than planned."""

from __future__ import annotations

from collections.abc import Sequence

from fedmp.partition.build import stage_times
from fedmp.partition.events import StageTimes, step_s
from fedmp.partition.placed_events import place, simulate_placed
from fedmp.records import Plan
from fedmp.schedule import placed_schedule_by_name

__all__ = ["slowed_step_s"]


def slowed_step_s(plan: Plan, slowness: Sequence[float]) -> float:
    """Seconds of one optimizer step, by the event simulation of the plan's schedule.

    A pipeline follows its slowest stage: a device that was idle half of the time may take twice as long for
    nothing, the busiest one may not.

    Args:
        plan: predicts the times of each stage.
        slowness: of each device in use, in order of rank: what computing takes, in multiples of the plan's.
    """
    if all(factor == 1.0 for factor in slowness):
        return plan.step_s
    factor_of = dict(zip(plan.devices, slowness, strict=True))
    factors = [factor_of[stage.device] for stage in plan.stages]
    planned = stage_times(plan.stages)
    times = StageTimes(
        forward_s=[factor * seconds for factor, seconds in zip(factors, planned.forward_s, strict=True)],
        backward_s=[factor * seconds for factor, seconds in zip(factors, planned.backward_s, strict=True)],
        send_s=planned.send_s,
        gradient_s=planned.gradient_s,
    )
    if placed_schedule_by_name(plan.schedule) is None:
        return step_s(times, plan.schedule, plan.num_microbatches)
    placed = place(plan.schedule, plan.num_devices, plan.num_microbatches)
    return simulate_placed(times, placed.actions, placed.placement)
