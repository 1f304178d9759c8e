"""The loop of ``mics train``, top to bottom: set up, resume, step, evaluate, save, finish."""

from __future__ import annotations

from mics.training.config import TrainConfig
from mics.training.keeping import Keeper
from mics.training.reporting import Reporter
from mics.training.setup import set_up
from mics.training.signals import StopRequest
from mics.training.step import take_step


def train(config: TrainConfig) -> int:
    """Train as ``config`` says. Called on every rank of a launched job.

    Returns:
        0; 1 when the last checkpoint could not be written.

    Raises:
        MicsError: something is wrong with options, data, model or checkpoints, said before the
            first step; or too many steps in a row were not finite.
    """
    with StopRequest() as asked, set_up(config) as run, Reporter(run) as reporter:
        keeper = Keeper(run, alarm=reporter.alarm)
        at = keeper.resume()
        reporter.header(at)
        skipped_in_a_row = 0

        while at.step < config.run.steps:
            reporter.step_begins()
            outcome = take_step(
                run.model,
                run.optimizer,
                run.micro_batches(at.position),
                config.optimizer,
                step=at.step + 1,
                steps=config.run.steps,
                stop=asked.stop,
                count=reporter.count,
            )
            at = at.after(run.batch.global_batch, outcome.targets)
            reporter.step(at, outcome)

            skipped_in_a_row = 0 if outcome.taken else skipped_in_a_row + 1
            if skipped_in_a_row == config.optimizer.bad_steps:
                raise _diverged(at.step, skipped_in_a_row, keeper)
            if _due(at.step, config.evaluation.every) and at.step < config.run.steps:
                reporter.evaluation(at.step, _evaluate(run))
            if outcome.stop:
                break
            if _due(at.step, config.checkpoint.every):
                keeper.save(at)
            keeper.look_after_pending()

        keeper.save(at)
        keeper.finish()
        if at.step == config.run.steps:
            reporter.evaluation(at.step, _evaluate(run))
            reporter.sample(_sample(run))
        reporter.end(at, stopped=at.step < config.run.steps)
        return 1 if keeper.last_failed else 0
