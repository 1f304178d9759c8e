"""DeepSpeed's optimizer and scheduler as ours."""

from __future__ import annotations

from typing import Any

from mics.errors import ConfigError
from mics.training.migrating.conversion import AUTO, Conversion, Fields, Verdict

_C, _N, _U = Verdict.CONVERTED, Verdict.NO_COUNTERPART, Verdict.NOT_NEEDED
_PARAMS = "optimizer.params"
_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
_OURS = {"lr": "learning_rate", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}
_ARGUMENTS = {
    "lr": "--learning_rate",
    "betas": "--adam_beta1, --adam_beta2",
    "eps": "--adam_epsilon",
    "weight_decay": "--weight_decay",
}
_KINDS: dict[str, Any] = {"lr": "number", "betas": "numbers", "eps": "number"}
_OF_TORCH = {"adagrad": "Adagrad", "sgd": "SGD", "muon": "Muon", "adafactor": "Adafactor"}
_DECAYS = "mics train does not decay biases and norms; DeepSpeed decays what it is given"
_HANDED = "TrainingArguments, or the optimizer that the script hands over"

_SCHEDULES = {
    "WarmupLR": "none",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
_OTHER_SCHEDULES = ("LRRangeTest", "OneCycle")


def convert_optimizer(conversion: Conversion, fields: Fields) -> None:
    """Convert Adam and AdamW; what other optimizers need is said.

    Raises:
        ConfigError: a value is of the wrong kind, or out of range.
    """
    name = fields.take("optimizer.type", "text")
    if name is None:
        if fields.below("optimizer"):
            words = "without optimizer.type DeepSpeed does not read the rest of the table"
            conversion.absent("optimizer.type", words)
        else:
            conversion.absent("optimizer", f"[optimizer]: {_HANDED}")
        for key, ours in _OURS.items():
            conversion.leave_open(f"optimizer.{ours}", _HANDED)
            _say_params(conversion, fields, key, _U, "not read without optimizer.type")
        return
    kind = name.lower()
    decoupled = fields.take(f"{_PARAMS}.adam_w_mode", "truth")
    plain = kind == "adam" and decoupled is False
    if decoupled is not None:
        words = "L2 into the gradient: torch.optim.Adam in a loop of your own"
        verdict = _N if decoupled is False else _C
        conversion.say(f"{_PARAMS}.adam_w_mode", decoupled, verdict, words if plain else "AdamW")
    if kind not in ("adam", "adamw") or plain:
        _keep_for_loop(conversion, fields, name, "Adam" if plain else _OF_TORCH.get(kind))
        return
    conversion.say("optimizer.type", name, _C, "AdamW, as DeepSpeed's Adam is by default")
    if fields.take(f"{_PARAMS}.torch_adam", "truth") is not None:
        conversion.say(f"{_PARAMS}.torch_adam", True, _U, "it is torch's in any case")
    _refuse_variants(conversion, fields)
    for key in _OURS:
        _convert_number(conversion, fields, key)


def _refuse_variants(conversion: Conversion, fields: Fields) -> None:
    for key, usual in (("bias_correction", True), ("amsgrad", False)):
        value = fields.take(f"{_PARAMS}.{key}", "truth")
        if value is not None:
            words = "AdamW's default" if value in (usual, AUTO) else "not in mics train"
            verdict = _U if value in (usual, AUTO) else _N
            conversion.say(f"{_PARAMS}.{key}", value, verdict, words)
    norm = fields.take(f"{_PARAMS}.max_grad_norm", "number")
    if norm is not None:
        words = "DeepSpeed does not clip by it either: gradient_clipping is optimizer.clip"
        conversion.say(f"{_PARAMS}.max_grad_norm", norm, _N, words)


def _convert_number(conversion: Conversion, fields: Fields, key: str) -> None:
    path, ours = f"{_PARAMS}.{key}", f"optimizer.{_OURS[key]}"
    value = fields.take(path, _KINDS.get(key, "number"))
    if value == AUTO:
        conversion.leave_open(ours, f"{_ARGUMENTS[key]} of TrainingArguments")
        conversion.say(path, value, Verdict.FILLED_IN, f"{ours}: {_ARGUMENTS[key]}")
        return
    given, value = value is not None, _DEFAULTS[key] if value is None else value
    _check_range(fields, path, key, value)
    value = [float(v) for v in value] if key == "betas" else float(value)
    conversion.set(ours, value)
    words = f"{ours} = {value}" + (f"; {_DECAYS}" if key == "weight_decay" and value else "")
    if given:
        conversion.say(path, value, _C, words)
    else:
        conversion.absent(path, f"{words}, DeepSpeed's default")


def _check_range(fields: Fields, path: str, key: str, value: Any) -> None:
    if key == "betas":
        if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
            raise fields.refuse(path, value, "two numbers of at least 0 and below 1")
    elif key == "weight_decay":
        if value < 0:
            raise fields.refuse(path, value, "0 or more")
    elif value <= 0:
        raise fields.refuse(path, value, "above 0")


def _keep_for_loop(conversion: Conversion, fields: Fields, name: str, of_torch: str | None) -> None:
    """Rows, and the line of a loop of one's own, for an optimizer that ``mics train`` has not."""
    options = {}
    for key in _OURS:
        value = fields.take(f"{_PARAMS}.{key}", _KINDS.get(key, "number"))
        if value is not None:
            words = f"of {name!a}; [optimizer] is AdamW's"
            conversion.say(f"{_PARAMS}.{key}", value, _N, words)
            if value != AUTO:
                _check_range(fields, f"{_PARAMS}.{key}", key, value)
                options[key] = tuple(value) if key == "betas" else value
        conversion.leave_open(f"optimizer.{_OURS[key]}", f"AdamW instead of {name!a}")
    words = ", ".join(f"{key}={value!r}" for key, value in options.items())
    if of_torch is None:
        line = "optimizer = ...  # yours: any whose step is by the element, or mics.WholeStep"
        there = "a loop of your own with an optimizer of that kind; one of whole matrices "
        there += "steps in mics.WholeStep"
    elif of_torch == "Muon":
        line = "optimizer = mics.WholeStep(...)  # torch.optim.Muon steps on whole matrices"
        there = "a loop of your own: torch.optim.Muon in mics.WholeStep"
    else:
        line = f"optimizer = torch.optim.{of_torch}(model.parameters(), {words})"
        there = f"a loop of your own: torch.optim.{of_torch}"
    conversion.optimizer = [line]
    conversion.say("optimizer.type", name, _N, f"mics train has AdamW alone; {there}")


def _say_params(
    conversion: Conversion, fields: Fields, key: str, verdict: Verdict, words: str
) -> None:
    value = fields.take(f"{_PARAMS}.{key}", _KINDS.get(key, "number"))
    if value is not None:
        conversion.say(f"{_PARAMS}.{key}", value, verdict, words)


# -- schedule --------------------------------------------------------------------------------------


def convert_scheduler(conversion: Conversion, fields: Fields) -> None:
    """Convert the schedules with a warmup; others have no counterpart.

    Raises:
        ConfigError: a value is of the wrong kind or out of range, or there are fewer steps than
            the warmup has.
    """
    name = fields.take("scheduler.type", "text")
    if name is None or name == AUTO:
        if name == AUTO or ("optimizer", "learning_rate") not in conversion.settings:
            conversion.leave_open("optimizer.decay", "--lr_scheduler_type of TrainingArguments")
            conversion.leave_open("optimizer.warmup", "--warmup_steps of TrainingArguments")
        else:
            conversion.set("optimizer.decay", "none")
            conversion.set("optimizer.warmup", 0)
        if name == AUTO:
            conversion.say("scheduler.type", name, Verdict.FILLED_IN, "optimizer.decay")
        else:
            words = "no schedule of DeepSpeed's: optimizer.decay and optimizer.warmup"
            conversion.absent("scheduler", words)
        _say_rest(conversion, fields, _U, "not read without scheduler.type")
        return
    if name not in _SCHEDULES:
        if name not in _OTHER_SCHEDULES:
            raise fields.refuse("scheduler.type", name, ", ".join([*_SCHEDULES, *_OTHER_SCHEDULES]))
        words = "a loop of your own: torch.optim.lr_scheduler works on sharded optimizers"
        conversion.say("scheduler.type", name, _N, words)
        conversion.leave_open("optimizer.decay", f"{name} has no counterpart in mics train")
        _say_rest(conversion, fields, _N, f"{name}'s")
        return
    decay = _SCHEDULES[name]
    conversion.set("optimizer.decay", decay)
    conversion.say("scheduler.type", name, _C, f'optimizer.decay = "{decay}"')
    _convert_peak(conversion, fields)
    warmup = _convert_warmup(conversion, fields)
    total = _convert_total(conversion, fields, decay)
    if isinstance(warmup, int) and isinstance(total, int) and warmup > total:
        raise ConfigError(
            "The schedule has fewer steps than its warmup.",
            numbers=f"total_num_steps = {total}, warmup_num_steps = {warmup}.",
            write="warmup_num_steps of at most total_num_steps",
        )
    _convert_ends(conversion, fields, decay)
    _say_rest(conversion, fields, _N, "not of these schedules")


def _convert_peak(conversion: Conversion, fields: Fields) -> None:
    path = "scheduler.params.warmup_max_lr"
    peak = fields.take(path, "number")
    ours = "optimizer.learning_rate"
    if peak == AUTO:
        conversion.leave_open(ours, "--learning_rate of TrainingArguments")
        conversion.say(path, peak, Verdict.FILLED_IN, ours)
    elif peak is not None:
        if peak <= 0:
            raise fields.refuse(path, peak, "above 0")
        if conversion.optimizer is None:
            conversion.set(ours, float(peak))
            conversion.open.pop(("optimizer", "learning_rate"), None)
        conversion.say(path, peak, _C, f"{ours} = {float(peak)}: it overrules optimizer.params.lr")


def _convert_warmup(conversion: Conversion, fields: Fields) -> Any:
    path = "scheduler.params.warmup_num_steps"
    warmup = fields.take(path, "count")
    if warmup == AUTO:
        conversion.leave_open("optimizer.warmup", "--warmup_steps or --warmup_ratio")
        conversion.say(path, warmup, Verdict.FILLED_IN, "optimizer.warmup")
    elif warmup is None:
        warmup = 1000
        conversion.set("optimizer.warmup", warmup)
        conversion.absent(path, "optimizer.warmup = 1000, DeepSpeed's default")
    else:
        if not 0 <= warmup <= 10**15:
            raise fields.refuse(path, warmup, "0 or more")
        conversion.set("optimizer.warmup", warmup)
        conversion.say(path, warmup, _C, f"optimizer.warmup = {warmup}")
    path = "scheduler.params.warmup_type"
    shape = fields.take(path, "text")
    if shape not in (None, "log", "linear", AUTO):
        raise fields.refuse(path, shape, '"log" or "linear"')
    if shape == "linear":
        conversion.say(path, shape, _C, "the warmup is linear")
    elif shape is not None:
        conversion.say(path, shape, Verdict.NEAREST, "the warmup is linear")
    elif warmup:
        conversion.absent(path, "DeepSpeed's warmup is logarithmic, ours linear")
    return warmup


def _convert_total(conversion: Conversion, fields: Fields, decay: str) -> Any:
    path = "scheduler.params.total_num_steps"
    total = fields.take(path, "count")
    if total == AUTO:
        conversion.leave_open("run.steps", "--max_steps, or epochs of TrainingArguments")
        conversion.say(path, total, Verdict.FILLED_IN, "run.steps")
    elif total is None:
        if decay != "none":
            raise ConfigError(
                "The schedule does not say how many steps it has.",
                numbers=f"scheduler.type is {decay}, and there is no total_num_steps.",
                write='"total_num_steps" of all optimizer steps in scheduler.params',
            )
    else:
        if not 1 <= total <= 10**15:
            raise fields.refuse(path, total, "1 or more")
        conversion.set("run.steps", total)
        conversion.say(path, total, _C, f"run.steps = {total}")
    return total


def _convert_ends(conversion: Conversion, fields: Fields, decay: str) -> None:
    for key, kept in (("warmup_min_lr", "the peak"), ("warmup_min_ratio", "the peak")):
        value = fields.take(f"scheduler.params.{key}", "number")
        if value is not None:
            zero = value in (0, AUTO)
            words = f"the warmup begins at {kept} divided by its steps"
            verdict = _U if zero else Verdict.NEAREST
            conversion.say(f"scheduler.params.{key}", value, verdict, words)
    path = "scheduler.params.cos_min_ratio"
    least = fields.take(path, "number")
    if least is not None and least != AUTO and not 0 <= least <= 1:
        raise fields.refuse(path, least, "0 to 1")
    if decay == "linear":
        conversion.set("optimizer.final", 0.0)
    elif decay == "cosine":
        share = 1e-4 if least in (None, AUTO) else float(least)
        conversion.set("optimizer.final", share)
    if least is not None:
        used = decay == "cosine"
        words = f"optimizer.final = {least}" if used else "read by WarmupCosineLR only"
        conversion.say(path, least, _C if used else _U, words)


def _say_rest(conversion: Conversion, fields: Fields, verdict: Verdict, words: str) -> None:
    for path, value in fields.rest_of("scheduler"):
        conversion.say(path, value, verdict, words)
