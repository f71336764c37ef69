"""Open an Optuna storage that several processes share: a database, a journal, a server or memory."""

from __future__ import annotations

import importlib.util
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ft.errors import Error, OptionError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import URL, Engine

MISSING = "Trials need Optuna: pip install 'hf-ft[search]'"
JOURNAL, GRPC = "journal:///", "grpc://"
ATTEMPTS = 8  # to open a database while other processes create its tables
LOCK_TIMEOUT = 60.0  # seconds to wait for another process that has locked an SQLite file
ANSWER_TIMEOUT = 30  # seconds to wait for a server's answer to a connection
KINDS = (
    "a path *.db, *.sqlite3 or *.log, or a URL such as sqlite:///study.db, postgresql://user@host/database, "
    "mysql+pymysql://user@host/database, grpc://host:13000"
)
# Detects a connection that is lost silently.
LIBPQ = {"connect_timeout": str(ANSWER_TIMEOUT), "keepalives_idle": str(ANSWER_TIMEOUT)}


class UnavailableError(OptionError):
    """The storage does not answer, though it was opened: nothing can be stored, not even a failure."""


class GoneError(UnavailableError):
    """The server of a storage can no longer be reached."""

    def __init__(self, storage: str, reason: object) -> None:
        super().__init__(
            f"storage={storage!r} can no longer be reached: {_first_line(reason)}. Restart its server and run the "
            "same command again: finished trials are kept."
        )


class LockedError(UnavailableError):
    """An SQLite file stays locked by another process."""

    def __init__(self, storage: str) -> None:
        super().__init__(
            f"storage={storage!r} is held by another process, which has locked it for more than {LOCK_TIMEOUT:g} s. "
            "Wait until that process is done, end it if it hangs, or give another storage; finished trials are kept."
        )


def open_storage(storage: str | BaseStorage | None) -> BaseStorage:
    """Open a storage that several processes may write to.

    Args:
        storage: a path, a URL, None for memory, or an open storage; see :func:`hf_ft.search.trials.run_trials`.

    Raises:
        OptionError: if it cannot be opened; the message names the storage, the reason and the fix.
        ImportError: if Optuna is not installed.
    """
    try:
        from optuna.storages import InMemoryStorage
    except ImportError as error:
        raise ImportError(MISSING) from error
    if storage is None:
        return InMemoryStorage()
    if not isinstance(storage, str):
        return storage
    if storage.startswith(GRPC):
        return _open_proxy(storage)
    if storage.startswith(JOURNAL) or ("://" not in storage and storage.endswith(".log")):
        return _open_journal(storage.removeprefix(JOURNAL))
    if "://" in storage:
        return _open_database(storage, storage)
    if Path(storage).suffix not in (".db", ".sqlite3"):
        raise OptionError(f"storage={_hidden(storage)!r} is of an unknown kind. Give {KINDS}.")
    return _open_database(f"sqlite:///{storage}", storage)


def _open_proxy(url: str) -> BaseStorage:
    """Connect to Optuna's gRPC server, which needs no password and hides the storage behind it."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import GrpcStorageProxy

    match = re.fullmatch(r"grpc://([^/@:]+|\[[^/@]+\]):(\d+)/?", url)
    if match is None:
        raise OptionError(f"storage={_hidden(url)!r} lacks a host or port, or contains more. Give grpc://host:13000.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            proxy = GrpcStorageProxy(host=match[1], port=int(match[2]))
    except Exception as error:  # a different one for each library that is missing or too old
        reason = _first_line(error)
        raise OptionError(f"storage={url!r} needs gRPC ({reason}). Install it: pip install 'hf-ft[grpc]'.") from error
    try:
        proxy.wait_server_ready(timeout=ANSWER_TIMEOUT)
    except ConnectionError as error:
        raise OptionError(
            f"storage={url!r}: no gRPC server answered there within {ANSWER_TIMEOUT} s. Start one with "
            "optuna.storages.run_grpc_proxy_server, or give its host and port."
        ) from error
    proxy.url = url  # type: ignore[attr-defined]
    return proxy


def _open_journal(path: str) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    _check_folder(path, path)
    path = os.path.abspath(path)  # independent of later changes of the working folder
    try:
        # Optuna's other lock, a symbolic link, is for NFS of the nineties, and can be read only on machines that have
        # the folder at the same path: on others, the lock of a killed worker would stay forever.
        return JournalStorage(JournalFileBackend(path, JournalFileOpenLock(path)))
    except OSError as error:
        raise OptionError(f"storage={path!r} cannot be opened: {error}. Give a writable file.") from error
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        raise OptionError(f"storage={path!r} is not an Optuna journal, or a damaged one. Give another file.") from error


def _open_database(url: str, given: str) -> BaseStorage:
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage
    from sqlalchemy import exc
    from sqlalchemy.engine import make_url
    from sqlalchemy.pool import NullPool

    try:
        address = make_url(url)
    except (exc.ArgumentError, ValueError) as error:  # a port that is not a number
        raise OptionError(f"storage={_hidden(given)!r} is not a URL. Give {KINDS}.") from error
    if "@" in (address.host or ""):
        raise OptionError(f"storage={_hidden(given)!r}: write each @ of a name or password as %40.")
    # The query may hold a password as well.
    given = address.set(query={}).render_as_string() if given == url else given
    kind = address.get_backend_name()
    sqlite = kind == "sqlite"
    if sqlite:
        _check_folder(address.database or "", given)
    # No pool: a connection would go stale during an evaluation and be inherited by data loader workers.
    options: dict[str, Any] = {"poolclass": NullPool}
    if sqlite:
        options["connect_args"] = {"timeout": LOCK_TIMEOUT}
    elif kind == "postgresql":
        # In a session that reads a snapshot of its beginning, trials that wait for each other would count the same
        # number of earlier ones, and get the same number.
        options["isolation_level"] = "READ COMMITTED"
        address = _with_driver(address)
    url = address.render_as_string(hide_password=False)
    began = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            # Optuna passes the URL through str.format.
            database = RDBStorage(url.replace("{", "{{").replace("}", "}}"), engine_kwargs=dict(options))
            break
        except (exc.DBAPIError, exc.ArgumentError, StorageInternalError, ImportError, RuntimeError) as error:
            if _is_locked(error) and time.monotonic() - began >= LOCK_TIMEOUT:
                raise LockedError(given) from error
            if attempt + 1 == ATTEMPTS or not _is_race(error):
                raise OptionError(f"storage={given!r} cannot be opened: {_reason(error)}") from error
            time.sleep(min(0.05 * 2**attempt, 1.0) + os.getpid() % 16 / 100)
    if sqlite:
        _lock_before_reading(database.engine)
    _tell_if_unavailable(database.engine, given)
    return database


def _with_driver(address: URL) -> URL:
    """Name the installed PostgreSQL driver: the one that SQLAlchemy uses by default depends on its version."""
    names = ("psycopg", "psycopg2")
    if address.drivername == "postgresql":
        installed = [name for name in names if importlib.util.find_spec(name) is not None]
        address = address.set(drivername=f"postgresql+{[*installed, names[0]][0]}")
    if address.get_driver_name() in names:
        address = address.set(query={**LIBPQ, **address.query})
    return address


def _hidden(url: str) -> str:
    """A URL that cannot be parsed, without what may be a password: the part before ``@``, and the query."""
    return re.sub(r":.*@", ":***@", url, flags=re.DOTALL).partition("?")[0]


def _check_folder(path: str, given: str) -> None:
    if path in ("", ":memory:"):
        raise OptionError(f"storage={given!r} names no file. For an in-memory study, give None.")
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise OptionError(f"storage={given!r}: there is no folder {str(folder)!r}. Create it, or give another path.")


def _is_race(error: Exception) -> bool:
    from sqlalchemy import exc

    text = f"{error} {error.__cause__}"
    return isinstance(error, exc.IntegrityError) or "already exists" in text or _is_locked(error)


def _is_locked(error: BaseException) -> bool:
    """Whether another process held the SQLite file."""
    return any("database is locked" in str(reason) for reason in (error, error.__cause__))


def _reason(error: Exception) -> str:
    from sqlalchemy import exc

    if isinstance(error, ImportError):
        return f"its driver is missing ({error.__cause__}). Install it: pip install 'hf-ft[postgresql]', pymysql, ..."
    if isinstance(error, exc.ArgumentError):
        return f"{error}. Give {KINDS}."
    cause = _first_line(getattr(error, "orig", None) or error.__cause__ or error)
    return (
        f"{cause}. Is it a database of this kind, is it writable, is its server running, and are user and password "
        "correct? Otherwise, give another."
    )


def _first_line(reason: object) -> str:
    lines = str(reason).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(reason).__name__


def _lock_before_reading(engine: Engine) -> None:
    """Make every transaction lock the SQLite file before its first read.

    Optuna reads a trial's state and then writes it. Python's sqlite3 begins a transaction between the two, so one of
    two workers could complete a trial that the other has just failed.
    """
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def leave_beginning_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _tell_if_unavailable(engine: Engine, storage: str) -> None:
    """Raise our errors in place of SQLAlchemy's, which Optuna turns into one about invalid data."""
    from sqlalchemy import event, exc

    @event.listens_for(engine, "handle_error")
    def tell(context: Any) -> None:
        error = context.original_exception
        if _is_locked(error):
            raise LockedError(storage) from error
        # From a server: with a file, it could be the disk, which has errors of its own.
        connecting = context.connection is None and isinstance(context.sqlalchemy_exception, exc.OperationalError)
        if engine.name != "sqlite" and (connecting or context.is_disconnect):
            raise GoneError(storage, error) from error


@contextmanager
def reachable(storage: BaseStorage) -> Iterator[None]:
    """Name the server of a storage in place of gRPC's errors.

    Raises:
        GoneError: if it can no longer be reached.
        OptionError: if the storage behind it failed.
    """
    from optuna.storages import GrpcStorageProxy

    if not isinstance(storage, GrpcStorageProxy):
        yield
        return
    import grpc

    try:
        yield
    except grpc.RpcError as error:
        address = getattr(storage, "url", f"{GRPC}...")
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise GoneError(address, error.details()) from error
        raise OptionError(
            f"storage={address!r}: its server failed ({_first_line(error.details())}). Check its log, and "
            "the storage behind it; then run the same command again: finished trials are kept."
        ) from error


def is_refused(error: Exception) -> bool:
    """Whether a storage refused what it was given. Optuna's gRPC server reports only that something failed."""
    if isinstance(error, ValueError):
        return not isinstance(error, Error)
    code = getattr(error, "code", None)
    return callable(code) and getattr(code(), "name", "") == "UNKNOWN"


@contextmanager
def one_transaction(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Combine what this thread does with a trial in a database: each transaction takes as long as a write to disk.

    The trial is locked first. Optuna first writes attributes, for which a server may take a lock that is shared with
    another process, and then the state, for which both would wait for each other.
    """
    from optuna.storages import RDBStorage

    if not isinstance(storage, RDBStorage):
        yield
        return
    from sqlalchemy import column, select, table

    sessions = storage.scoped_session
    lock = select(column("trial_id")).select_from(table("trials")).where(column("trial_id") == trial_id)
    with storage.engine.connect() as connection, connection.begin():
        connection.execute(lock.with_for_update())
        sessions.remove()
        # The session that all calls of this thread share; their commits end a savepoint.
        sessions(bind=connection, join_transaction_mode="create_savepoint")
        try:
            yield
        finally:
            sessions.remove()
