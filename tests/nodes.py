"""Two machines on this one: network namespaces that are joined by a virtual cable, each with its own process numbers.

Host name and files are the same in both, as in containers with a shared folder.
"""

import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


def _permitted():
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    name = f"hf-ft-{os.getpid()}"
    tried = ["ip", "netns", "add", name], ["ip", "netns", "exec", name, "unshare", "-pf", "--mount-proc", "true"]
    done = [subprocess.run(command, capture_output=True).returncode for command in tried]
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return done == [0, 0]


needs_nodes = pytest.mark.skipif(
    not os.environ.get("HF_FT_NODES") or not _permitted(),
    reason="two namespaces: set HF_FT_NODES=1, as root, with apt-get install iproute2 util-linux",
)


@dataclass(frozen=True)
class Node:
    """One of the machines."""

    name: str
    address: str
    interface: str

    def start(self, *command, **environment):
        """Start a program, as the second process in its namespace: the first cannot be killed from inside.

        Killing the returned process kills everything in the namespace. A killed program ends with status 137.
        """
        space = ["ip", "netns", "exec", self.name, "unshare", "-pf", "--kill-child", "--mount-proc"]
        inside = [*space, "sh", "-c", '"$@"; exit $?', "sh", *map(str, command)]
        return subprocess.Popen(
            inside,
            env={**os.environ, "GLOO_SOCKET_IFNAME": self.interface, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def two_nodes():
    ip, number = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True), os.getpid() % 100000
    nodes = [Node(f"hf-ft-{number}-{i}", f"10.213.7.{i + 1}", f"ft{number}{'ab'[i]}") for i in range(2)]
    try:
        for node in nodes:
            ip("netns", "add", node.name)
        ip("link", "add", nodes[0].interface, "type", "veth", "peer", "name", nodes[1].interface)
        for node in nodes:
            ip("link", "set", node.interface, "netns", node.name)
            ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.interface)
            for interface in (node.interface, "lo"):
                ip("-n", node.name, "link", "set", interface, "up")
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "delete", node.name], capture_output=True)
