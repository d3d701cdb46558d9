from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from fedmp.records import ClientData
from fedmp.report import closing_table, data_table, plan_table, plans_panel
from tests.report.samples import make_clients, make_plan, make_summary


def shown(renderable: RenderableType, width: int = 110) -> str:
    console = Console(file=io.StringIO(), record=True, width=width)
    console.print(renderable)
    return console.export_text()


def test_data_table_shows_samples_and_label_shares() -> None:
    text = shown(data_table([ClientData("a", 4, (1, 3)), ClientData("b", 6, (6, 0))], ("cat", "dog")))
    assert "cat" in text
    row = next(line for line in text.splitlines() if line.startswith(" a "))
    assert "25" in row
    assert "75" in row
    assert "all 2" in text
    assert "10" in text


def test_data_table_sums_up_many_clients_without_losing_samples() -> None:
    clients = make_clients(50, 62)
    text = shown(data_table(clients))
    assert "35 others" in text
    assert f"{sum(client.num_samples for client in clients):,}" in text
    assert "(62)" in text
    assert len(text.splitlines()) < 30
    assert max(len(line) for line in text.splitlines()) <= 90


def test_data_table_takes_regression_targets_and_label_names_with_markup() -> None:
    assert "labels" not in shown(data_table([ClientData("a", 7)]))
    text = shown(data_table([ClientData("[b]x", 3, (1, 1, 1))], ("[", "\n", "[/red]")))
    assert "[b]x" in text
    assert r"'\n'" in text
    assert "[/red]" in text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_plan_table_shows_each_stage_and_its_figures(width: int) -> None:
    text = shown(plan_table("lab-a", make_plan(3)), width)
    for word in (
        "nano-0",
        "nano-2",
        "4.2 MB",
        "1.0/4.0",
        "4+8",
        "131 kB",
        "predicted step 200 ms",
        "spare-9",
    ):
        assert word in text
    assert "5.0 % from optimal" in text.replace("\n", " ")


def test_plan_table_marks_the_slowest_stage() -> None:
    text = shown(plan_table("lab-a", make_plan(3)))
    assert [line.split()[2] for line in text.splitlines() if "▶" in line] == ["nano-1"]
    assert "slowest: nano-1" in text


def test_plan_table_names_a_link_that_is_slower_than_every_stage() -> None:
    plan = make_plan(2)
    slow = plan.stages[0].model_copy(update={"send_s": 1.0})
    text = shown(plan_table("lab-a", plan.model_copy(update={"stages": (slow, plan.stages[1])})))
    assert "link from stage 0 to 1" in text
    assert "▶" not in text


def test_plan_table_says_nothing_of_a_gap_without_a_bound() -> None:
    assert "optimal" not in shown(plan_table("lab-a", make_plan().model_copy(update={"bound_s": 0.0})))


def test_plans_panel_groups_clients_with_equal_plans() -> None:
    text = shown(plans_panel({"lab-a": make_plan(), "lab-b": make_plan(), "lab-c": make_plan(2)}))
    assert "plan of lab-a, lab-b " in text
    assert "plan of lab-c " in text
    assert "2 distinct, 3 clients" in text


def test_plans_panel_stays_short_for_fifty_distinct_plans() -> None:
    text = shown(plans_panel({f"lab-{i}": make_plan(3, forward_s=0.001 * (i + 1)) for i in range(50)}))
    assert "47 other plans" in text
    assert len(text.splitlines()) < 60


def test_long_layer_names_keep_their_numbers() -> None:
    text = shown(plan_table("lab-a", make_plan(3, long=True)), 120)
    for number in range(6):
        assert f".{number}." in text


def test_closing_table_compares_with_centralized() -> None:
    text = shown(closing_table(make_summary()))
    for word in ("83.1 %", "84.4 %", "1.3 points below", "34.5 MB", "31.0 MB", "12.3 s", "6.1 s"):
        assert word in text


def test_closing_table_says_what_was_not_asked_for() -> None:
    missing = dict.fromkeys(
        ("centralized_accuracy", "centralized_samples", "centralized_bytes", "centralized_wall_s")
    )
    text = shown(closing_table(make_summary(**missing)))
    assert text.count("not asked for") == 4
    assert "gap" not in text


def test_a_plan_of_several_stages_a_device_shows_devices_not_stages_as_slowest_and_fullest() -> None:
    plan = make_plan(4)
    stages = [
        stage.model_copy(update={"device": device, "forward_s": 0.004, "backward_s": 0.008})
        for stage, device in zip(plan.stages, "abba", strict=True)
    ]
    stages[1] = stages[1].model_copy(update={"send_s": 0.0, "gradient_s": 0.0, "boundary_bytes": 0})
    stages[3] = stages[3].model_copy(update={"memory_bytes": 2 << 30})
    plan = plan.model_copy(update={"stages": tuple(stages), "schedule": "v-shape"})
    text = shown(plan_table("lab", plan))
    assert "slowest: a" in text
    assert "fullest: a, 3.0 GiB of 4.0 GiB" in " ".join(text.split())
    rows = [line.split() for line in text.splitlines() if line.strip("▶ ")[:1].isdigit()]
    assert [row[-2] for row in rows][1] == "-", "what stays on the device is not sent"
    marked = [line.strip()[2] for line in text.splitlines() if line.strip().startswith("▶")]
    assert marked == ["0", "3"]
