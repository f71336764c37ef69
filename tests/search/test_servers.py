"""Several workers share one study on each storage meant for several machines."""

import importlib.util
import os
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from hf_ft.errors import OptionError
from hf_ft.search.claims import Claims
from hf_ft.search.storage import open_storage
from hf_ft.search.study import open_study
from hf_ft.search.trials import run_trials
from tests.search.trials_worker import jobs, start
from tests.servers import PASSWORD, drivers, grpc_server, needs_grpc, needs_postgresql, postgresql

pytestmark = pytest.mark.slow
SIGNATURE = {"model": "a"}
LONG = pytest.mark.skipif(not os.environ.get("HF_FT_SERVERS"), reason="set HF_FT_SERVERS=1")
HERE = [
    pytest.param("postgresql", marks=needs_postgresql),
    pytest.param("journal"),
    pytest.param("grpc before sqlite", marks=needs_grpc),
    pytest.param("grpc before postgresql", marks=[needs_grpc, needs_postgresql, LONG]),
]


@pytest.fixture(scope="module")
def server():
    with postgresql() as started:
        yield started


@pytest.fixture
def database(server, request):
    """A new database, and nothing in it."""
    name = f"test{abs(hash(request.node.nodeid))}"
    server.execute(f"CREATE DATABASE {name}")
    return name


def url_of(request):
    return request.getfixturevalue("server").url(request.getfixturevalue("database"))


@pytest.fixture
def storage(request, tmp_path):
    """The URL given to workers, and the storage behind it.

    This process makes no gRPC connection: processes that it forks could not use any.
    """
    behind = url_of(request) if "postgresql" in request.param else str(tmp_path / "study.db")
    with ExitStack() as stack:
        if request.param == "journal":
            behind = told = str(tmp_path / "study.log")
        else:
            told = stack.enter_context(grpc_server(behind)).url if "grpc" in request.param else behind
        yield told, behind


def trials_of(storage):
    return optuna.load_study(study_name="study", storage=open_storage(storage)).get_trials()


def completed(storage):
    return [(t.user_attrs["job"], t.value) for t in trials_of(storage) if t.state == TrialState.COMPLETE]


def seed(job, report):
    return float(job.params["seed"])


def told_by(process, folder):
    """The last line and the whole output of a process that failed."""
    process.join(60)
    assert process.exitcode == 1
    text = (folder / f"error{process.pid}").read_text()
    return text.splitlines()[-1], text


@pytest.mark.parametrize("storage", HERE, indirect=True)
def test_three_workers_of_which_one_is_killed_do_what_one_does(storage, tmp_path):
    """The others notice the killed one only by its heartbeat, as if it were on another machine."""
    told, behind = storage
    options = {"number": 8, "seconds": 0.05, "heartbeat": 0.2, "start": time.time() + 0.3}
    killed = start(tmp_path, told, machine="0" * 12, signals=[None, signal.SIGKILL], **options)
    others = [start(tmp_path, told, waits=True, **options) for _ in range(2)]
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    undisturbed = run_trials(jobs(8), seed, storage=None, name="study", signature=SIGNATURE)
    assert sorted(completed(behind)) == sorted((key, outcome.value) for key, outcome in undisturbed.items())
    trials = trials_of(behind)
    assert [t.number for t in trials] == list(range(len(trials)))
    assert TrialState.RUNNING not in {t.state for t in trials}
    assert [t.user_attrs["worker"].endswith(f":{killed.pid}") for t in trials if died(t)] == [True]
    lists = {path.read_text() for path in tmp_path.glob("done*")}
    assert len(list(tmp_path.glob("done*"))) == 2 and len(lists) == 1
    written = "".join(path.read_text() for path in tmp_path.iterdir() if path.suffix != ".db")
    assert PASSWORD not in written


def died(trial):
    return trial.user_attrs.get("failure") == "worker died"


def _lists_with_other_values(folder, storage):
    opened = open_storage(storage)
    lists = [{"block": "a", "seed": 0}], [{"block": "b", "seed": 0}]
    one, two = (Claims(opened, open_study(opened, "study", None), SIGNATURE, 9.0, params) for params in lists)
    two.read()
    one.read()
    assert one.claim("a", lists[0][0]) is not None
    assert two.claim("b", lists[1][0]) is not None


@pytest.mark.parametrize("storage", HERE, indirect=True)
def test_lists_with_other_values_at_once(storage, tmp_path):
    """Optuna fixes a parameter's choices; its gRPC server does not give this as the reason."""
    told, behind = storage
    process = start(tmp_path, told, target=_lists_with_other_values)
    process.join(60)
    assert process.exitcode == 0
    assert [t.user_attrs["job"] for t in trials_of(behind)] == ["a", "b"]


def _joined(*threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@needs_postgresql
def test_of_two_that_finish_a_trial_neither_waits_for_the_other(server, database):
    one, two = (open_storage(server.url(database)) for _ in range(2))
    study = open_study(one, "study", None)
    claims = [Claims(storage, study, SIGNATURE, 9.0, [{}]) for storage in (one, two)]
    for _ in range(8):
        trial_id, answers, ready = one.create_new_trial(study._study_id), [], threading.Barrier(2)
        ends = ("COMPLETE", 1.0, {"seconds": 1.0, "info": {}}), ("FAIL", None, {"failure": "worker died"})

        def finish(of, state, value, attributes, trial_id=trial_id, answers=answers, ready=ready):
            ready.wait()
            answers.append(of.finish(trial_id, state, value, **attributes))

        _joined(*(threading.Thread(target=finish, args=(of, *end)) for of, end in zip(claims, ends, strict=True)))
        assert sorted(answers) == [False, True]
        trial = one.get_trial(trial_id)
        assert ("failure" in trial.user_attrs) == (trial.state == TrialState.FAIL) != ("info" in trial.user_attrs)


@needs_postgresql
@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_trials_are_numbered_in_the_order_in_which_they_can_be_seen(server, database, isolation):
    """Also if the server's sessions read a snapshot from their beginning by default."""
    server.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = '{isolation}'")
    storages = [open_storage(server.url(database)) for _ in range(3)]
    study_id, seen = open_study(storages[0], "study", None)._study_id, []

    def add(storage):
        for _ in range(8):
            storage.create_new_trial(study_id, create_trial(state=TrialState.RUNNING, user_attrs={"job": "a"}))
            seen.append([(t.number, t._trial_id) for t in storage.get_all_trials(study_id)])

    _joined(*(threading.Thread(target=add, args=(storage,)) for storage in storages))
    whole = max(seen, key=len)
    assert [number for number, _ in whole] == list(range(24)) and whole == sorted(whole, key=lambda pair: pair[1])
    assert all(part == whole[: len(part)] for part in seen)  # never one without its predecessors


@needs_postgresql
@pytest.mark.parametrize("driver", ["", "psycopg", "psycopg2"])
def test_postgresql_that_does_not_open(server, driver):
    if driver and importlib.util.find_spec(driver) is None:
        pytest.skip(f"pip install {driver}")
    assert drivers()
    right = server.url(driver=driver)
    for url, message in (
        (
            server.url(driver=driver, password="secret"),
            "password authentication failed .*are user and password correct",
        ),
        (server.url("nosuch", driver=driver), 'database "nosuch" does not exist'),
        (right.replace(f":{server.port}/", ":1/"), "refused.*is its server running"),
        (right.replace(f":{server.port}/", ":1/") + "?password=secret", "refused.*is its server running"),
        (right.replace(f":{server.port}/", ":port/"), "is not a URL"),
    ):
        with pytest.raises(OptionError, match="(?s)storage='postgresql.*" + message) as caught:
            open_storage(url)
        assert not [part for part in ("secret", PASSWORD, url.split(":")[2].split("@")[0]) if part in str(caught.value)]


@needs_postgresql
def test_postgresql_that_goes(server, database):
    seen = []

    def evaluate(job, report):
        seen.append(job.key)
        if len(seen) == 2:
            server.stop()
        return seed(job, report)

    options = {"storage": server.url(database), "name": "study", "signature": SIGNATURE}
    try:
        with pytest.raises(OptionError, match=r"storage='postgresql://worker:\*\*\*@.*can no longer be reached") as e:
            run_trials(jobs(4), evaluate, heartbeat=0.1, **options)
        assert "Restart its server" in str(e.value) and PASSWORD not in str(e.value)
    finally:
        server.start()
    assert [o.value for o in run_trials(jobs(4), evaluate, heartbeat=0.1, **options).values()] == [0.0, 1.0, 2.0, 3.0]
    assert sorted(seen[2:]) == sorted(job.key for job in jobs(4)[1:])


@needs_postgresql
def test_a_result_waits_for_a_server_that_restarts(server, database):
    restarting = threading.Timer(1.0, server.start)

    def evaluate(job, report):
        if job == jobs(2)[0]:
            server.stop()
            restarting.start()
        return seed(job, report)

    options = {"storage": server.url(database), "name": "study", "signature": SIGNATURE}
    try:
        assert [o.value for o in run_trials(jobs(2), evaluate, **options).values()] == [0.0, 1.0]
    finally:
        restarting.join()


@needs_grpc
@pytest.mark.parametrize("url", ["grpc://127.0.0.1", "grpc://user:secret@127.0.0.1:13000", "grpc://127.0.0.1:1/x"])
def test_grpc_urls(url):
    with pytest.raises(OptionError, match=r"storage='grpc.* Give grpc://host:13000") as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)


def _without_server(folder, url):
    from hf_ft.search import storage

    storage.ANSWER_TIMEOUT = 0.5
    open_storage(url)


@needs_grpc
def test_grpc_that_does_not_open(tmp_path):
    last, _ = told_by(start(tmp_path, "grpc://127.0.0.1:1", target=_without_server), tmp_path)
    assert "storage='grpc://127.0.0.1:1': no gRPC server answered there within 0.5 s" in last


@needs_grpc
def test_grpc_that_goes(tmp_path):
    with grpc_server(str(tmp_path / "study.db")) as server:
        worker = start(tmp_path, server.url, 3, 1.0, 0.2)
        while not (tmp_path / "log").exists():
            time.sleep(0.05)
        server.stop()
        last, _ = told_by(worker, tmp_path)
        assert f"OptionError: storage={server.url!r} can no longer be reached" in last.replace("Gone", "Option")
        assert "Restart its server" in last
        server.start()
        worker = start(tmp_path, server.url, 3, 0.0, 0.2)
        worker.join(60)
        assert worker.exitcode == 0
    assert Counter(completed(str(tmp_path / "study.db"))) == {(job.key, job.params["seed"]): 1 for job in jobs(3)}
