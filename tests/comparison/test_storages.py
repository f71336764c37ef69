"""Two workers, one of which is killed, share a comparison through each storage meant for several machines."""

import os
import subprocess
import sys

import pytest

from hf_ft.comparison import Results
from tests.comparison.small_comparison import SHORT, lasting, run
from tests.servers import PASSWORD, grpc_server, needs_grpc, needs_postgresql, postgresql

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("HF_FT_SERVERS"), reason="half a minute for each: set HF_FT_SERVERS=1"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one undisturbed worker finds."""
    return lasting(run(tmp_path_factory.mktemp("whole"), **SHORT))


@pytest.fixture
def storage(request, tmp_path):
    if request.param == "journal":
        yield str(tmp_path / "study.log")
    elif request.param == "grpc":
        with grpc_server(str(tmp_path / "study.db")) as server:
            yield server.url
    else:
        with postgresql() as server:
            yield server.url()


def worker(folder, dies, storage):
    command = [sys.executable, "-m", "tests.comparison.small_comparison", folder, "dies" if dies else "lives", storage]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def files_with(text, folder):
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "storage",
    ["journal", pytest.param("grpc", marks=needs_grpc), pytest.param("postgresql", marks=needs_postgresql)],
    indirect=True,
)
def test_two_workers_of_which_one_is_killed_find_what_one_does(storage, whole, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    killed, other = (worker(folder, dies, storage) for dies in (True, False))
    told = [process.communicate(timeout=300)[0] for process in (killed, other)]
    assert (killed.returncode, other.returncode) == (-9, 0), told
    assert lasting(Results.load(folder / f"results-{other.pid}.json")) == whole
    secret = storage.partition("://")[2].partition("@")[0] if "@" in storage else PASSWORD
    assert not [text for text in told if PASSWORD in text or secret in text]
    assert not files_with(PASSWORD, tmp_path) and not files_with(secret, tmp_path)
