"""Where in a model an error came up: the modules whose forward was running, and the line of code."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from torch import nn

__all__ = ["Running", "watch_calls", "where_it_failed"]

_NOT_THE_USERS = ("/torch/", "/fedmp/graph/", "/fedmp/engine/")

Running = list[tuple[str, nn.Module]]


@contextlib.contextmanager
def watch_calls(model: nn.Module, running: Running) -> Iterator[None]:
    """Keep the stack of modules whose forward is running, with their paths, so that an error can be placed."""
    handles = []
    for name, module in model.named_modules():
        entry = (name, module)
        handles.append(module.register_forward_pre_hook(lambda *_, entry=entry: running.append(entry)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def where_it_failed(model: nn.Module, running: Running, error: Exception) -> str:
    """The innermost module that was running, the line of code of the user's, and what is wrong, in one line."""
    name, module = running[-1] if running else ("", model)
    where = f"module {name!r} ({type(module).__name__})" if name else f"{type(model).__name__}.forward"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.line and not any(part in frame.filename for part in _NOT_THE_USERS):
            where += f", at `{frame.line}` ({frame.filename}:{frame.lineno})"
            break
    reason = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
    return f"{where}: {reason.strip().rstrip('.')[:300]}"
