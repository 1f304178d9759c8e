"""``mics.plan``: a model and a cluster in, plans out; ``mics.simulate``: a step of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mics.errors import PlanError
from mics.planning.inverse import check_any
from mics.planning.plan import Plan, Question, search, simulate_way
from mics.planning.reasons import explained
from mics.planning.subject import subject
from mics.simulation.anatomy import Anatomy
from mics.simulation.engines import PROFILES, Engine
from mics.simulation.hardware import Cluster as Cluster
from mics.simulation.hardware import find_node
from mics.simulation.step import Step


def plan(
    model: Any,
    cluster: Cluster | str,
    *,
    sequence: int,
    global_batch: int | None = None,
    micro_steps: int = 4,
    micro_batches: Sequence[int] | None = None,
    **options: Any,
) -> list[Plan]:
    """Every way to train a model on a cluster that fits, the fastest first, each with its reason.

    Nothing runs and no weight is made. ``plan(...)[0].reason`` says why the first one won.

    Args:
        model: a preset ("bert-10b"), config.json, a transformers configuration, an ``nn.Module``,
            or an ``Anatomy`` that was made before.
        cluster: a ``Cluster``, or "p4d:8" for 8 nodes of the catalogue.
        sequence: tokens of one sequence.
        global_batch: sequences per step; without it every plan takes ``micro_steps``.
        micro_steps: s.
        micro_batches: to try; 1 to 32 by default.
        options: further fields of ``Question``.

    Raises:
        PlanError: nothing fits, an unknown node, or nothing to try.
        ConfigError: an unknown model.
        ShardError: a model without blocks.
    """
    anatomy = model if isinstance(model, Anatomy) else subject(model)
    where = cluster if isinstance(cluster, Cluster) else parse_cluster(cluster)
    if micro_batches is not None:
        options["micro_batches"] = tuple(micro_batches)
    question = Question(sequence, global_batch, micro_steps, **options)
    found = search(anatomy, where, question)
    check_any(anatomy, where, question, found)
    return list(explained(found))


def simulate(plan: Plan, engine: Engine = "mics", *, timeline: bool = False) -> Step:
    """One step of a plan, by any engine.

    Args:
        plan: of ``mics.plan``.
        engine: "mics", "fsdp2", "hsdp every micro-step", "hsdp deferred", "ddp", "zero2", "zero3",
            "zero2 0.5.6" or "zero3 0.5.6".
        timeline: keep every span of the first micro-steps.

    Raises:
        PlanError: there is no such engine.
    """
    if engine not in PROFILES:
        raise PlanError(
            f"There is no engine {engine!r}.", numbers=f"Engines: {', '.join(PROFILES)}."
        )
    simulated = simulate_way(
        engine, plan.anatomy, plan.cluster, plan.question, plan.way, timeline=timeline
    )
    return simulated.step


def parse_cluster(text: str) -> Cluster:
    """ "p4d:8" or "p4d.24xlarge:8": 8 nodes of a kind.

    Raises:
        PlanError: another form, or an unknown node.
    """
    name, colon, count = text.rpartition(":")
    if not colon or not count.isdigit() or int(count) < 1:
        raise PlanError(
            f"{text!r} is no cluster.", write="<node>:<number of nodes>, for example p4d:8"
        )
    return Cluster(find_node(name), int(count))
