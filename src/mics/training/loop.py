"""The loop of ``mics train``: set up, resume, then step, evaluate, save; in the end, show."""

from __future__ import annotations

import torch.distributed as dist

from mics.errors import MicsError
from mics.training.config import TrainConfig
from mics.training.evaluation import evaluate, sample
from mics.training.keeping import Keeper
from mics.training.meter import Meter
from mics.training.rates import peak_flops
from mics.training.record import EvaluationRecord, bits_per_byte
from mics.training.reporting import open_reporter
from mics.training.setup import Run, set_up
from mics.training.signals import StopRequest
from mics.training.step import take_step


def train(config: TrainConfig) -> int:
    """Train as ``config`` says. Called on every rank of a launched job.

    Returns:
        0; 1 when the last checkpoint could not be written.

    Raises:
        MicsError: options, data, model or checkpoints are not right, said before the first step; or
            too many steps in a row were not finite.
    """
    # Until everything is set up a signal ends the process as it does any other.
    with set_up(config) as run, StopRequest() as asked:
        keeper = Keeper(run)
        at = keeper.resume()
        meter = _meter(run)
        with open_reporter(run, meter, at) as reporter:
            skipped_in_a_row = 0
            stopped = False
            while at.step < config.run.steps and not stopped:
                meter.begin()
                outcome = take_step(
                    run.model,
                    run.optimizer,
                    run.micro_batches(at.position),
                    config.optimizer,
                    step=at.step + 1,
                    steps=config.run.steps,
                    stop=asked.stop,
                    count=meter.count,
                )
                at = at.after(run.batch.global_batch, outcome.targets)
                reporter.step(meter.end(at, outcome))
                stopped = outcome.stop

                skipped_in_a_row = 0 if outcome.taken else skipped_in_a_row + 1
                if skipped_in_a_row == config.optimizer.bad_steps:
                    raise _not_finite(at.step, skipped_in_a_row, keeper)
                last = at.step == config.run.steps
                if last or stopped or _due(at.step, config.checkpoint.every):
                    keeper.save(at)
                if last or _due(at.step, config.evaluation.every):
                    reporter.evaluation(_evaluate(run, at.step))
                keeper.look_after_save()

            keeper.look_after_save(wait=True)
            reporter.end(at, keeper.newest, None if stopped else _sample(run))
        return 1 if keeper.last_failed else 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _meter(run: Run) -> Meter:
    return Meter(
        run.model,
        micro_steps=run.batch.micro_steps,
        steps=run.config.run.steps,
        tokens=run.batch.global_batch * run.sequence,
        bytes_per_token=None if run.masked else run.data.train.bytes_per_token,
        flops=run.flops,
        peak_flops=peak_flops(run.device, run.config.parallel.dtype),
        device=run.device,
    )


def _evaluate(run: Run, step: int) -> EvaluationRecord | None:
    held_out, sequences = run.data.held_out, run.config.evaluation.sequences
    if min(held_out.num_sequences, sequences) == 0:
        return None
    loss = evaluate(
        run.model,
        held_out,
        sequences=sequences,
        micro_batch=run.batch.micro_batch,
        device=run.device,
    )
    bits = None if run.masked or loss is None else bits_per_byte(loss, held_out.bytes_per_token)
    return EvaluationRecord(step, loss, bits)


def _sample(run: Run) -> str | None:
    if run.masked or run.config.evaluation.sample == 0:
        return None
    return sample(
        run.model,
        run.data.tokenizer,
        run.config.evaluation.prompt,
        tokens=run.config.evaluation.sample,
        positions=run.sequence,
        seed=run.config.run.seed,
        device=run.device,
    )


def _not_finite(step: int, in_a_row: int, keeper: Keeper) -> MicsError:
    keeper.look_after_save(wait=True)
    kept = f"the newest checkpoint is {keeper.newest}" if keeper.newest else "there is none yet"
    return MicsError(
        f"Loss or gradient norm was not finite in {in_a_row} steps in a row.",
        numbers=f"Steps {step - in_a_row + 1} to {step} of {dist.get_world_size()} ranks; {kept}.",
        write="a smaller --optimizer.learning-rate or more --optimizer.warmup; it goes on from the "
        "newest checkpoint",
    )
