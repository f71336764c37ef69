"""Two machines train one model, and share one comparison, like one machine: in two namespaces of this one."""

import json
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from hf_ft.comparison import Results
from tests.comparison.small_comparison import SHORT, lasting, run
from tests.docs.test_docs import image_checkpoint, photos
from tests.nodes import needs_nodes, two_nodes
from tests.servers import PASSWORD, needs_grpc, needs_postgresql, postgresql

pytestmark = [pytest.mark.slow, needs_nodes]
SERVE = """
from optuna.storages import get_storage, run_grpc_proxy_server
from hf_ft.search.storage import open_storage
run_grpc_proxy_server(get_storage(open_storage("{}")), host="{}", port=13000)
"""


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as made:
        yield made


def command(model, data, output, *launch):
    return [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2",
        "--mixed_precision", "no", "--dynamo_backend", "no", *launch, "-m", "hf_ft", "train", "--model", model,
        "--dataset", data, "--strategy", "lp_ft", "--num_train_epochs", "2", "--per_device_train_batch_size", "4",
        "--use_cpu", "True", "--save_strategy", "epoch", "--output_dir", output,
    ]  # fmt: skip


def test_two_nodes_train_what_two_local_ranks_do(nodes, tmp_path):
    image_checkpoint(tmp_path / "model", classes=2)
    for split in ("train", "validation"):
        photos(tmp_path / "data" / split)
    given = tmp_path / "model", tmp_path / "data"
    together = command(*given, tmp_path / "local", "--num_machines", "1", "--main_process_port", "29511")
    done = subprocess.run(together, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    meeting = "--main_process_ip", nodes[0].address, "--main_process_port", "29511"
    started = [
        node.start(*command(*given, tmp_path / "nodes", "--num_machines", "2", "--machine_rank", rank, *meeting))
        for rank, node in enumerate(nodes)
    ]
    told = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(told)
    assert "[process 1]" not in told[0]
    local, apart = (load_file(tmp_path / name / "model.safetensors") for name in ("local", "nodes"))
    assert local.keys() == apart.keys() and all(local[name].equal(apart[name]) for name in local)
    losses = [
        [entry["loss"] for entry in json.loads(file.read_text())["log_history"] if "loss" in entry]
        for name in ("local", "nodes")
        for file in [sorted((tmp_path / name).glob("checkpoint-*/trainer_state.json"))[-1]]
    ]
    assert losses[0] == losses[1] and losses[0]


@pytest.mark.parametrize(
    "kind", [pytest.param("grpc", marks=needs_grpc), pytest.param("postgresql", marks=needs_postgresql)]
)
def test_two_nodes_share_a_comparison(kind, nodes, tmp_path):
    """The storage is on the first; the worker of the second dies, which the first notices only by its heartbeat."""
    whole = lasting(run(tmp_path / "whole", **SHORT))
    folder = tmp_path / "shared"
    folder.mkdir()
    if kind == "grpc":
        server = nodes[0].start(sys.executable, "-c", SERVE.format(tmp_path / "study.db", nodes[0].address))
        told = share(folder, f"grpc://{nodes[0].address}:13000", nodes)
        server.kill()
    else:
        with postgresql(nodes[0].address, ["ip", "netns", "exec", nodes[0].name]) as server:
            told = share(folder, server.url(), nodes)
    [results] = folder.glob("results-*.json")
    assert lasting(Results.load(results)) == whole
    assert not [text for text in told if PASSWORD in text]
    assert not [path for path in folder.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]


def share(folder, storage, nodes):
    command = [sys.executable, "-m", "tests.comparison.small_comparison", folder]
    # Two containers whose first process has the number 1: their files next to each other have distinct names.
    lives, dies = (node.start(*command, does, storage) for node, does in zip(nodes, ("lives", "dies"), strict=True))
    began = time.monotonic()
    told = [process.communicate(timeout=500)[0] for process in (lives, dies)]
    assert (lives.returncode, dies.returncode) == (0, 137), told
    print(f"{storage.partition(':')[0]}: {time.monotonic() - began:.0f} s")
    return told
