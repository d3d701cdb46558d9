"""Observers that show a run while it goes: live on a terminal, in plain lines anywhere else.

A view takes the events of any engine, from any thread, and never raises into the run: if the terminal
fails it, it logs one warning and falls silent.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from fedmp.records import Event, Note, RoundFinished, RunFinished, RunStarted
from fedmp.report.board import Board
from fedmp.report.board_view import render_board
from fedmp.report.plain import closing_lines, round_line, start_lines, write_lines
from fedmp.report.tables import closing_table, data_table, plans_panel

__all__ = ["LiveView", "PlainView", "QuietView", "View", "make_view"]

_LOG = logging.getLogger(__name__)


class View(Protocol):
    """An observer with a beginning and an end."""

    def __call__(self, event: Event) -> None:
        """Show one event; never raises."""
        ...

    def __enter__(self) -> View:
        """Begin to show."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing and leave the terminal as it was."""
        ...


def make_view(console: Console | None = None, quiet: bool = False) -> View:
    """Pick the view that suits where the output goes.

    Args:
        console: where to show the run; standard output if None.
        quiet: show nothing at all.

    Returns:
        A live view on a terminal that can draw it, plain lines anywhere else.

    Example:
        >>> with make_view(quiet=True) as view:
        ...     view(Note("ready"))
    """
    if quiet:
        return QuietView()
    if console is None:
        # FORCE_COLOR makes rich take a pipe for a terminal, and a log would fill with redrawn frames.
        console = Console(force_terminal=None if sys.stdout.isatty() else False)
    can_draw = console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only
    return LiveView(console) if can_draw else PlainView(console)


class _SafeView:
    """What all views share: one lock, and failures that stay inside."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._has_failed = False

    def __call__(self, event: Event) -> None:
        """Show one event.

        Args:
            event: from any thread, in any order.
        """
        if self._has_failed:
            return
        try:
            self._show(event)
        # rich leaves with SystemExit when its pipe was closed; the run must not.
        except (Exception, SystemExit) as error:
            self._fail(error)

    def _show(self, event: Event) -> None:
        """Show one event; may raise."""

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            is_first, self._has_failed = not self._has_failed, True
        if is_first:
            _LOG.warning("the display of the run failed (%r) and is off; the run goes on", error)


class QuietView(_SafeView):
    """Shows nothing."""

    def __enter__(self) -> QuietView:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""


class PlainView(_SafeView):
    """One plain line a round, for logs and pipes.

    Args:
        console: its file is written to; standard output if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console()
        self._num_rounds = 0
        self._shown_rounds: set[int] = set()

    def __enter__(self) -> PlainView:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: every line is already written."""

    def _show(self, event: Event) -> None:
        with self._lock:
            write_lines(self._lines(event), self._console.file)

    def _lines(self, event: Event) -> list[str]:
        if isinstance(event, RunStarted):
            self._num_rounds = event.num_rounds
            return start_lines(event)
        if isinstance(event, Note):
            return [event.message]
        if isinstance(event, RoundFinished):
            is_new = event.record.round not in self._shown_rounds
            self._shown_rounds.add(event.record.round)
            return [round_line(event.record, self._num_rounds)] if is_new else []
        if isinstance(event, RunFinished):
            return ["", *closing_lines(event.summary), "", *_file_lines(event.run_dir)]
        return []


class LiveView(_SafeView):
    """A display that redraws itself on a terminal while the run goes.

    Data and plans are printed once, above; the closing table and the files once, below.

    Args:
        console: a terminal; standard output if None.
        refresh_per_second: how often to redraw.

    Example:
        >>> with LiveView(Console(quiet=True)) as view:
        ...     view(Note("ready"))
    """

    def __init__(self, console: Console | None = None, *, refresh_per_second: float = 8.0) -> None:
        super().__init__()
        self._console = console or Console()
        self._board = Board()
        self._live = Live(
            console=self._console, get_renderable=self._render, refresh_per_second=refresh_per_second
        )

    def __enter__(self) -> LiveView:
        """Begin to draw."""
        try:
            self._live.start()
        except (Exception, SystemExit) as error:
            self._fail(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Draw a last time, and give the cursor back."""
        self._stop()

    def _show(self, event: Event) -> None:
        with self._lock:
            was_started, was_finished = bool(self._board.title), self._board.is_finished
            self._board.take(event, time.monotonic())
        # Never print or stop while holding the lock: the drawing thread holds rich's and waits for ours.
        if isinstance(event, RunStarted) and not was_started:
            self._print_start(event)
        elif isinstance(event, RunFinished) and not was_finished:
            self._stop()
            self._print_end(event)

    def _render(self) -> RenderableType:
        try:
            with self._lock:
                return render_board(self._board, now_s=time.monotonic(), height=self._console.height)
        except Exception as error:
            self._fail(error)
            return Text()

    def _stop(self) -> None:
        try:
            self._live.stop()
        except (Exception, SystemExit) as error:
            self._fail(error)

    def _print_start(self, event: RunStarted) -> None:
        if event.data:
            self._console.print(data_table(event.data, event.label_names))
        if event.plans:
            self._console.print(plans_panel(event.plans))

    def _print_end(self, event: RunFinished) -> None:
        self._console.print(closing_table(event.summary))
        for line in _file_lines(event.run_dir):
            self._console.print(Text(line), soft_wrap=True)


def _file_lines(run_dir: str) -> list[str]:
    """Name what the run left behind; pictures only if they were drawn."""
    pictures = Path(run_dir) / "pictures"
    names = sorted(path.name for path in pictures.iterdir()) if pictures.is_dir() else []
    return [f"run directory: {run_dir}", *(f"  picture: {pictures / name}" for name in names)]
