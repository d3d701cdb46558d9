"""A deployed device: it dials the coordinator, finds its part of the job, and trains it on its own data.

It has the same job config as the coordinator, made here, so nothing that could be executed is received. It
traces the model itself, on the meta device, where it has no weights: they come stage by stage with each pull.
When its client's model is cut anew, it asks for the job again, cuts its new stages from the graph that it has,
and goes on.
"""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

import fedmp
from fedmp.client import OTHER_PLAN, DeviceSpec, Federation, HttpFederation, heartbeat, serve_job
from fedmp.data import Dataset, Rows
from fedmp.engine.agreement import check_agreement
from fedmp.engine.client_plan import local_work, part_of
from fedmp.engine.job import Job
from fedmp.engine.prepare import build_model, trace_model
from fedmp.errors import ConfigError, DataError, RefusedError, TraceError
from fedmp.graph import LayerGraph
from fedmp.identity import Credentials
from fedmp.records import JobOffer, Joined, Ready
from fedmp.seeds import derive_seed
from fedmp.stages import StageBlueprint, draw_blueprints

__all__ = ["DeviceSettings", "LocalJob", "run_deployed_device"]

_log = logging.getLogger("fedmp.device")
_ASK_AGAIN_S = 0.5
_LONGEST_EXCUSE = 1000


class DeviceSettings(BaseModel):
    """How a device runs; never part of the job.

    Attributes:
        credentials: file that `fedmp enroll` made.
        coordinator: its URL; None for the one in the credentials.
        host: this machine's address in the client's own network, where its other devices reach it.
        backend: of torch.distributed, between the client's devices.
        torch_device: "cpu", "cuda:0", ...
        num_threads: for torch on the CPU; 0 leaves torch's default.
        transfer_timeout_s: deadline of one transfer between the client's devices.
        patience_s: how long a coordinator may be away.
        state_folder: where this device keeps what strategies need from round to round, if they need any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    credentials: Path | None = None
    coordinator: str | None = None
    host: str = "127.0.0.1"
    backend: str = "gloo"
    torch_device: str = "cpu"
    num_threads: int = Field(default=0, ge=0)
    transfer_timeout_s: float = Field(default=300.0, gt=0)
    patience_s: float = Field(default=3600.0, ge=0)
    state_folder: Path = Path("state")


@dataclass(frozen=True)
class LocalJob:
    """A job as this machine has it.

    Attributes:
        job: with this client's own data, or data that all share and a split.
        config: as the command line composed it; empty compares nothing but the model's graph.
    """

    job: Job
    config: Mapping[str, Any]


def run_deployed_device(jobs: Sequence[LocalJob], settings: DeviceSettings) -> None:
    """Take part in the coordinator's jobs, one after another, until it sends this device home.

    Args:
        jobs: what this device is ready to do; the coordinator's job is found among them.
        settings: of this device.

    Raises:
        ConfigError: credentials or address are missing, or the coordinator's job is not among `jobs`.
        FedmpError: the device had to give up; the coordinator was told why, if it could be reached.
    """
    if settings.credentials is None:
        raise ConfigError("a device needs its credentials: `fedmp device --credentials FILE`")
    credentials = Credentials.load(settings.credentials)
    federation = _dial(credentials, settings)
    _bind_pipeline(settings.host)
    process = os.urandom(8).hex()
    known: _Known | None = None
    while True:
        offer = federation.job()
        if (offer.client, offer.device) != (credentials.client, credentials.device):
            raise ConfigError(
                f"the coordinator takes {credentials.client}/{credentials.device} for {offer.client}/{offer.device}"
            )
        if known is None or known.name != offer.job:
            known = _Known(offer.job, _find(jobs, offer).job)
        federation.holds(offer.plan.digest)
        with heartbeat(federation, offer.heartbeat_s):
            spec = _prepare(known, offer, federation, settings, process)
        if isinstance(spec, Ready):
            last = _sit_out(spec, offer, federation)
        else:
            known.has_taken_part = True
            _log.info("ready", extra={"fields": {"event": "ready", "job": offer.job, "client": offer.client}})
            last = serve_job(spec, federation).kind
        if last == "stop":
            return


@dataclass
class _Known:
    """What a device keeps of a job from one plan to the next.

    Attributes:
        name: of the job.
        job: as this machine has it.
        graph: of its model, once it is traced.
        samples: of the client, once they are loaded.
        has_taken_part: whether this process has had stages.
    """

    name: str
    job: Job
    graph: LayerGraph | None = None
    samples: Dataset | None = None
    has_taken_part: bool = False


def _dial(credentials: Credentials, settings: DeviceSettings) -> HttpFederation:
    url = settings.coordinator or credentials.coordinator
    if url is None:
        raise ConfigError("where is the coordinator? say device.coordinator=https://HOST:PORT")
    secure = url.startswith("https://")
    if not secure and credentials.ca is not None:
        raise ConfigError(
            f"the credentials hold an authority to trust, so the coordinator's address must begin with https://, "
            f"but it is {url}"
        )
    return HttpFederation(
        url,
        credentials.token,
        context=credentials.ssl_context() if secure else None,
        patience_s=settings.patience_s,
    )


def _find(jobs: Sequence[LocalJob], offer: JobOffer) -> LocalJob:
    """The job among those of this device that the coordinator offers."""
    refusal: ConfigError | None = None
    for local in jobs:
        try:
            check_agreement(local.config, offer.agreed)
        except ConfigError as error:
            refusal = refusal or error
        else:
            return local
    raise refusal or ConfigError("this device has no job")


def _prepare(
    known: _Known, offer: JobOffer, federation: Federation, settings: DeviceSettings, process: str
) -> DeviceSpec | Ready:
    """Trace, cut, load.

    Returns:
        What to serve with; or, where the plan leaves this device out or should, what it has told.

    Raises:
        FedmpError: this device cannot take part at all.
    """
    job, plan = known.job, offer.plan
    ready = Ready(job=offer.job, plan=plan.digest, process=process)
    if offer.device not in plan.devices:
        _tell(federation, ready)
        return ready
    rank = plan.devices.index(offer.device)
    known.graph = known.graph or _trace(job, offer)
    drawn = draw_blueprints(known.graph, plan.cuts, device=torch.device(settings.torch_device))
    blueprints = tuple(drawn[stage] for stage in plan.placement[rank])
    try:
        dataset = _own_data(known, offer, blueprints)
    except (DataError, OSError) as error:
        ready = ready.model_copy(update={"unable": str(error)[:_LONGEST_EXCUSE]})
        _tell(federation, ready)
        if not known.has_taken_part:  # more likely a mistake, which whoever starts the device should see
            raise
        _log.warning("left out: %s", error, extra={"fields": {"event": "unable", "client": offer.client}})
        return ready
    ready = ready.model_copy(update={"num_samples": None if dataset is None else len(dataset)})
    num_samples = _join(federation, ready)
    if num_samples is None:
        return ready
    return DeviceSpec(
        url="",
        token="",
        client=offer.client,
        device=offer.device,
        rank=rank,
        placement=plan.placement,
        blueprints=blueprints,
        dataset=dataset,
        num_samples=num_samples,
        task=job.task,
        work=local_work(job, plan, job.strategy.scope(known.graph.state)),
        options=job.pipeline.options(),
        uplink=job.uplink_channel(known.graph.state),
        downlink=job.downlink_channel(known.graph.state),
        state_folder=settings.state_folder / offer.job,
        record_timeline=offer.record_timeline,
        host=settings.host,
        backend=settings.backend,
        torch_device=settings.torch_device,
        num_threads=settings.num_threads,
        planned_bytes=plan.memory_bytes(offer.device),
        memory_bytes=plan.device_memory_bytes(offer.device),
        timeout_s=settings.transfer_timeout_s,
        ready=ready,
        plan=plan.digest,
        process=process,
        heartbeat_s=offer.heartbeat_s,
        faults=tuple(f for f in job.faults if f.device == f"{offer.client}/{offer.device}"),
    )


def _trace(job: Job, offer: JobOffer) -> LayerGraph:
    """Trace the model without its weights."""
    dtype = getattr(torch, offer.sample_dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"the coordinator's samples are of dtype {offer.sample_dtype!r}, which torch has not"
        )
    shape = (job.batch_size, *offer.sample_shape)
    try:
        with torch.device("meta"):
            graph = trace_model(job, build_model(job), torch.empty(shape, dtype=dtype))
    except TraceError:  # a forward that makes tensors on the CPU, say: the whole model is here for a moment
        _log.info(
            "the model cannot be traced without its weights", extra={"fields": {"event": "trace-on-cpu"}}
        )
        graph = trace_model(job, build_model(job), torch.zeros(shape, dtype=dtype))
    if graph.fingerprint != offer.fingerprint:
        own = {"fedmp": fedmp.__version__, "torch": torch.__version__}
        differing = [
            f"{name} {own[name]} (there {theirs})"
            for name, theirs in offer.versions.items()
            if own.get(name) != theirs
        ]
        raise ConfigError(
            f"this device's model {graph.model_name} has another graph than the coordinator's (fingerprint "
            f"{graph.fingerprint}, there {offer.fingerprint}); use the same code and config"
            + (f", and the same versions: here {', '.join(differing)}" if differing else "")
        )
    if tuple(layer.name for layer in graph.layers) != offer.plan.layer_names:
        raise ConfigError("the coordinator's plan names other layers than this device's model has")
    return graph


def _own_data(known: _Known, offer: JobOffer, blueprints: Sequence[StageBlueprint]) -> Dataset | None:
    """This client's samples, as far as the device needs them; a device in the middle loads nothing."""
    if not (blueprints[0].is_first or blueprints[-1].is_last):
        return None
    if known.samples is None:
        known.samples = _load(known.job, offer)
    dataset = known.samples
    if blueprints[0].is_first and tuple(dataset.input_batch([0]).shape[1:]) != offer.sample_shape:
        raise DataError(
            f"a sample of {offer.client} has shape {list(dataset.input_batch([0]).shape[1:])}, those of the "
            f"coordinator {list(offer.sample_shape)}"
        )
    return part_of(dataset, blueprints)


def _load(job: Job, offer: JobOffer) -> Dataset:
    train = job.source().load().train
    parts = job.split.assign(train, offer.num_clients, derive_seed(job.seed, "split") % 2**32)
    own = parts[offer.client_index : offer.client_index + 1]
    return train.select(Rows.checked(own, [offer.client], num_rows=len(train))[0])


def _join(federation: Federation, ready: Ready) -> int | None:
    """Say that this device can begin.

    Returns:
        The client's number of samples, once a device has told it; None if the plan is another one by then.
    """
    while (joined := _tell(federation, ready)) is not None:
        if joined.num_samples is not None:
            return joined.num_samples
        time.sleep(_ASK_AGAIN_S)
    return None


def _tell(federation: Federation, ready: Ready) -> Joined | None:
    """Say what this device holds, or that it holds nothing; None if the plan is another one by then."""
    try:
        return federation.ready(ready)
    except RefusedError as error:
        if error.reason != OTHER_PLAN:
            raise
        return None


def _sit_out(ready: Ready, offer: JobOffer, federation: Federation) -> str:
    """Wait for the end of a job whose plan leaves this device out, or for another plan."""
    with heartbeat(federation, offer.heartbeat_s):
        while (instruction := federation.instruction(ready.process)).kind not in ("stop", "next"):
            if instruction.kind == "join":
                if instruction.plan != ready.plan:
                    return "join"
                _tell(federation, ready)
    return instruction.kind


def _bind_pipeline(host: str) -> None:
    """Let the client's devices reach each other over the interface of `host` alone.

    Raises:
        ConfigError: this machine has no such address.
    """
    try:
        wanted = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(
            f"device.host is {host!r}; give this machine's address in the client's network"
        ) from None
    if wanted.version == 4:
        for _, name in socket.if_nameindex():
            if _address_of(name) == host or (wanted.is_loopback and name.startswith("lo")):
                for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                    os.environ.setdefault(variable, name)
                return
        raise ConfigError(f"device.host is {host}, but no network interface of this machine has that address")


def _address_of(interface: str) -> str:
    """The IPv4 address of an interface, empty if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(
                probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15])
            )  # SIOCGIFADDR
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])
