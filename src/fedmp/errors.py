"""Every error that fedmp raises on purpose, drawn as one tree.

    FedmpError
    ├── ConfigError            a config, an argument or a file of the user's is wrong
    │   └── ResumeError        the run to resume does not match what was asked for
    ├── DataError              a data set is missing, malformed, or leaves a client without samples
    ├── TraceError             a model's forward cannot be turned into a graph
    ├── PlanError              a model cannot be cut as asked
    │   └── InfeasibleError    no plan fits the devices' memory
    ├── TrainingError          training itself went wrong (a loss that is not finite)
    ├── PipelineError          the pipeline between a client's devices broke
    │   ├── FrameError         a frame that does not belong here and now, or is malformed
    │   └── DeadlineError      a peer stayed silent for longer than its deadline
    └── FederationError        the coordinator and a device could not agree
        ├── RefusedError       the coordinator refused a request, and says why
        └── RoundError         a round could not be closed

Users get one of these, or ValueError for a bad argument of a plain function. The command line prints
the message alone and exits with code 2.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DataError",
    "DeadlineError",
    "FederationError",
    "FedmpError",
    "FrameError",
    "InfeasibleError",
    "PipelineError",
    "PlanError",
    "RefusedError",
    "ResumeError",
    "RoundError",
    "TraceError",
    "TrainingError",
]


class FedmpError(Exception):
    """Base of every error that fedmp raises on purpose."""


class ConfigError(FedmpError):
    """A config, an argument or a file of the user's is wrong."""


class ResumeError(ConfigError):
    """The run to resume does not match what was asked for."""


class DataError(FedmpError):
    """A data set is missing, malformed, or leaves a client without samples."""


class TraceError(FedmpError):
    """A model's forward cannot be turned into a graph."""


class PlanError(FedmpError):
    """A model cannot be cut as asked."""


class InfeasibleError(PlanError):
    """No plan fits the devices' memory."""


class TrainingError(FedmpError):
    """Training itself went wrong, such as a loss that is not finite."""


class PipelineError(FedmpError):
    """The pipeline between a client's devices broke."""


class FrameError(PipelineError):
    """A frame that does not belong here and now, or is malformed."""


class DeadlineError(PipelineError):
    """A peer stayed silent for longer than its deadline."""


class FederationError(FedmpError):
    """The coordinator and a device could not agree."""


class RefusedError(FederationError):
    """The coordinator refused a request.

    Attributes:
        status: HTTP status code of the refusal.
        reason: one of a few fixed words, such as "wrong-round", for programs and metrics.
    """

    def __init__(self, message: str, *, status: int, reason: str = "invalid") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class RoundError(FederationError):
    """A round could not be closed."""
