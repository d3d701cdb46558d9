"""What a job says about its pipelines, over real processes: placements, clipping, precision, bytes, traces."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmp import Job
from fedmp.data.order import one_pass
from fedmp.engine.prepare import prepare
from fedmp.errors import ConfigError, PlanError
from fedmp.learning_rate import Cosine
from fedmp.models import MLP
from fedmp.pipeline import PipelineSettings
from fedmp.schedule import Interleaved, OneFOneB, VShape, ZeroBubble
from fedmp.seeds import derive_seed
from fedmp.strategy import FedAvg
from tests.support.jobs import (
    TINY_CNN,
    TINY_GPT,
    assert_same,
    images,
    run,
    tiny_job,
    tokens,
    topology,
    weights,
)

# as in test_oracles
FLOAT32 = {"rtol": 1e-4, "atol": 2e-6}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}


def initial() -> MLP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MLP(784, (16, 12, 10)).double()


def job(**changes: Any) -> Job:
    """One client with two devices, 45 images, a partial last batch, in float64."""
    settings = {"model": initial(), "topology": topology(2), "data": images(45, dtype=torch.float64)}
    return tiny_job(**{**settings, **changes})


def by_hand(job: Job) -> dict[str, torch.Tensor]:
    """The job's only client in one process, in plain PyTorch: accumulation, clipping, learning rate and all."""
    model = copy.deepcopy(job.model)
    assert isinstance(model, nn.Module)
    data = job.source().load().train
    data = data.select(job.split.assign(data, 1, derive_seed(job.seed, "split") % 2**32)[0])
    for round in range(1, job.rounds + 1):
        optimizer = job.optimizer(list(model.parameters()))
        rates = [group["lr"] for group in optimizer.param_groups]
        order = one_pass(len(data), seed=job.seed, client="c0", round=round, epoch=0)
        steps = order.split(job.batch_size * job.accumulate_batches)
        for step, indices in enumerate(steps):
            x, y = data.batch(indices)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if job.max_gradient_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), job.max_gradient_norm)
            factor = job.learning_rate.factor((round - 1 + step / len(steps)) / job.rounds)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
    return weights(model)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"max_gradient_norm": 0.05}, marks=pytest.mark.slow),
        pytest.param({"accumulate_batches": 2}, marks=pytest.mark.slow),
        {
            "accumulate_batches": 2,
            "max_gradient_norm": 0.05,
            "learning_rate": Cosine(),
            "schedule": ZeroBubble(),
        },
        pytest.param({"pipeline": PipelineSettings(checkpoint=True)}, marks=pytest.mark.slow),
        {"pipeline": PipelineSettings(checkpoint=(1,)), "schedule": OneFOneB(warmup="short")},
    ],
    ids=["clipping", "accumulation", "all with zero bubble", "checkpointing", "checkpointing one stage"],
)
def test_real_processes_train_as_plain_pytorch_in_one(changes: dict[str, Any], tmp_path: Path) -> None:
    schedule = changes.get("schedule", OneFOneB())
    partitioner = _Even(schedule.name) if isinstance(schedule, ZeroBubble) else "uniform"
    described = job(**{"partitioner": partitioner, **changes})
    expected = by_hand(described)
    plain = by_hand(job())
    differs = not torch.equal(plain["head.weight"], expected["head.weight"])
    assert differs == bool({"max_gradient_norm", "accumulate_batches"} & set(changes))
    assert_same(weights(run(described, tmp_path / "local", "local")), expected, **FLOAT64)
    assert_same(weights(run(described, tmp_path / "simulate", "simulate")), expected, **FLOAT64)


class _Even:
    """As `uniform`, for a schedule that it does not know."""

    def __init__(self, schedule: str) -> None:
        self.schedule = schedule

    def plan(self, *args: Any, **kwargs: Any) -> Any:
        from fedmp.partition import Uniform

        return Uniform().plan(*args, **kwargs).model_copy(update={"schedule": self.schedule})


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("mlp", Interleaved()),
        ("mlp", VShape()),
        pytest.param("gpt", VShape(), marks=pytest.mark.slow),
        pytest.param("mlp", VShape(splits_backward=False), marks=pytest.mark.slow),
        pytest.param("gpt", Interleaved(), marks=pytest.mark.slow),
        pytest.param("cnn", Interleaved(), marks=pytest.mark.slow),
        pytest.param("cnn", VShape(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_placed_stages_give_the_model_of_one_stage_a_device(
    name: str, schedule: Interleaved | VShape, tmp_path: Path
) -> None:
    described = {
        "mlp": partial(job, max_gradient_norm=1.0),
        "cnn": partial(tiny_job, model=TINY_CNN, data=images(60), topology=topology(2, 2)),
        "gpt": partial(tiny_job, model=TINY_GPT, data=tokens(24), topology=topology(2)),
    }[name]
    expected = weights(run(described(schedule=OneFOneB()), tmp_path / "expected"))
    placed = described(schedule=schedule, federated_evaluation=True)
    real = run(placed, tmp_path / "local", "local")
    assert {plan.placement for plan in real.plans.values()} == {schedule.placement(2)}
    assert {plan.schedule for plan in real.plans.values()} == {schedule.name}
    simulated = run(placed, tmp_path / "simulate")
    tolerance = FLOAT64 if name == "mlp" else FLOAT32
    assert_same(weights(real), expected, **tolerance)
    assert_same(weights(simulated), expected, **tolerance)
    assert real.history[-1].federated_loss == pytest.approx(simulated.history[-1].federated_loss, rel=1e-5)
    assert real.summary.devices == len(placed.topology.clients) * 2
    assert real.summary.pipeline_bytes > 0


def test_a_v_shape_gives_inputs_and_targets_to_one_device_and_nothing_to_the_others() -> None:
    from fedmp.engine.local import LocalEngine
    from fedmp.engine.members import members_of

    prepared = prepare(tiny_job(topology=topology(3), data=images(30), model=TINY_CNN, schedule=VShape()))
    setup = next(iter(prepared.clients.values()))
    specs = {
        member.rank: LocalEngine()._spec("http://x", prepared, Path("state"), setup, member, "token")
        for member in members_of(prepared)
    }
    assert [blueprint.index for blueprint in specs[0].blueprints] == [0, 5]
    assert specs[0].dataset is not None
    assert specs[0].dataset.inputs is not None
    assert specs[0].dataset.targets is not None
    assert specs[1].dataset is specs[2].dataset is None


def test_a_device_pulls_and_pushes_the_tensors_of_its_own_stages_and_no_others() -> None:
    from fedmp.engine.members import members_of

    prepared = prepare(
        tiny_job(topology=topology(2), data=images(30), model=TINY_CNN, schedule=Interleaved())
    )
    blueprints = prepared.clients["c0"].blueprints
    everything: list[str] = []
    for member in members_of(prepared):
        own = [blueprints[stage] for stage in member.stages]
        assert set(member.pulled) == {name for blueprint in own for name in blueprint.state}
        assert set(member.pushed) <= {name for blueprint in own for name in blueprint.owned}
        everything += member.pushed
    assert len(everything) == len(set(everything)), "each tensor is pushed by one device"
    assert set(everything) == set(prepared.graph.state)


def test_devices_run_the_schedule_that_their_plan_charges_for() -> None:
    """Where memory binds, `exact` may choose the short warm-up; the devices must then not run the long one."""
    prepared = prepare(job(schedule=OneFOneB(), partitioner=_Even("1f1b-short")))
    assert prepared.clients["c0"].work.schedule == OneFOneB(warmup="short")


def test_a_partitioner_that_ignores_the_schedule_is_told_so() -> None:
    with pytest.raises(PlanError, match=r"placed the stages .* but schedule 'interleaved' wants"):
        prepare(job(schedule=Interleaved(), partitioner=_Even("interleaved")))


def test_bf16_autocast_trains_nearly_as_well(tmp_path: Path) -> None:
    common = {"topology": topology(2), "data": images(90), "strategy": FedAvg(local_epochs=3), "rounds": 2}
    plain = run(tiny_job(**common), tmp_path / "plain", "local")
    settings = PipelineSettings(autocast="bf16")
    halved = run(tiny_job(**common, pipeline=settings), tmp_path / "bf16", "local")
    assert halved.summary.pipeline_bytes == plain.summary.pipeline_bytes, "boundaries keep their dtype"
    assert halved.history[-1].train_loss == pytest.approx(plain.history[-1].train_loss, rel=0.02)
    assert halved.history[-1].train_loss != plain.history[-1].train_loss


@pytest.mark.parametrize(
    ("kind", "share"), [pytest.param("bf16", 0.6, marks=pytest.mark.slow), ("int8", 0.6)]
)
def test_compression_saves_bytes_between_the_devices_and_costs_little(
    kind: str, share: float, tmp_path: Path
) -> None:
    common = {
        "topology": topology(2),
        "data": images(90),
        "model": TINY_CNN,
        "strategy": FedAvg(local_epochs=2),
    }
    plain = run(tiny_job(**common), tmp_path / "plain", "local")
    settings = PipelineSettings(compress_activations=kind, compress_gradients=kind)
    packed = run(tiny_job(**common, pipeline=settings), tmp_path / kind, "local")
    assert packed.summary.pipeline_bytes < share * plain.summary.pipeline_bytes
    assert packed.history[-1].train_loss == pytest.approx(plain.history[-1].train_loss, rel=0.1)


def test_a_trace_shows_every_action_of_every_client_next_to_the_plan(tmp_path: Path) -> None:
    described = tiny_job(
        topology=topology(2, 1),
        model=partial(MLP, 784, (16, 12, 10)),
        schedule=VShape(),
        trace=True,
        max_gradient_norm=1.0,
        rounds=1,
    )
    result = run(described, tmp_path / "run", "local")
    folder = tmp_path / "run" / "traces"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{client}{end}" for client in ("c0", "c1") for end in (".shares.txt", ".svg", ".trace.json")
    ]
    for client in ("c0", "c1"):
        events = json.loads((folder / f"{client}.trace.json").read_text())["traceEvents"]
        done = [(e["args"]["stage"], e["cat"], e["args"]["micro-batch"]) for e in events if e["ph"] == "X"]
        for stage in range(result.plans[client].num_stages):
            forwards = [microbatch for at, kind, microbatch in done if (at, kind) == (stage, "forward")]
            assert sorted(forwards) == [0, 1, 2]
        assert {"forward", "backward", "exchange", "step"} <= {kind for _, kind, _ in done}
        table = (folder / f"{client}.shares.txt").read_text().splitlines()
        assert len(table) == 1 + result.plans[client].num_devices
        assert all(row.split()[-1].endswith("%") for row in table[1:]), "the plan's bubble stands beside"
        assert "bubble" in (folder / f"{client}.svg").read_text()


def test_the_simulating_engine_says_that_it_measures_no_steps(tmp_path: Path) -> None:
    from fedmp.records import Note

    notes: list[str] = []
    tiny_job(trace=True, rounds=1).run(
        "simulate",
        run_dir=tmp_path / "run",
        observe=lambda event: notes.append(event.message) if isinstance(event, Note) else None,
    )
    assert any("measures no steps" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_gradient_norm": 0.0}, "max_gradient_norm is 0.0"),
        ({"accumulate_batches": 0}, "accumulate_batches is 0"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_job(**changes)
