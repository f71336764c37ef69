"""Round trips through a Hub on loopback: uploaded by one process, loaded by another that shares nothing else.

The client is `huggingface_hub` itself. tests/hub_work.py contains what the processes do.
"""

import contextlib
import json
import os
import socket
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_ft.models.sharing import model_files, shareable_file
from tests.forked import python, start
from tests.hub_api import TOKEN
from tests.hub_rules import metadata_errors
from tests.hub_server import Hub
from tests.hub_work import PARTS

pytestmark = pytest.mark.slow


def work(hub, what, folder, monkeypatch):
    """Run a part of tests/hub_work.py in a process with its own home and cache."""
    home = folder / "home" / "plantedann"
    home.mkdir(parents=True, exist_ok=True)
    start()
    with monkeypatch.context() as own:
        for name, value in hub.environment(folder / f"cache of {what}").items():
            own.setenv(name, value)
        for name, value in {"HOME": home, "USER": "plantedann", "LOGNAME": "plantedann"}.items():
            own.setenv(name, str(value))
        ran = python("-m", "tests.hub_work", what, folder)
    assert ran.returncode == 0, ran.stderr[-5000:]
    return json.loads((folder / f"{what}.json").read_text())


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as own:
        yield own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plantedfolder")


@pytest.fixture(scope="module")
def hub(folder, patch):
    """The Hub with all uploads; the first commit is slow, so that training continues meanwhile."""
    with Hub() as server:
        with server.fails("POST .*ann/cells/commit", delay=0.5, times=1):
            work(server, "upload", folder, patch)
        yield server


@pytest.fixture(scope="module")
def loaded(hub, folder, patch):
    return work(hub, "load", folder, patch)


@pytest.mark.parametrize("name", PARTS)
def test_it_is_loaded_as_it_was_uploaded(name, loaded):
    assert name not in loaded, loaded[name]


def test_nothing_uploaded_tells_of_the_machine(hub, folder):
    planted = ["plantedann", "plantedhost", "plantedfolder", str(Path.home()), os.getcwd(), TOKEN]
    own = [name for name in (socket.gethostname(),) if len(name) > 5]
    contents = [content for request in hub.requests for content in request.contents()]
    assert sum(map(len, contents)) > 10**5
    assert [word for word in planted + own if any(word.encode() in content for content in contents)] == []


def test_only_the_model_is_uploaded(hub):
    plain = {".gitattributes", "README.md", "config.json", "ft_config.json", "ft_state.safetensors"}
    plain |= {"model.safetensors", "preprocessor_config.json"}
    assert set(hub.files("ann/cells")) == plain
    assert set(hub.files("ann/photos")) - {"ft_calibration.json"} == plain | {"all_results.json"}
    delta = {".gitattributes", "README.md", "config.json", "ft_config.json", "ft_delta.safetensors"}
    assert set(hub.files("ann/delta")) == delta | {"preprocessor_config.json"}
    last = {name for name in hub.files("ann/adapter") if name.startswith("last-checkpoint/")}
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} < last


def test_a_temperature_is_part_of_the_model_and_what_was_found_in_the_data_is_not(tmp_path):
    others = ("data_checks.json", "optimizer.pt", "_part.json", "training_args.bin")
    for name in ("model.safetensors", "ft_calibration.json", *others):
        (tmp_path / name).touch()
    assert model_files(tmp_path) == ["ft_calibration.json", "model.safetensors"]


def test_a_long_log_names_no_folder_either(tmp_path):
    file = tmp_path / "trainer_state.json"
    history = [{"step": step, "loss": 0.5} for step in range(50_000)]
    file.write_text(json.dumps({"best_model_checkpoint": "/home/ann/runs/checkpoint-3", "log_history": history}))
    uploaded = json.loads(shareable_file(file))
    assert uploaded == {"best_model_checkpoint": "checkpoint-3", "log_history": history}


def test_each_save_is_a_commit(hub):
    messages = [message for message in hub.messages("ann/cells") if message != "initial commit"]
    assert messages[0] == "Training in progress, step 2" and messages[-1] == "End of training"


def test_cards_keep_the_rules_of_the_hub(hub):
    cards = {name: hub.files(name)["README.md"].decode() for name in hub.repos if "README.md" in hub.files(name)}
    assert {name: found for name, text in cards.items() if (found := metadata_errors(text))} == {}
    data = ModelCard(cards["ann/cells"]).data.to_dict()
    assert (data["license"], data["base_model"], data["datasets"]) == ("apache-2.0", "org/resnet", "ethz/food101")
    assert data["pipeline_tag"] == "image-classification" and data["model-index"][0]["name"] == "ann/cells"
    assert ModelCard(cards["ann/both"]).data.base_model == ["org/resnet", "org/vit"]
    data = ModelCard(cards["ann/adapter"]).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "org/vit", "image-classification")
    assert 'hf_ft.load_delta("ann/delta")' in cards["ann/delta"]
    assert ModelCard(cards["ann/delta"]).data.library_name == "hf_ft"
    assert json.loads(hub.files("ann/local")["adapter_config.json"])["base_model_name_or_path"] == "vit"


@pytest.mark.parametrize(
    "line", ["base_model: /home/ann/resnet", "license: my own", "datasets: [my photos]", "model-index: [{name: x}]"]
)
def test_the_server_refuses_cards_as_the_hub_does(line):
    assert metadata_errors(f"---\n{line}\n---\n")


@pytest.fixture(scope="module")
def failures(hub, folder, patch):
    """For each repository, three uploads fail (two saves and the result); the fourth is accepted."""
    faults = [("refused/commit", 403, 3), ("broken/commit", 503, 3), ("dropped/commit", None, 3)]
    faults += [("ann/refused-delta", 403, 9), ("repos/create .*forbidden", 403, 9)]
    with contextlib.ExitStack() as planted:
        for pattern, status, times in faults:
            planted.enter_context(hub.fails(pattern, status, times=times))
        yield work(hub, "fail", folder, patch)


@pytest.mark.parametrize(("name", "why"), [("refused", "403"), ("broken", "503"), ("dropped", "RemoteProtocolError")])
def test_a_failed_upload_says_how_to_go_on(name, why, failures, folder, hub):
    """The process that failed ran the command in the message, and loaded what this uploaded."""
    place = folder / "home" / "plantedann" / "failed" / name
    assert failures[name].startswith(f"ann/{name} could not be uploaded: ") and why in failures[name]
    assert f"Nothing is lost, the files are in {place}." in failures[name]
    assert f"`hf-ft push --model {place} --hub_model_id ann/{name}` uploads them." in failures[name]
    assert "model.safetensors" in hub.files(f"ann/{name}")
    assert len([line for line in failures["told"] if f"not uploaded to ann/{name}" in line]) == 2


def test_a_delta_is_kept_and_a_repository_refused_before_training(failures):
    assert "ann/refused-delta could not be uploaded: 403" in failures["delta"]
    assert "/dropped/ft_delta --hub_model_id ann/refused-delta` uploads them" in failures["delta"]
    assert "hub_model_id='ann/forbidden' cannot be created: 403" in failures["before"]
