"""A conversion as text: TOML for ``mics train``, whose comments are the fields and an own loop."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mics.errors import ConfigError
from mics.training.config import TrainConfig
from mics.training.migrating.conversion import Conversion, Verdict
from mics.training.migrating.deepspeed import convert_deepspeed
from mics.training.migrating.deepspeed_fields import CONVERTED, RULES
from mics.training.migrating.sagemaker import KEYS, convert_sagemaker
from mics.training.settings import check_settings

_TABLES = ("run", "model", "data", "batch", "optimizer", "parallel", "log")
_WIDTH = 96
_DEEPSPEED = {name.split(".")[0] for name in (*CONVERTED, *RULES)} | {"zero_optimization"}
_ONLY_DEEPSPEED = _DEEPSPEED - {"fp16", "bf16", "pipeline"}


def convert(
    name: str, tree: dict[str, Any], *, ranks: int | None = None, gpus_per_node: int | None = None
) -> Conversion:
    """Convert a configuration of DeepSpeed or SageMaker; its names say which it is.

    Args:
        name: what it is called in messages.
        tree: the configuration, as JSON gives it.
        ranks: ranks of the job.
        gpus_per_node: ranks of a node.

    Raises:
        ConfigError: it is neither, or both, or cannot be converted.
    """
    for option, number in (("--ranks", ranks), ("--gpus-per-node", gpus_per_node)):
        if number is not None and not 1 <= number <= 2**20:
            raise ConfigError(
                f"{option} is out of range.", numbers=f"It is {number}.", write="1 to 2^20"
            )
    of_sagemaker, of_deepspeed = tree.keys() & KEYS, tree.keys() & _ONLY_DEEPSPEED
    if of_sagemaker and of_deepspeed:
        raise ConfigError(
            f"{name} has fields of DeepSpeed and of SageMaker.",
            numbers=f"{min(of_deepspeed)} is the one's, {min(of_sagemaker)} the other's.",
            write="one configuration a file",
        )
    if not of_sagemaker and not tree.keys() & _DEEPSPEED:
        raise ConfigError(
            f"{name} is a configuration of neither DeepSpeed nor SageMaker.",
            numbers=f"It has {', '.join(map(ascii, list(tree)[:4])) or 'nothing'}.",
            write="a DeepSpeed configuration, or the parameters of smdistributed.modelparallel",
        )
    change = convert_sagemaker if of_sagemaker else convert_deepspeed
    conversion = change(tree, ranks=ranks, gpus_per_node=gpus_per_node)
    if gpus_per_node is not None:
        conversion.set("parallel.gpus_per_node", gpus_per_node)
    _check(conversion)
    return conversion


def as_document(conversion: Conversion, name: str) -> str:
    """TOML that ``mics train`` reads; its comments say what became of every field."""
    lines = [f"# {name}, a configuration of {conversion.source}, for `mics train`.", ""]
    lines += _toml_lines(conversion)
    lines += ["# -- every field of it " + "-" * 60]
    for verdict in Verdict:
        rows = [row for row in conversion.rows if row.verdict is verdict]
        lines += [f"# {verdict.value}:"] if rows else []
        for row in rows:
            value = f" = {row.value}" if row.verdict is not Verdict.ABSENT else ""
            lines += _comment(f"{row.field}{value}: {row.ours}.")
    lines += ["#", "# -- the same in a loop of your own " + "-" * 47]
    lines += [f"#     {line}".rstrip() for line in loop_lines(conversion)]
    return "\n".join(lines) + "\n"


def as_record(conversion: Conversion) -> dict[str, Any]:
    """The same as a table of JSON."""
    options: dict[str, dict[str, Any]] = {}
    for (table, key), value in conversion.settings.items():
        options.setdefault(table, {})[key] = value
    return {
        "source": conversion.source,
        "ranks": conversion.ranks,
        "options": options,
        "left_to_you": {f"{table}.{key}": why for (table, key), why in conversion.open.items()},
        "fields": [
            {
                "field": row.field,
                "value": row.value,
                "verdict": row.verdict.value,
                "ours": row.ours,
            }
            for row in conversion.rows
        ],
        "loop": loop_lines(conversion),
    }


def write_document(path: Path, text: str) -> None:
    """Write the document to a file of its own.

    Raises:
        ConfigError: it is there already, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists; nothing is written over.", write="--out ...") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be written: {why}.", write="--out ...") from None


def _toml_lines(conversion: Conversion) -> Iterator[str]:
    for table in _TABLES:
        keys = {k: v for (t, k), v in conversion.settings.items() if t == table}
        left = {
            k: why
            for (t, k), why in conversion.open.items()
            if t == table and (t, k) not in conversion.settings
        }
        if not keys and not left:
            continue
        yield f"[{table}]"
        yield from (f"{key} = {_toml(value)}" for key, value in keys.items())
        yield from (f"# {key} = ...  # {why}" for key, why in left.items())
        yield ""


def _toml(value: Any) -> str:
    """A TOML value: JSON's, but that TOML has neither pairs of surrogates nor a bare DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="#   ", subsequent_indent="#       ", break_on_hyphens=False
    )


def loop_lines(conversion: Conversion) -> list[str]:
    """The lines of a loop of one's own that do the same, as Python."""
    own = conversion.settings
    keywords = {"partition": json.dumps(own.get(("parallel", "partition"), "auto"))}
    if own.get(("parallel", "collectives"), "auto") != "auto":
        keywords["collectives"] = json.dumps(own["parallel", "collectives"])
    if own.get(("parallel", "dtype")) == "fp32":
        keywords["mp_policy"] = "MixedPrecisionPolicy()"
    for key in ("activation_checkpointing", "activation_offload"):
        if own.get(("parallel", key)) in (True, "on"):
            keywords[key] = "True"
    keywords |= conversion.loop_keywords
    given = ", ".join(f"{key}={value}" for key, value in keywords.items())
    steps = own.get(("batch", "micro_steps"), "the")
    clip = own.get(("optimizer", "clip"), 1.0)
    from_fsdp = [
        name
        for name in ("CPUOffloadPolicy", "MixedPrecisionPolicy")
        if any(name in value for value in keywords.values())
    ]
    return [
        *([f"from torch.distributed.fsdp import {', '.join(from_fsdp)}"] if from_fsdp else []),
        f"model = mics.shard(model, {given})",
        *(conversion.optimizer or [_adamw(conversion)]),
        f"for batch in loader:  # a list of {steps} micro-batches",
        "    for x, y in mics.micro_steps(model, batch):",
        "        (loss(model(x), y) / len(batch)).backward()",
        *([f"    mics.clip_grad_norm_(model.parameters(), {clip})"] if clip else []),
        "    optimizer.step()",
        "    optimizer.zero_grad()",
    ]


def _adamw(conversion: Conversion) -> str:
    own = conversion.settings
    options = {
        "lr": own.get(("optimizer", "learning_rate")),
        "betas": own.get(("optimizer", "betas")),
        "eps": own.get(("optimizer", "eps")),
        "weight_decay": own.get(("optimizer", "weight_decay")),
    }
    given = ["model.parameters()"]
    for key, value in options.items():
        if value is not None:
            given.append(f"{key}={tuple(value) if isinstance(value, list) else value}")
    return f"optimizer = torch.optim.AdamW({', '.join(given)})"


def _check(conversion: Conversion) -> None:
    """Let ``mics train`` say whether it would take these options."""
    tables: dict[str, dict[str, Any]] = {}
    for (table, key), value in conversion.settings.items():
        tables.setdefault(table, {})[key] = value
    try:
        config = TypeAdapter(TrainConfig).validate_python(tables)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{'.'.join(map(str, first['loc'][:2]))} would get a value that does not fit.",
            numbers=f"{str(first['input'])[:60]!a}: {first['msg']}.",
            write="another value",
        ) from None
    check_settings(config)
