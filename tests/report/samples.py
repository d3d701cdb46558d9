"""Made-up records for the tests of the report package."""

from __future__ import annotations

from fedmp.records import ClientData, Plan, RoundRecord, StagePlan, Summary, TimedAction


def make_plan(
    num_stages: int = 3, *, device: str = "nano", forward_s: float = 0.004, long: bool = False
) -> Plan:
    """A plan of two layers a stage; the middle stage is the slowest."""
    stages = []
    for index in range(num_stages):
        is_last = index == num_stages - 1
        slow = 2.0 if index == num_stages // 2 else 1.0
        stages.append(
            StagePlan(
                device=f"{device}-{index}",
                start=2 * index,
                stop=2 * index + 2,
                forward_s=forward_s * slow,
                backward_s=2 * forward_s * slow,
                send_s=0.0 if is_last else 0.001,
                gradient_s=0.0 if is_last else 0.001,
                boundary_bytes=0 if is_last else 131_072,
                parameter_bytes=4_200_000,
                memory_bytes=1 << 30,
                device_memory_bytes=4 << 30,
                in_flight=num_stages - index,
            )
        )
    part = ".a_rather_long_module_name.feed_forward" if long else ""
    return Plan(
        layer_names=tuple(f"block.{index}{part}" for index in range(2 * num_stages)),
        stages=tuple(stages),
        partitioner="balanced",
        schedule="1f1b",
        num_microbatches=8,
        microbatch_size=4,
        step_s=0.2,
        bound_s=0.19,
        unused_devices=("spare-9",),
    )


def make_clients(count: int, num_labels: int = 10) -> tuple[ClientData, ...]:
    """Clients with unequal samples and labels."""
    rows = []
    for index in range(count):
        labels = tuple((index * 7 + label * 3) % 11 for label in range(num_labels))
        rows.append(ClientData(f"lab-{index}", sum(labels) or 100 + index, labels))
    return tuple(rows)


def make_records(count: int) -> tuple[RoundRecord, ...]:
    """Rounds that learn."""
    return tuple(
        RoundRecord(
            round=number,
            clients=("lab-0", "lab-1"),
            num_examples=400,
            train_loss=2.0 / number,
            test_loss=2.1 / number,
            test_accuracy=1.0 - 0.9 / number,
            bytes_up=1_200_000,
            bytes_down=1_300_000,
            pipeline_bytes=9_000_000,
            wall_s=4.1,
        )
        for number in range(1, count + 1)
    )


def make_summary(**changes: object) -> Summary:
    """A finished run beside a centralized one."""
    values: dict[str, object] = {
        "engine": "local",
        "rounds": 3,
        "clients": 2,
        "devices": 6,
        "num_parameters": 1_000_000,
        "final_accuracy": 0.831,
        "centralized_accuracy": 0.844,
        "samples_processed": 1200,
        "centralized_samples": 1200,
        "bytes_up": 3_600_000,
        "bytes_down": 3_900_000,
        "pipeline_bytes": 27_000_000,
        "centralized_bytes": 31_000_000,
        "wall_s": 12.3,
        "centralized_wall_s": 6.1,
    }
    return Summary.model_validate({**values, **changes})


def make_timeline(num_devices: int = 3, num_microbatches: int = 4) -> tuple[TimedAction, ...]:
    """A forward-only step: each device waits for the one before it."""
    actions = []
    for stage in range(num_devices):
        device = f"nano-{stage}"
        if stage:
            actions.append(TimedAction(device, stage, "wait", 0, 0.0, 0.01 * stage))
        for microbatch in range(num_microbatches):
            start_s = 0.01 * (stage + microbatch)
            actions.append(TimedAction(device, stage, "forward", microbatch, start_s, start_s + 0.01))
    return tuple(actions)
