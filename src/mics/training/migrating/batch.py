"""The batch triangle of DeepSpeed: global = micro-batch x accumulation x ranks."""

from __future__ import annotations

from mics.errors import ConfigError
from mics.training.migrating.conversion import AUTO, Conversion, Fields, Verdict

_OURS = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "micro_steps",
}
_FILLED_FROM = {
    "train_batch_size": "micro_batch x micro_steps x ranks",
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size of TrainingArguments",
    "gradient_accumulation_steps": "--gradient_accumulation_steps of TrainingArguments",
}


def convert_batch(conversion: Conversion, fields: Fields) -> None:
    """Convert the three sizes of a batch, and find the number of ranks where all are given.

    Raises:
        ConfigError: a size is no positive number, or they contradict each other or the ranks.
    """
    numbers: dict[str, int] = {}
    auto = False
    for path, ours in _OURS.items():
        value = fields.take(path, "count")
        if value is None:
            continue
        if value == AUTO:
            auto = True
            if ours != "global_batch":
                conversion.leave_open(f"batch.{ours}", _FILLED_FROM[path])
            conversion.say(path, value, Verdict.FILLED_IN, f"batch.{ours}: {_FILLED_FROM[path]}")
            continue
        if value < 1:
            raise fields.refuse(path, value, "1 or more")
        numbers[ours] = value
        conversion.set(f"batch.{ours}", value)
        conversion.say(path, value, Verdict.CONVERTED, f"batch.{ours} = {value}")
    _check_triangle(conversion, numbers)
    if auto:
        return
    if "micro_steps" not in numbers and len(numbers) == 1:
        conversion.set("batch.micro_steps", 1)
        conversion.absent("gradient_accumulation_steps", "batch.micro_steps = 1")
    if not {"global_batch", "micro_batch"} & numbers.keys():
        conversion.leave_open("batch.micro_batch", _FILLED_FROM["train_micro_batch_size_per_gpu"])
        words = "batch.micro_batch; DeepSpeed itself wants it, but Accelerate fills it in"
        conversion.absent("train_micro_batch_size_per_gpu", words)


def _check_triangle(conversion: Conversion, numbers: dict[str, int]) -> None:
    whole = numbers.get("global_batch")
    if whole is None:
        return
    micro, steps = numbers.get("micro_batch", 1), numbers.get("micro_steps", 1)
    ranks, rest = divmod(whole, micro * steps)
    known = conversion.ranks
    if rest or ranks == 0:
        raise ConfigError(
            "The sizes of the batch contradict each other.",
            numbers=f"train_batch_size = {whole} is no multiple of {micro} x {steps} "
            "(train_micro_batch_size_per_gpu x gradient_accumulation_steps).",
            write="train_batch_size = micro-batch x accumulation x ranks, or two of the three",
        )
    if len(numbers) == 3:
        if known is not None and known != ranks:
            raise ConfigError(
                "The sizes of the batch contradict the number of ranks.",
                numbers=f"{whole} = {micro} x {steps} x {ranks} ranks, --ranks {known}.",
                write=f"--ranks {ranks}, or two of the three sizes",
            )
        conversion.ranks = ranks
    elif known is not None and whole % (micro * steps * known):
        raise ConfigError(
            "The sizes of the batch contradict the number of ranks.",
            numbers=f"train_batch_size = {whole} is no multiple of {micro} x {steps} x {known} "
            "(micro-batch x accumulation x ranks).",
            write=f"train_batch_size = {micro * steps * known * max(1, ranks // known)}",
        )
