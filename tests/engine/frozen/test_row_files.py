"""A file of recorded rows has its disk space allocated before it is written, or is not created."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from hf_ft import FrozenCache
from hf_ft.data.rows import GB
from hf_ft.engine.frozen import row_files
from hf_ft.engine.frozen.record import batches_of, fill
from hf_ft.engine.frozen.row_files import reserve
from hf_ft.engine.frozen.row_store import RowsDiffer, RowStore

FIRST = {"a": torch.zeros(2, 300, 300), "b": torch.zeros(2).bool()}
ROWS = 16


def cache(folder):
    return FrozenCache(memory_gb=0.0, folder=str(folder))


def full(number, start, size):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unsupported(number, start, size):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.parametrize("allocation", ["of the system", "not supported", "not there"])
def test_every_block_is_there(allocation, tmp_path, monkeypatch):
    if allocation == "not supported":
        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    if allocation == "not there":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    size = 3 * 2**20 + 5
    with (tmp_path / "file").open("wb") as file:
        reserve(file, size)
    found = (tmp_path / "file").stat()
    assert found.st_size == size and 512 * found.st_blocks >= size, "the file has holes"
    assert not any((tmp_path / "file").read_bytes())


def test_the_rows_of_a_store_have_their_blocks(tmp_path):
    store = RowStore(ROWS, FIRST, cache(tmp_path))
    (folder,) = tmp_path.iterdir()
    for file in folder.iterdir():
        assert 512 * file.stat().st_blocks >= file.stat().st_size > 0
    store.put(torch.arange(2), {"a": torch.ones(2, 300, 300), "b": torch.ones(2).bool()})
    assert store.take(torch.tensor([1, 2]))["a"].mean(dim=(1, 2)).tolist() == [1.0, 0.0]
    del store
    assert not list(tmp_path.iterdir())


def test_if_the_disk_is_full_nothing_is_kept_or_left(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(RowsDiffer, match="a file of 0.0 GB cannot be written: No space left on device"):
        RowStore(ROWS, FIRST, cache(tmp_path))
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_noticed_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(RowsDiffer, match="0.0 GB of disk space are free"):
        RowStore(ROWS, FIRST, cache(tmp_path))


class Ranks:
    """An accelerator for one of two ranks on a machine; the other rank reports this."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, first, other=1):
        self.is_local_main_process, self.other = first, other

    def gather(self, mine):
        return torch.cat((mine, mine.new_tensor([self.other])))


def filled(folder, ranks):
    rows = ((torch.tensor(some), {"a": torch.full((len(some), 3), 7.0)}) for some in batches_of(ROWS, 4))
    return fill(ROWS, rows, cache(folder), lambda _: None, ranks)


def test_the_ranks_of_a_machine_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files.secrets, "token_hex", lambda _: "name")
    checked = []
    monkeypatch.setattr(RowStore, "_check_disk", lambda *_: checked.append(1))
    first, second = filled(tmp_path, Ranks(first=True)), filled(tmp_path, Ranks(first=False))
    assert [path.name for path in tmp_path.iterdir()] == ["hf_ft_frozen_name"] and len(checked) == 1
    first.put(torch.tensor([2]), {"a": torch.full((1, 3), 8.0)})
    assert second.take(torch.tensor([1, 2]))["a"][:, 0].tolist() == [7.0, 8.0]
    del first
    assert not list(tmp_path.iterdir()) and second.take(torch.tensor([2]))["a"][0, 0] == 8.0


def test_if_one_machine_has_no_space_no_rank_keeps_anything(tmp_path, monkeypatch):
    for ranks in (Ranks(first=True, other=0), Ranks(first=False, other=0)):
        with pytest.raises(RowsDiffer, match="no room"):
            filled(tmp_path, ranks)
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(RowsDiffer, match="No space left"):
        filled(tmp_path, Ranks(first=True))


def test_a_limit_is_in_gigabytes(tmp_path):
    with pytest.raises(RowsDiffer, match="allow"):
        RowStore(2 * GB, {"a": torch.zeros(1, 3)}, cache(tmp_path))
