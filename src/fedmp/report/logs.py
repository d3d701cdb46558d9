"""Structured logs of the long-running commands: one line an event, as text for people or as JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import fields
from datetime import datetime, timezone
from typing import Any, Literal, TextIO

from pydantic import BaseModel

from fedmp.records import Event, Progress, RunStarted

__all__ = ["LogView", "configure_logs"]

_log = logging.getLogger("fedmp.run")


def configure_logs(style: Literal["text", "json"], stream: TextIO | None = None) -> None:
    """Print fedmp's log, whatever is a note or worse.

    Args:
        style: "text" or "json" (one object a line).
        stream: where to; None for standard error.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter())
    logger = logging.getLogger("fedmp")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)


class LogView:
    """An observer of a run that logs what happens; of progress within a round, only the metrics tell."""

    def __call__(self, event: Event) -> None:
        """Log one event."""
        if isinstance(event, Progress):
            return
        told: dict[str, Any] = {"event": _kind(event)}
        if isinstance(event, RunStarted):
            told |= {"title": event.title, "rounds": event.num_rounds, "first_round": event.first_round}
        else:
            for field in fields(event):
                value = getattr(event, field.name)
                if isinstance(value, BaseModel):
                    told |= value.model_dump(mode="json")
                elif isinstance(value, str | int | float):
                    told[field.name] = value
                elif field.name == "clients":
                    told["clients"] = list(value)
        message = str(told.pop("message", told["event"]))
        _log.info(message, extra={"fields": told})


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        told = " ".join(
            f"{key}={value}" for key, value in getattr(record, "fields", {}).items() if value is not None
        )
        text = f"{at} {record.levelname.lower():7} {record.getMessage()}  {told}".rstrip()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _kind(event: Event) -> str:
    """`RoundFinished` as `round-finished`."""
    name = type(event).__name__
    return "".join(f"-{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
