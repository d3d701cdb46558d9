from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import pytest

from fedmp.report import draw_accuracy, draw_data, draw_plan, draw_timeline
from tests.report.samples import make_clients, make_plan, make_records, make_timeline


def svg_text(path: Path) -> str:
    return " ".join(ElementTree.parse(path).getroot().itertext())


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_pictures_are_valid_png_files(tmp_path: Path) -> None:
    draw_accuracy(make_records(200), tmp_path / "a.png", 0.9)
    draw_data(make_clients(50, 62), tmp_path / "d.png")
    draw_plan({"lab": make_plan(8, long=True)}, tmp_path / "p.png")
    draw_timeline(make_timeline(8, 16), tmp_path / "t.png")
    for name in "adpt":
        width, height = png_size(tmp_path / f"{name}.png")
        assert min(width, height) > 300
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png"] * 4, "no temporary file stays"


def test_plan_picture_names_devices_layers_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    draw_plan({"lab-a": make_plan(3), "lab-b": make_plan(3), "lab-c": make_plan(1, device="lone")}, path)
    text = svg_text(path)
    for word in (
        "plan of lab-a, lab-b",
        "nano-0",
        "nano-2",
        "lone-0",
        "block.0 to block.1",
        "131 kB",
        "1.0 GiB of 4.0 GiB",
    ):
        assert word in text


def test_timeline_picture_has_a_lane_a_device_and_shares(tmp_path: Path) -> None:
    path = tmp_path / "t.svg"
    draw_timeline(make_timeline(3, 4), path)
    text = svg_text(path)
    for word in (
        "nano-0",
        "nano-1",
        "nano-2",
        "stage 2",
        "forward 67 %",
        "waiting 17 %",
        "other 17 %",
    ):
        assert word in text


def test_data_picture_names_clients_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "d.svg"
    draw_data(make_clients(3, 3), path, ("cat", "$dog$", "\n"))
    text = svg_text(path)
    for word in ("lab-0", "lab-2", "cat", "$dog$", r"'\n'"):
        assert word in text
    draw_data(make_clients(1, 0), path)
    draw_data(make_clients(2, 11), path)
    assert "share of each of 11 labels" in svg_text(path)


def test_accuracy_picture_shows_the_centralized_line_only_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    draw_accuracy(make_records(1), path)
    assert "centralized" not in svg_text(path)
    draw_accuracy(make_records(5), path, 0.913)
    assert "centralized, 91.3 %" in svg_text(path)
    draw_accuracy([record.model_copy(update={"test_accuracy": None}) for record in make_records(2)], path)
    assert "accuracy" not in svg_text(path)


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    for name in "ab":
        draw_plan({"lab": make_plan()}, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    draw_timeline(make_timeline(), tmp_path / "t.svg")
    assert dict(matplotlib.rcParams) == before


def test_what_cannot_be_drawn_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        draw_plan({"lab": make_plan()}, tmp_path / "plan.pdf")
    for draw in (draw_accuracy, draw_data, draw_timeline):
        with pytest.raises(ValueError, match="there is no"):
            draw((), tmp_path / "x.svg")
    with pytest.raises(ValueError, match="there is no"):
        draw_plan({}, tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())
