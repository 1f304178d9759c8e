"""MiCS for today's PyTorch: sharded data parallelism that stays inside small partition groups.

The whole public surface is here. Names are loaded when first used, so that the pure modules
(``mics.topology``, ``mics.traffic``) can be imported without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mics.version import __version__ as __version__

if TYPE_CHECKING:
    from mics import traffic as traffic
    from mics.checkpoint import load as load
    from mics.checkpoint import save as save
    from mics.errors import CheckpointError as CheckpointError
    from mics.errors import ConfigError as ConfigError
    from mics.errors import DataError as DataError
    from mics.errors import DisagreementError as DisagreementError
    from mics.errors import MicroStepError as MicroStepError
    from mics.errors import MicsError as MicsError
    from mics.errors import MicsWarning as MicsWarning
    from mics.errors import PlanError as PlanError
    from mics.errors import RankError as RankError
    from mics.errors import RecoveryError as RecoveryError
    from mics.errors import ShardError as ShardError
    from mics.errors import TopologyError as TopologyError
    from mics.lab.tracing.loops import trace as trace
    from mics.models.interchange.adapters import load_adapters as load_adapters
    from mics.models.interchange.adapters import save_adapters as save_adapters
    from mics.models.interchange.gathered import gathered as gathered
    from mics.planning.api import Cluster as Cluster
    from mics.planning.api import plan as plan
    from mics.planning.api import simulate as simulate
    from mics.ranks.mesh import init_mesh as init_mesh
    from mics.recovery.snapshots import Snapshots as Snapshots
    from mics.sharding.average import EMA as EMA
    from mics.sharding.clipping import clip_grad_norm_ as clip_grad_norm_
    from mics.sharding.clipping import get_total_norm as get_total_norm
    from mics.sharding.dealing import deal as deal
    from mics.sharding.dealt_step import DealtStep as DealtStep
    from mics.sharding.fully_shard import fully_shard as fully_shard
    from mics.sharding.micro_steps import finish_step as finish_step
    from mics.sharding.micro_steps import micro_step as micro_step
    from mics.sharding.micro_steps import micro_steps as micro_steps
    from mics.sharding.owned import owned as owned
    from mics.sharding.prediction import ledger as ledger
    from mics.sharding.prediction import predict_traffic as predict_traffic
    from mics.sharding.scales import precompute_scales as precompute_scales
    from mics.sharding.shard import shard as shard
    from mics.sharding.steps import steps as steps
    from mics.sharding.stragglers import stragglers as stragglers
    from mics.sharding.verdicts import Verdicts as Verdicts
    from mics.sharding.whole_step import WholeStep as WholeStep
    from mics.topology import Topology as Topology

_HOME = {
    "CheckpointError": "mics.errors",
    "ConfigError": "mics.errors",
    "DataError": "mics.errors",
    "DealtStep": "mics.sharding.dealt_step",
    "DisagreementError": "mics.errors",
    "Cluster": "mics.planning.api",
    "EMA": "mics.sharding.average",
    "MicroStepError": "mics.errors",
    "MicsError": "mics.errors",
    "MicsWarning": "mics.errors",
    "PlanError": "mics.errors",
    "RankError": "mics.errors",
    "RecoveryError": "mics.errors",
    "ShardError": "mics.errors",
    "Snapshots": "mics.recovery.snapshots",
    "Topology": "mics.topology",
    "TopologyError": "mics.errors",
    "Verdicts": "mics.sharding.verdicts",
    "WholeStep": "mics.sharding.whole_step",
    "clip_grad_norm_": "mics.sharding.clipping",
    "deal": "mics.sharding.dealing",
    "fully_shard": "mics.sharding.fully_shard",
    "gathered": "mics.models.interchange.gathered",
    "finish_step": "mics.sharding.micro_steps",
    "get_total_norm": "mics.sharding.clipping",
    "init_mesh": "mics.ranks.mesh",
    "ledger": "mics.sharding.prediction",
    "load": "mics.checkpoint",
    "load_adapters": "mics.models.interchange.adapters",
    "micro_step": "mics.sharding.micro_steps",
    "micro_steps": "mics.sharding.micro_steps",
    "owned": "mics.sharding.owned",
    "plan": "mics.planning.api",
    "precompute_scales": "mics.sharding.scales",
    "predict_traffic": "mics.sharding.prediction",
    "save": "mics.checkpoint",
    "save_adapters": "mics.models.interchange.adapters",
    "shard": "mics.sharding.shard",
    "simulate": "mics.planning.api",
    "steps": "mics.sharding.steps",
    "stragglers": "mics.sharding.stragglers",
    "trace": "mics.lab.tracing.loops",
}

__all__ = ["__version__", "traffic", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "traffic":
        return importlib.import_module("mics.traffic")
    if name in _HOME:
        from mics.errors import naming_extras

        with naming_extras(f"mics.{name}"):
            return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mics' has no attribute {name!r}")
