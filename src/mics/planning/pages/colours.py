"""The colours of everything that is drawn: one per engine and one per kind, on pages and pictures.

The ten of them differ in brightness too, and are told apart by people who see few colours (after
Paul Tol's "bright" and "muted" sets). Who draws something new adds it here.
"""

from __future__ import annotations

BLUE, CYAN, GREEN, YELLOW, RED = "#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677"
PURPLE, GREY, TEAL, INDIGO, BROWN = "#aa3377", "#999999", "#44aa99", "#332288", "#a5682a"

ENGINES = {
    "mics": BLUE,
    "mics p=1": CYAN,
    "fsdp2": RED,
    "hsdp every micro-step": YELLOW,
    "hsdp deferred": GREEN,
    "ddp": PURPLE,
    "zero2": TEAL,
    "zero3": BROWN,
    "hpz": GREY,
    "deepspeed mics": INDIGO,
}
"""By the names of ``mics simulate`` and ``mics bench``."""

MEMORY = {
    "parameters": BLUE,
    "optimizer": CYAN,
    "gradients": GREEN,
    "unsharded_blocks": YELLOW,
    "prefetched_blocks": BROWN,
    "activations": RED,
    "logits": PURPLE,
    "communication_buffers": TEAL,
    "communicators": INDIGO,
    "fragmentation": GREY,
}
"""What a GPU's memory holds, by the fields of ``anatomy.memory.Need``."""

COMPUTE, HOP_1, HOP_2 = BLUE, YELLOW, RED
LINKS = {"between nodes": RED, "inside nodes": CYAN}
EVALUATION, SAVE, OTHER = GREEN, PURPLE, "#cccccc"
TRAINING, HELD_OUT, LIMIT = BLUE, RED, "#cc3311"
SETS = (GREEN, PURPLE, YELLOW, TEAL, BROWN, INDIGO, CYAN, GREY)  # of evaluation.sets, in turn
_STREAMS = {"compute": COMPUTE, "hop 1": HOP_1, "hop 2": HOP_2, "to host": PURPLE}


def of_engine(name: str) -> str:
    """Return an engine's colour; grey for one that has none.

    Args:
        name: of the engine; of a version of it ("zero3 0.5.6") the first word counts.
    """
    return ENGINES.get(name) or ENGINES.get(name.partition(" ")[0], GREY)


def of_memory(kind: str) -> str:
    """Return the colour of what is in memory.

    Args:
        kind: a field of ``Need``, or fragmentation.
    """
    return MEMORY.get(kind, GREY)


def of_stream(name: str) -> str:
    """Return the colour of a stream of a simulated step.

    Args:
        name: as ``simulation`` calls it ("hop 1, reductions inter"); how it begins counts.
    """
    return next((colour for begin, colour in _STREAMS.items() if name.startswith(begin)), TEAL)
