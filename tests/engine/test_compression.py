"""Transformed updates and stages in whole jobs: every engine, every plan and every restart gives the same model."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmp import cli
from fedmp.component import Component
from fedmp.engine.prepare import prepare
from fedmp.engine.simulate import SimulateEngine
from fedmp.models import MLP
from fedmp.records import Fault
from fedmp.strategy import FedAvg
from fedmp.updates import BFloat16, Clip, Encoded, Int4, Int8, LowRank, Part, RandomK, Sign, TopK, Zstd
from tests.support.deployment import Deployment, ends
from tests.support.jobs import TINY_CNN, assert_same, images, run, tiny_job, topology, weights

CHAINS: dict[str, dict[str, Any]] = {
    "topk int8": {"transforms": (TopK(fraction=0.1), Int8(block=64))},
    "clip sign": {"transforms": (Clip(max_norm=0.5), Sign())},
    "lowrank zstd, bf16 down": {"transforms": (LowRank(), Zstd()), "downlink": (BFloat16(),)},
    "randomk int4, int8 zstd down": {
        "transforms": (RandomK(fraction=0.3), Int4(block=64)),
        "downlink": (Int8(), Zstd()),
    },
}


@pytest.mark.parametrize("chain", CHAINS)
def test_real_devices_and_simulated_ones_make_the_same_model_of_the_same_bytes(
    tmp_path: Path, chain: str
) -> None:
    job = tiny_job(**CHAINS[chain], rounds=3)
    simulated = run(job, tmp_path / "simulate")
    local = run(job, tmp_path / "local", "local")
    assert_same(weights(local), weights(simulated), rtol=0, atol=1e-6)
    for there, here in zip(local.history[1:], simulated.history[1:], strict=True):  # round 1 has a timeline
        # entropy coding takes in the digits of the report, such as the seconds that training took
        slack = 4 * 32 if "zstd," in chain else 0
        assert abs(there.bytes_up - here.bytes_up) <= slack
        assert there.bytes_down == here.bytes_down


@pytest.mark.parametrize(
    ("transforms", "downlink", "atol"),
    [((Clip(max_norm=0.5), LowRank(rank=3)), (), 1e-5), ((RandomK(fraction=0.2), Zstd()), (), 1e-5)],
)
def test_a_cohort_trained_at_once_sends_what_one_client_after_another_does(
    tmp_path: Path, transforms: tuple[Any, ...], downlink: tuple[Any, ...], atol: float
) -> None:
    job = tiny_job(transforms=transforms, downlink=downlink, rounds=3, topology=topology(1, 1, 1))
    at_once = run(job, tmp_path / "vectorized", SimulateEngine(cohort="vectorized"))
    in_turn = run(job, tmp_path / "sequential", SimulateEngine(cohort="sequential"))
    assert_same(weights(at_once), weights(in_turn), rtol=0, atol=atol)
    for there, here in zip(at_once.history, in_turn.history, strict=True):
        assert there.bytes_down == here.bytes_down
        # compressed digits of numbers that differ in their last places
        assert abs(there.bytes_up - here.bytes_up) <= (64 if Zstd() in transforms else 0)


def test_a_cohort_starts_from_what_it_receives(tmp_path: Path) -> None:
    job = tiny_job(downlink=(Int4(block=64),), rounds=2, topology=topology(1, 1))
    at_once = run(job, tmp_path / "vectorized", SimulateEngine(cohort="vectorized"))
    in_turn = run(job, tmp_path / "sequential", SimulateEngine(cohort="sequential"))
    plain = run(tiny_job(rounds=2, topology=topology(1, 1)), tmp_path / "plain")
    assert at_once.history[0].train_loss == pytest.approx(in_turn.history[0].train_loss, rel=1e-5)
    assert at_once.history[0].train_loss != pytest.approx(plain.history[0].train_loss, rel=1e-5)
    assert at_once.summary.bytes_down == in_turn.summary.bytes_down < plain.summary.bytes_down / 3


def test_what_travels_is_counted_in_bodies(tmp_path: Path) -> None:
    plain = run(tiny_job(rounds=1), tmp_path / "plain")
    small = run(
        tiny_job(rounds=1, transforms=(TopK(fraction=0.01),), downlink=(BFloat16(),)), tmp_path / "small"
    )
    tensors = sum(tensor.numel() * 4 for tensor in weights(plain).values())
    assert plain.history[0].bytes_up > 2 * tensors  # of two clients, with names and reports
    assert small.history[0].bytes_up < plain.history[0].bytes_up / 10
    assert small.history[0].bytes_down < plain.history[0].bytes_down * 0.6


@pytest.mark.parametrize("chain", ["topk int8", "clip sign"])
def test_plans_make_no_difference_to_what_is_learnt(tmp_path: Path, chain: str) -> None:
    """Tensors are transformed by themselves, and a client's norm is that of all of its devices."""
    same = run(tiny_job(**CHAINS[chain], topology=topology(1, 1)), tmp_path / "one")
    cut = run(tiny_job(**CHAINS[chain], topology=topology(3, 2)), tmp_path / "cut", "local")
    assert_same(weights(cut), weights(same), rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["simulate", pytest.param("local", marks=pytest.mark.slow)])
def test_what_transforms_keep_survives_a_resumed_run_bit_for_bit(tmp_path: Path, engine: str) -> None:
    settings = {"transforms": (TopK(fraction=0.05), Int8(block=64)), "downlink": (BFloat16(),)}
    settings |= {"strategy": FedAvg(fraction=0.5)}
    whole = run(tiny_job(**settings, topology=topology(2, 1, 1), rounds=5), tmp_path / "whole", engine)
    run(tiny_job(**settings, topology=topology(2, 1, 1), rounds=3), tmp_path / "part", engine)
    part = run(
        tiny_job(**settings, topology=topology(2, 1, 1), rounds=5), tmp_path / "part", engine, resume=True
    )
    assert_same(weights(part), weights(whole))


@pytest.mark.parametrize("phase", ["backward", pytest.param("push", marks=pytest.mark.slow)])
def test_a_device_that_is_lost_does_not_lose_what_its_transforms_keep(tmp_path: Path, phase: str) -> None:
    settings = {"transforms": (TopK(fraction=0.05),), "rounds": 3}
    undisturbed = run(tiny_job(**settings), tmp_path / "undisturbed", "local")
    fault = Fault(device="c0/d1", round=2, phase=phase, kind="kill")
    disturbed = run(tiny_job(**settings, faults=(fault,)), tmp_path / "disturbed", "local")
    assert disturbed.summary.faults == 1
    assert_same(weights(disturbed), weights(undisturbed))


@pytest.mark.slow
def test_a_deployed_coordinator_that_is_killed_forgets_nothing_of_what_clients_keep(tmp_path: Path) -> None:
    job = tiny_job(**CHAINS["topk int8"], downlink=(Int8(), Zstd()), rounds=3, topology=topology(2, 1))
    expected = weights(run(job, tmp_path / "local", "local"))
    with Deployment(tmp_path, job) as federation:
        devices = federation.devices()
        assert ends(federation.coordinator(kill_at="before the commit", nth=2)) == -signal.SIGKILL
        assert ends(federation.coordinator()) == 0
        assert [ends(device) for device in devices] == [0] * 3
        assert_same(federation.final_state(), expected)


def test_predicted_times_know_that_less_travels() -> None:
    plain, small = (
        prepare(tiny_job(transforms=transforms)).clients["c0"] for transforms in ((), (Int8(block=64),))
    )
    assert [device.down_bytes for device in small.moved] == [device.down_bytes for device in plain.moved]
    ups = [(ours.up_bytes, theirs.up_bytes) for ours, theirs in zip(small.moved, plain.moved, strict=True)]
    assert sum(ours for ours, _ in ups) < 0.3 * sum(theirs for _, theirs in ups)


def test_batch_norm_statistics_and_counters_arrive_unharmed(tmp_path: Path) -> None:
    job = tiny_job(model=TINY_CNN, transforms=(Int4(block=64),), rounds=1, topology=topology(1))
    plain = run(tiny_job(model=TINY_CNN, rounds=1, topology=topology(1)), tmp_path / "plain")
    coarse = run(job, tmp_path / "coarse")
    for name, tensor in weights(plain).items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(weights(coarse)[name], tensor)
    assert any(not torch.equal(weights(coarse)[name], tensor) for name, tensor in weights(plain).items())


def test_a_model_in_double_precision_is_trained_the_same_way(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        return MLP(784, (16, 12)).double()

    job = tiny_job(model=model, data=images(90, dtype=torch.float64), transforms=(TopK(fraction=0.2), Int8()))
    result = run(job, tmp_path)
    assert all(tensor.dtype == torch.float64 for tensor in weights(result).values())
    assert result.history[-1].train_loss < result.history[0].train_loss


def test_a_learning_rate_that_suits_plain_averaging_suits_error_feedback(tmp_path: Path) -> None:
    """A tenth of the numbers at a time, yet after some rounds as low a loss, up to 20 %."""
    plain = run(tiny_job(rounds=8), tmp_path / "plain")
    sparse = run(tiny_job(rounds=8, transforms=(TopK(fraction=0.1), Int8())), tmp_path / "sparse")
    without = run(
        tiny_job(rounds=8, transforms=(TopK(fraction=0.1, error_feedback=False), Int8())),
        tmp_path / "without",
    )
    assert sparse.history[-1].train_loss < 1.2 * plain.history[-1].train_loss
    assert sparse.history[-1].train_loss < without.history[-1].train_loss


class Negated(Component):
    """A transform of a user's own."""

    error_feedback: bool = False
    times: int = 1

    def layout(self, spec: Part) -> dict[str, Part]:
        return {"negated": spec}

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        return Encoded({"negated": -tensor * self.times}, {})

    def decode(self, parts: Mapping[str, torch.Tensor], spec: Part, *, seed: int) -> torch.Tensor:
        return -parts["negated"] / self.times


TINY_RUN = (
    *(
        "topology=three_labs",
        "data=fashion_mnist_excerpt",
        "partitioner=uniform",
        "model=mlp",
        "rounds=1",
        "centralized=null",
    ),
    *("strategy.local_epochs=0.01", "batch_size=8", "engine=simulate", "quiet=true"),
)


@pytest.mark.parametrize(
    "overrides",
    [
        ("transforms=[clip,topk,int8,zstd]", "transforms.topk.fraction=0.02", "downlink=[bf16,zstd]"),
        ("transforms=int4",),
        ("transforms=[int8]", "transforms.mine._target_=tests.engine.test_compression.Negated"),
    ],
)
def test_transforms_are_chosen_on_the_command_line(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert cli.main(["run", *TINY_RUN, *overrides, f"run_dir={tmp_path}"]) == 0
    chosen = json.loads((tmp_path / "config.json").read_text())["transforms"]
    assert [name for name in chosen if name != "mine"] == [
        name for name in ("clip", "topk", "int8", "int4", "zstd") if name in overrides[0]
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["transforms=[topkk]"],
            "group transforms has no choice 'topkk'; there are bf16, clip, ef21, fp16, int4, int8",
        ),
        (["transforms=[topk]", "transforms.topk.fraction=5"], "transforms.topk.fraction is 5: "),
        (["transforms=[topk]", "transforms.topk.fracton=1"], "did you mean transforms.topk.fraction?"),
        (["transforms.topk.fraction=1"], "transforms.topk is not chosen: say transforms=[topk]"),
        (["transforms=[zstd,int8]"], "Zstd comes last of all, not between Zstd, Int8"),
        (["transforms.x._target_=builtins.dict"], "dict is no transform: it needs error_feedback"),
        (["downlink=[topk]"], "TopK leaves out most of a tensor and makes up for it in later updates"),
        (["downlink=[clip]"], "group downlink has no choice 'clip'; there are bf16, ef21, fp16, int4, int8"),
        (["downlink.x._target_=fedmp.updates.TopK"], "downlink: TopK leaves out most of a tensor"),
    ],
)
def test_a_wrong_choice_of_transforms_is_explained(
    tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *TINY_RUN, *overrides, f"run_dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


def test_the_help_lists_the_transforms(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "transforms=[topk,int8,zstd]" in shown
    assert "lowrank" in shown
