"""A shape for a number of parameters: ``13b`` is a decoder of Llama's kind of that size.

The rule is that of Llama (Touvron et al. 2023, arXiv:2302.13971, table 2), whose 7B and 13B are 128
wide for each layer: heads of 128, each with its own keys and values, a feed-forward layer of 8/3
the width, rounded up to a multiple of 256, 32000 ids, untied. Loss hardly depends on the ratio of
width to depth (Kaplan et al. 2020, arXiv:2001.08361, figure 5). ``13b`` is Llama 13B to the
parameter. Positions are those of Llama 2, 4096.
"""

from __future__ import annotations

import math
import re

from mics.errors import ConfigError
from mics.models.families import Preset, decoder

_RULE = "width near 128 x layers, heads of 128, as Llama (Touvron et al. 2023, table 2)"
_NAME = re.compile(r"(?:llama-)?(\d{1,4}(?:\.\d{1,3})?)([mbt])", re.IGNORECASE)
_UNITS = {"m": 1e6, "b": 1e9, "t": 1e12}
_LEAST, _MOST = 20e6, 10e12
_HEAD, _VOCABULARY, _POSITIONS = 128, 32000, 4096
_ROUNDED_TO = 256  # the width of a feed-forward layer


def preset_of_count(name: str) -> Preset | None:
    """Find the shape that a number of parameters names: 13b, 350m, llama-1.5b.

    Returns:
        ``None`` where the name is no such number.

    Raises:
        ConfigError: it is below 20 million or above 10 million million parameters.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    parameters = float(match[1]) * _UNITS[match[2].lower()]
    if not _LEAST <= parameters <= _MOST:
        raise ConfigError(
            "No shape follows from that number of parameters.",
            numbers=f"{name} is {parameters:,.0f}; 20m to 10t have one.",
            write="--model.name 1b",
        )
    width, layers = _shape(parameters)
    about = f"{name.lower()} is {layers} layers of width {width}: {_RULE}"
    shape = decoder(width, _feed_forward(width), layers, width // _HEAD, width // _HEAD)
    own = {"vocab_size": _VOCABULARY, "max_position_embeddings": _POSITIONS, "rms_norm_eps": 1e-5}
    return Preset("llama", about, shape | own)


def _shape(parameters: float) -> tuple[int, int]:
    """Choose width and layers: of widths that layers can fill, the one nearest to the rule."""
    shapes = []
    width = _HEAD
    while 2 * _VOCABULARY * width < parameters:
        left = parameters - 2 * _VOCABULARY * width - width
        layers = round(left / _of_layer(width))
        if layers:
            shapes.append((abs(math.log(width / (_HEAD * layers))), width, layers))
        width += _HEAD
    _, width, layers = min(shapes)
    return width, layers


def _feed_forward(width: int) -> int:
    return -(-8 * width // (3 * _ROUNDED_TO)) * _ROUNDED_TO


def _of_layer(width: int) -> int:
    """Count the parameters of a layer: attention, feed-forward, two norms."""
    return 4 * width**2 + 3 * width * _feed_forward(width) + 2 * width
