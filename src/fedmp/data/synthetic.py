"""Synthetic(alpha, beta): the published generator of clients that differ in their models and in their inputs."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.data.dataset import Dataset, TrainTest

__all__ = ["Synthetic"]

_FEATURES, _CLASSES = 60, 10


class Synthetic(Component):
    """Synthetic(alpha, beta) (Li et al., 2020, Federated Optimization in Heterogeneous Networks, section 5.1).

    User k has a model W_k [10, 60], b_k with entries from N(u_k, 1), u_k ~ N(0, alpha), and inputs from N(v_k, S),
    with v_k's entries from N(B_k, 1), B_k ~ N(0, beta), S diagonal with S_jj = j^-1.2. A sample's label is
    argmax(W_k x + b_k). alpha says how much the users' models differ, beta how much their inputs do. As in the
    authors' code, alpha and beta are standard deviations, and a user has 50 samples and lognormal(4, 2) more.

    Give each user to a client of its own with the split by user.

    Args:
        alpha, beta: spread of models and of inputs. With both 0 users still differ: draws are their own.
        num_users: of which each has samples of its own.
        iid: one model and one distribution of inputs for all.
        most_samples: of a user; what the lognormal gives beyond is left out. None for no limit.
        test_fraction: share of each user's samples to hold out, at least one.
        seed: of everything that is drawn.
    """

    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=1.0, ge=0)
    num_users: int = Field(default=30, ge=1)
    iid: bool = False
    most_samples: int | None = Field(default=None, ge=2)
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)

    def load(self) -> TrainTest:
        """Draw both sets: inputs float32 [N, 60], classes 0 to 9, users 0 to num_users - 1."""
        random = np.random.default_rng(self.seed)
        counts = random.lognormal(4, 2, self.num_users).astype(np.int64) + 50
        if self.most_samples is not None:
            counts = counts.clip(max=self.most_samples)
        scale = np.sqrt(np.arange(1, _FEATURES + 1) ** -1.2)
        common = random.normal(0, 1, (_CLASSES, _FEATURES)), random.normal(0, 1, _CLASSES)
        train, test = [], []
        for user, count in enumerate(counts.tolist()):
            centre = random.normal(0, self.alpha) if self.alpha else 0.0
            where = random.normal(0, self.beta) if self.beta else 0.0
            weight, bias = common
            mean = np.zeros(_FEATURES)
            if not self.iid:
                weight, bias = random.normal(centre, 1, weight.shape), random.normal(centre, 1, bias.shape)
                mean = random.normal(where, 1, _FEATURES)
            inputs = mean + scale * random.standard_normal((count, _FEATURES))
            labels = (inputs @ weight.T + bias).argmax(axis=1)
            held_out = max(1, round(self.test_fraction * count))
            train.append((inputs[held_out:], labels[held_out:], np.full(count - held_out, user)))
            test.append((inputs[:held_out], labels[:held_out], np.full(held_out, user)))
        return TrainTest(train=_joined(train), test=_joined(test))


def _joined(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Dataset:
    inputs, labels, users = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Dataset(
        inputs=torch.from_numpy(inputs.astype(np.float32)),
        targets=torch.from_numpy(labels.astype(np.int64)),
        users=torch.from_numpy(users.astype(np.int64)),
        label_names=tuple(map(str, range(_CLASSES))),
    )
