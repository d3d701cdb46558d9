"""Centralized against federated: the parts of the comparison by hand, and the whole of it by command."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from fedmp import Centralized, Client, Device, Link, Links, Topology
from fedmp.cli import main
from fedmp.clock import Clock, Loss
from fedmp.engine.client_plan import set_up_client
from fedmp.engine.prepare import prepare
from fedmp.errors import ConfigError
from fedmp.models import MLP
from fedmp.paper import PaperSettings, Variations, compute_curves, run_paper
from fedmp.paper.table import make_rows, verdict
from fedmp.paper.times import CenterTimes, SiteTimes, Workload, time_center, time_sites
from fedmp.records import Summary
from tests.support.jobs import images, tiny_job

CONFIGS = Path(__file__).parents[1] / "support" / "configs"
LINE = Link(1e6, 0.1)
NO_TIME = Links(default=Link(1e15, 0.0))
SITES = Topology(clients={"count": 2, "devices": {"count": 2, "flops_per_s": 1e8}, "uplink": LINE})
VARY = Variations(
    uplink_mbit_per_s=(0.1, 1, 1000),
    sites=(1, 4),
    device_speed=(2,),
    center_speed=(1e-3, 1e3),
    data_size=(10,),
)


def center(count: int, *, links: Links = NO_TIME, uplink: Link = LINE, speed: float = 1e8) -> Client:
    devices = [Device(f"d{number}", flops_per_s=speed) for number in range(count)]
    return Client(name="center", devices=devices, links=links, uplink=uplink)


@cache
def workload() -> Workload:
    """An MLP on 80 images of 784 bytes and a label of 8."""
    job = tiny_job(model=partial(MLP, 784, (64, 64)), topology=SITES, data=images(80), batch_size=20)
    prepared = prepare(job)
    return Workload(job, prepared.graph, prepared.model, sample_bytes=792, epochs=4.0, center_batch=20)


def time_of(settings: PaperSettings, sizes: dict[Link, list[int]] | None = None) -> CenterTimes:
    return time_center(workload(), settings, sizes or {LINE: [40, 40]})


def test_the_raw_data_come_in_over_the_sites_lines_and_the_centres_own() -> None:
    wide = time_of(PaperSettings(center=center(1, uplink=Link(1e9, 0.2))))
    assert wide.raw_bytes == 80 * 792
    assert wide.move_s == pytest.approx(0.1 + 40 * 792 / 1e6 + 0.2)
    narrow = time_of(PaperSettings(center=center(1, uplink=Link(1e5, 0.2))))
    assert narrow.move_s == pytest.approx(0.1 + 80 * 792 / 1e5 + 0.2)
    assert narrow.epoch_s == pytest.approx(narrow.train_s + narrow.move_s / 4)


def test_one_device_works_all_the_time() -> None:
    times = time_of(PaperSettings(center=center(1)))
    assert times.layout == "one device"
    assert times.train_s == pytest.approx(times.ideal_s)
    plan = set_up_client(
        replace(workload().job, num_microbatches=1), workload().graph, workload().model, center(1)
    ).plan
    assert times.train_s == pytest.approx(4 * plan.step_s)


def test_where_messages_take_no_time_devices_in_data_parallel_lose_nothing() -> None:
    one, four = (time_of(PaperSettings(center=center(count))) for count in (1, 4))
    assert four.layout == "4 devices in data parallel"
    # five samples each instead of twenty, but each device updates all of the weights
    assert one.train_s / 4 < four.train_s < one.train_s
    assert four.train_s == pytest.approx(four.ideal_s)
    assert four.num_devices == 4


def test_where_gradients_are_slow_to_add_up_a_pipeline_is_chosen() -> None:
    slow = Links(default=Link(3e5, 0.0))
    times = time_of(PaperSettings(center=center(2, links=slow), center_num_microbatches=10))
    assert times.layout.startswith("one pipeline of")
    assert times.train_s >= times.ideal_s


def test_an_epoch_of_the_federation_is_its_rounds() -> None:
    job = workload().job
    setups = [set_up_client(job, workload().graph, workload().model, client) for client in SITES.clients]
    whole = time_sites(setups, [40, 40], Clock(), seed=0)
    assert whole.epoch_s == pytest.approx(setups[0].with_samples(40).predicted_s)
    halves = replace(job, strategy=job.strategy.model_copy(update={"local_epochs": 0.5}))
    parts = [set_up_client(halves, workload().graph, workload().model, client) for client in SITES.clients]
    twice = time_sites(parts, [40, 40], Clock(), seed=0)
    assert twice.epoch_s == pytest.approx(2 * parts[0].with_samples(40).predicted_s)
    assert twice.train_s == pytest.approx(whole.train_s)


def test_the_curves_turn_where_they_must() -> None:
    points = compute_curves(workload(), PaperSettings(center=center(2), vary=VARY), [40, 40])
    by_curve = {
        curve: [point for point in points if point.curve == curve]
        for curve in ("uplink", "sites", "device_speed", "center_speed", "data_size")
    }
    defaults = [point for point in points if point.is_default]
    assert len(defaults) == 5
    assert len({(point.center_s, point.fedmp_s) for point in defaults}) == 1
    uplinks = [point.fedmp_s for point in by_curve["uplink"]]
    assert uplinks == sorted(uplinks, reverse=True)
    assert by_curve["center_speed"][0].improvement > 0 > by_curve["center_speed"][-1].improvement
    assert [point.value for point in by_curve["sites"]] == [1, 2, 4]


def summary(**fields: object) -> Summary:
    values = {
        "engine": "simulate",
        "rounds": 10,
        "clients": 2,
        "devices": 50,
        "num_parameters": 1,
        "final_accuracy": 0.937,
        "centralized_accuracy": 0.943,
        "bytes_up": 300,
        "bytes_down": 300,
        "pipeline_bytes": 10,
        "simulated_s": 450.0,
    }
    return Summary.model_validate({**values, **fields})


def test_the_table_says_what_is_gained_and_where_centralized_wins() -> None:
    times = CenterTimes("one device", 10, 115.0, 30.0, 50.0, 10.0, raw_bytes=200.0, inside_bytes=100.0)
    failing = summary(simulated_s=540.0, final_accuracy=0.931, centralized_accuracy=None, recoveries=3)
    rows = make_rows(summary(), SiteTimes(45.0, 20.0), times, failing, num_center=10, num_lost=8)
    found = {row.metric.strip(): row for row in rows}
    assert found["time per epoch"].improvement == "-62.5 %"
    assert (found["time per epoch"].centralized, found["time per epoch"].fedmp) == ("2 min 00 s", "45.0 s")
    assert found["accuracy"].improvement == "-0.6 points, centralized wins"
    assert found["devices"].improvement == "x 5"
    assert found["moved between sites"].improvement == "x 3, centralized wins"
    assert found["against a centre without any overhead"].improvement == "x 1.5, centralized wins"
    assert found["with 8 devices lost: time per epoch"].values == (None, pytest.approx(54.0))
    assert found["with 8 devices lost: accuracy"].improvement == "-0.6 points"
    assert verdict(rows).startswith("centralized training wins at: against a centre")


def test_paper_needs_a_centralized_side_and_devices_that_exist(tmp_path: Path) -> None:
    settings = PaperSettings(center=center(2))
    with pytest.raises(ConfigError, match="say how it is done"):
        run_paper(workload().job, settings, tmp_path, make_view=lambda: pytest.fail("nothing runs"))
    lost = settings.model_copy(update={"losses": (Loss(device="c0/d9", round=1),)})
    job = replace(workload().job, centralized=Centralized())
    with pytest.raises(ConfigError, match="no device is called 'c0/d9'; did you mean c0/d"):
        run_paper(job, lost, tmp_path, make_view=lambda: pytest.fail("nothing runs"))


def test_paper_is_for_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match="runs in one process, but this is rank 1 of 2; start it without torchrun"
    ):
        run_paper(
            workload().job,
            PaperSettings(center=center(2)),
            tmp_path,
            make_view=lambda: pytest.fail("nothing runs"),
        )
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_table_the_curves_and_both_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    arguments = ["--config-dir", str(CONFIGS), "experiment=tiny", "quiet=true", "run_dir=out", "rounds=2"]
    arguments += [
        "paper={center: {name: center, devices: 2}, losses: [{device: c0/d1, round: 2}],"
        " vary: {uplink_mbit_per_s: [1]}}",
        "centralized={optimizer: {_target_: torch.optim.SGD, lr: 0.1}}",
    ]
    assert main(["run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "time per epoch" in printed
    assert "centralized training wins" in printed
    plain = json.loads((tmp_path / "out" / "paper.json").read_text())
    metrics = [row["metric"] for row in plain["rows"]]
    assert {"time per epoch", "accuracy", "devices", "with 1 devices lost: accuracy"} <= set(metrics)
    assert plain["assumptions"]["paper"]["center"]["devices"][0]["flops_per_s"] == 2e11
    for name in ("paper.png", "curves.json", "curves.png", "federated/summary.json", "failing/events.jsonl"):
        assert (tmp_path / "out" / name).stat().st_size > 0
