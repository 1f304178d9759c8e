"""``mics train``: train a language model, on ranks started here or by a launcher."""

from __future__ import annotations

from mics.commands.options.train import Config
from mics.hardware.lookup import find_node
from mics.ranks.console import show
from mics.training import dry_run
from mics.training.launching import run_on_ranks
from mics.training.loop import train
from mics.training.settings import check_settings, check_source


def run(config: Config) -> int:
    """Train, or show what would be trained.

    Returns:
        0; 1 when a rank that was started here failed, or the last checkpoint was not written.

    Raises:
        MicsError: options, data, model or checkpoints are not right.
    """
    if config.models:
        show(dry_run.list_models())
        return 0
    check_settings(config.options)
    if config.options.parallel.node is not None:
        find_node(config.options.parallel.node)  # before any rank is started
    if config.dry_run:
        show(dry_run.describe(config.options))
        return 0
    check_source(config.options)
    return run_on_ranks(train, config.options)
