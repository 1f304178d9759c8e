"""The machine's `ip` and `tc`, and what they lack when a lab cannot be built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

from mics.errors import LabError

_PACKAGES = {
    "ip": "iproute2",
    "tc": "iproute2",
    "mount": "mount",
    "unshare": "util-linux",
    "hostname": "hostname",
}


def check_system() -> None:
    """Check that this machine can hold a lab.

    Raises:
        LabError: it is no Linux, or a program is missing; says how to get it.
    """
    if sys.platform != "linux":
        raise LabError(
            "A lab needs Linux: its nodes are network namespaces.",
            numbers=f"This is {sys.platform}.",
            write="mics lab inside a Linux virtual machine or a privileged container",
        )
    for program, package in _PACKAGES.items():
        if find_program(program) is None:
            raise LabError(
                f"The program {program!r} is missing.",
                write=f"apt-get install {package} (Debian; Fedora has tc in iproute-tc)",
            )


def find_program(name: str) -> str | None:
    """Find a program; system folders are searched even when PATH lacks them."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return shutil.which(name, path=path)


def call(*words: str) -> str:
    """Run a program and return what it printed.

    Raises:
        LabError: it failed; carries its own words.
    """
    program = find_program(words[0])
    if program is None:
        raise LabError(f"The program {words[0]!r} is missing.")
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(
            f"`{' '.join(words)}` failed.",
            numbers=(done.stderr or done.stdout).strip().replace("\n", " "),
            write="`mics lab clean` if an earlier lab left something behind",
        )
    return done.stdout


def call_json(*words: str) -> Any:
    """Run a program that prints JSON and return what it means."""
    return json.loads(call(*words) or "[]")
