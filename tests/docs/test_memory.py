"""Memory of each process: the model in docs/tools/memory.py compared with the measurements."""

import json

import pytest
import torch

from docs.tools.memory import deviations
from tests.benchmarks import memory_ranks

CONTENT = json.loads(memory_ranks.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("config", memory_ranks.STRATEGIES, ids=lambda config: config.ft_type)
def test_a_run_has_the_sizes_that_were_measured(config):
    with torch.device("meta"):
        found = memory_ranks.sizes_of(memory_ranks.small_vit(), config)
    assert found == CONTENT["small"][config.ft_type], "run `python -m tests.benchmarks.memory_ranks`"


def test_the_model_is_near_what_was_measured():
    measured = {(row["strategy"], row["sharded"], row["ranks"]) for row in CONTENT["measured"]}
    carried = {config.ft_type for config in memory_ranks.STRATEGIES if config.needs().sharded}
    assert {name for name, sharded, _ in measured if sharded} == carried
    assert {ranks for _, _, ranks in measured} == {1, 2, 4}
    for row, (held, peak) in zip(CONTENT["measured"], deviations(CONTENT), strict=True):
        assert abs(held) < 0.01, row
        assert abs(peak) < (0.2 if row["sharded"] else 0.03), row  # a layer is a quarter of this model
