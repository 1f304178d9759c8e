"""A step that has begun: its micro-steps, what it owes to an optimizer, how it ends.

[Note: who knows the last micro-step, and when]
Hop 2 runs beside the backward of the last micro-step, so that has to be known when it begins. Each
rank tells the others then, and the answers travel while it computes (``same_steps.py``). A trainer
that learns only afterwards says ``last=None``: no micro-step runs hop 2, ``finish`` does. Then
nobody knows at the beginning of a micro-step whether the others run it too, so they are waited
for: a message of a few bytes per micro-step. All ranks say it in the same way: ``finish`` starts
hop 2 in the order of the units, a backward pass in the reverse, and a communicator must see one
order.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mics import compat
from mics.communication.guard import guard
from mics.communication.hop_two import HopTwo
from mics.communication.same_steps import same_steps_of
from mics.communication.settling import settle
from mics.communication.step_facts import Normalise, Said
from mics.communication.used import Used
from mics.errors import MicroStepError, MicsWarning
from mics.sharding.belonging import refuse_outside
from mics.sharding.normalisation import divide_by_micro_steps, divide_by_tokens
from mics.sharding.passes import Passes, drop_unfinished
from mics.sharding.same_replicas import check_same_replicas
from mics.sharding.tokens import Counted
from mics.sharding.units import Unit, units_of
from mics.sharding.unreduced import refuse_unreduced

_ATTRIBUTE = "_mics_open_step"


class OpenStep:
    """A step of a model between the beginning of its first micro-step and the end of its last.

    Args:
        model: a model sharded by mics, or a module that contains such models.
        normalise: what the gradients are divided by at the end.
        in_loop: whether ``micro_steps`` runs it, for the words of a refusal.

    Raises:
        ShardError: the model was not sharded by mics, or not all of it.
        MicroStepError: gradient sync was switched off.
    """

    def __init__(self, model: nn.Module, *, normalise: Normalise, in_loop: bool) -> None:
        units = units_of(model)
        refuse_unreduced(units)
        modules = compat.modules_under(model)
        refuse_outside(model, modules, units)
        _abandon(model, units)
        for unit in units:
            _refuse_other_module(unit.step)
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()  # what an evaluation left gathered may be older than the shards
        for passes in _passes(units):
            passes.lockstep.forget()  # a forward before the step has its backward before it too
        self._model = weakref.ref(model)
        self._units = units
        self._params = [p for unit in units for p in compat.sharded_params(unit.group)]
        # One of every mesh: a hop 2 asks the one of its own before it waits.
        self._same_steps = list(dict.fromkeys(same_steps_of(unit.groups) for unit in units))
        self._normalise = normalise
        self.in_loop = in_loop
        self.index = 0  # micro-steps that have ended
        self._last: bool | None = False  # what was said of the latest one
        self._running = False
        self._ended = False
        self._raised = False
        self._tokens: list[Counted] = []
        self._has_gradients = False
        self._left: list[weakref.ref[torch.Tensor] | None] | None = None
        self._state_dict_hook = model.register_state_dict_pre_hook(self._refuse_state_dict)  # type: ignore[no-untyped-call]
        model.__dict__[_ATTRIBUTE] = self
        for unit in units:
            unit.belong_to(self)
        guard(self)

    @contextlib.contextmanager
    def micro_step(
        self, model: nn.Module, *, last: bool | None, tokens: Counted | None
    ) -> Iterator[None]:
        """Run the forward and backward of one micro-batch inside; end the step after the last.

        Args:
            model: the step's.
            last: whether it is the step's last; ``None`` if that is not known yet.
            tokens: of this rank's micro-batch, where gradients are divided by tokens.

        Raises:
            MicroStepError: another one is running, or ranks disagree on what follows.
        """
        self._refuse_another(model)
        try:
            self._begin(model, last)
            if tokens is not None:
                self._tokens.append(tokens)
            yield
            if not self._ended:
                self._complete(model)
        except BaseException as error:
            # A break after the last backward leaves complete gradients, an exception may not.
            self._raised = not isinstance(error, GeneratorExit)
            self.leave()
            raise

    def finish(self, model: nn.Module) -> None:
        """End a step whose last micro-step was not known to be the last.

        Raises:
            MicroStepError: one is running or was announced, or other ranks go on.
        """
        if self._running or self._last is not None or self.index == 0:
            raise MicroStepError(
                "finish_step was called where another micro-step has to end first.",
                numbers=f"{self.index} micro-step(s) have ended; "
                + ("one is running." if self._running else "the latest said last=False."),
                write="with mics.micro_step(model, last=None) for micro-steps that may be the last",
            )
        try:
            self._ask(self.index, more=False, said="afterwards")
            self._check()
            self._end(model)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Leave the step before its end; its gradients stay refused until they are dropped."""
        if self._ended:
            return
        self._running = False
        if self._units[0].step is self:  # else another one uses these by now
            for questions in self._same_steps:
                questions.forget(self)
            set_all_reduce(self._units, True)
        if self._left is None:
            self._close()

    def before_forward(self) -> None:
        """A forward begins: outside of a micro-step, and with no gradient left, not of this one."""
        if not self._running and self.was_left:
            self.leave()

    @property
    def params(self) -> list[nn.Parameter]:
        """What the step makes gradients of, in the order of its units."""
        return self._params

    @property
    def used(self) -> Used:
        """The first unit's, which lasts as long as the parameters."""
        return self._units[0].used

    @property
    def was_left(self) -> bool:
        """Whether it can not go on: it was left, or its gradients have been dropped."""
        for unit in self._units:
            if unit.share is not None:
                unit.share.signs.follow_zero_grad()
        dropped = self._has_gradients and all(p.grad is None for p in self._params)
        return self._left is not None or dropped

    def check_normalise(self, normalise: Normalise) -> None:
        """Refuse a micro-step that divides by something else than the ones before it.

        Raises:
            MicroStepError: it does.
        """
        if normalise != self._normalise:
            raise MicroStepError(
                "The micro-steps of one step are normalised in different ways.",
                numbers=f"The first one: {self._normalise}, micro-step {self.index + 1}: "
                f"{normalise}.",
                write="the same normalise=, and tokens= and tokens_shared_over= in all of "
                "them or in none",
            )

    def check_optimizer(self, stepped: set[int]) -> bool:
        """Refuse an optimizer of gradients that are not finished, see ``guard.Owner``."""
        if self._ended:
            return False
        if self._is_over(stepped):
            model = self._model()
            assert model is not None
            with torch.enable_grad():  # a rank may have left out its backward
                self._complete(model)
            return False
        if not self._owes(stepped):
            return True
        if self.in_loop:
            where = "the loop over mics.micro_steps(...) had ended"
            instead = "optimizer.step() after the loop, without break"
        else:
            where = "the last mics.micro_step(...) had ended"
            instead = "last=True for the last micro-step, or mics.finish_step(model) after it"
        raise MicroStepError(
            f"optimizer.step() was called before {where}: its gradients are "
            + ("not normalised yet." if self._last else "incomplete."),
            numbers=f"{self.index} micro-step(s) have ended; the one under way is "
            f"{'the last' if self._last else 'not the last'}.",
            write=f"{instead}; or drop the gradients with optimizer.zero_grad()",
        )

    # -- the parts -------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, last: bool | None) -> None:
        if self._running:
            raise MicroStepError(
                "A micro-step began inside another one of the same model.",
                numbers=f"{self.index} micro-step(s) of this step have ended.",
                write="one mics.micro_step(...) after the other",
            )
        if self._last is None:  # see [Note: who knows the last micro-step, and when]
            self._ask(self.index, more=True, said="on arrival")
            self._check()
        self._running, self._last = True, last
        set_all_reduce(self._units, bool(last))
        for passes in _passes(self._units):
            passes.begin_micro_step()
        if last is not None:
            self._ask(self.index + 1, more=not last, said="beforehand")

    def _complete(self, model: nn.Module) -> None:
        """End a micro-step, and the step if it is the last."""
        self._running = False
        self._refuse_another(model)
        for passes in _passes(self._units):
            passes.end_micro_step()
        self._check()
        self.index += 1
        self._has_gradients = any(p.grad is not None for p in self._params)
        if self._last:
            self._end(model)

    def _ask(self, ran: int, *, more: bool, said: Said) -> None:
        for questions in self._same_steps:
            questions.ask(self, ran, more=more, said=said, normalise=self._normalise)

    def _check(self) -> None:
        for questions in self._same_steps:
            questions.check()

    def _end(self, model: nn.Module) -> None:
        # Only after a last micro-step without a backward, or one not known to be the last, is
        # hop 2 left to do here.
        set_all_reduce(self._units, True)
        if any(unit.find_passes() is None for unit in self._units):
            _find_roots(model)
        for order in dict.fromkeys(passes.order for passes in _passes(self._units)):
            if not self._last:
                order.begin()
            order.finish()
        for hop in _hops(self._units):
            hop.wait()
        for units in _by_mesh(self._units):
            used = [unit.used for unit in units]
            settle(units[0].groups, used)
            check_same_replicas(units[0].groups, used)
        if self._normalise == "micro_steps":
            divide_by_micro_steps(self._units, self.index)
        elif self._normalise is not None:
            divide_by_tokens(self._units, self._tokens)
        self._ended = True
        for questions in self._same_steps:
            questions.end(self)
        for unit in self._units:
            unit.belong_to(None)
        del model.__dict__[_ATTRIBUTE]
        self._state_dict_hook.remove()

    def _close(self) -> None:
        self._state_dict_hook.remove()
        self._left = [None if p.grad is None else weakref.ref(p.grad) for p in self._params]

    def _is_over(self, stepped: set[int]) -> bool:
        """Whether an optimizer steps inside the last micro-step, where nothing is owed any more."""
        over = self._running and self._last and self._normalise is None and not self._raised
        return bool(over) and any(id(p) in stepped for p in self._params)

    def _owes(self, stepped: set[int]) -> bool:
        """Whether an optimizer of these parameters would use gradients that are not finished."""
        if self._last and self._normalise is None and not self._raised:
            return False
        mine = [(i, p.grad) for i, p in enumerate(self._params) if id(p) in stepped]
        if self._left is None:
            return any(gradient is not None for _, gradient in mine)
        # After an exception or a break: as long as what the step left is still there.
        left = [(self._left[i], gradient) for i, gradient in mine if gradient is not None]
        return any(ref is not None and ref() is gradient for ref, gradient in left)

    def _refuse_another(self, model: nn.Module) -> None:
        if open_step(model) is not self:
            raise MicroStepError(
                "Another micro_steps began on this model before this one had ended.",
                numbers=f"This one had run {self.index + 1} micro-step(s).",
                write="one loop over mics.micro_steps(...) at a time",
            )

    def _refuse_state_dict(self, *_: object) -> None:
        if self.was_left:
            return
        after = "the loop over mics.micro_steps(...)" if self.in_loop else "the last micro-step"
        raise MicroStepError(
            "state_dict() was called between micro-steps: the gradients accumulated so far are in "
            "no state dict, so a run resumed from it would lose them.",
            numbers=f"{self.index} micro-step(s) of this step have run.",
            write=f"save after {after}, or drop the gradients before: model.zero_grad()",
        )


def open_step(model: nn.Module) -> OpenStep | None:
    """The step of a model that has begun and not ended, if there is one."""
    step: OpenStep | None = model.__dict__.get(_ATTRIBUTE)
    return step


def _refuse_other_module(step: object) -> None:
    """Refuse a step of units that belong to the open step of another module."""
    if isinstance(step, OpenStep) and not step.was_left:
        raise MicroStepError(
            "A step of these parameters is open on another module.",
            numbers=f"{step.index} micro-step(s) of it have ended.",
            write="the same module object in every micro_step, micro_steps and finish_step",
        )


def _abandon(model: nn.Module, units: list[Unit]) -> None:
    """Clear what a step that was left early (an exception, a break) has left behind."""
    left = open_step(model)
    if left is None:
        return
    left.leave()
    del model.__dict__[_ATTRIBUTE]
    dropped = drop_unfinished(units, _passes(units))
    if dropped:
        warnings.warn(
            f"A step was left in its micro-step {left.index + 1}, before its end; its gradients "
            "have been dropped.",
            MicsWarning,
            stacklevel=4,
        )


def set_all_reduce(units: list[Unit], wanted: bool) -> None:
    """Switch hop 2 on or off for the backward passes to come."""
    for unit in units:
        if compat.wants_all_reduce(unit.group) == wanted:
            continue
        module = compat.modules_of(unit.group)[0]
        assert isinstance(module, FSDPModule)
        module.set_requires_all_reduce(wanted, recurse=False)


def _find_roots(model: nn.Module) -> None:
    """Let FSDP2 know the roots that this rank has run no forward of yet, as other ranks have."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and not any(map(compat.is_initialised, module.modules())):
            compat.initialise(module)


def _passes(units: list[Unit]) -> list[Passes]:
    """Those of every tree and mesh that has run a forward, in module order."""
    found = [unit.find_passes() for unit in units]
    return list(dict.fromkeys(passes for passes in found if passes is not None))


def _by_mesh(units: list[Unit]) -> list[list[Unit]]:
    meshes: dict[dist.ProcessGroup, list[Unit]] = {}
    for unit in units:
        meshes.setdefault(unit.groups.shard, []).append(unit)
    return list(meshes.values())


def _hops(units: list[Unit]) -> list[HopTwo]:
    return [unit.hop_two for unit in units if unit.hop_two is not None]
