"""An in-memory Hub on the loopback interface, with faults on request.

For a new process, set ``HF_ENDPOINT`` to `Hub.endpoint`, and ``HF_HUB_DISABLE_XET`` so that large files use LFS:
`Hub.environment` has both.
"""

import contextlib
import importlib
import os
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api
import transformers.utils.hub

from hf_ft.models import sharing
from tests.hub_api import TOKEN, Handler, Repo


@dataclass
class Fault:
    """The response to matching requests, by method, path and the beginning of the body, this many times."""

    pattern: str
    status: int | None
    delay: float
    times: float


class Hub:
    """The server, running in a thread of this process; a context manager.

    Attributes:
        repos: by id.
        requests: everything received.
    """

    def __init__(self):
        self.repos, self.objects, self.requests, self.faults = {}, {}, [], []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """The environment variables with which a process uses this Hub and nothing else."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
        return own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    @contextlib.contextmanager
    def fails(self, pattern, status=None, delay=0.0, times=float("inf")):
        """Within this context, respond with this status after a delay; without both, drop the connection."""
        fault = Fault(pattern, status, delay, times)
        self.faults.append(fault)
        try:
            yield
        finally:
            self.faults.remove(fault)

    @contextlib.contextmanager
    def used_here(self, home):
        """Within this context, this process uses this Hub, as if started with its environment."""
        before = dict(os.environ)
        os.environ.update(self.environment(home))
        _read_environment()
        try:
            yield
        finally:
            for name in set(os.environ) - set(before):
                del os.environ[name]
            os.environ.update(before)
            _read_environment()

    def add(self, repo, folder):
        """Add a repository with the files of a folder."""
        self.repos[repo] = Repo()
        self.repos[repo].commit("all", {file.name: file.read_bytes() for file in Path(folder).iterdir()})

    def files(self, repo, revision="main"):
        """The files of a repository at a revision, by path."""
        return self.repos[repo].at(revision)[1]

    def messages(self, repo):
        """The messages of its commits, oldest first."""
        return [message for _, message, _ in self.repos[repo].commits]


def _read_environment():
    """Read again what `huggingface_hub` reads on import, and discard the clients that use it."""
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
    transformers.utils.hub._hf_api = None
    sharing._api.cache_clear()
