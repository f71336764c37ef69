"""Every job runs once: in one process, in several, after interruptions, kills and pauses."""

import contextlib
import logging
import math
import os
import random
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter

import optuna
import pytest
from optuna.trial import TrialState

from hf_ft.errors import OptionError
from hf_ft.search import storage as storage_module
from hf_ft.search import trials as trials_module
from hf_ft.search.claims import Claims
from hf_ft.search.storage import open_storage
from hf_ft.search.study import open_study
from hf_ft.search.trials import Halving, Job, JobError, run_trials
from tests.search.trials_worker import jobs, open_all, start

pytestmark = pytest.mark.slow

SIGNATURE = {"model": "a"}
WORKERS = {"pruner": None, **SIGNATURE}  # as it is stored


def run(listed, evaluate, storage=None, **options):
    options = {"name": "study", "signature": SIGNATURE, "heartbeat": 0.2, **options}
    return run_trials(listed, evaluate, storage=storage, **options)


def seed(job, report):
    return float(job.params["seed"])


def trials_of(storage):
    return optuna.load_study(study_name="study", storage=open_storage(storage)).get_trials()


def completed(storage):
    return Counter(t.user_attrs["job"] for t in trials_of(storage) if t.state == TrialState.COMPLETE)


def started(folder):
    log = folder / "log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def wait(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def finish(*processes):
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


def claim(claims, key, params):
    """The trial of a worker that has just read the others' trials, if it owns the job."""
    claims.read()
    return claims.claim(key, params)


def add_by_hand(storage, job, number=1):
    """Trials of a worker that was killed as soon as it had claimed a job."""
    opened = open_storage(storage)
    claims = Claims(opened, open_study(opened, "study", None), WORKERS, 0.2, [job.params])
    claims.read()
    return [claims._add_trial(job.key, job.params) for _ in range(number)]


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """A database with its tables: creating them takes longer than most of the tests."""
    path = tmp_path_factory.mktemp("storage") / "study.db"
    open_storage(str(path))
    return path


@pytest.fixture
def database(empty, tmp_path):
    return str(shutil.copy(empty, tmp_path / "study.db"))


@pytest.fixture(params=["study.db", "study.log"])
def storage(request, empty, tmp_path):
    if request.param == "study.db":
        shutil.copy(empty, tmp_path)
    return str(tmp_path / request.param)


def test_one_process_runs_each_job_once_in_order():
    seen, told = [], []

    def evaluate(job, report):
        seen.append(job.key)
        report(1, 0.25)
        report(2, 0.5)
        return job.params["seed"], {"loss": (1, 2)}

    def tell(*args):
        told.append((*args[:2], args[2] and args[2].key))

    outcomes = run(jobs(3), evaluate, progress=tell)
    assert seen == [job.key for job in jobs(3)] == list(outcomes)
    assert [o.value for o in outcomes.values()] == [0.0, 1.0, 2.0]
    assert outcomes[seen[0]].steps == (0.25, 0.5) and not outcomes[seen[0]].pruned
    assert outcomes[seen[0]].info == {"loss": [1, 2]} and outcomes[seen[0]].seconds >= 0
    assert told == [(0, 3, None), *((i + 1, 3, key) for i, key in enumerate(seen))]


def test_finished_jobs_are_read_and_more_may_come(storage):
    first = run(jobs(3), seed, storage)
    seen, told = [], []

    def evaluate(job, report):
        seen.append(job.key)
        return seed(job, report)

    more = [*jobs(3), Job("new/seed3", {"block": "a block that was not there", "seed": 3.5})]
    second = run(more, evaluate, storage, progress=lambda *args: told.append(args[:2]))
    assert seen == ["new/seed3"] and told == [(3, 4), (4, 4)]
    assert {key: second[key] for key in first} == first
    dashboard = trials_of(storage)
    assert [t.params for t in dashboard] == [*(dict(job.params) for job in jobs(3)), {}]
    assert dashboard[3].user_attrs["block"] == "a block that was not there"


def test_lists_with_other_values_at_once(storage):
    """Optuna fixes a parameter's choices: the second worker shows none."""
    opened = open_storage(storage)
    lists = [{"block": "a", "seed": 0}], [{"block": "b", "seed": 0}]
    one, two = (Claims(opened, open_study(opened, "study", None), WORKERS, 9.0, params) for params in lists)
    two.read()
    assert claim(one, "a", lists[0][0]) is not None
    assert two.claim("b", lists[1][0]) is not None
    assert [t.user_attrs["job"] for t in trials_of(storage)] == ["a", "b"]


@pytest.mark.parametrize(
    ("error", "name"), [(ValueError, "study.db"), (KeyboardInterrupt, "study.log"), (SystemExit, "study.log")]
)
def test_an_exception_stops_the_worker_and_the_next_call_continues(tmp_path, error, name):
    storage, seen = str(tmp_path / name), []

    def evaluate(job, report):
        seen.append(job.params["seed"])
        if seen == [0, 1, 2]:
            raise error("the message")
        return 0.0

    with pytest.raises(error, match="the message"):
        run(jobs(4), evaluate, storage, heartbeat=100.0)
    failed = trials_of(storage)[2]
    assert failed.state == TrialState.FAIL and failed.user_attrs["message"] == f"{error.__name__}: the message"
    began = time.monotonic()
    assert len(run(jobs(4), evaluate, storage, heartbeat=100.0)) == 4
    assert seen == [0, 1, 2, 2, 3]
    assert time.monotonic() - began < 10  # the failed trial is not a stale one, for which to wait


def test_three_workers_that_start_together_share_the_jobs(storage, tmp_path):
    """They create the study at the same time, and compete for each job, since jobs take no time."""
    finish(*(start(tmp_path, storage, 15, 0.0, 2.0, start=time.time() + 0.3) for _ in range(3)))
    assert completed(storage) == {job.key: 1 for job in jobs(15)}
    assert Counter(key for key, _ in started(tmp_path)) == {job.key: 1 for job in jobs(15)}
    assert TrialState.RUNNING not in {t.state for t in trials_of(storage)}
    lists = {path.read_text() for path in tmp_path.glob("done*")}
    assert len(list(tmp_path.glob("done*"))) == 3 and len(lists) == 1  # all read the same outcomes


@pytest.mark.parametrize("name", ["study{}.db", "study{}.log"])
def test_several_may_create_a_storage_at_once(tmp_path, name):
    storages = [str(tmp_path / name.format(index)) for index in range(4)]
    open_storage(str(tmp_path / "first.db"))  # imports what is needed for opening
    when = time.time() + 0.3
    finish(*(start(tmp_path, storages, when, target=open_all) for _ in range(3)))
    assert [optuna.get_all_study_names(open_storage(storage)) for storage in storages] == [["study"]] * 4


def test_the_job_of_a_killed_worker_is_done_by_another(database, tmp_path):
    killed = start(tmp_path, database, 8, 0.3, 0.3, signals=[None, signal.SIGKILL])
    others = [start(tmp_path, database, 8, 0.3, 0.3) for _ in range(2)]
    finish(*others)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert completed(database) == {job.key: 1 for job in jobs(8)}
    assert TrialState.RUNNING not in {t.state for t in trials_of(database)}
    _, job = [key for key, pid in started(tmp_path) if pid == str(killed.pid)]
    assert len([key for key, _ in started(tmp_path) if key == job]) >= 2


def test_a_restart_after_all_were_killed(database, tmp_path):
    for worker in [start(tmp_path, database, 6, 0.1, 0.2, signals=[None, signal.SIGKILL]) for _ in range(2)]:
        worker.join()
    before, log = completed(database), started(tmp_path)
    assert len(before) == 2 and len(log) == 4
    finish(start(tmp_path, database, 6, 0.0, 0.2))
    assert completed(database) == {job.key: 1 for job in jobs(6)}
    assert TrialState.RUNNING not in {t.state for t in trials_of(database)}
    assert not set(before) & {key for key, _ in started(tmp_path)[len(log) :]}


def test_the_job_of_a_killed_worker_of_this_machine_is_free_at_once(storage, tmp_path):
    """Otherwise its mark would have to stay unchanged for ten minutes."""
    killed = start(tmp_path, storage, 3, 0.0, 100.0, signals=[None, signal.SIGKILL])
    killed.join()
    assert len(run(jobs(3), seed, storage, heartbeat=100.0)) == 3
    assert Counter(t.state.name for t in trials_of(storage)) == {"COMPLETE": 3, "FAIL": 1}
    [failed] = [t for t in trials_of(storage) if t.state == TrialState.FAIL]
    assert failed.user_attrs["failure"] == "worker died"


def test_a_paused_worker_that_comes_back_does_not_complete_again(storage, tmp_path):
    paused = start(tmp_path, storage, 2, 0.5, 0.2, signals=[signal.SIGSTOP])
    wait(lambda: started(tmp_path))
    try:
        other = start(tmp_path, storage, 2, 0.0, 0.2)
        finish(other)
        assert [pid for _, pid in started(tmp_path)] == [str(p.pid) for p in (paused, other, other)]
    finally:
        os.kill(paused.pid, signal.SIGCONT)
    finish(paused)
    assert completed(storage) == {job.key: 1 for job in jobs(2)}
    read = (tmp_path / f"done{paused.pid}").read_text()
    assert read == (tmp_path / f"done{other.pid}").read_text() and str(paused.pid) not in read


def test_a_worker_taken_for_dead_notices_at_its_next_report(storage):
    calls = []

    def evaluate(job, report):
        calls.append(job.key)
        if len(calls) == 1:
            [mine] = trials_of(storage)
            open_storage(storage).set_trial_state_values(mine._trial_id, TrialState.FAIL)
            report(1, 0.0)
            pytest.fail("the report was taken")
        return 1.0

    assert [o.value for o in run(jobs(1), evaluate, storage).values()] == [1.0]
    assert len(calls) == 2


def test_claims_of_workers_killed_at_once_are_taken_over(storage):
    """One owns the job, the other came second and had no time to withdraw: neither may be left running."""
    add_by_hand(storage, jobs(2)[0], 2)
    began = time.monotonic()
    assert len(run(jobs(2), seed, storage)) == 2
    assert time.monotonic() - began > 5 * 0.2
    assert completed(storage) == {job.key: 1 for job in jobs(2)}
    assert Counter(t.state.name for t in trials_of(storage)) == {"COMPLETE": 2, "FAIL": 2}
    failures = [t.user_attrs["failure"] for t in trials_of(storage) if t.state.name == "FAIL"]
    assert failures == ["worker died", "withdrawn"]  # one death; a comparison gives up after two


def test_the_lowest_trial_owns_the_job(storage):
    opened = open_storage(storage)
    job = jobs(1)[0]
    one, two = (Claims(opened, open_study(opened, "study", None), WORKERS, 9.0, [job.params]) for _ in range(2))
    two.read()
    owned = claim(one, job.key, job.params)
    assert owned is not None
    assert two.claim(job.key, job.params) is None  # it read before the other claimed
    one.finish(owned, "FAIL")
    again = claim(two, job.key, job.params)
    assert again is not None and not one.finish(owned, "COMPLETE", 1.0)
    assert two.finish(again, "COMPLETE", 2.0, seconds=0.0, info={})


@pytest.mark.parametrize(("name", "heartbeat"), [("study.log", 0.25), ("study.db", 60.0)])
def test_a_worker_that_lives_is_left_alone(tmp_path, name, heartbeat):
    """Its job takes longer than six of its own heartbeats, or of those of the worker that waits for it."""
    storage = str(tmp_path / name)
    busy = start(tmp_path, storage, 1, 2.0, heartbeat)
    wait(lambda: started(tmp_path))
    run(jobs(1), seed, storage, heartbeat=0.1)
    finish(busy)
    assert len(started(tmp_path)) == 1 and len(trials_of(storage)) == 1


def test_of_two_that_finish_a_trial_at_once_one_is_refused(database):
    """The second comes between the first's reading of the state and its writing."""
    [trial_id] = add_by_hand(database, jobs(1)[0])
    one, two = open_storage(database), open_storage(database)
    check, answers, threads = one.check_trial_is_updatable, [], []

    def fail():
        try:
            answers.append(two.set_trial_state_values(trial_id, TrialState.FAIL))
        except optuna.exceptions.UpdateFinishedTrialError:
            answers.append(False)

    def check_and_be_overtaken(*args):
        check(*args)
        if not threads:
            threads.append(threading.Thread(target=fail))
            threads[0].start()
            threads[0].join(0.5)

    one.check_trial_is_updatable = check_and_be_overtaken
    answers.append(one.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0]))
    threads[0].join()
    assert sorted(answers) == [False, True]


def test_a_job_that_raises_in_other_workers_is_given_up_last(storage, monkeypatch):
    monkeypatch.setattr(trials_module, "FRESH", 0.0)  # the job after which they are read again takes no time

    def others_raise(job, report):
        """While we run the other job, two workers fail in the first."""
        opened = open_storage(storage)
        for trial_id in add_by_hand(storage, jobs(2)[0], 2):
            opened.set_trial_user_attr(trial_id, "failure", "error")
            opened.set_trial_user_attr(trial_id, "message", "ValueError: theirs")
            opened.set_trial_state_values(trial_id, TrialState.FAIL)
        return 0.0

    with pytest.raises(JobError, match="stage0/seed0.*ValueError: theirs"):
        run(jobs(2)[::-1], others_raise, storage, retries=1)
    assert completed(storage) == {"stage1/seed1": 1}
    assert len(run(jobs(2), seed, storage, retries=0)) == 2  # the errors of an earlier call do not count


def test_signature(storage):
    nested = {"model": "a", "options": {"lr": 0.1, "epochs": 2}, "nan": math.nan, "tuple": (1, 2)}
    run(jobs(1), seed, storage, signature=nested)
    run(jobs(1), seed, storage, signature=nested)
    study = optuna.load_study(study_name="study", storage=open_storage(storage))
    assert study.user_attrs["signature"]["options"] == nested["options"]
    other = {**nested, "options": {"lr": 0.2, "epochs": 2}, "seeds": 3}
    with pytest.raises(OptionError, match=r"'study'.*options.lr \(0.1 there, 0.2 here\), seeds \(None .*study name"):
        run(jobs(2), seed, storage, signature=other)
    with pytest.raises(OptionError, match="pruner"):
        run(jobs(2), seed, storage, signature=nested, pruner=Halving())
    run(jobs(2), seed, storage, signature=other, name="another")
    assert len(trials_of(storage)) == 1
    with pytest.raises(OptionError, match="signature is not a JSON dict"):
        run(jobs(1), seed, signature={"model": object()})


def test_of_two_signatures_at_once_the_first_claim_decides(storage):
    job = jobs(1)[0]
    opened = open_storage(storage)
    one, two = (
        Claims(opened, open_study(opened, "study", None), {"model": model}, 9.0, [job.params]) for model in "ab"
    )
    two.read()  # before any trial exists
    assert claim(one, job.key, job.params) is not None
    with pytest.raises(OptionError, match="model .'a' there, 'b' here"):
        two.claim(job.key, job.params)
    assert [t.state.name for t in trials_of(storage)] == ["RUNNING", "FAIL"]


@pytest.mark.parametrize("storage", ["sqlite:///a{b}.db", "journal:///a.b"])
def test_relative_urls(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(jobs(1), seed, storage)
    monkeypatch.chdir("/")
    assert completed(storage.replace(":///", f":///{tmp_path}/")) == {"stage0/seed0": 1}


def test_a_journal_needs_no_symbolic_links(tmp_path, monkeypatch):
    """Not every shared file system supports them, and their targets differ between machines."""
    monkeypatch.setattr(os, "symlink", None)
    run(jobs(1), seed, str(tmp_path / "study.log"))


def test_a_foreign_study(database):
    study = optuna.create_study(study_name="study", storage=open_storage(database), direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(OptionError, match="already exists with other trials"):
        run(jobs(1), seed, database)


def test_halving_stops_the_worse(storage):
    def evaluate(job, report):
        for step in range(1, 5):
            report(step, step * job.params["seed"])
        return 100.0 * job.params["seed"]

    listed = [Job(f"seed{n}", {"seed": n}) for n in (5, 1, 9, 4)]
    for _ in range(2):  # evaluated, and read from the study
        outcomes = run(listed, evaluate, storage, pruner=Halving(min_steps=2, factor=2))
        assert [o.pruned for o in outcomes.values()] == [False, True, False, True]
        assert [o.value for o in outcomes.values()] == [500.0, 2.0, 900.0, 8.0]
        assert outcomes["seed1"].steps == (1.0, 2.0) and outcomes["seed9"].steps == (9.0, 18.0, 27.0, 36.0)
    assert not any(o.pruned for o in run(listed, evaluate).values())


def test_pruned_by_evaluate_itself():
    def evaluate(job, report):
        raise optuna.TrialPruned

    outcome = run(jobs(1), evaluate)[jobs(1)[0].key]
    assert outcome.pruned and math.isnan(outcome.value)


def test_scores_that_are_not_numbers(storage):
    with pytest.raises(ValueError, match="nan for job 'stage0/seed0'"):
        run(jobs(1), lambda job, report: math.nan, storage)
    with pytest.raises(OptionError, match="info of job 'stage0/seed0'"):
        run(jobs(1), lambda job, report: (1.0, {"model": object()}), storage)
    assert run(jobs(1), lambda job, report: -math.inf, storage)["stage0/seed0"].value == -math.inf


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("{tmp}/none/study.db", "there is no folder .*none.*Create it"),
        ("{tmp}/none/study.log", "there is no folder .*none.*Create it"),
        ("{tmp}/study.txt", "unknown kind"),
        ("{tmp}/damaged.db", "damaged.db.*not a database"),
        ("{tmp}/damaged.log", "damaged.log.*journal"),
        ("{tmp}/folder.db", "unable to open database file"),
        ("{tmp}/folder.log", "folder.log.*Is a directory"),
        ("{tmp}/old.db", "old.db.*no longer compatible"),
        ("sqlite://", "For an in-memory study, give None"),
        ("nosuch://host/database", "nosuch.*sqlite:///study.db"),
        ("mysql+pymysql://user:secret@host/database", "driver is missing.*pymysql"),
        ("://", "is not a URL"),
        ("postgresql://user:pass@secret@host/database", "write each @ of a name or password as %40"),
        ("postgresql://host:port/database?password=secret", "'postgresql://host:port/database' is not a URL"),
        ("postgresql:/user:secret@host/database", r"'postgresql:\*\*\*@host/database' is of an unknown kind"),
        ("grpc://user:secret@host:13000", "lacks a host or port, or contains more"),
    ],
)
def test_storage_that_cannot_be_opened(storage, message, empty, tmp_path):
    (tmp_path / "damaged.db").write_bytes(b"no database" * 1000)
    (tmp_path / "damaged.log").write_text("no journal\n" * 2)
    for name in ("folder.db", "folder.log"):
        (tmp_path / name).mkdir()
    with sqlite3.connect(shutil.copy(empty, tmp_path / "old.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    with pytest.raises(OptionError, match=message) as caught:
        run(jobs(1), seed, storage.format(tmp=tmp_path))
    assert "storage=" in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"listed": [*jobs(2), *jobs(1)]}, "'stage0/seed0'.*twice"),
        ({"heartbeat": 0.0}, "heartbeat=0.0"),
        ({"retries": -1}, "retries=-1"),
        ({"pruner": Halving(factor=1)}, "factor at least 2"),
    ],
)
def test_bad_arguments(options, message):
    options = {"listed": jobs(1), **options}
    with pytest.raises(OptionError, match=message):
        run(options.pop("listed"), seed, **options)


def test_leaves_logging_and_random_numbers_alone(monkeypatch):
    records, claim = [], Claims.claim
    handler = logging.Handler()
    handler.emit = records.append
    # As if another worker were faster: then the next job is drawn.
    monkeypatch.setattr(Claims, "claim", lambda *args: monkeypatch.setattr(Claims, "claim", claim))
    optuna.logging.set_verbosity(optuna.logging.INFO)
    logging.getLogger("optuna").addHandler(handler)
    random.seed(0)
    run(jobs(2), seed)
    logging.getLogger("optuna").removeHandler(handler)
    assert random.random() == random.Random(0).random()
    assert optuna.logging.get_verbosity() == optuna.logging.INFO and not records


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-ft\[search\]'"):
        run(jobs(1), seed)


def test_a_study_that_another_process_holds(database, monkeypatch):
    """The same patience when opening and in the middle of a search, without messages of SQLAlchemy or Optuna."""
    monkeypatch.setattr(storage_module, "LOCK_TIMEOUT", 0.2)
    other = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    seen = []

    def evaluate(job, report):
        seen.append(job.key)
        if len(seen) == 2:
            other.execute("BEGIN EXCLUSIVE")
            report(1, 0.5)
        return seed(job, report)

    with pytest.raises(OptionError, match=r"study\.db' is held by another process, which has locked it for more than"):
        run(jobs(3), evaluate, database)
    assert len(seen) == 2
    with pytest.raises(OptionError, match="held by another process"):
        run(jobs(3), evaluate, database)
    other.execute("ROLLBACK")
    assert len(run(jobs(3), seed, database, heartbeat=0.05)) == 3


# What each damages in the trials of an otherwise intact study.
DAMAGE = {
    "seconds": "DELETE FROM trial_user_attributes WHERE key = 'seconds'",
    "info": "UPDATE trial_user_attributes SET value_json = '3' WHERE key = 'info'",
    "signature": "UPDATE trial_system_attributes SET value_json = '3' WHERE key = 'hf_ft:signature'",
    "value": "DELETE FROM trial_values",
    "trial": "DELETE FROM trials WHERE number = 0",
    "state": "UPDATE trials SET state = 'x'",
    "json": "UPDATE trial_user_attributes SET value_json = '{'",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_study_is_named(damage, tmp_path):
    storage = str(tmp_path / "study.db")
    run(jobs(2), seed, storage)
    with contextlib.closing(sqlite3.connect(storage)) as database, database:
        database.execute(DAMAGE[damage])
    with pytest.raises(OptionError, match=r"study 'study' .* is damaged \(.*\)\. Restore its file"):
        run(jobs(3), seed, storage)
