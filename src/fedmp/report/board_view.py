"""Draws the board of a run for a terminal: title, notes, progress bars, clients, the last rounds."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmp.records import RoundRecord
from fedmp.report.board import Board, ClientProgress
from fedmp.report.marks import bar, spark_line
from fedmp.report.units import (
    format_bytes,
    format_count,
    format_loss,
    format_seconds,
    format_share,
    shorten,
)

__all__ = ["render_board"]

_MAX_CLIENTS = 12
_NUM_ROUNDS = 5
_SPARK_WIDTH = 40


def render_board(board: Board, *, now_s: float, height: int = 40) -> RenderableType:
    """Draw a run as it is now.

    Args:
        board: what is known of the run.
        now_s: the present, on the clock of the board.
        height: lines that the terminal has; details give way on a low one.

    Returns:
        What to show; it does not change when the board does.
    """
    parts: list[RenderableType] = [_title(board, now_s)]
    parts += [
        Text(f"  {note}", style="bright_black", no_wrap=True, overflow="ellipsis") for note in board.notes
    ]
    if board.num_rounds > 0 or board.round > 0:
        parts += [_bars(board, now_s), _figures(board)]
    fits = height >= 16 + min(len(board.cohort), _MAX_CLIENTS)
    if board.is_round_open and len(board.cohort) > 1:
        parts.append(_clients(board) if fits and len(board.cohort) <= _MAX_CLIENTS else _crowd(board.cohort))
    if board.records and height >= 20:
        parts.append(_rounds(board.latest_records(_NUM_ROUNDS)))
    return Group(*parts)


def _title(board: Board, now_s: float) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("fedmp ", style="bold cyan").append(board.title or "getting ready", style="bold")
    if board.engine:
        text.append(f"  {board.engine}", style="bright_black")
    if board.began_s is not None:
        text.append(f"  {format_seconds(max(now_s - board.began_s, 0.0))}", style="bright_black")
    return text


def _bars(board: Board, now_s: float) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, min_width=8)
    grid.add_column(width=30)
    grid.add_column(no_wrap=True, min_width=17)
    grid.add_column(no_wrap=True)
    total = str(board.num_rounds) if board.num_rounds else "?"
    left_s = board.time_left_s(now_s)
    left = "done" if board.is_finished else f"{format_seconds(left_s)} left" if left_s is not None else ""
    grid.add_row("rounds", _bar(board.run_share), f"{board.rounds_done} of {total}", left)
    if board.is_round_open:
        samples = f"{format_count(board.samples_done)} of {format_count(board.cohort_samples)}"
        waits = board.samples_done >= board.cohort_samples > 0
        grid.add_row(
            f"round {board.round}", _bar(board.round_share), samples, "aggregating" if waits else "samples"
        )
    return grid


def _bar(share: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=share, width=30, complete_style="cyan", finished_style="green")


def _figures(board: Board) -> Text:
    records = board.latest_records(len(board.records))
    text = Text("train loss ", style="bright_black", no_wrap=True, overflow="ellipsis")
    text.append(format_loss(board.train_loss), style="bold default")
    tested = [record.test_accuracy for record in records if record.test_accuracy is not None]
    if tested:
        text.append("   test accuracy ").append(format_share(tested[-1]), style="bold green")
        text.append(" ").append_text(spark_line(tested, _SPARK_WIDTH))
    if records:
        text.append("   up ").append(format_bytes(sum(r.bytes_up for r in records)), style="default")
        text.append("   down ").append(format_bytes(sum(r.bytes_down for r in records)), style="default")
    return text


def _clients(board: Board) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, max_width=20)
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True, style="bright_black")
    for name, client in board.cohort.items():
        share = _share(client)
        progress = f"{share * 100:.0f} %" if client.samples_total else "waiting"
        loss = f"loss {format_loss(client.loss)}" if client.samples_done else ""
        grid.add_row(
            Text(f"  {shorten(name, 18)}"), bar(share, 16, "green" if share >= 1 else "cyan"), progress, loss
        )
    return grid


def _crowd(cohort: Mapping[str, ClientProgress]) -> Text:
    shares = {name: _share(client) for name, client in cohort.items()}
    num_done = sum(share >= 1 for share in shares.values())
    num_waiting = sum(share <= 0 for share in shares.values())
    num_training = len(shares) - num_done - num_waiting
    text = Text(f"  {len(shares)} clients: ", style="bright_black", no_wrap=True, overflow="ellipsis")
    text.append(f"{num_done} done", style="green").append(", ")
    text.append(f"{num_training} training", style="cyan").append(f", {num_waiting} waiting")
    slowest = min(shares, key=lambda name: shares[name])
    if num_training and shares[slowest] > 0:
        text.append(f"; slowest {slowest} at {shares[slowest] * 100:.0f} %")
    return text


def _share(client: ClientProgress) -> float:
    return min(client.samples_done / client.samples_total, 1.0) if client.samples_total > 0 else 0.0


def _rounds(records: list[RoundRecord]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bright_black", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("round", "clients", "loss", "accuracy", "up", "down", "devices", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            str(record.round),
            str(len(record.clients)),
            format_loss(record.train_loss),
            format_share(record.test_accuracy),
            format_bytes(record.bytes_up),
            format_bytes(record.bytes_down),
            format_bytes(record.pipeline_bytes),
            format_seconds(record.wall_s),
        )
    return table
