"""What one step cost: bytes against their prediction, seconds, tokens per second, memory."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import nn

from mics.anatomy.flops import utilisation
from mics.communication.ledger import Seconds
from mics.communication.wire import bytes_sent
from mics.ranks.issuing import all_reduce
from mics.sharding.prediction import ledger, predict_full_sharding, predict_traffic
from mics.sharding.units import units_of
from mics.traffic import Key, Traffic
from mics.training.progress import Progress
from mics.training.rates import Stopwatch, memory_bytes
from mics.training.record import StepRecord, bits_per_byte
from mics.training.step import Outcome

_NEW_SHARDS = Key(2, "all_gather", "flat")


class Meter:
    """Measures the steps of a run. Every rank has one, because bytes are counted on every rank.

    [Note: what an optimizer's step sends]
    Ranks tell each other what they have sent before the optimizer's step. One of states that are
    dealt to the replicas sends new shards in its step: these are counted with the step behind it,
    and the first of a run has none.

    Making it is collective: the predicted bytes of all ranks are summed.

    Args:
        model: a model that mics has sharded.
        micro_steps: how many a step has.
        steps: how many the whole run has.
        tokens: how many the model computes in a step, on all ranks; a masked model predicts few of
            them.
        bytes_per_token: bytes of the training text; ``None`` shows no bits per byte.
        flops: FLOPs of the model per rank and step (``anatomy.flops``); ``None`` shows no MFU.
        peak_flops: FLOPs per second of one device, in the dtype that is computed in; ``None``
            shows no MFU.
        device: where collectives take their tensors from.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        micro_steps: int,
        steps: int,
        tokens: int,
        bytes_per_token: float | None,
        flops: float | None,
        peak_flops: float | None,
        device: torch.device,
    ) -> None:
        self._ledger = ledger(model)
        self._predicted = predict_traffic(model, micro_steps=micro_steps)
        self._at_first = self._predicted
        if any(unit.share is not None for unit in units_of(model)):
            self._at_first = _without(self._predicted, [_NEW_SHARDS])
        self._counted = self._of_optimizer = Traffic({})
        self._steps = steps
        self._tokens = tokens
        self._bytes_per_token = bytes_per_token
        self._flops = flops
        self._peak_flops = peak_flops
        self._device = device
        self._watch = Stopwatch()
        self._wire: int | None = None  # what this node's interface had sent as the step began
        flow = self._predicted.flow
        full = predict_full_sharding(model, micro_steps=micro_steps).flow
        sent = [flow.inter_bytes, flow.intra_bytes, full.inter_bytes, full.intra_bytes]
        summed = torch.tensor([*map(float, sent)], dtype=torch.float64, device=device)
        all_reduce(summed)
        predicted = [int(value) for value in summed.tolist()]
        self.predicted_between_nodes, self.predicted_inside_nodes = predicted[:2]
        self.full_sharding_between_nodes, self.full_sharding_inside_nodes = predicted[2:]

    def begin(self) -> None:
        """A step begins; what was communicated before it does not count."""
        self._ledger.reset()
        self._wire = bytes_sent()
        self._watch.start()

    def count(self) -> dict[str, float]:
        """What this rank sent in this step, in bytes, and whether it was what was predicted."""
        self._counted = self._ledger.traffic()
        counted = self._counted + self._of_optimizer
        predicted = self._predicted if self._of_optimizer.counts else self._at_first
        flow = counted.flow
        return {
            "bytes between nodes": float(flow.inter_bytes),
            "bytes inside nodes": float(flow.intra_bytes),
            "ranks as predicted": float(counted == predicted),
        }

    def end(self, at: Progress, outcome: Outcome) -> StepRecord:
        """The step has ended; ``outcome.sums`` is what all ranks' ``count`` returned, summed."""
        seconds = self._watch.stop()
        # Nothing else is sent in this way, so what is there now and was not is the optimizer's.
        self._of_optimizer = _without(self._ledger.traffic(), self._counted.counts.keys())
        sums = outcome.sums
        world = dist.get_world_size()
        rate = self._tokens / seconds
        hop_1, hop_2 = self._seconds(1), self._seconds(2)
        wire = bytes_sent()
        used = None
        if self._flops is not None and self._peak_flops is not None:
            used = utilisation(self._flops, seconds, self._peak_flops)
        bits = None
        if self._bytes_per_token is not None and outcome.loss is not None:
            bits = bits_per_byte(outcome.loss, self._bytes_per_token)
        return StepRecord(
            step=at.step,
            loss=outcome.loss,
            router_loss=outcome.router_loss,
            bits_per_byte=bits,
            learning_rate=outcome.learning_rate,
            norm=outcome.norm,
            taken=outcome.verdict.take,
            skipped=outcome.verdict.why or None,
            seconds=seconds,
            tokens=at.tokens,
            tokens_per_second=rate,
            tokens_per_second_per_gpu=rate / world,
            mfu=used,
            memory_bytes=memory_bytes(self._device),
            bytes_between_nodes=int(sums["bytes between nodes"]),
            bytes_inside_nodes=int(sums["bytes inside nodes"]),
            bytes_on_wire=None if wire is None or self._wire is None else wire - self._wire,
            traffic_as_predicted=sums["ranks as predicted"] == world,
            hop_1_seconds=hop_1.total,
            hop_1_exposed=hop_1.exposed,
            hop_2_seconds=hop_2.total,
            hop_2_exposed=hop_2.exposed,
            seconds_left=self._watch.left(self._steps - at.step),
            ranks=world,
        )

    def _seconds(self, hop: int) -> Seconds:
        spent = self._ledger.seconds().items()
        return sum((seconds for key, seconds in spent if key.hop == hop), Seconds())


def _without(traffic: Traffic, keys: Collection[Key]) -> Traffic:
    return Traffic({key: count for key, count in traffic.counts.items() if key not in keys})
