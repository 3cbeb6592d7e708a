"""A simulated Ray cluster in a process of its own: `python simulated.py`, then a line a wish.

    add CPUS     one more node; prints its number
    kill NUMBER  that node is gone, as if its machine had lost power
    (end)        all of it is shut down

The first line printed is the cluster's address. Every node is a raylet on this machine.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on loopback alone

from ray.cluster_utils import Cluster

STORE = 80 << 20
# Ports that are given need no waiting: Ray grants an agent that chooses one 15 s to say which.
PORTS = (
    "metrics_agent_port",
    "metrics_export_port",
    "dashboard_agent_listen_port",
    "runtime_env_agent_port",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    cluster = Cluster()
    nodes = []

    def add(cpus: int) -> None:
        node = cluster.add_node(
            num_cpus=cpus,
            object_store_memory=STORE,
            plasma_directory=tempfile.gettempdir(),
            include_dashboard=False,
            node_ip_address="127.0.0.1",
            **{name: free_port() for name in PORTS},
        )
        nodes.append(node)

    add(1)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        wish, number = line.split()
        if wish == "add":
            add(int(number))
            print(len(nodes) - 1, flush=True)
        else:
            cluster.remove_node(nodes[int(number)], allow_graceful=False)
            print("killed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
