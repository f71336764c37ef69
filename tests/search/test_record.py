"""What trials say about jobs; a study with many trials costs no more per step than one with few."""

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState, create_trial

from hf_ft.search import record as record_module
from hf_ft.search.claims import Claims
from hf_ft.search.record import Record
from hf_ft.search.storage import one_transaction, open_storage
from hf_ft.search.study import open_study
from hf_ft.search.trials import Job, run_trials


def trial(number, job, state="COMPLETE", failure=None):
    attributes = {} if job is None else {"job": job}
    attributes |= {} if failure is None else {"failure": failure}
    made = create_trial(
        state=TrialState[state], value=1.0 if state == "COMPLETE" else None, user_attrs=attributes, params={}
    )
    made.number = number
    return made


def test_owners_and_failures():
    record = Record()
    record.update([trial(0, "a", "FAIL", "error"), trial(1, "a", "RUNNING"), trial(2, "b"), trial(3, None, "RUNNING")])
    assert record.owner("a").number == 1 and record.owner("b").number == 2 and record.owner("c") is None
    assert record.take_finished() == ["a", "b"] and record.take_finished() == []
    assert [running.number for running in record.running()] == [1]
    assert record.failures("a", "error") == 1 and record.failures("a", "error", since=1) == 0
    record.update([*record.trials[:1], trial(1, "a", "FAIL", "worker died"), *record.trials[2:], trial(4, "a")])
    assert record.take_finished() == ["a", "a"] and record.owner("a").number == 4 and record.running() == []
    assert record.failures("a", "worker died") == 1 and record.failures("b", "error") == 0


def test_trials_are_read_once(monkeypatch):
    looked = []
    monkeypatch.setattr(record_module, "job_of", lambda trial: looked.append(trial.number) or trial.user_attrs["job"])
    record, trials = Record(), [trial(number, f"job{number}") for number in range(200)]
    record.update(trials)
    looked.clear()
    record.update([*trials, trial(200, "more")])
    assert set(looked) == {200}


@pytest.mark.parametrize("name", ["study.db", "study.log"])
def test_one_reading_for_each_job_that_takes_no_time(tmp_path, monkeypatch, name):
    read, readings = optuna.Study.get_trials, []
    monkeypatch.setattr(optuna.Study, "get_trials", lambda *a, **k: readings.append(1) or read(*a, **k))
    jobs = [Job(f"job{number}", {"seed": number}) for number in range(12)]
    storage = str(tmp_path / name)
    told = []
    outcomes = run_trials(
        jobs,
        lambda job, report: float(job.params["seed"]),
        storage=storage,
        name="s",
        signature={},
        progress=lambda *done: told.append(done[:2]),
    )
    assert [outcome.value for outcome in outcomes.values()] == list(range(12))
    assert told == [(number, 12) for number in range(13)]
    assert len(readings) <= len(jobs) + 4  # one for claiming each job, and one each at the start and the end


def test_a_trial_ends_in_one_transaction(tmp_path):
    storage = open_storage(str(tmp_path / "study.db"))
    claims = Claims(storage, open_study(storage, "s", None), {}, 9.0, [{}])
    claims.read()
    trial_id, commits = claims.claim("a", {}), []
    sqlalchemy.event.listen(storage.engine, "commit", commits.append)
    assert claims.finish(trial_id, "COMPLETE", 0.5, seconds=1.0, info={"x": 1})
    assert len(commits) == 1
    claims.read()
    owner = claims.record.owner("a")
    assert owner.value == 0.5 and owner.user_attrs["info"] == {"x": 1}
    assert not claims.finish(trial_id, "FAIL", failure="late")


def test_an_aborted_transaction_leaves_nothing(tmp_path):
    storage = open_storage(str(tmp_path / "study.db"))
    study = open_study(storage, "s", None)
    with pytest.raises(RuntimeError), one_transaction(storage, 0):
        study.set_user_attr("x", 1)
        raise RuntimeError
    assert study.user_attrs == {}
    study.set_user_attr("y", 2)
    assert study.user_attrs == {"y": 2}
