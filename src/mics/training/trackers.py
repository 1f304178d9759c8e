"""Experiment trackers: TensorBoard by default, Weights & Biases and MLflow when asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mics.errors import ConfigError
from mics.training.config import LogConfig

Scalars = Mapping[str, float]


class Tracker(Protocol):
    """A place that scalars are sent to."""

    def log(self, step: int, scalars: Scalars) -> None:
        """Take the scalars of one step."""

    def close(self) -> None:
        """Hand over what is still buffered."""


def check_trackers(config: LogConfig) -> None:
    """Raise before anything starts when a tracker that was asked for is not installed.

    Raises:
        ConfigError: names the option and the package.
    """
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb, "mlflow": config.mlflow}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"log.{package} asks for {package}, which is not installed.",
                numbers=f"log.{package} = {asked!r}.",
                write=f"pip install {package}, or leave --log.{package} out"
                if package != "tensorboard"
                else "pip install tensorboard, or --log.no-tensorboard",
            )


def open_trackers(config: LogConfig, folder: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run; ``settings`` is its resolved configuration. Rank 0 only."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(_TensorBoard(folder / "tensorboard"))
    if config.wandb:
        trackers.append(_WandB(config.wandb, folder, settings))
    if config.mlflow:
        trackers.append(_MLflow(config.mlflow, folder, settings))
    return trackers


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        writers = importlib.import_module("torch.utils.tensorboard")
        self._writer = writers.SummaryWriter(str(folder))

    def log(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(project=project, dir=str(folder), config=dict(settings))

    def log(self, step: int, scalars: Scalars) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, experiment: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(experiment)
        self._mlflow.start_run(run_name=folder.name)
        self._mlflow.log_params(_flat(settings))

    def log(self, step: int, scalars: Scalars) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat
