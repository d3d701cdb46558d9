"""What a model's layers cost: the planner's input."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["LayerProfile", "Profile"]


class LayerProfile(BaseModel):
    """Costs of one layer: a contiguous run of the model's graph that no plan cuts.

    Times and activations are per sample, on the profile's reference device; weights are not.

    Attributes:
        name: path of the module it comes from, unique in the profile.
        forward_s: seconds of one sample's forward.
        backward_s: seconds of one sample's backward.
        parameters: names of the parameters it uses; a tied one is named by every layer that uses it.
        buffer_bytes: its buffers (batch-norm statistics, constant tables).
        activation_bytes: what one sample keeps for backward.
        workspace_bytes: what one sample's backward through this layer needs for a moment, such as gradients.
        boundary_bytes: what one sample sends forward if the model is cut right after this layer.
        gradient_bytes: what comes back through that cut for one sample.
        reused_bytes: of what crosses that cut, what a later layer keeps for backward and counts as its own.
        can_cut_after: whether a plan may cut right after this layer.
        must_cut_after: whether every plan must cut right after this layer; the last layer never must.
        device: name of the device that must run this layer; None for any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    forward_s: float = Field(ge=0)
    backward_s: float = Field(ge=0)
    parameters: tuple[str, ...] = ()
    buffer_bytes: int = Field(default=0, ge=0)
    activation_bytes: float = Field(default=0, ge=0)
    workspace_bytes: float = Field(default=0, ge=0)
    boundary_bytes: float = Field(default=0, ge=0)
    gradient_bytes: float = Field(default=0, ge=0)
    reused_bytes: float = Field(default=0, ge=0)
    can_cut_after: bool = True
    must_cut_after: bool = False
    device: str | None = None

    @model_validator(mode="after")
    def _must_implies_can(self) -> LayerProfile:
        if self.must_cut_after and not self.can_cut_after:
            raise ValueError(f"layer {self.name!r} must be cut after, but may not be cut after")
        return self


class Profile(BaseModel):
    """Costs of a model's layers, in graph order, and of the training that they are for.

    Attributes:
        layers: the layers, in order.
        parameter_bytes: size of each parameter by name.
        reference_flops_per_s: speed of the device that the layers' times are for; on a device of
            another speed a layer takes `forward_s * reference_flops_per_s / device.flops_per_s`.
        batch_size: samples in one optimizer step.
        optimizer_copies: optimizer state in units of the parameters' size (SGD 0, with momentum 1, Adam 2).
        update_s_per_byte: seconds of the optimizer's step for each byte of parameters, on the reference device.
        process_bytes: what a stage's process needs beside tensors once it works.
        method: how the times were found: "flops" or "measured".
        fingerprint: of the graph that was profiled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[LayerProfile, ...] = Field(min_length=1)
    parameter_bytes: Mapping[str, int]
    reference_flops_per_s: float = Field(gt=0)
    batch_size: int = Field(gt=0)
    optimizer_copies: float = Field(default=1.0, ge=0)
    update_s_per_byte: float = Field(default=0.0, ge=0)
    process_bytes: int = Field(default=0, ge=0)
    method: str = "flops"
    fingerprint: str = ""
