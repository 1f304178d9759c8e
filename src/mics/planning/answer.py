"""``mics.plan``: a model and a cluster in, plans out; ``mics.simulate``: a step of a plan."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from mics.anatomy.anatomy import Anatomy, Loss
from mics.anatomy.blocks import Blocks
from mics.errors import PlanError
from mics.hardware.cluster import Cluster as Cluster
from mics.planning.nearest import check_any
from mics.planning.parsing import parse_cluster
from mics.planning.plan import Plan, search, simulate_way
from mics.planning.question import Question
from mics.planning.reasons import explained
from mics.planning.subject import subject
from mics.simulation.profiles import PROFILES, Engine
from mics.simulation.step import Step

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def plan(
    model: Any,
    cluster: Cluster | str,
    *,
    sequence: int | None = None,
    global_batch: int | None = None,
    micro_steps: int | None = None,
    micro_batches: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    loss: Loss | None = None,
    blocks: Blocks = None,
    **options: Any,
) -> list[Plan]:
    """Every way to train a model on a cluster that fits, the fastest first, each with its reason.

    Nothing runs and no weight is made. ``plan(...)[0].reason`` says why the first one won.

    Args:
        model: a preset ("bert-10b"), config.json, a transformers configuration, an ``nn.Module``,
            or an ``Anatomy`` that was made before.
        cluster: a ``Cluster``, or "p4d:8" for 8 nodes of the catalogue.
        sequence: tokens of one sequence; the model's positions by default, at most 4096.
        global_batch: sequences per step, from which the micro-steps follow.
        micro_steps: s, instead; 4 by default.
        micro_batches: to try; 1 to 32 by default.
        dtype: what is computed in, and gathered; bf16 by default.
        loss: ``loss(model, micro_batch, sequence)`` runs a module of one's own on inputs it makes
            on the meta device; see ``subject``.
        blocks: as in ``mics.shard``.
        options: further fields of ``Question``.

    Raises:
        PlanError: nothing fits, an unknown node, nothing to try, or figures that cannot be.
        ConfigError: an unknown model.
        ShardError: a model without blocks.
    """
    where = cluster if isinstance(cluster, Cluster) else parse_cluster(str(cluster))
    known = [field.name for field in fields(Question)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise PlanError(
                f"plan has no option {name}" + (f"; did you mean {near[0]}?" if near else "."),
                numbers=f"Options: {', '.join(known)}.",
            )
    if micro_batches is not None:
        options["micro_batches"] = micro_batches
    if dtype is not None and dtype not in _DTYPES:
        told = ", ".join(map(str, _DTYPES))
        raise PlanError(f"dtype must be one of {told}, got {dtype!r}.")
    if isinstance(model, Anatomy):
        if loss is not None or blocks is not None or dtype not in (None, model.dtype):
            raise PlanError(
                "An anatomy has its loss, its blocks and its dtype.",
                write="plan(module, ..., loss=, blocks=, dtype=)",
            )
        anatomy = model
    else:
        anatomy = subject(model, dtype=dtype or torch.bfloat16, loss=loss, blocks=blocks)
    options.setdefault("compute_bytes", anatomy.dtype.itemsize)
    asked = anatomy.sequence_or(sequence)
    question = Question(asked, global_batch, micro_steps, **options)
    found = search(anatomy, where, question)
    check_any(anatomy, where, question, found)
    return list(explained(found))


def simulate(plan: Plan, engine: Engine = "mics", *, timeline: bool = False) -> Step:
    """One step of a plan, by any engine.

    Args:
        plan: of ``mics.plan``.
        engine: "mics", "fsdp2", "hsdp every micro-step", "hsdp deferred", "ddp", "zero2", "zero3",
            "zero2 0.5.6" or "zero3 0.5.6".
        timeline: keep every span.

    Raises:
        PlanError: there is no such engine, or no plan.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"simulate takes a plan, got {type(plan).__name__}.", write="plans[0]")
    if engine not in PROFILES:
        raise PlanError(
            f"There is no engine {engine!r}.", numbers=f"Engines: {', '.join(PROFILES)}."
        )
    simulated = simulate_way(
        engine, plan.anatomy, plan.cluster, plan.question, plan.way, timeline=timeline
    )
    return simulated.step
