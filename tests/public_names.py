"""Type checkers see the names that ``hf_ft`` imports lazily: ``make lint`` checks this file."""

from typing import assert_type

import hf_ft
from hf_ft import FTTrainer, L2SPConfig, diagnostics
from hf_ft.errors import OptionError
from hf_ft.strategies.l2_sp import L2SPConfig as Config
from hf_ft.trainer.trainer import FTTrainer as Trainer

assert_type(FTTrainer, type[Trainer])
assert_type(L2SPConfig, type[Config])
assert_type(hf_ft.OptionError, type[OptionError])
hf_ft.FTTrainr  # type: ignore[attr-defined]  # noqa: B018
diagnostics.feature_distortio  # type: ignore[attr-defined]  # noqa: B018
