"""``mics.plan``: a model and a cluster in, plans out; ``mics.simulate``: a step of a plan."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from mics.anatomy.anatomy import Anatomy, Loss
from mics.anatomy.blocks import Blocks
from mics.anatomy.recipe import Machine, Recipe
from mics.errors import PlanError
from mics.hardware.cluster import Cluster as Cluster
from mics.planning.answer import Plans, answer
from mics.planning.parsing import parse_cluster
from mics.planning.plan import Plan
from mics.planning.question import Question
from mics.planning.subject import subject
from mics.planning.weighing import simulate_recipe
from mics.simulation.profiles import PROFILES, EngineName
from mics.simulation.step import Step

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def plan(
    model: Any,
    cluster: Cluster | str,
    *,
    sequence: int | None = None,
    dtype: torch.dtype | None = None,
    loss: Loss | None = None,
    blocks: Blocks = None,
    **options: Any,
) -> Plans:
    """Find every way to train a model on a cluster that fits, the best first.

    Nothing runs and no weight is made. ``print(plan(...))`` shows what ``mics plan`` shows;
    ``plan(...)[0].reason`` says why the first one won. All do the same work in a step; of those
    that are equally fast, within the model's error, the smallest partition comes first.

    Args:
        model: a preset ("bert-10b"), config.json, a transformers configuration, an ``nn.Module``,
            or an ``Anatomy`` that was made before.
        cluster: a ``Cluster``, or "p4d:8" for 8 nodes of the catalogue.
        sequence: tokens of one sequence; the model's positions by default, at most 4096.
        dtype: what is computed in, and gathered; bf16 by default. Parameters that say themselves
            what is gathered of them (float8) are planned in it too, and the answer says so.
        loss: ``loss(model, micro_batch, sequence)`` runs a module of one's own on inputs it makes
            on the meta device; see ``subject``.
        blocks: as in ``mics.shard``.
        options: what to try, fields of ``Question``: ``global_batch``, sequences per step, from
            which the micro-steps follow; ``micro_batches``, ``partitions``, ``checkpointing``,
            ``forms``, ``offload``, lists. How a step is run in any case, fields of ``Recipe``:
            ``micro_steps``, ``reduce_bytes``, ``optimizer``, ``prefetch``, ``stack`` and others.
            What is assumed of the machines, fields of ``Machine``: ``fragmentation``, ``sigma``
            and others.

    Raises:
        PlanError: nothing fits, an unknown node, nothing to try, or figures that cannot be.
        ConfigError: an unknown model.
        ShardError: a model without blocks.
    """
    where = cluster if isinstance(cluster, Cluster) else parse_cluster(str(cluster))
    _check_options(options)
    if dtype is not None and dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise PlanError(f"dtype must be one of {names}, got {dtype!r}.")
    if isinstance(model, Anatomy):
        if loss is not None or blocks is not None or dtype not in (None, model.dtype):
            raise PlanError(
                "An anatomy has its loss, its blocks and its dtype.",
                write="plan(module, ..., loss=, blocks=, dtype=)",
            )
        anatomy = model
    else:
        anatomy = subject(model, dtype=dtype or torch.bfloat16, loss=loss, blocks=blocks)
    machine = replace(where.node.machine, **_only(options, _OF_MACHINE))
    where = replace(where, node=replace(where.node, machine=machine))
    recipe = {"compute_bytes": anatomy.dtype.itemsize, **_only(options, _OF_RECIPE)}
    question = Question(
        Recipe(1, sequence=anatomy.sequence_or(sequence), **recipe),
        **_only(options, _OF_QUESTION),
    )
    return answer(anatomy, where, question)


_OF_QUESTION = [field.name for field in fields(Question) if field.name != "recipe"]
_BY_QUESTION = ("partition", "micro_batch", "checkpointing", "form", "sequence", "offload")
_OF_RECIPE = [field.name for field in fields(Recipe) if field.name not in _BY_QUESTION]
_OF_MACHINE = [field.name for field in fields(Machine)]


def _only(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Pick the options of one record; ``None`` leaves its default."""
    return {name: options[name] for name in names if options.get(name) is not None}


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse unknown options, and micro-steps beside the batch they follow from."""
    known = ["sequence", *_OF_QUESTION, *_OF_RECIPE, *_OF_MACHINE]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise PlanError(
                f"plan has no option {name}" + (f"; did you mean {near[0]}?" if near else "."),
                numbers=f"Options: {', '.join(known)}.",
            )
    batch, steps = options.get("global_batch"), options.get("micro_steps")
    if batch is not None and steps is not None:
        raise PlanError(
            "micro_steps follow from global_batch; both were given.",
            numbers=f"global_batch {batch}, micro_steps {steps}.",
            write="one of them",
        )


def simulate(plan: Plan | Plans, engine: EngineName = "mics", *, timeline: bool = False) -> Step:
    """Simulate one step of a plan, by any engine.

    Args:
        plan: one of ``mics.plan``, or all it answered, of which the best is taken.
        engine: "mics", "fsdp2", "hsdp every micro-step", "hsdp deferred", "ddp", "zero2", "zero3",
            "zero2 0.5.6" or "zero3 0.5.6".
        timeline: keep every span.

    Raises:
        PlanError: there is no such engine, or no plan.
    """
    chosen = plan.best if isinstance(plan, Plans) else plan
    if not isinstance(chosen, Plan):
        raise PlanError(
            f"simulate takes a plan, got {type(plan).__name__}.",
            write="simulate(plan(model, cluster)), or one of its plans: simulate(plans[0])",
        )
    if engine not in PROFILES:
        raise PlanError(
            f"There is no engine {engine!r}.", numbers=f"Engines: {', '.join(PROFILES)}."
        )
    return simulate_recipe(
        engine, chosen.anatomy, chosen.cluster, chosen.way, timeline=timeline
    ).step
