"""Agents of ``mics run`` in one process: all that they decide, with pretended links and ranks.

Messages wait until they are delivered, ranks that were killed until they are reaped, and time
stands still unless it is moved. So a test can try any order of what may happen.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mics.agent import gathering, seeing, supervising, world
from mics.agent.links import Message, Refusal
from mics.agent.nursery import Process
from mics.agent.settings import Settings
from mics.agent.supervising import Supervisor
from mics.ranks.heartbeat import PAUSE, Heart


class Ranks:
    """Stands for a nursery: processes that are only written down."""

    def __init__(self, loop: object, command: list[str], owner: Supervisor) -> None:
        self._owner = owner
        self.is_ready = False
        self.running: list[Process] = []
        self.dying: list[Process] = []

    def open(self, *, warm: bool) -> None:
        self.is_ready = True
        self._owner.warmed({"threads": 1, "trouble": ""})

    def start_store(self, host: str) -> Process:
        return Process(0, "the store", None, 0.0, pid=1, report={"port": 1})

    def start_rank(self, local_rank: int, name: str, environment: dict[str, str]) -> Process:
        process = Process(0, name, local_rank, 0.0, pid=1, report={})
        process.report_environment = environment  # type: ignore[attr-defined]
        self.running.append(process)
        return process

    def kill(self, process: Process, number: int = 9) -> None:
        process.doomed = True
        if process in self.running and process not in self.dying:
            self.dying.append(process)

    def reap(self) -> None:
        """Let the killed ones be gone."""
        dying, self.dying = self.dying, []
        for process in dying:
            self.end(process, -9)

    def end(self, process: Process, status: int) -> None:
        process.status = status
        self.running.remove(process)
        self._owner.ended(process)

    def close(self) -> None:
        self.running = []


class Links:
    """Stands for the links of one agent."""

    def __init__(self, net: Net, index: int) -> None:
        self._net, self._index = net, index
        self.linked: list[int] = []

    def look(self) -> None: ...

    def close(self) -> None: ...

    def say(self, message: Message) -> None:
        for index in self.linked:
            self.send(index, message)

    def send(self, index: int, message: Message) -> None:
        if index in self.linked:
            self._net.waiting[self._index, index].append(json.dumps(message))


class Net:
    """Agents on nodes, each of which can be cut off, killed and started again.

    Args:
        folder: for their heartbeats.
        count: of nodes.
        patch: puts the pretended parts in the place of the real ones.
        options: of the agents, as in ``Settings``.
    """

    def __init__(self, folder: Path, count: int, patch: pytest.MonkeyPatch, **options: Any) -> None:
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        for module in (gathering, seeing, supervising, world):
            patch.setattr(module, "time", clock)
        patch.setattr(supervising, "Nursery", Ranks)
        patch.setattr("mics.agent.peers.Peers.listen", lambda peers: None)
        self._folder, self._options = folder, {"ranks_per_node": 2, **options}
        self.nodes = [f"node{index}:1" for index in range(count)]
        self.waiting: dict[tuple[int, int], deque[str]] = {
            (a, b): deque() for a in range(count) for b in range(count)
        }
        self.reachable = {(a, b) for a in range(count) for b in range(a)}
        self.agents: dict[int, Supervisor] = {}
        self.said: dict[int, list[str]] = {index: [] for index in range(count)}
        for index in range(count):
            self.start(index)

    def start(self, index: int, nodes: list[str] | None = None) -> None:
        """Start an agent, which is not linked yet."""
        agent = self.agents[index] = self._agent(index, nodes)
        agent._peers._links = Links(self, index)  # type: ignore[assignment]
        agent._voice.say = self.said[index].append  # type: ignore[method-assign]
        agent.open()

    def _agent(self, index: int, nodes: list[str] | None = None) -> Supervisor:
        nodes = [*(nodes or self.nodes)]
        settings = Settings(["x"], nodes=nodes, node_index=index, **self._options)
        return Supervisor(settings, self._folder / str(index))

    def hello_of(self, index: int, nodes: list[str]) -> Message:
        """What an agent would say that nobody knows."""
        return self._agent(index, nodes)._peers.hello()

    def kill(self, index: int) -> None:
        """Kill an agent, with its ranks."""
        agent = self.agents.pop(index)
        for other in [*links_of(agent).linked]:
            self._drop(index, other)
        if agent._world is not None:
            agent._world.close()

    def cut(self, *sides: list[int]) -> None:
        """Cut the network into sides, and heal it within each."""
        for a, b in self.reachable | {(a, b) for a in self.said for b in self.said if b < a}:
            if any(a in side and b in side for side in sides):
                self.reachable.add((a, b))
            else:
                self.unlink(a, b)

    def unlink(self, a: int, b: int) -> None:
        """Cut two nodes off from each other."""
        self.reachable.discard((max(a, b), min(a, b)))
        if a in self.agents and b in links_of(self.agents[a]).linked:
            self._drop(a, b)

    def link(self, a: int, b: int) -> None:
        """Let two agents find each other, if they can."""
        self.reachable.add((max(a, b), min(a, b)))
        caller, called = self.agents.get(max(a, b)), self.agents.get(min(a, b))
        if caller is None or called is None or min(a, b) in links_of(caller).linked:
            return
        hello = json.loads(json.dumps(caller._peers.hello()))
        refusal = called._peers.admit(hello)
        if refusal is None:
            answer = json.loads(json.dumps(called._peers.hello()))
            links_of(called).linked.append(max(a, b))
            called._peers.linked(max(a, b), hello)
            refusal = caller._peers.admit(answer)
            if refusal is None:
                links_of(caller).linked.append(min(a, b))
                caller._peers.linked(min(a, b), answer)
            else:
                self._drop(max(a, b), min(a, b))
        elif refusal.final:
            caller._peers.refused(min(a, b), Refusal(refusal.why, final=True))
        self.waiting[max(a, b), min(a, b)] = self.waiting[max(a, b), min(a, b)] or deque()

    def _drop(self, a: int, b: int) -> None:
        for one, other in ((a, b), (b, a)):
            self.waiting[one, other].clear()
        for one, other in ((a, b), (b, a)):
            agent = self.agents.get(one)
            if agent is not None and other in links_of(agent).linked:
                links_of(agent).linked.remove(other)
                if other in agent._members.others:
                    agent._peers.lost(other, "has closed the connection")

    def deliver(self, a: int, b: int) -> bool:
        """Deliver the next message from one agent to another; returns whether there was any."""
        agent = self.agents.get(b)
        if not self.waiting[a, b] or agent is None or agent.code is not None:
            return False
        agent._peers.heard(a, json.loads(self.waiting[a, b].popleft()))
        return True

    def look(self, index: int, seconds: float = 0.1) -> None:
        """Let time pass, and an agent see to what it does from time to time."""
        self.now += seconds
        agent = self.agents[index]
        if agent.code is None:
            agent._look()
            agent._beat()

    def settle(self, seconds: float = 0.0) -> None:
        """Let all that can happen happen, and time pass."""
        self.now += seconds
        for _ in range(30):
            for a, b in sorted(self.reachable):
                self.link(a, b)
            for index in [*self.agents]:
                self.ranks(index).reap()
                self.look(index, 0.01)
            while any(self.deliver(a, b) for a, b in self.waiting):
                pass
            for index, agent in [*self.agents.items()]:
                if agent.code is not None:
                    self.kill(index)

    def ranks(self, index: int) -> Ranks:
        """The ranks of a node."""
        nursery = self.agents[index]._nursery
        assert isinstance(nursery, Ranks)
        return nursery

    def step(self, step: int, partition: int = 2, *, waits: bool = False) -> None:
        """Let all ranks come to a step."""
        for index, agent in self.agents.items():
            for process in self.ranks(index).running:
                environment = process.report_environment  # type: ignore[attr-defined]
                heart = Heart(environment["MICS_HEARTBEAT"])
                heart.hold_in(partition)
                heart.at_step(step)
                if agent._gathering.pauses or heart._words[15]:
                    heart.enter(PAUSE)
                else:
                    heart.in_step(1, 1)

    def fail(self, index: int, step: int | None = None, status: int = 1) -> None:
        """Let the first rank of a node fail."""
        self.ranks(index).end(self.ranks(index).running[0], status)

    def last_words(self, index: int) -> str:
        return "\n".join(self.said[index][-6:])

    @property
    def going_on(self) -> list[str]:
        """The marks of generations that make steps: all of their ranks run."""
        found = []
        for agent in self.agents.values():
            record = agent._members.latest
            if record.mark == agent._members.mark and record.mark not in found:
                others = [self.agents.get(index) for index in record.agents]
                if all(
                    other is not None
                    and other._members.incarnation == record.agents[other._members.me]
                    and other._members.mark == record.mark
                    and len(self.ranks(other._members.me).running) == 2
                    for other in others
                ):
                    found.append(record.mark)
        return found

    def environments(self, index: int) -> list[dict[str, str]]:
        """What the ranks of a node were told."""
        return [
            process.report_environment  # type: ignore[attr-defined]
            for process in self.ranks(index).running
        ]

    @property
    def worlds(self) -> dict[int, list[int]]:
        """The ranks on each node."""
        return {
            index: [int(told["RANK"]) for told in self.environments(index)]
            for index in sorted(self.agents)
        }


def links_of(agent: Supervisor) -> Links:
    links = agent._peers._links
    assert isinstance(links, Links)
    return links
