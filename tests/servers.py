"""Storage servers on this machine: PostgreSQL in its own folder, and Optuna's gRPC server."""

import importlib.util
import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PASSWORD = "pässwörd:/@%{1}"  # whatever has a special meaning in a URL, in str.format or in SQL
INSTALL_SERVER = "apt-get install postgresql"
INSTALL_DRIVER = "pip install 'hf-ft[postgresql]'"
INSTALL_GRPC = "pip install 'hf-ft[grpc]'"


def _program(name):
    """Debian's programs are not on the PATH."""
    found = shutil.which(name) or next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))[-1:]), None)
    return found and str(Path(found).resolve())


def drivers():
    return [name for name in ("psycopg2", "psycopg") if importlib.util.find_spec(name) is not None]


needs_postgresql = pytest.mark.skipif(
    _program("pg_ctl") is None or not drivers(), reason=f"needs PostgreSQL: {INSTALL_SERVER}; {INSTALL_DRIVER}"
)
needs_grpc = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("grpc", "google.protobuf"))
    if importlib.util.find_spec("google") is not None
    else True,
    reason=f"needs gRPC: {INSTALL_GRPC}",
)


def free_port(host="127.0.0.1"):
    with socket.socket() as free:
        free.bind((host, 0))
        return free.getsockname()[1]


@dataclass
class PostgreSQL:
    """A server that has a database for every requested name."""

    folder: Path
    host: str
    port: int
    user: str | None
    inside: tuple[str, ...] = ()  # a command that runs another command in a namespace

    def run(self, *command):
        if self.inside:
            command = (*self.inside, "runuser", "-u", self.user, "--", *command)
        user = None if self.inside else self.user
        done = subprocess.run(command, user=user, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        # Nothing has to survive a power failure.
        options = f"-c listen_addresses={self.host} -p {self.port} -k {self.folder} -c fsync=off"
        log = self.folder / "server.log"
        self.run(_program("pg_ctl"), "-w", "-D", self.folder / "data", "-l", log, "-o", options, "start")

    def stop(self):
        self.run(_program("pg_ctl"), "-w", "-D", self.folder / "data", "-m", "immediate", "stop")

    def url(self, database="postgres", password=PASSWORD, driver=""):
        from sqlalchemy.engine import URL

        kind = f"postgresql+{driver}" if driver else "postgresql"
        address = URL.create(kind, "worker", password, self.host, self.port, database)
        return address.render_as_string(hide_password=False)

    def execute(self, statement):
        import sqlalchemy

        engine = sqlalchemy.create_engine(self.url(driver=drivers()[0]), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)
        engine.dispose()


@contextmanager
def postgresql(host="127.0.0.1", inside=()):
    """Run PostgreSQL, which refuses to run as root: then it runs as another user, in a folder owned by that user.

    Args:
        inside: a command that runs another command on the host where the server should run.
    """
    user = None
    if os.geteuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
    folder = Path(tempfile.mkdtemp(prefix="hf-ft-"))  # below pytest's folders, which belong to this user
    server = PostgreSQL(folder, host, 5432 if inside else free_port(), user, tuple(inside))
    try:
        secret = folder / "password"
        secret.write_text(PASSWORD, encoding="utf-8")
        if user is not None:
            for path in (folder, secret):
                shutil.chown(path, user)
        server.run(
            _program("initdb"), "-D", folder / "data", "-U", "worker", "--pwfile", secret, "--auth", "scram-sha-256",
            "--encoding", "UTF8", "--locale", "C", "--no-sync",
        )  # fmt: skip
        if inside:
            with open(folder / "data" / "pg_hba.conf", "a") as access:
                access.write("host all all samenet scram-sha-256\n")
        server.start()
        yield server
        if (folder / "data" / "postmaster.pid").exists():
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(storage, host, port):
    from optuna.storages import run_grpc_proxy_server

    from hf_ft.search.storage import open_storage

    run_grpc_proxy_server(open_storage(storage), host=host, port=port)


@dataclass
class GRPC:
    """Optuna's server in front of a storage."""

    storage: str
    host: str
    port: int

    def start(self):
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(self.storage, self.host, self.port), daemon=True
        )
        self._process.start()

    def stop(self):
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()

    @property
    def url(self):
        return f"grpc://{self.host}:{self.port}"


@contextmanager
def grpc_server(storage, host="127.0.0.1"):
    server = GRPC(storage, host, free_port(host))
    server.start()
    try:
        yield server
    finally:
        if server._process.is_alive():
            server.stop()
