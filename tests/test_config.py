"""From composed YAML to a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fedmp.config import RunConfig, config_dir, load_config
from fedmp.engine.local import LocalEngine
from fedmp.engine.simulate import SimulateEngine
from fedmp.errors import ConfigError
from fedmp.schedule import GPipe
from fedmp.strategy import PowerOfChoice, Scaffold, Stragglers

IN_COMPANY = {
    "transforms=ef21": "transforms=[ef21,topk]",
    **{f"downlink={name}": f"downlink=[ef21,{name}]" for name in ("lowrank", "randomk", "sign", "topk")},
    "downlink=ef21": "downlink=[ef21,int8]",
}
GROUPS = sorted(f"{path.parent.name}={path.stem}" for path in config_dir().glob("*/*.yaml"))


def composed(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return load_config(compose("config", list(overrides)))


@pytest.mark.parametrize("choice", GROUPS)
def test_every_choice_of_every_group_makes_a_job_and_an_engine(choice: str) -> None:
    config = composed("experiment=none", IN_COMPANY.get(choice, choice))
    assert config.job().rounds == config.rounds
    assert config.make_engine().name in ("local", "simulate", "deploy")


def test_the_default_is_the_quickstart() -> None:
    assert composed() == composed("experiment=quickstart")
    assert composed().topology.name == "three_labs"
    assert composed().centralized is not None


def test_a_choice_on_the_command_line_wins_over_the_experiments() -> None:
    assert composed("experiment=quickstart", "topology=uneven").topology.name == "uneven"


@pytest.mark.parametrize(("choice", "kind"), [("local", LocalEngine), ("simulate", SimulateEngine)])
def test_an_engine_is_made_by_its_dotted_path(choice: str, kind: type) -> None:
    assert isinstance(composed(f"engine={choice}").make_engine(), kind)


def test_a_component_keeps_the_values_that_it_was_given() -> None:
    job = composed("schedule=gpipe", "+strategy.fraction=0.5", "+strategy.local_steps=3", "seed=9").job()
    assert isinstance(job.schedule, GPipe)
    assert (job.strategy.local_steps, job.seed) == (3, 9)
    assert job.strategy.cohort(["a", "b"], round=1, seed=0) in (("a",), ("b",))


def test_an_optimizer_is_made_of_whatever_parameters_come() -> None:
    job = composed("optimizer.lr=0.25", "+optimizer.nesterov=true").job()
    optimizer = job.optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["nesterov"]) == (0.25, True)


def test_a_server_optimizer_is_any_of_torch_optim() -> None:
    job = composed("experiment=none", "server_optimizer=adam").job()
    assert job.server_optimizer is not None
    assert isinstance(job.server_optimizer([torch.nn.Parameter(torch.zeros(2))]), torch.optim.Adam)


def test_a_strategy_brings_its_server_optimizer_unless_another_is_chosen() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    job = composed("strategy=fedadam", "+strategy.server_rate=0.3").job()  # also within an experiment
    assert job.server_optimizer is None
    assert job.strategy.server_optimizer is not None
    made = job.strategy.server_optimizer(weights)
    assert isinstance(made, torch.optim.Adam)
    assert made.defaults["lr"] == 0.3
    other = composed("strategy=fedadam", "server_optimizer=momentum").job().server_optimizer
    assert other is not None
    assert isinstance(other(weights), torch.optim.SGD)


def test_diloco_brings_its_client_optimizer_unless_another_is_chosen() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    for strategy in ("diloco", "streaming_diloco"):
        job = composed("experiment=none", f"strategy={strategy}").job()
        assert isinstance(job.optimizer(weights), torch.optim.AdamW)
        job = composed("experiment=none", f"strategy={strategy}", "optimizer=sgd").job()
        assert isinstance(job.optimizer(weights), torch.optim.SGD)


def test_selection_and_effort_are_parts_of_whatever_strategy() -> None:
    job = composed(
        *("strategy=scaffold", "selection=power_of_choice", "+strategy.selection.num_candidates=3"),
        *("effort=stragglers", "+strategy.effort.fraction=0.9"),
    ).job()
    assert isinstance(job.strategy, Scaffold)
    assert job.strategy.selection == PowerOfChoice(num_candidates=3)
    assert job.strategy.effort == Stragglers(fraction=0.9)


def test_a_config_survives_json() -> None:
    config = composed("experiment=quickstart")
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+rouns=1"], r"unknown key rouns; did you mean rounds\?"),
        (["batch_size=0"], "batch_size is 0"),
        (["seed=-1"], "seed is -1"),
        (["~model"], "model is missing"),
        (["~model._target_"], "model needs a _target_"),
        (["+engine.prt=1"], r"unknown key engine\.prt; did you mean engine\.port\?"),
        (["engine._target_=fedmp.engine.nowhere.Engine"], r"engine \(fedmp\.engine\.nowhere\.Engine\)"),
        (["centralized={epochs: 1}"], r"centralized\.optimizer is missing"),
        (["topology.clients.0.devices.flops_per_s=-1"], "flops_per_s is -1"),
    ],
)
def test_a_config_error_names_the_key_and_the_value(overrides: list[str], message: str) -> None:
    def build() -> None:
        config = composed("experiment=none", *overrides)
        config.job()
        config.make_engine()

    with pytest.raises(ConfigError, match=message):
        build()


def test_an_interpolation_is_resolved() -> None:
    config = composed("rounds=6", "num_microbatches=${rounds}")
    assert config.num_microbatches == 6


def test_a_value_that_is_still_missing_is_an_error(tmp_path: Path) -> None:
    from omegaconf.errors import MissingMandatoryValue

    plain: dict[str, Any] = {"rounds": "???"}
    with pytest.raises(MissingMandatoryValue):
        load_config(OmegaConf.create(plain))


def test_the_shipped_configs_are_found() -> None:
    assert (config_dir() / "config.yaml").is_file()
