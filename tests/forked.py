"""Python in separate processes that need not import torch again: they are forked from a server that has done so."""

import gc
import importlib
import logging
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.connection import arbitrary_address, wait
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api

_context = multiprocessing.get_context("forkserver")
# Only libraries: each process imports hf_ft itself.
LIBRARIES = ["torch._dynamo", "transformers.trainer", "datasets", "peft", "optuna", "sklearn.svm"]
_context.set_forkserver_preload(LIBRARIES)


def start():
    """Fork the server from this process, which needs the libraries too: a new process would have to import them again.

    To be called before anything of hf_ft is imported. Like `multiprocessing`'s start of its server, but without `exec`.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    if sys.version_info >= (3, 14) or forkserver._forkserver._forkserver_pid is not None:
        return  # in 3.14 the server also needs a key: `multiprocessing` starts it on demand
    address = arbitrary_address("AF_UNIX")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        os.chmod(address, 0o600)
        listener.listen()
        alive, held = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(held)
                forkserver.main(listener.detach(), alive, [])
            finally:
                os._exit(0)
    os.close(alive)
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, held, pid


def python(*arguments, ranks=1, cwd=None):
    """Run ``python ARGUMENTS`` (a script, ``-m`` or ``-c``), once for each rank if there are several.

    Returns:
        What `subprocess.run` returns; for several ranks, their joint output and the exit code of one that failed.
    """
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        folder = str(cwd or Path.cwd())
        started = [_context.Process(target=_work, args=(command, folder, told, out, err)) for told in _group(ranks)]
        for process in started:
            process.start()
        try:
            code = _join(started)
        finally:
            for process in started:
                process.kill()
                process.join()
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def _group(ranks):
    """The environment of each rank, with the variables that a launcher sets."""
    if ranks == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joint = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told = [{**joint, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{**os.environ, **{name: str(value) for name, value in one.items()}} for one in told]


def _join(processes):
    """The exit code once all have ended, or one has failed, for which the others would wait."""
    left = list(processes)
    while left:
        wait([process.sentinel for process in left])
        for process in [process for process in left if process.exitcode is not None]:
            if process.exitcode:
                return process.exitcode
            left.remove(process)
    return 0


def _read_environment():
    """Read again what `huggingface_hub` has read from the server's environment."""
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT


def _work(command, folder, environment, out, err):
    """Run in the new process."""
    gc.freeze()
    multiprocessing.set_start_method(None, force=True)  # processes that it starts do not belong to the server
    os.environ.clear()
    os.environ.update(environment)
    _read_environment()
    os.chdir(folder)
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    # Neither pytest's replacements for these, nor its handlers.
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    logging.getLogger().handlers.clear()
    first, *rest = command
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(first, run_name="__main__")
