"""Full fine-tuning against a loop written by hand in float64."""

import pytest

from hf_ft import FullConfig
from tests.strategies.test_linear_probe import STEPS
from tests.strategies.test_lp_ft import BODY, HEAD, as_by_hand


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        (FullConfig(), [(STEPS, BODY, BODY, True)]),
        (FullConfig(norm_mode="eval", head_lr=HEAD), [(STEPS, BODY, HEAD, False)]),
    ],
)
def test_written_by_hand(config, stages, tmp_path):
    as_by_hand(config, stages, tmp_path)
