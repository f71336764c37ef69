"""Every registered strategy keeps every law."""

import pytest

from hf_ft.docs_tables import documented
from hf_ft.testing import LAWS, suited, tiny_bert, tiny_resnet, tiny_vit

# A search as long as the default takes most of the time here, and shows no more.
OPTIONS = {"blockwise": {"search_epochs": 1, "storage": "memory", "baselines": False}}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
@pytest.mark.parametrize("name", documented())
def test_law(name, make, law, tmp_path):
    config = documented()[name](**OPTIONS.get(name, {}))
    LAWS[law](suited(config, make()), make, tmp_path)
