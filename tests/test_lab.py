"""A cluster on this machine: links as slow as asked, nothing left behind, nobody else touched."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mics.__main__ import main
from mics.errors import LabError
from mics.lab import lifetime, network, relay, running, state, system, unprivileged
from mics.lab.comparing import scripts_of
from mics.lab.state import Lab
from mics.ranks.program import as_command

ROOT = Path(__file__).parents[1]


def can_build() -> str:
    """Why no lab can be built here; empty if one can."""
    try:
        system.check_system()
        system.call("ip", "netns", "add", "mics-probe-x")
        system.call("ip", "netns", "delete", "mics-probe-x")
    except LabError as error:
        return str(error).replace("\n", " ")
    return ""


WHY_NOT = can_build()
needs_a_lab = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "a lab can be built")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with lifetime.lab_for(Lab(state.new_name(), 2, 1, "100mbit")) as built:
        yield built


def of_lab(lab: Lab) -> list[str]:
    return [name for name in network.namespaces() if name.startswith(f"mics-{lab.name}-")]


def test_scripts_to_compare_have_their_arguments_behind_them() -> None:
    assert scripts_of(["a.py", "--x", "1", "b.py"]) == [("a.py", "--x", "1"), ("b.py",)]
    with pytest.raises(LabError, match="not two scripts"):
        scripts_of(["a.py", "--x"])


@pytest.mark.extra
@needs_a_lab
@pytest.mark.slow
def test_two_scripts_are_compared_on_the_same_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, file = str(ROOT / "tests" / "checked" / "hsdp.py"), tmp_path / "compared.json"
    shape = ["--nodes", "2", "--gpus-per-node", "2", "--link", "100mbit", "--steps", "3"]
    where = ["--logs", str(tmp_path / "logs"), "--json", str(file)]
    scripts = [script, "--way", "right", script, "--way", "every"]
    assert main(["lab", "compare", *shape, *where, *scripts]) == 0
    right, every = json.loads(file.read_text())
    assert len(right["seconds"]) == 3
    assert right["losses"] == pytest.approx(every["losses"], abs=1e-6)
    assert None not in right["losses"]
    # 50,568 bytes of hop 2 once and four times, and what TCP adds.
    assert 50_568 < right["bytes_sent"] < 1.5 * 50_568
    assert 3.5 < every["bytes_sent"] / right["bytes_sent"] < 4.5
    assert "largest difference to the first" in capsys.readouterr().out


# -- without a lab ---------------------------------------------------------------------------------


def test_rates_are_read_as_tc_does() -> None:
    assert network.bits_per_second("200mbit") == 2e8
    assert network.bits_per_second("1.5gbit") == 1.5e9
    assert network.bits_per_second("800kbit") == 8e5


@pytest.mark.parametrize("rate", ["fast", "0mbit", "200", "mbit", "-1mbit"])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(LabError, match="is no rate of a link"):
        network.bits_per_second(rate)


@pytest.mark.parametrize(
    ("lab", "words"),
    [
        (Lab("a-b", 2, 2, "1mbit"), "cannot be called 'a-b'"),
        (Lab("waytoolong", 2, 2, "1mbit"), "cannot be called"),
        (Lab("a", 0, 2, "1mbit"), "cannot have 0 nodes"),
        (Lab("a", 2, 0, "1mbit"), "cannot have 0 gpus-per-node"),
        (Lab("a", 2, 2, "slow"), "is no rate"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_before_anything_is_built(lab: Lab, words: str) -> None:
    with pytest.raises(LabError, match=words):
        lifetime._check(lab)


def test_what_is_missing_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "find_program", lambda name: None)
    with pytest.raises(LabError, match="'ip' is missing") as caught:
        system.check_system()
    assert "apt-get install iproute2" in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(LabError, match="A lab needs Linux"):
        system.check_system()


def test_a_command_is_a_script_a_module_a_verb_or_any_program() -> None:
    take, python = as_command, sys.executable
    assert take(["a.py", "--x"]) == [python, "a.py", "--x"]
    assert take(["python", "a.py"]) == [python, "a.py"]
    assert take(["mics", "train", "c.toml"]) == [python, "-m", "mics", "train", "c.toml"]
    assert take(["-m", "pkg"]) == [python, "-m", "pkg"]
    assert take(["./program", "1"]) == ["./program", "1"]


def test_lab_run_without_a_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "run"]) == 2
    assert "no command; write it after `--`" in capsys.readouterr().err


# -- a lab -----------------------------------------------------------------------------------------


@needs_a_lab
def test_a_link_is_as_slow_as_asked_in_both_directions(lab: Lab) -> None:
    """2.5 MB take at least 0.2 s at 100 Mbit/s, and the kernel counts them and their headers."""
    receive = (
        "import socket; s = socket.create_server(('', 5000)); print('ready', flush=True)\n"
        "c, _ = s.accept()\nwhile c.recv(1 << 20): pass\nc.sendall(bytes(2_500_000)); c.close()"
    )
    send = (
        "import socket, time; s = socket.create_connection(('node0', 5000)); t = time.time()\n"
        "s.sendall(bytes(2_500_000)); s.shutdown(1)\nn = 0\n"
        "while d := s.recv(1 << 20): n += len(d)\nprint(n, time.time() - t)"
    )
    before = network.traffic(lab)
    server = subprocess.Popen(
        running.in_node(lab, 0, [sys.executable, "-c", receive]), stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    sent = subprocess.run(
        running.in_node(lab, 1, [sys.executable, "-c", send]),
        capture_output=True,
        text=True,
        check=True,
    )
    server.communicate()
    received, seconds = sent.stdout.split()
    assert int(received) == 2_500_000
    assert float(seconds) > 0.35, "there is no link of 100 Mbit/s here"
    for node, earlier in zip(network.traffic(lab), before, strict=True):
        counted = node - earlier
        assert 2_500_000 < counted.sent < 1.06 * 2_500_000 + 60_000
        assert 2_500_000 < counted.received < 1.06 * 2_500_000 + 60_000


JOB = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
dist.init_process_group("gloo", timeout=timedelta(seconds=8))
try:
    x = torch.ones(250_000)
    for step in range(int(sys.argv[1])):
        dist.all_reduce(x)
        if dist.get_rank() == 0:
            print("step", step, flush=True)
    if len(sys.argv) > 2 and dist.get_rank() == 1:
        raise ValueError("rank one broke")
    dist.barrier()
finally:  # closes its connections, which the other rank hears of, before its words are written
    if len(sys.argv) < 4:
        dist.destroy_process_group()
"""


@pytest.fixture
def job(tmp_path: Path) -> str:
    (tmp_path / "job.py").write_text(JOB)
    return str(tmp_path / "job.py")


@needs_a_lab
@pytest.mark.slow
def test_a_job_runs_on_every_node_and_its_bytes_are_counted(
    job: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["lab", "run", "--nodes", "2", "--gpus-per-node", "1", "--link", "400mbit"]
    words += ["--logs", str(tmp_path / "logs"), "--", job, "10"]
    assert main(words) == 0
    out = capfd.readouterr().out
    assert "step 9" in out
    sent = [int(n.replace(",", "")) for n in re.findall(r"sent +([\d,]+) bytes", out)]
    assert len(sent) == 2
    for node in sent:  # a ring over two ranks: each sends the message once
        assert 10_000_000 < node < 1.06 * 10_000_000 + 200_000


@needs_a_lab
@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["stay"]], ids=["closes", "stays"])
def test_the_first_failing_ranks_own_traceback_is_returned(
    job: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], more: list[str]
) -> None:
    words = ["lab", "run", "--gpus-per-node", "1", "--logs", str(tmp_path / "logs"), "--"]
    assert main([*words, job, "1", "break", *more]) == 1
    err = capfd.readouterr().err
    assert "rank 1:" in err
    assert err.rstrip().endswith("ValueError: rank one broke")
    assert not [lab for lab in state.noted() if lab.owner == os.getpid()]


@needs_a_lab
@pytest.mark.slow
def test_a_rank_that_was_killed_is_named_and_not_those_that_lost_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        "if dist.get_rank() == 1:\n"
        "    os.kill(os.getpid(), 9)\n"
        "dist.barrier()\n"
    )
    words = ["lab", "run", "--gpus-per-node", "1", "--logs", str(tmp_path / "logs"), "--"]
    assert main([*words, str(script)]) == 137
    assert "rank 1 ended with exit code -9 and said nothing" in capfd.readouterr().err


@needs_a_lab
@pytest.mark.slow
def test_a_second_run_of_a_name_says_its_own_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["lab", "run", "--gpus-per-node", "1", "--name", state.new_name()]
    words += ["--logs", str(tmp_path / "logs"), "--"]
    for which in ("first", "second"):
        script = tmp_path / f"{which}.py"
        script.write_text(f"raise RuntimeError('this is the {which}')\n")
        assert main([*words, str(script)]) == 1
        assert f"RuntimeError: this is the {which}" in capfd.readouterr().err


@needs_a_lab
@pytest.mark.extra
def test_what_a_verb_says_on_its_ranks_is_the_labs_last_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["lab", "run", "--gpus-per-node", "1", "--logs", str(tmp_path / "logs"), "--"]
    assert main([*words, "mics", "bench", "collectives", "--sizes", "0KiB"]) == 1
    assert capfd.readouterr().err.rstrip().endswith("\nmics bench: '0KiB' is no size.")


@needs_a_lab
@pytest.mark.extra
def test_a_cut_cable_is_an_error_on_every_rank_within_the_timeout(
    lab: Lab, job: str, tmp_path: Path
) -> None:
    import threading

    class Cutter:
        """Cuts the cable when the third step is on the screen."""

        def write(self, text: str) -> None:
            if "step 3" in text:
                network.set_link(lab, 1, up=False)
                assert not network.link_is_up(lab, 1)

        def flush(self) -> None: ...

    done: list[running.Finished] = []
    start = time.monotonic()
    thread = threading.Thread(
        target=lambda: done.append(
            running.run(lab, [job, "100000"], tmp_path / "logs", screen=Cutter())  # type: ignore[arg-type]
        )
    )
    thread.start()
    thread.join(timeout=120)
    assert done, "the job hangs"
    assert done[0].code == 1
    assert time.monotonic() - start < 110
    for log in sorted((tmp_path / "logs").rglob("stderr.log")):
        assert re.search(r"Timed out|Connection closed|RuntimeError", log.read_text()), log
    network.set_link(lab, 1, up=True)
    assert network.link_is_up(lab, 1)


@needs_a_lab
def test_a_lab_that_is_up_is_shown_used_and_taken_down(capfd: pytest.CaptureFixture[str]) -> None:
    name = state.new_name()
    assert main(["lab", "up", "--nodes", "3", "--name", name]) == 0
    try:
        assert main(["lab", "up", "--name", name]) == 1
        assert f"There is a lab '{name}' already" in capfd.readouterr().err
        command = [sys.executable, "-m", "mics", "lab", "exec", "node2", "--lab", name, "--"]
        text = subprocess.check_output(
            [*command, "sh", "-c", "hostname; cat /etc/hosts"], text=True
        )
        assert text.startswith("node2\n") and "10.213.0.1 node0" in text
        told = "import os, signal; print('up', flush=True); signal.pause()"
        with subprocess.Popen([*command, "python", "-c", told], stdout=subprocess.PIPE) as program:
            assert program.stdout is not None and program.stdout.readline() == b"up\n"
            program.terminate()
        assert program.returncode == -signal.SIGTERM
        assert not network.processes(f"mics-{name}-node2")
        assert main(["lab", "exec", "node2", "--lab", name]) == 2
        assert "no command" in capfd.readouterr().err
        assert main(["lab", "cut", "node1", "--lab", name]) == 0
        assert main(["lab", "status"]) == 0
        shown = capfd.readouterr().out
        assert f"lab {name}: 3 nodes x 2 ranks, 200mbit" in shown
        assert len(re.findall("CABLE CUT", shown)) == 1
        assert main(["lab", "restore", "node1", "--lab", name]) == 0
        in_use = running.in_node(state.find(name).lab, 2, ["sleep", "100"])
        with subprocess.Popen(in_use) as user:
            while Path(f"/proc/{user.pid}/comm").read_text() != "sleep\n":
                time.sleep(0.05)
            with pytest.raises(LabError, match=f"Lab {name} is in use") as caught:
                lifetime.check_unused(state.find(name).lab)
            assert f"In its nodes run the processes {user.pid}." in str(caught.value)
            assert f"Write: mics lab down {name}, which ends them" in str(caught.value)
            user.kill()
        assert main(["lab", "cut", "node7", "--lab", name]) == 1
        assert f"Lab {name} has no node 'node7'" in capfd.readouterr().err
    finally:
        assert main(["lab", "down", name]) == 0
    assert not of_lab(Lab(name, 3, 2, ""))
    assert main(["lab", "down", name]) == 1
    assert f"There is no lab '{name}'" in capfd.readouterr().err


HOLD = """
import sys, time
from mics.lab import lifetime
from mics.lab.state import Lab
from mics.ranks.program import as_command
print("begins", flush=True)
with lifetime.lab_for(Lab(sys.argv[1], 3, 1, "100mbit")):
    print("up", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@needs_a_lab
@pytest.mark.extra
def test_of_20_labs_5_of_them_killed_nothing_is_left_and_nothing_else_touched() -> None:
    system.call("ip", "netns", "add", "somebody-elses")
    try:
        before = set(network.namespaces())
        with lifetime.lab_for(Lab("standing", 2, 1, "100mbit")) as other:
            for number in range(20):
                killed = number % 4 == 0
                process = subprocess.Popen(
                    [sys.executable, "-c", HOLD, f"x{number}", "60" if killed else "0"],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
                )
                assert process.stdout is not None
                assert process.stdout.readline() == "begins\n"
                if killed:
                    time.sleep(0.03 * number)  # while it is built, or once it is up
                    process.kill()
                process.communicate(timeout=60)
                assert killed or process.returncode == 0
            assert main(["lab", "clean"]) == 0
            assert set(network.namespaces()) - before == set(other.namespaces)
        assert set(network.namespaces()) == before
        assert not list(state.folder().glob("x*"))
        assert not [one for one in state.noted() if one.lab.name.startswith("x")]
    finally:
        system.call("ip", "netns", "delete", "somebody-elses")


@needs_a_lab
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_the_lab_down(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, "term", "60"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["begins\n", "up\n"]
    process.send_signal(number)
    process.communicate(timeout=60)
    assert not of_lab(Lab("term", 3, 1, ""))


def test_a_lab_that_begins_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(state.FOLDER, str(tmp_path))
    lab = Lab("begins", 2, 1, "1gbit")
    with state.note(lab):
        (one,) = state.noted()
        assert one.alive
        with pytest.raises(LabError, match="There is a lab 'begins' already"):
            state.note(lab)
        assert [path.name for path in tmp_path.iterdir()] == ["begins.json"]
    (one,) = state.noted()
    assert not one.alive  # its owner lets go without having kept it
    state.keep(lab)
    (one,) = state.noted()
    assert one.alive
    state.forget(lab)
    assert state.noted() == []


def test_a_lab_of_a_run_is_not_taken_down_by_one_who_does_not_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(state.FOLDER, str(tmp_path))
    with state.note(Lab("anrun", 2, 1, "1gbit")):
        with pytest.raises(LabError, match="belong to runs, and go down with them") as caught:
            state.find_left_up(None)
        assert f"In use: anrun by process {os.getpid()}." in str(caught.value)
        assert "Write: mics lab down anrun, which ends that run" in str(caught.value)
        assert state.find_left_up("anrun").lab.name == "anrun"
        with state.note(Lab("left", 2, 1, "1gbit")):
            state.keep(Lab("left", 2, 1, "1gbit"))
        assert state.find_left_up(None).lab.name == "left"
        with state.note(Lab("right", 2, 1, "1gbit")):
            state.keep(Lab("right", 2, 1, "1gbit"))
        with pytest.raises(LabError, match="There are 3 labs"):
            state.find_left_up(None)


def test_notes_of_an_ordinary_user_are_not_in_the_public_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(state.FOLDER, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    assert state.folder().parent == tmp_path / "home" / ".cache"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    assert state.folder().parent == tmp_path / "runtime"


def test_a_holder_whose_number_is_anothers_now_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(state.FOLDER, str(tmp_path))
    with state.note(Lab("held", 2, 1, "1gbit"), holder=os.getpid()):
        pass
    (one,) = state.noted()
    assert one.alive
    path = tmp_path / "held.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"began": "1"}))
    (one,) = state.noted()
    assert not one.alive


def test_only_namespaces_of_the_form_of_ours_are_ours() -> None:
    assert network.lab_of("mics-a1-switch") == network.lab_of("mics-a1-node12") == "a1"
    for name in ("mics-a1", "mics-a1-net", "mics-a1-node", "x-mics-a1-node1", "mics-A-node1"):
        assert network.lab_of(name) is None


# -- latency ---------------------------------------------------------------------------------------


def test_latencies_are_read_and_what_is_none_is_refused() -> None:
    assert network.milliseconds("0.5ms") == 0.5
    assert network.milliseconds("0ms") == 0
    for text in ("5", "-1ms", "1s", "ms"):
        with pytest.raises(LabError, match="is no latency"):
            network.milliseconds(text)


def test_a_frame_is_delivered_when_it_is_due_and_in_order() -> None:
    near, far = os.pipe2(os.O_NONBLOCK), os.pipe2(os.O_NONBLOCK)
    direction = relay.Direction(near[0], far[1], latency=2.0)
    os.write(near[1], b"first")
    direction.take(now=10.0)
    os.write(near[1], b"second")
    direction.take(now=11.0)
    assert direction.deliver(now=11.9) == 12.0
    assert direction.deliver(now=12.0) == 13.0
    assert os.read(far[0], 100) == b"first"
    assert direction.deliver(now=14.0) is None
    assert os.read(far[0], 100) == b"second"
    os.close(far[0])
    direction.take(now=20.0)
    os.write(near[1], b"lost")
    direction.take(now=20.0)
    assert direction.deliver(now=30.0) is None  # nobody is there: lost without a word
    for descriptor in (*near, far[1]):
        os.close(descriptor)


ECHO = """
import os, socket, time
if os.environ["RANK"] == "0":
    server = socket.create_server(("", 5001))
    connection, _ = server.accept()
    while data := connection.recv(1 << 16):
        connection.sendall(data)
else:
    while True:
        try:
            connection = socket.create_connection(("node0", 5001))
            break
        except OSError:
            time.sleep(0.1)
    for _ in range(5):
        start = time.perf_counter()
        connection.sendall(b"x")
        connection.recv(1)
        print("took", time.perf_counter() - start, flush=True)
    connection.sendall(bytes(500_000))
    left = 500_000
    while left:
        left -= len(connection.recv(1 << 16))
    print("all came back", flush=True)
"""


@needs_a_lab
def test_a_round_trip_takes_four_latencies_at_least(tmp_path: Path) -> None:
    """From the node to the switch, to the other node, and back."""
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    with lifetime.lab_for(Lab(state.new_name(), 2, 1, "100mbit", latency_ms=5.0)) as lab:
        done = running.run(lab, [str(script)], tmp_path / "logs", screen=io.StringIO())
    assert done.code == 0, done.words
    log = (tmp_path / "logs" / "node1" / "0" / "stdout.log").read_text()
    took = [float(words) for words in re.findall(r"took ([\d.]+)", log)]
    assert len(took) == 5
    assert min(took) >= 0.020
    assert "all came back" in log
    assert not of_lab(lab)


# -- an ordinary user ------------------------------------------------------------------------------

USER = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
IS_ROOT_THERE = [*USER, "unshare", "--user", "--map-root-user", "--net", "--mount", "true"]
needs_user_namespaces = pytest.mark.skipif(
    bool(WHY_NOT)
    or subprocess.run(IS_ROOT_THERE, capture_output=True, check=False).returncode != 0,
    reason="the kernel lets no user make namespaces of their own",
)


def as_user(folder: Path, script: str) -> str:
    """Run a shell script as somebody who is not root; ``$MICS`` is the command."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HOME": str(folder),
        "XDG_RUNTIME_DIR": "",
        "MICS": f"{sys.executable} -m mics",
    }
    done = subprocess.run(
        [*USER, "sh", "-ec", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_user_namespaces
def test_an_ordinary_user_runs_a_job(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import os, socket\n"
        "print('rank', os.environ['RANK'], socket.gethostbyname('node1'), flush=True)\n"
    )
    before = set(network.namespaces())
    text = as_user(tmp_path, "$MICS lab run --nodes 2 --gpus-per-node 1 -- job.py")
    assert "rank 0 10.213.0.2" in text
    assert "node1  sent" in text
    assert set(network.namespaces()) == before


@needs_user_namespaces
def test_an_ordinary_users_lab_stays_up_and_goes_down(tmp_path: Path) -> None:
    text = as_user(
        tmp_path,
        "$MICS lab up --nodes 2 --name user\n"
        "$MICS lab status\n"
        "$MICS lab exec node0 -- ip address\n"
        "$MICS lab cut node1\n"
        "$MICS lab status\n"
        "$MICS lab down\n"
        "$MICS lab status\n"
        "$MICS lab clean\n",
    )
    up, shown, address, cut, shown_again, *rest = re.split(
        r"(?=lab user: 2 nodes x)|(?=1: lo)|(?=lab user: the cable)|(?=lab user is)", text
    )
    assert "mics lab down user" in up
    assert "node1  10.213.0.2" in shown and "CABLE CUT" not in shown
    assert "10.213.0.1/24" in address
    assert "node1 is cut" in cut
    assert "CABLE CUT" in shown_again
    assert rest == ["lab user is down\nno lab is up\nnothing was left behind\n"]


@needs_user_namespaces
@pytest.mark.parametrize(
    ("cleaner", "says"),
    [("clean", "removed: dies\n"), ("run --nodes 1 --gpus-per-node 1 -- true > /dev/null", "")],
    ids=["clean", "the next run"],
)
@pytest.mark.extra
def test_what_a_killed_job_of_an_ordinary_user_leaves_is_cleaned(
    cleaner: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text(
        "import os, time\nopen(os.environ['RANK'], 'w').write(str(os.getpid()))\ntime.sleep(100)\n"
    )
    text = as_user(
        tmp_path,
        "$MICS lab run --nodes 2 --gpus-per-node 1 --name dies -- job.py &\n"
        "while [ ! -s 0 ] || [ ! -s 1 ]; do sleep 0.1; done\n"
        "kill -9 $!\n"
        "kill -0 $(cat 0) && kill -0 $(cat 1) && echo alive\n"
        f"$MICS lab {cleaner}\n"
        "while kill -0 $(cat 0) || kill -0 $(cat 1); do sleep 0.1; done\n",
    )
    assert text.endswith(f"alive\n{says}")


def test_a_user_who_may_make_no_namespaces_is_told_which_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("unshare", "nsenter"):
        (tmp_path / program).write_text("#!/bin/sh\necho not allowed >&2\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    switch = tmp_path / "switch"
    switch.write_text("0\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(LabError, match=r"user namespace(.|\n)*sudo mics lab"):
        unprivileged.check_user()
    monkeypatch.setattr(unprivileged, "_SWITCHES", {str(switch): ("0", "sysctl -w it=1")})
    with pytest.raises(LabError, match=r"switch is 0 \(sysctl -w it=1\)"):
        unprivileged.check_user()


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match=r"'unshare' is missing(.|\n)*util-linux"):
        unprivileged.check_user()


# -- the measurements ------------------------------------------------------------------------------


def measured(script: str, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "MICS_BENCH_ENVIRONMENTS": "nowhere"},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_a_lab
@pytest.mark.extra
def test_the_kernel_counts_what_the_ledger_counts_and_headers(tmp_path: Path) -> None:
    """Partitions inside a node, over 2 and over 4 nodes, flat and in two stages."""
    out = tmp_path / "bytes.json"
    measured("lab_bytes.py", "--repeats", "1", "--out", str(out))
    found = json.loads(out.read_text())
    rows = [row for node in found["nodes"] for row in node]
    layouts = {(row["partition"], row["form"]) for row in rows}
    assert {(2, "flat"), (4, "flat"), (4, "hierarchical"), (8, "hierarchical")} <= layouts
    for row in rows:
        assert 1 <= row["kernel_over_ledger"]["median"] <= 1.06, row
    for one in found["all-gather"]:
        expected = one["(p - k) / (p - 1)"]
        assert abs(one["hierarchical over flat"] / expected - 1) <= 0.05, one


@needs_a_lab
@pytest.mark.extra
def test_a_slow_rank_and_a_slow_link_of_a_lab_are_named_and_else_nobody(tmp_path: Path) -> None:
    measured("stragglers.py", "--count", "1", "--folder", str(tmp_path))
    (job,) = json.loads((tmp_path / "stragglers.json").read_text())["jobs"]
    assert {name: part["right"] for name, part in job["parts"].items()} == {
        "nothing": True,
        "rank": True,
        "link": True,
    }


@needs_a_lab
@pytest.mark.extra
def test_the_readmes_measurements_of_slow_links_run(tmp_path: Path) -> None:
    """Small: tiny models, one step, 2 nodes."""
    measured("slow_links.py", "--small", "--folder", str(tmp_path))
    written = {file.stem for file in tmp_path.glob("*.json")}
    assert {"collectives", "lab_inside", "lab_spanning", "lab_bert", "lab_dilated_p4d"} <= written
    for file in tmp_path.glob("lab_*.json"):
        assert json.loads(file.read_text())["losses agree"]
        assert file.with_suffix(".png").is_file()
