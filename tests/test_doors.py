"""Every socket on which a verb listens while it runs, and why it is there; and what a stranger can.

Ranks talk to each other, so they listen: Gloo of every rank for its peers, and rank 0's store where
ranks come from a launcher and have no file in common. Nothing else listens, and nothing but a lab's
own network is reached from outside of this machine.
"""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from doors import Listener, attack, listeners, outer_addresses
from hatching import start, start_verb
from test_joining import free_port
from test_lab import needs_a_lab
from test_train_command import configuration, environment, wait_for_steps

ROOT = Path(__file__).parents[1]


def watched(started: Sequence[subprocess.Popen[str]]) -> tuple[set[Listener], set[int]]:
    """Watch programs to their end; returns all on which they listened, and their own processes."""
    seen: set[Listener] = set()
    while any(process.poll() is None for process in started):
        for process in started:
            seen |= listeners(process.pid)
        time.sleep(0.05)
    for process in started:
        printed = "".join(process.communicate())
        assert process.returncode == 0, printed
    return seen, {process.pid for process in started}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text("One is a number, and so is two. " * 99)
    return tmp_path / "corpus.txt"


@pytest.mark.slow
@pytest.mark.extra
def test_ranks_that_a_verb_starts_listen_for_each_other_on_loopback_and_nothing_else_does(
    tmp_path: Path, corpus: Path
) -> None:
    train = ["train", str(configuration(tmp_path, corpus, steps=2))]
    for words in (train, ["doctor", "--ranks", "2"]):
        # Variables that name a network are for several nodes.
        seen, own = watched([start_verb(words, environment() | {"GLOO_SOCKET_IFNAME": "nowhere0"})])
        assert {(one.kind, one.address) for one in seen} == {("tcp", "127.0.0.1")}, seen
        assert len({one.pid for one in seen}) == 2, "Gloo of the two ranks"
        assert not own & {one.pid for one in seen}, "who starts ranks waits in silence"


@pytest.mark.slow
@pytest.mark.extra
def test_verbs_without_ranks_listen_to_nobody(tmp_path: Path, corpus: Path) -> None:
    file = str(configuration(tmp_path, corpus, steps=2))
    watched([start_verb(["train", file], environment())])
    checkpoint = tmp_path / "run" / "step-00000002"
    plan = ["--model", "bert-10b", "--node", "p3dn"]
    for words in (
        ["export", str(checkpoint), str(tmp_path / "exported"), "--check"],
        ["import", str(tmp_path / "exported"), str(tmp_path / "imported")],
        ["train", file, "--dry-run"],
        ["plan", *plan, "--nodes", "2"],
        ["simulate", *plan, "--nodes", "2"],
        ["lab", "status"],
    ):
        seen, _ = watched([start_verb(words, environment())])
        assert seen == set(), words


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["doctor"],
        pytest.param(
            ["bench", "collectives", "--sizes", "64KiB", "--repeats", "1"], marks=pytest.mark.extra
        ),
    ],
    ids=["doctor", "bench"],
)
def test_ranks_of_a_launcher_listen_on_loopback_where_they_share_a_machine(
    words: list[str],
) -> None:
    port = free_port()
    of_all = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    of_all |= {"MASTER_ADDR": socket.gethostname()}
    ranks = [of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    seen, own = watched([start_verb(words, environment() | rank) for rank in ranks])
    assert {(one.kind, one.address) for one in seen} == {("tcp", "127.0.0.1")}, seen
    assert {one.pid for one in seen} == own, "Gloo of the two ranks"
    assert len({one.pid for one in seen if one.port == port}) == 1, "rank 0's store"


@needs_a_lab
@pytest.mark.slow
@pytest.mark.extra
def test_ranks_of_a_lab_listen_in_its_own_network_only(tmp_path: Path) -> None:
    lab = ["lab", "run", "--nodes", "2", "--gpus-per-node", "1", "--logs", str(tmp_path), "--"]
    seen, own = watched([start_verb([*lab, "mics", "doctor"], environment())])
    addresses = {one.pid: one.address for one in seen}
    assert {one.kind for one in seen} == {"tcp"}
    assert set(addresses.values()) == {"10.213.0.1", "10.213.0.2"}, seen
    assert len({one.pid for one in seen if one.port == 29511}) == 1, "rank 0's store"
    assert not own & set(addresses)


@pytest.mark.slow
def test_a_stranger_on_the_network_finds_nothing_to_connect_to(
    tmp_path: Path, corpus: Path
) -> None:
    if not outer_addresses():
        pytest.skip("this machine has no address but its own")
    # The attack is one: a store as torch opens it lets it in.
    torchs = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    assert attack(listeners(os.getpid()), tmp_path / "touched")
    assert torchs.check(["torch.rendezvous.mics"])
    words = ["train", str(configuration(tmp_path, corpus, steps=100_000))]
    process = start_verb(words, environment())
    try:
        wait_for_steps(tmp_path / "run", 2, process)
        seen = listeners(process.pid)
        assert seen
        assert attack(seen, tmp_path / "touched") == []
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert not (tmp_path / "touched").exists()


HEARS = """
import pickle, sys, traceback
words = {words}
def hear(event, arguments):
    if event == "pickle.find_class":
        print("UNPICKLED", arguments, "".join(traceback.format_stack()), file=sys.stderr)
sys.addaudithook(hear)
if words:
    from mics.__main__ import main
    sys.exit(main(words))
pickle.loads(pickle.dumps(hear))
"""


@pytest.mark.extra
@pytest.mark.slow
def test_no_rank_unpickles_anything(tmp_path: Path, corpus: Path) -> None:
    """Python tells of every class that a pickle asks for, whoever reads it."""
    file = str(configuration(tmp_path, corpus, steps=2))
    heard = []
    for words in ([], ["train", file], ["train", file, "--run.steps", "4"]):
        process = start(HEARS.format(words=words), environment())
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        heard.append("UNPICKLED" in err)
    assert heard == [True, False, False], "the hook is deaf, or a rank unpickles"


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def pickles(name: str) -> bool:
    """Whether a name is of something that reads pickles, or sends them: collectives of objects."""
    if name.split(".")[0] in PICKLES or name.endswith(("_object_list", "gather_object")):
        return True
    return "elastic" in name and not name.endswith("multiprocessing.errors")  # which writes JSON


def test_nothing_here_reads_a_pickle_or_sends_one() -> None:
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute):
                names = [node.attr]
            found += [f"{file.name}: {name}" for name in names if pickles(name)]
    assert found == []
