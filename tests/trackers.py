"""Reads what trackers stored, each from its own files."""

import json
import re
import sqlite3
from collections import defaultdict
from dataclasses import dataclass

import pytest
from transformers.integrations.integration_utils import rewrite_logs


@dataclass
class Run:
    """A run as a tracker stored it, with the names of the Trainer's logs."""

    name: str
    values: dict
    options: dict
    rename: object

    def series(self, name):
        """The values of a name, in logging order."""
        return self.values.get(self.rename(name), [])


def grouped(name):
    return next(iter(rewrite_logs({name: 0})))


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = []
    for place in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        found = EventAccumulator(str(place)).Reload()
        values = {tag: [event.value for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
        text = found.Tensors("strategy/text_summary")[0].tensor_proto.string_val[0].decode()
        runs.append(Run(place.name, values, dict(re.findall(r"^ {4}(\S+): (.*)$", text, re.M)), grouped))
    return runs


def mlflow(folder):
    import mlflow

    client, runs = mlflow.MlflowClient(), []
    for experiment in client.search_experiments():
        for found in client.search_runs([experiment.experiment_id], order_by=["start_time"]):
            key = found.info.run_id
            values = {name: [m.value for m in client.get_metric_history(key, name)] for name in found.data.metrics}
            assert found.info.status in ("FINISHED", "FAILED")
            name = found.info.run_name
            runs.append(Run(name, values, found.data.params, lambda name: name.replace("/", "_")))
            runs[-1].experiment, runs[-1].status = experiment.name, found.info.status
    return runs


def trackio(folder):
    import trackio

    if trackio.context_vars.current_run.get() is not None:  # logging after training reopens the run
        trackio.finish()
    runs = []
    for file in sorted((folder / "trackio").glob("*.db")):
        with sqlite3.connect(file) as base:
            options = dict(base.execute("select run_name, config from configs").fetchall())
            values = defaultdict(lambda: defaultdict(list))
            for name, metrics in base.execute("select run_name, metrics from metrics order by id"):
                for key, value in json.loads(metrics).items():
                    values[name][key].append(value)
        runs += [Run(name, found, json.loads(options[name]), grouped) for name, found in values.items()]
    return runs


READERS = {"tensorboard": tensorboard, "mlflow": mlflow, "trackio": trackio}


def tracker(name, folder, monkeypatch):
    """A function that reads all runs below a folder; the test is skipped if the tracker is not installed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    pytest.importorskip(name, reason=f"pip install 'hf-ft[{name}]'")
    if name == "trackio":  # which reads its environment when it is imported
        for module in ("utils", "sqlite_storage"):
            monkeypatch.setattr(f"trackio.{module}.TRACKIO_DIR", folder / "trackio")
    monkeypatch.chdir(folder)
    return lambda: READERS[name](folder)
