"""Everything a run needs before its first step, in the order it is needed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PretrainedConfig

from mics.checkpoint import HeldFolder, hold_folder
from mics.models.building import (
    check_fits,
    check_mask,
    load_config,
    num_parameters,
    num_positions,
    task_of,
)
from mics.models.experts import as_asked_by, ask_for_router_loss
from mics.models.interchange.weights import load_weights
from mics.models.packing import check_packed
from mics.models.small_files import OF_MODELS, small_files
from mics.planning.figures import Figures
from mics.ranks.agreement import check_agreement
from mics.ranks.device import default_device_type
from mics.ranks.launcher import full_world
from mics.ranks.mesh import start
from mics.ranks.whereabouts import world_group
from mics.sharding.dealing import remember_dealt
from mics.sharding.shard import shard
from mics.sharding.units import units_of
from mics.topology import Topology
from mics.training.batching import Batching, sequence_length, solve
from mics.training.config import TrainConfig
from mics.training.data import IGNORED, Batch, Data, Sequences, Tokenizer, open_data
from mics.training.expectation import Choice, Expectation, forecast
from mics.training.length import going_on, in_steps
from mics.training.lora import anatomy_of, check_lora
from mics.training.measuring import open_sets, sources_by_name
from mics.training.optimisation import check_dealt, make_optimizer
from mics.training.progress import Progress
from mics.training.rates import memory_bytes
from mics.training.record import HELD_OUT
from mics.training.settings import as_toml
from mics.training.trackers import check_trackers


@dataclass(frozen=True)
class Run:
    """A run that is ready for its first step.

    ``config`` has its length in steps, and ``epochs`` what that follows from, if anything.
    """

    config: TrainConfig
    epochs: float | None
    shape: PretrainedConfig
    model: nn.Module
    parameters: int
    optimizer: torch.optim.Optimizer
    data: Data
    measured: Mapping[str, Sequences]
    batch: Batching
    topology: Topology
    device: torch.device
    sequence: int
    expected: Expectation
    planned: Figures | None
    memory_before: int | None
    assets: dict[str, bytes]
    folder: HeldFolder

    @property
    def masked(self) -> bool:
        """Whether it is a masked language model."""
        return task_of(self.shape) == "masked"

    @property
    def flops(self) -> int | None:
        """FLOPs of the model per rank and step; ``None`` for a model that cannot be traced."""
        each = self.expected.model_flops
        return None if each is None else each * self.batch.micro_batches // self.ranks

    @property
    def ranks(self) -> int:
        """How many there are; fewer than the full job's while some are away."""
        return dist.get_world_size()

    @property
    def micro_steps(self) -> int:
        """How many each rank runs per step."""
        return len(self.batch.dealt(0, self.ranks))

    def going_on(self, at: Progress) -> Run:
        """The run as it is from ``at`` on: as many epochs may be another number of steps."""
        if self.epochs is None:
            return self
        data, batch = self.data.train.num_sequences, self.batch.global_batch
        config = going_on(self.config, self.epochs, at, data, batch)
        assets = {**self.assets, "config.toml": as_toml(config).encode()}
        return replace(self, config=config, assets=assets)

    def micro_batches(self, position: int) -> Iterator[Batch]:
        """This rank's micro-batches of the step that begins at ``position``.

        Together the ranks take the next ``global_batch`` sequences, every one once, whatever the
        layout and their number.
        """
        size = self.batch.micro_batch
        for number in self.batch.dealt(dist.get_rank(), self.ranks):
            batch = self.data.train.batch(position + (number or 0) * size, size)
            if number is None:  # as large as any other, and nothing in it is to be predicted
                batch.labels.fill_(IGNORED)
            yield batch.to(self.device)


@contextmanager
def set_up(asked: TrainConfig) -> Iterator[Run]:
    """Hold the run's folder and build what trains in it. Collective over all ranks.

    Raises:
        MicsError: an option, the data, the model or the cluster does not fit; on every rank.
    """
    _check(asked)
    world, _ = start()
    device_type = default_device_type()
    device = torch.device(device_type)
    batch = _batch(asked, world, device)
    with hold_folder(asked.run.folder) as folder:
        shape, data, sequence = _shape_and_data(asked)
        config = in_steps(asked, data.train.num_sequences, batch.global_batch)
        measured = _measured(config, shape, data, sequence)
        anatomy = anatomy_of(config, shape)
        expected = forecast(config, anatomy, batch, sequence, device)
        choice = expected.choose(config.parallel.partition)
        before = memory_bytes(device)
        torch.manual_seed(config.run.seed)  # of the weights
        model = anatomy.hand_on(torch.float32)
        parameters = num_parameters(model)
        _shard(model, config, choice)
        if config.model.weights is not None:
            load_weights(model, config.model.weights)
        torch.manual_seed(config.run.seed + 1 + dist.get_rank())  # of dropout
        remember_dealt(model, batch.micro_batches)
        groups = units_of(model)[0].groups
        partition = groups.shard.size()
        yield Run(
            config=config,
            epochs=asked.run.epochs,
            shape=shape,
            model=model.train(),
            parameters=parameters,
            optimizer=make_optimizer(
                model, config.optimizer, dealt_states=config.parallel.dealt_states
            ),
            data=data,
            measured=measured,
            batch=batch,
            topology=Topology.from_world(world, groups.gpus_per_node, partition),
            device=device,
            sequence=sequence,
            expected=expected.on(world, len(batch.dealt(0, world))).expect(
                partition, choice.offload
            ),
            planned=expected.planned(partition, choice.offload),
            memory_before=before,
            assets=_assets(config, shape, data.tokenizer),
            folder=folder,
        )
        dist.barrier()


def _shard(model: nn.Module, config: TrainConfig, choice: Choice) -> None:
    parallel = config.parallel
    shard(
        model,
        partition=choice.partition,
        gpus_per_node=parallel.gpus_per_node,
        mp_policy=_precision(parallel.dtype),
        activation_checkpointing=parallel.activation_checkpointing,
        activation_offload=choice.offload,
        compile=parallel.compile,
        collectives=parallel.collectives,
        hop_two=parallel.hop_two,
        error_feedback=parallel.error_feedback,
    )


def _check(config: TrainConfig) -> None:
    """Raises MicsError where options contradict each other, before anything is read."""
    check_trackers(config.log)
    check_lora(config)
    check_dealt(config)
    sources_by_name(config)


def _measured(
    config: TrainConfig, shape: PretrainedConfig, data: Data, sequence: int
) -> dict[str, Sequences]:
    """What the model is measured with, by name."""
    sets = open_sets(config, sequence=sequence, masked=task_of(shape) == "masked")
    return {HELD_OUT: data.held_out, **sets}


def _batch(config: TrainConfig, world: int, device: torch.device) -> Batching:
    """The batch of the full job; all ranks are told of the same one, or it is refused."""
    full = full_world(world)
    check_agreement({"ranks of the full job": [str(full)]}, [world_group()], device)
    return solve(config.batch, full)


def _shape_and_data(config: TrainConfig) -> tuple[PretrainedConfig, Data, int]:
    """The model's configuration needs the tokenizer's size, the data the model's positions."""
    name = config.model.name
    draft = load_config(name, vocabulary=8, separator=0)
    ask_for_router_loss(draft, config.model.router_loss)  # refused before data are prepared
    sequence = sequence_length(config.data.sequence, num_positions(draft))
    check_fits(draft, sequence=sequence, vocabulary=0)
    if config.data.format == "chat" and config.data.packing and task_of(draft) == "causal":
        check_packed(draft)
    data = open_data(
        config.data,
        seed=config.run.seed,
        sequence=sequence,
        masked=task_of(draft) == "masked",
        folder=config.run.folder,
    )
    if data.template is not None and config.evaluation.sample:
        data.start_of(config.evaluation.prompt)  # refused before it trains
    shape = load_config(name, vocabulary=data.tokenizer.size, separator=data.tokenizer.separator)
    ask_for_router_loss(shape, config.model.router_loss)
    check_fits(shape, sequence=sequence, vocabulary=data.tokenizer.size)
    if task_of(shape) == "masked":
        check_mask(shape, data.tokenizer.mask)
    return shape, data, sequence


def _precision(dtype: str) -> MixedPrecisionPolicy:
    compute = torch.bfloat16 if dtype == "bf16" else None
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)


def _assets(config: TrainConfig, shape: PretrainedConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What makes a checkpoint a model that others can use."""
    assets = {"config.toml": as_toml(config).encode()}
    for folder in (Path(config.model.name).expanduser(), config.model.weights):
        if folder is not None and folder.is_dir():
            assets |= {f"model/{n}": data for n, data in small_files(folder, OF_MODELS).items()}
    kept = as_asked_by(shape, load_config(config.model.name, vocabulary=8, separator=0))
    with tempfile.TemporaryDirectory() as scratch:
        kept.save_pretrained(str(Path(scratch) / "model"))
        tokenizer.save(Path(scratch) / "tokenizer")
        for file in sorted(Path(scratch).rglob("*")):
            if file.is_file():
                assets[file.relative_to(scratch).as_posix()] = file.read_bytes()
    return assets
