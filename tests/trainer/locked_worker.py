"""Trains in its own folder, and then in one that another process holds: `locked_worker.py OWN HELD`."""

import os
import sys

from hf_ft import OptionError
from hf_ft.testing import tiny_resnet, train
from tests import quick

quick.set_up()
own, held = sys.argv[1:]
train(tiny_resnet(), "full", own, max_steps=2, save_strategy="steps", save_steps=1)
try:
    train(tiny_resnet(), "full", held, save_strategy="steps", resume=True)
except OptionError as error:
    print(f"rank {os.environ.get('RANK', 0)}: {error}")
