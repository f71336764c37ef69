"""Every registered strategy, and two that are composed, keep every law."""

import pytest

from hf_ft.registry import strategies
from hf_ft.testing import LAWS, suited, tiny_bert, tiny_resnet, tiny_vit


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
@pytest.mark.parametrize("name", strategies())
def test_law(name, make, law, tmp_path):
    LAWS[law](suited(strategies()[name](), make()), make, tmp_path)
