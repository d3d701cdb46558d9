from __future__ import annotations

import io
import itertools
import random
import threading
from pathlib import Path

import pytest
from rich.console import Console

from fedmp.records import Event, Note, Progress, RoundFinished, RoundStarted, RunFinished, RunStarted
from fedmp.report import LiveView, PlainView, QuietView, make_view
from fedmp.report.board import Board
from fedmp.report.board_view import render_board
from tests.report.samples import make_clients, make_plan, make_records, make_summary


def run_events(num_rounds: int = 3, num_clients: int = 2, run_dir: str = "out/x") -> list[Event]:
    clients = make_clients(num_clients)
    events: list[Event] = [
        Note("profiling"),
        RunStarted("quickstart", "local", num_rounds, 1, {c.name: make_plan() for c in clients}, clients),
    ]
    records = make_records(num_rounds)
    for record in records:
        events.append(RoundStarted(record.round, tuple(c.name for c in clients), 100 * num_clients))
        events += [Progress(record.round, c.name, n, 100, 1.0) for n in (50, 100) for c in clients]
        events.append(RoundFinished(record))
    return [*events, RunFinished(make_summary(), records, run_dir)]


def terminal(file: io.StringIO | None = None) -> Console:
    return Console(
        file=file or io.StringIO(),
        force_terminal=True,
        width=110,
        height=50,
        legacy_windows=False,
        _environ={},
    )


def written(view: PlainView | LiveView, file: io.StringIO, events: list[Event]) -> str:
    with view:
        for event in events:
            view(event)
    return file.getvalue()


def test_plain_view_writes_one_line_a_round_and_no_escape_codes() -> None:
    file = io.StringIO()
    text = written(PlainView(terminal(file)), file, run_events())
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.isascii()
    rounds = [line for line in text.splitlines() if line.startswith("round ")]
    assert rounds[0] == "round 1/3  loss 2.000  accuracy 10.0 %  up 1.2 MB  down 1.3 MB  4.1 s"
    assert len(rounds) == 3
    assert "not asked" not in text
    assert "1.3 points below" in text
    assert "plan of lab-0, lab-1: balanced" in text
    assert "run directory: out/x" in text


def test_plain_view_defuses_control_characters_and_what_the_file_cannot_encode() -> None:
    body = io.BytesIO()
    file = io.TextIOWrapper(body, encoding="ascii", write_through=True)
    PlainView(Console(file=file))(Note("\x1b[2Jdévice lost"))
    assert body.getvalue() == b" [2Jd?vice lost\n"


def test_live_view_shows_plans_once_and_the_closing_table_last(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "plan.svg").write_text("<svg/>")
    file = io.StringIO()
    text = written(LiveView(terminal(file)), file, run_events(run_dir=str(tmp_path)))
    assert text.count("predicted step") == 1
    assert text.count("federated against centralized") == 1
    assert text.index("3 of 3") < text.index("federated against centralized") < text.index("plan.svg")
    assert "\x1b[?25h" in text, "the cursor must come back"


@pytest.mark.parametrize("seed", range(5))
def test_live_view_survives_events_out_of_order_and_twice(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    events = run_events(num_rounds=4, num_clients=15) * 2
    random.Random(seed).shuffle(events)
    file = io.StringIO()
    written(LiveView(terminal(file)), file, events)
    assert not caplog.records


def test_live_view_takes_events_from_many_threads(caplog: pytest.LogCaptureFixture) -> None:
    events = run_events(num_rounds=5, num_clients=4)
    file = io.StringIO()
    with LiveView(terminal(file), refresh_per_second=50) as view:
        threads = [threading.Thread(target=lambda: [view(event) for event in events]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        assert not any(thread.is_alive() for thread in threads)
    assert file.getvalue().count("federated against centralized") == 1
    assert not caplog.records


def test_a_live_view_gives_the_terminal_back_when_the_run_raises() -> None:
    file = io.StringIO()
    with pytest.raises(RuntimeError), LiveView(terminal(file)):
        raise RuntimeError("the run failed")
    assert file.getvalue().rstrip("\n").endswith("\x1b[?25h")


@pytest.mark.parametrize("kind", [OSError, BrokenPipeError, ValueError])
@pytest.mark.parametrize("view_type", [PlainView, LiveView])
def test_a_broken_terminal_never_raises_into_the_run(
    view_type: type[PlainView | LiveView], kind: type[Exception], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise kind("gone")

    console = terminal(Broken())
    # What rich does on a closed pipe, without closing this process's standard output.
    monkeypatch.setattr(console, "on_broken_pipe", lambda: (_ for _ in ()).throw(SystemExit(1)))
    with view_type(console) as view:
        for event in run_events():
            view(event)
    assert len(caplog.records) == 1


def test_make_view_picks_what_the_output_can_show() -> None:
    assert isinstance(make_view(terminal()), LiveView)
    assert isinstance(make_view(Console(file=io.StringIO())), PlainView)
    assert isinstance(make_view(quiet=True), QuietView)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(make_view(dumb), PlainView)


def test_make_view_keeps_a_pipe_plain_even_with_forced_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert isinstance(make_view(), PlainView)


def test_a_quiet_view_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with make_view(quiet=True) as view:
        for event in run_events():
            view(event)
    assert capsys.readouterr() == ("", "")


def drawn(board: Board, now_s: float = 0.0, height: int = 50) -> str:
    console = Console(file=io.StringIO(), width=110, record=True)
    console.print(render_board(board, now_s=now_s, height=height))
    return console.export_text()


def test_the_board_shows_progress_losses_and_time_left() -> None:
    board = Board()
    events = run_events(num_rounds=4)
    until = next(i for i, event in enumerate(events) if isinstance(event, Progress) and event.round == 3)
    for event in events[: until + 2]:
        board.take(event, 0.0)
    text = drawn(board, now_s=10.0)
    assert "2 of 4" in text
    assert "100 of 200" in text
    # 2.5 of 4 rounds took 10 s, so 1.5 rounds take 6 s.
    assert "6.0 s left" in text
    assert "test accuracy 55.0 %" in text
    assert "lab-1" in text


def test_the_board_sums_a_large_cohort_up() -> None:
    board = Board()
    board.take(RoundStarted(1, tuple(f"lab-{i}" for i in range(50)), 5000), 0.0)
    for index in range(20):
        board.take(Progress(1, f"lab-{index}", 100 if index < 5 else 40, 100, 1.0), 0.0)
    text = drawn(board)
    assert "50 clients: 5 done, 15 training, 30 waiting" in text
    assert len(text.splitlines()) < 8


def test_the_board_ignores_stale_progress() -> None:
    board = Board()
    board.take(RoundStarted(2, ("a",), 100), 0.0)
    for event in (
        Progress(2, "a", 80, 100, 1.0),
        Progress(2, "a", 40, 100, 2.0),
        Progress(1, "a", 100, 100, 3.0),
    ):
        board.take(event, 0.0)
    assert board.samples_done == 80
    assert board.round == 2


def test_a_note_cannot_steer_the_terminal() -> None:
    board = Board()
    board.take(Note("lost\x1b[2J a peer"), 0.0)
    assert "\x1b" not in drawn(board)
    assert "a peer" in drawn(board)


def test_a_resumed_run_counts_the_rounds_before_it() -> None:
    board = Board()
    board.take(RunStarted("t", "local", 10, 6, {}, ()), 0.0)
    board.take(RoundStarted(6, ("a",), 100), 0.0)
    board.take(Progress(6, "a", 50, 100, 1.0), 0.0)
    assert board.rounds_done == 5
    assert board.run_share == pytest.approx(0.55)
    assert board.time_left_s(1.0) == pytest.approx(9.0)  # half a round took 1 s, 4.5 rounds are left


def test_every_prefix_of_a_run_can_be_drawn_on_any_height() -> None:
    board = Board()
    for event, height in itertools.product(run_events(num_rounds=2, num_clients=3), (8, 24, 60)):
        board.take(event, 0.0)
        assert drawn(board, height=height)
