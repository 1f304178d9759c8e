"""The loop of ``mics train``: set up, resume, then step, evaluate, save; in the end, show."""

from __future__ import annotations

import time
from dataclasses import replace

from mics.ranks.heartbeat import at_step
from mics.ranks.skips import SkipRule
from mics.ranks.whereabouts import during
from mics.training.config import TrainConfig
from mics.training.evaluation import evaluate, sample
from mics.training.keeping import Keeper
from mics.training.length import say_if_never_warm
from mics.training.lookout import Lookout
from mics.training.memory import Memory
from mics.training.meter import Meter
from mics.training.progress import Progress
from mics.training.rates import peak_flops
from mics.training.record import EvaluationRecord, LatenessRecord, SaveRecord, bits_per_byte
from mics.training.reporting import Reporter, open_reporter
from mics.training.setup import Run, set_up
from mics.training.signals import StopRequest
from mics.training.skipping import Skipping
from mics.training.step import take_step


def train(config: TrainConfig) -> int:
    """Train as ``config`` says. Called on every rank of a launched job.

    Returns:
        0; 1 when the last checkpoint could not be written.

    Raises:
        MicsError: options, data, model or checkpoints are not right, said before the first step; or
            too many steps in a row were skipped, and there is nothing to go back to.
    """
    # Until everything is set up a signal ends the process as it does any other.
    with set_up(config) as run, StopRequest() as asked:
        rule = _rule(config)
        keeper, memory = Keeper(run, rule), Memory(run, rule)
        run, at = _first(keeper, memory)
        config = run.config  # whose length is known
        meter, lookout, skipping = _meter(run), Lookout(run.model), Skipping(run, keeper)
        with open_reporter(run, meter, at) as reporter:
            stopped = False
            while at.step < config.run.steps and not stopped:
                at_step(at.step + 1)
                meter.begin()
                outcome = take_step(
                    run.model,
                    run.optimizer,
                    run.micro_batches(at.position),
                    config.optimizer,
                    step=at.step + 1,
                    steps=config.run.steps,
                    count=lambda: {**meter.count(), "stops": float(asked.stop)},
                    rule=rule,
                )
                at = at.after(run.batch.global_batch, outcome.targets)
                record, found = meter.end(at, outcome), lookout.after_step()
                reporter.step(replace(record, slow=lookout.words))
                if found is not None:
                    reporter.lateness(LatenessRecord(at.step, found))
                stopped = outcome.sums["stops"] > 0  # some rank was asked to

                if not outcome.verdict.take:
                    reporter.skipped(skipping.record(at, outcome.verdict))
                    if skipping.is_due(outcome.verdict) and not stopped:
                        at, back = skipping.go_back(at, outcome.verdict)
                        reporter.rolled_back(back)
                        memory.forget()
                        continue
                kept = memory.keep(at)
                if kept != at:  # replicas differed, and all have been put back
                    at = keeper.go_on(kept)
                    continue
                if stopped or _is_due(at.step, config.checkpoint.every, config):
                    reporter.saved(_save(keeper, at))
                if _is_due(at.step, config.evaluation.every, config):
                    _measure(run, at.step, reporter)
                keeper.look_after_save()

            keeper.look_after_save(wait=True)
            memory.close()
            reporter.end(at, keeper.newest, None if stopped else _sample(run))
        return 1 if keeper.last_failed else 0


def _rule(config: TrainConfig) -> SkipRule:
    given = config.optimizer
    return SkipRule(spike_loss=given.spike_loss, spike_norm=given.spike_norm)


def _first(keeper: Keeper, memory: Memory) -> tuple[Run, Progress]:
    """Where the run goes on: from memory where it has been kept there, else from a checkpoint.

    Returns:
        The run, whose length is known now, and how far it has come.
    """
    recalled = memory.recall()
    if recalled is None:
        at = keeper.resume()
    else:
        keeper.run = keeper.run.going_on(recalled)
        at = keeper.go_on(recalled)
    say_if_never_warm(keeper.run.config)
    return keeper.run, at


def _is_due(step: int, every: int, config: TrainConfig) -> bool:
    """Whether what is done every so many steps, and after the last, is to be done now."""
    return step == config.run.steps or (every > 0 and step % every == 0)


def _meter(run: Run) -> Meter:
    return Meter(
        run.model,
        micro_steps=run.micro_steps,
        steps=run.config.run.steps,
        tokens=run.batch.global_batch * run.sequence,
        bytes_per_token=None if run.masked else run.data.train.bytes_per_token,
        flops=run.flops,
        peak_flops=peak_flops(run.device, run.config.parallel.dtype),
        device=run.device,
    )


def _save(keeper: Keeper, at: Progress) -> SaveRecord:
    begun = time.perf_counter()
    keeper.save(at)
    return SaveRecord(at.step, time.perf_counter() - begun)


def _measure(run: Run, step: int, reporter: Reporter) -> None:
    for name in run.measured:
        reporter.evaluation(_evaluate(run, step, name))


@during("the evaluation")
def _evaluate(run: Run, step: int, name: str) -> EvaluationRecord | None:
    held_out, sequences = run.measured[name], run.config.evaluation.sequences
    if min(held_out.num_sequences, sequences) == 0:
        return None
    begun = time.perf_counter()
    loss = evaluate(
        run.model,
        held_out,
        sequences=sequences,
        micro_batch=run.batch.micro_batch,
        device=run.device,
    )
    rate, bits = held_out.bytes_per_token, None
    if not run.masked and loss is not None and rate is not None:
        bits = bits_per_byte(loss, rate)
    return EvaluationRecord(step, loss, bits, time.perf_counter() - begun, name)


@during("the evaluation")
def _sample(run: Run) -> str | None:
    if run.masked or run.config.evaluation.sample == 0:
        return None
    return sample(
        run.model,
        run.data.tokenizer,
        run.data.start_of(run.config.evaluation.prompt),
        tokens=run.config.evaluation.sample,
        positions=run.sequence,
        seed=run.config.run.seed,
        device=run.device,
    )
