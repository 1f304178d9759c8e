"""What stands where a gradient would be read wrongly without a word, and says where it is.

[Note: two kinds]
Where replicas have dealt a unit, the gradients of a finished step are with what each rank owns.
``.grad`` of the model's parameters would be ``None`` then: whatever clips, scales or logs gradients
would find none, and go on. So a signpost stands there, without memory, that refuses to be read. One
stands with what is owned as long as gradients are accumulated in the model's parameters.

What is owned has a real gradient in the end, of this rank's part. It is edited by element like any
other, but its norm is not that of a gradient, so an ``OwnedGradient`` refuses to have one until an
optimizer has stepped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mics import compat
from mics.errors import MicroStepError

_ABOUT = {
    *("shape", "ndim", "dtype", "device", "layout", "_version"),
    *("grad_fn", "requires_grad", "is_leaf", "is_cpu", "is_cuda", "is_meta", "is_sparse"),
}
_NORMS = {"norm", "_foreach_norm", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm"}


class Signpost(torch.Tensor):
    """What stands for the gradient of a parameter of the model; ``owned`` has it."""

    owned: nn.Parameter

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch's.

        Raises:
            MicroStepError: it was read or written.
        """
        if _is_about(func):
            return _as_plain(func, args, kwargs)
        raise MicroStepError(
            "A gradient of the model was read or written behind the last backward of a step; "
            "mics.owned has dealt its optimizer, and gradients are with what each rank owns.",
            numbers=f"By {_spelled(func)}.",
            write="mics.clip_grad_norm_ or mics.get_total_norm, which take either; for anything "
            "else the gradients of what mics.owned returned, element by element",
        )


class Lent(torch.Tensor):
    """What stands for the gradient of what is owned, while gradients add up in the model."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch's.

        Raises:
            MicroStepError: it was read or written.
        """
        if _is_about(func):
            return _as_plain(func, args, kwargs)
        raise MicroStepError(
            "A gradient of what mics.owned returned was read or written before the end of a "
            "step; until then all is accumulated with the parameters of the model.",
            numbers=f"By {_spelled(func)}.",
            write="it behind the last micro-step; optimizer.zero_grad(), without "
            "set_to_none=False, to drop what was accumulated",
        )


def _getter(func: Any) -> str:
    """The attribute that a function gets, "" if it is any other function."""
    return getattr(func.__self__, "__name__", "") if func.__name__ == "__get__" else ""


def _is_about(func: Any) -> bool:
    """Whether it asks for something else than values."""
    return _getter(func) in _ABOUT


def _as_plain(func: Any, args: Any, kwargs: Any) -> Any:
    """What it gives for plain tensors."""
    with compat.as_plain_tensors():
        return func(*args, **(kwargs or {}))


def _spelled(func: Any) -> str:
    return _getter(func) or str(func.__name__)


class OwnedGradient(torch.Tensor):
    """The gradient of what a rank owns of a parameter."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch's; results are plain tensors.

        Raises:
            MicroStepError: a norm was asked for.
        """
        if func.__name__ in _NORMS:
            raise MicroStepError(
                "A norm was asked for of gradients of which this rank owns a part; clipped by it, "
                "each rank would scale its part in another way.",
                numbers=f"By {func.__name__}.",
                write="mics.clip_grad_norm_ or mics.get_total_norm, of all parameters or gradients "
                "on every rank",
            )
        return _as_plain(func, args, kwargs)


class Signs:
    """The signposts of one unit.

    What ``zero_grad`` drops of the gradients at one place has to be dropped at the other one: where
    a signpost is gone, the gradient goes.

    Args:
        owned: what this rank owns of each parameter.
        of_model: the parameters, in the same order.
    """

    def __init__(
        self, owned: Sequence[nn.Parameter], of_model: Callable[[], Sequence[nn.Parameter]]
    ) -> None:
        self._owned, self._of_model = owned, of_model
        self._lent: set[int] = set()  # positions
        self._shown: set[int] = set()

    @property
    def shown(self) -> bool:
        """Whether some stand with parameters of the model."""
        return bool(self._shown)

    def lend(self) -> None:
        """Gradients are with the parameters of the model, and a part of a step's."""
        for param, owned in zip(self._of_model(), self._owned, strict=True):
            if param.grad is not None and owned.grad is None:
                owned.grad = _without_memory(owned).as_subclass(Lent)
        self.bring()

    def bring(self) -> None:
        """Gradients are at both places."""
        self._lent = {at for at, owned in enumerate(self._owned) if owned.grad is not None}

    def show(self, used: Sequence[bool]) -> None:
        """Gradients are with what is owned, and final.

        Args:
            used: for each parameter, whether it has one.
        """
        for at, (param, owned) in enumerate(zip(self._of_model(), self._owned, strict=True)):
            param.grad = None
            if not used[at]:
                owned.grad = None
            elif owned.grad is not None:
                owned.grad = owned.grad.as_subclass(OwnedGradient)
                sign = _without_memory(param).as_subclass(Signpost)
                sign.owned, param.grad = owned, sign
                self._shown.add(at)
        self._lent.clear()

    def follow_zero_grad(self) -> None:
        """Drop the gradients whose signposts were dropped."""
        for at, param in enumerate(self._of_model() if self._lent or self._shown else ()):
            if at in self._lent and self._owned[at].grad is None:
                param.grad = None
                self._lent.discard(at)
            if at in self._shown and param.grad is None:
                self._owned[at].grad = None
                self._shown.discard(at)

    def take_back(self) -> None:
        """Gradients of another step come to the parameters of the model."""
        self.follow_zero_grad()
        for at, param in enumerate(self._of_model() if self._shown else ()):
            if at in self._shown and isinstance(param.grad, Signpost):
                param.grad = None
        self._shown.clear()

    def before_step(self, names: Sequence[str]) -> None:
        """Let an optimizer have the gradients of what is owned.

        Raises:
            MicroStepError: somebody has set a gradient that it would not see.
        """
        self.follow_zero_grad()
        for at, param in enumerate(self._of_model()):
            if at in self._shown and not isinstance(param.grad, Signpost):
                raise MicroStepError(
                    "A gradient was set on a parameter of the model behind the last backward of a "
                    "step; the optimizer of mics.owned(model) would not see it.",
                    numbers=f"On {names[at]}.",
                    write="the gradients of what mics.owned returned",
                )
        for owned in self._owned:
            if owned.grad is not None:
                owned.grad = bare(owned.grad)

    def forget(self) -> None:
        """There are no gradients any more."""
        self._lent.clear()
        self._shown.clear()


def _without_memory(param: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=param.dtype, device=compat.local_of(param.detach()).device)
    return zero.expand(param.shape)


def is_real(gradient: torch.Tensor | None) -> bool:
    """Whether there is a gradient, and no signpost."""
    return gradient is not None and not isinstance(gradient, Signpost | Lent)


def read(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient that a signpost points to; any other is itself."""
    if isinstance(gradient, Signpost):
        return gradient.owned.grad
    return gradient


def bare(gradient: torch.Tensor) -> torch.Tensor:
    """An owned gradient as a plain tensor in its memory; any other is itself."""
    if not isinstance(gradient, OwnedGradient):
        return gradient
    with compat.as_plain_tensors():
        return gradient.as_subclass(torch.Tensor)


@contextlib.contextmanager
def bared(params: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let gradients of what is owned be plain tensors inside."""
    owned = [(param, param.grad) for param in params if isinstance(param.grad, OwnedGradient)]
    for param, gradient in owned:
        param.grad = bare(gradient)
    try:
        yield
    finally:
        for param, gradient in owned:
            param.grad = gradient
