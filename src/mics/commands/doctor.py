"""``mics doctor``: what the ranks of this job are, whether they agree, how fast their links are."""

from __future__ import annotations

import json

from mics.commands.examining.examination import examine_here, examine_launched
from mics.commands.examining.facts import Problem
from mics.commands.examining.options import Config, nonsense
from mics.commands.examining.report import Report, as_json
from mics.commands.numbers import out_of_bounds
from mics.errors import MicsError
from mics.ranks.console import progress, show, speaks
from mics.ranks.joining import RanksMissing
from mics.ranks.launcher import read_launch


def run(config: Config) -> int:
    """Examine the job this process belongs to, or ranks started here.

    Returns:
        0 when all is well, 1 when a problem was named, 2 when the options make no sense.

    Raises:
        MicsError: there are no ranks to examine; with ``--json`` it is a document as well.
    """
    try:
        launch = read_launch()
        words = out_of_bounds(config) or nonsense(config, launch)
        if words is not None:
            progress(f"mics doctor: {words}")
            return 2
        return examine_here(config) if launch is None else examine_launched(config, launch)
    except MicsError as error:
        if not (config.json and speaks()):
            raise
        ranks = error.ranks if isinstance(error, RanksMissing) else ()
        show(json.dumps(as_json(Report(problems=[Problem(error, ranks)]))))
        return 1
