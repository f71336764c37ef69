"""A conformance kit: the laws that every strategy must satisfy, including third-party strategies.

>>> from hf_ft.testing import check_strategy
>>> check_strategy(MyConfig())
"""

from hf_ft.testing.laws import LAWS, check_strategy, suited
from hf_ft.testing.models import TINY_MODELS, tiny_bert, tiny_collaborative, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.training import same_tensors, still, tiny_data, train

__all__ = [
    "LAWS",
    "TINY_MODELS",
    "check_strategy",
    "same_tensors",
    "still",
    "suited",
    "tiny_bert",
    "tiny_collaborative",
    "tiny_data",
    "tiny_inputs",
    "tiny_resnet",
    "tiny_vit",
    "train",
]
