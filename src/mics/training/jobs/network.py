"""The network between nodes: what NCCL has to be told of it, and how a node is asked for it.

Only variables that their makers document, and that a job cannot do without, are set:

- FI_PROVIDER, FI_EFA_USE_HUGE_PAGE: "EFA Cheatsheet" of aws-ofi-nccl (doc/efa-env-var.md), and
  AWS' "Get started with EFA and NCCL". Since libfabric 1.18 and the plugin's 1.7 nothing else is
  needed. The first keeps libfabric from another provider, the second lets a process fork.
- NCCL_NET: NCCL's guide, "Environment Variables". With "IB" NCCL fails where it would take TCP.
- NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME are not set: mics chooses the interface towards rank 0,
  and says which.
"""

from __future__ import annotations

from mics.training.jobs.job import Job

_VARIABLES = {
    "efa": {"FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0"},
    "infiniband": {"NCCL_NET": "IB"},
    "ethernet": {},
}
_PLUGINS = ("libnccl-net-ofi.so", "libnccl-net.so")  # as aws-ofi-nccl is called, and as it was


def environment(job: Job) -> dict[str, str]:
    """The variables of every rank; none for one node, which needs no network."""
    of_network = dict(_VARIABLES[job.network]) if job.nodes > 1 else {}
    return of_network | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def probe(job: Job) -> list[str]:
    """Lines of a shell script that end with 1 on a node without that network.

    The kernel lists devices of InfiniBand and of EFA in one folder. NCCL takes TCP without a word
    where its plugin for EFA cannot be loaded, so it is loaded once as NCCL does.
    """
    if job.network == "ethernet" or job.nodes == 1:
        return []
    least = 1
    if job.network == "efa" and job.instance is not None:
        least = job.instance.efa
    lines = [
        "found=$(find /sys/class/infiniband -mindepth 1 2>/dev/null | wc -l)",
        f'if [ "$found" -lt {least} ]; then',
        f'    echo "$(hostname): $found network devices of {least}" >&2; exit 1',
        "fi",
    ]
    if job.network == "efa":
        lines += [
            "loaded=no",
            f"for plugin in {' '.join(_PLUGINS)}; do",
            "    if python3 -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' \"$plugin\" "
            "2>/dev/null; then loaded=yes; fi",
            "done",
            'if [ "$loaded" = no ]; then',
            '    echo "$(hostname): no aws-ofi-nccl, the plugin of NCCL for EFA: put its folder'
            ' (/opt/amazon/ofi-nccl/lib) into LD_LIBRARY_PATH" >&2; exit 1',
            "fi",
        ]
    return lines
