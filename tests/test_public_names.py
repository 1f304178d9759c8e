"""What may not change without a word: public names, and the verbs of the command line."""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import Any

import pytest

import mics
from mics import topology, traffic
from mics.commands import VERBS

PUBLIC = """
    __version__ traffic
    init_mesh fully_shard shard micro_steps micro_step finish_step deal steps stragglers
    trace clip_grad_norm_ gathered get_total_norm owned EMA Snapshots Verdicts WholeStep
    DealtStep precompute_scales ledger predict_traffic save load save_adapters load_adapters plan
    simulate Cluster Topology
    MicsError TopologyError DisagreementError ShardError MicroStepError ConfigError DataError
    CheckpointError PlanError RankError RecoveryError MicsWarning
"""
OF_TOPOLOGY = "Ranks Topology possible_partitions nodes_of has_two_stages"
OF_TRAFFIC = """
    Collective Stage Form Key Flow Count Traffic UnitBytes Block View StageMessage
    ring_flow exchange_flow stages all_reduce_stages stage_flow message_traffic mics unit_traffic
    block_traffic fsdp hsdp ddp hop_2_traffic node_inter_bytes
"""
OF_THE_COMMAND_LINE = """
    train tokenize run new plan simulate page export import import-config bench check trace lab
    doctor completion
"""


def test_the_public_names_are_these() -> None:
    assert sorted(mics.__all__) == sorted(PUBLIC.split())


def test_the_public_names_are_there_and_typed() -> None:
    tree = ast.parse(inspect.getsource(mics))
    typed = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(mics.__all__) <= typed
    assert all(getattr(mics, name) is not None for name in mics.__all__)


@pytest.mark.parametrize(("module", "names"), [(topology, OF_TOPOLOGY), (traffic, OF_TRAFFIC)])
def test_the_names_of_a_public_module_are_these(module: Any, names: str) -> None:
    assert made_in(module) == set(names.split())


def made_in(module: Any) -> set[str]:
    """The names that a module's own statements make, imports left out."""
    found = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def test_the_verbs_are_these_and_each_has_its_file() -> None:
    assert [verb.name for verb in VERBS] == OF_THE_COMMAND_LINE.split()
    for verb in VERBS:
        assert hasattr(importlib.import_module(f"mics.commands.{verb.options}"), "Config")
        assert hasattr(importlib.import_module(f"mics.commands.{verb.module}"), "run")
