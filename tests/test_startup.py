"""What is imported when: the package and light commands without torch, the rest by name on first use."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import transformers as hf

import hf_ft
from hf_ft.core.config import strategies, write_configs
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.models.ensemble.processor import combined
from hf_ft.strategies.l2_sp import L2SPConfig
from hf_ft.strategies.tred.config import TREDConfig
from hf_ft.testing.models import tiny_resnet
from tests.forked import python

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "sklearn")
pil = pytest.mark.skipif(
    getattr(hf.MobileNetV2ImageProcessorPil, "is_dummy", False),
    reason="this version of Transformers has no image processors without torchvision",
)


def run(code, *arguments):
    """The output of a fresh process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def run_forked(code, *arguments):
    """The output of a process that has imported libraries, `transformers.Trainer` too, before anything of ours."""
    ran = python("-c", code, *arguments)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["list"], 0),
        (["describe", "l2_sp"], 0),
        (["describe", "l2_ps"], 2),
        (["tarin"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_light_commands_import_nothing_heavy(arguments, code):
    printed = run(
        "import json, sys; from hf_ft.cli import main; code = main(sys.argv[2:]);"
        "print(json.dumps([code, [name for name in json.loads(sys.argv[1]) if name in sys.modules]]))",
        json.dumps(HEAVY),
        *arguments,
    )
    assert json.loads(printed.splitlines()[-1]) == [code, []]


def test_output_that_nobody_reads_is_no_error():
    ran = subprocess.Popen(
        [sys.executable, "-m", "hf_ft", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert ran.stdout is not None and ran.stderr is not None
    ran.stdout.close()  # as `head` does
    assert (ran.stderr.read(), ran.wait()) == ("", 0)
    ran.stderr.close()


def test_importing_the_package_imports_nothing_heavy_and_knows_its_names():
    printed = run(
        "import json, sys, hf_ft; hidden = {*hf_ft.__all__} - {*dir(hf_ft)}; hf_ft.documents, hf_ft.cli;"
        "print(json.dumps([sorted(hidden), [name for name in json.loads(sys.argv[1]) if name in sys.modules]]))",
        json.dumps(HEAVY),
    )
    assert json.loads(printed) == [[], []]


def test_every_public_name_is_there():
    assert len(hf_ft.__all__) > 50 and all(getattr(hf_ft, name) is not None for name in hf_ft.__all__)
    with pytest.raises(AttributeError, match="module 'hf_ft' has no attribute 'FTTrainr'"):
        hf_ft.FTTrainr  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'FTTrainr' from 'hf_ft'"):
        from hf_ft import FTTrainr  # noqa: F401


def test_no_public_name_is_hidden_by_a_module():
    folder = Path(hf_ft.__file__).parent
    modules = {path.stem for path in folder.iterdir()}
    assert {*hf_ft.__all__} & modules == {"diagnostics"}


@pytest.mark.parametrize(
    "name", ["data", "trainer", "diagnostics", "advice", "comparison", "testing", "zoo", "metrics"]
)
def test_a_module_is_an_attribute(name):
    assert getattr(hf_ft, name) is importlib.import_module(f"hf_ft.{name}")


# Registered by name


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """A folder of an ensemble whose members read different images, and a photo."""
    folder = tmp_path_factory.mktemp("ensemble")
    sizes = ({"height": 16, "width": 16}, {"height": 24, "width": 24})
    combined(
        [
            hf.MobileNetV2ImageProcessorPil(size=sizes[0], do_center_crop=False),
            hf.EfficientNetImageProcessorPil(size=sizes[1], include_top=False),
        ]
    ).save_pretrained(folder)
    CollaborativeModel.from_members([tiny_resnet(), tiny_resnet(seed=1)], inputs=[0, 1]).save_pretrained(folder)
    PIL.Image.fromarray(np.zeros((40, 30, 3), dtype=np.uint8)).save(folder / "photo.png")
    return folder


# What is imported first, and what is looked up first after that.
ORDERS = [
    ("import hf_ft, transformers", "model"),
    ("import hf_ft; from transformers import Trainer; import transformers", "config"),
    ("from transformers import Trainer; import hf_ft, transformers", "pipeline"),
    ("import hf_ft.models.ensemble.config, transformers", "processor"),
    ("from hf_ft import CollaborativeImageProcessor; import transformers", "model"),
]
LOOKS = {
    "model": (
        "type(transformers.AutoModelForImageClassification.from_pretrained(folder)).__name__",
        "CollaborativeModel",
    ),
    "config": ("type(transformers.AutoConfig.from_pretrained(folder)).__name__", "CollaborativeConfig"),
    "processor": (
        "type(transformers.AutoImageProcessor.from_pretrained(folder)).__name__",
        "CollaborativeImageProcessor",
    ),
    "pipeline": ("len(transformers.pipeline('image-classification', model=folder)(folder + '/photo.png'))", "3"),
}


# Each in a process that has imported neither Transformers nor hf_ft, only other slow libraries.
FORKS = """
import json, os, sys
import PIL.Image, accelerate, datasets, scipy.signal, sklearn.svm, torch._dynamo, torch.distributed.tensor
assert not {"transformers", "hf_ft"} & {*sys.modules}
folder = sys.argv[1]
for index, code in enumerate(json.loads(sys.argv[2])):
    if not (child := os.fork()):
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def in_order(first):
    """That one, then the others, except the pipeline, which is slowest and looks where the others do."""
    return [first, *(name for name in LOOKS if name not in (first, "pipeline"))]


@pytest.fixture(scope="module")
def shown(ensemble):
    """The output of each order of imports, up to a failure."""
    codes = [
        f"{imports}; print(json.dumps([index, {', '.join(LOOKS[name][0] for name in in_order(first))}]))"
        for imports, first in ORDERS
    ]
    lines = map(json.loads, run(FORKS, ensemble, json.dumps(codes)).splitlines())
    return {index: list(map(str, found)) for index, *found in lines}


@pytest.mark.slow
@pil
@pytest.mark.parametrize(("imports", "first"), ORDERS)
def test_transformers_loads_an_ensemble_after_a_plain_import(imports, first, shown):
    assert shown.get(ORDERS.index((imports, first))) == [LOOKS[name][1] for name in in_order(first)]


@pytest.mark.slow
def test_the_first_lookup_finds_every_strategy_in_order(tmp_path):
    write_configs(tmp_path, [L2SPConfig(), TREDConfig()])
    printed = run_forked(
        "import json, sys, hf_ft; print(json.dumps([config.ft_type for config in hf_ft.load_configs(sys.argv[1])]));"
        "from hf_ft.core.config import strategies;"
        "print(json.dumps([hf_ft.config_class('soft').ft_type, *strategies()]))",
        tmp_path,
    )
    loaded, (looked, *names) = map(json.loads, printed.splitlines())
    assert loaded == ["l2_sp", "tred"] and looked == "soft"
    assert names == [name for name, kind in strategies().items() if kind.__module__.startswith("hf_ft.")]
    assert names == sorted(names)  # whatever module they share


THEIRS = """
import json, sys
from dataclasses import dataclass
from hf_ft import FTConfig, Plan, register
def theirs(name):
    @register(name)
    @dataclass(frozen=True, kw_only=True)
    class Theirs(FTConfig):
        '''Another's.'''
        def plan(self, model, state):
            return Plan()
    return Theirs
"""


@pytest.mark.slow
def test_third_party_strategies_come_after_ours_and_take_none_of_their_names():
    printed = run_forked(
        f"{THEIRS}\nkind = theirs('theirs')\n"
        "import hf_ft; from hf_ft.core.config import strategies\n"
        "assert hf_ft.config_class('theirs') is kind and type(hf_ft.FTConfig.from_dict(kind().to_dict())) is kind\n"
        "try:\n    theirs('l2_sp')\nexcept ValueError as error:\n    print(error)\n"
        "print(json.dumps(list(strategies())))"
    )
    clash, names = printed.splitlines()
    assert clash.startswith("strategy name 'l2_sp' is already taken by hf_ft.strategies.l2_sp")
    assert "L2SPConfig" in clash
    assert json.loads(names)[-1] == "theirs" and json.loads(names)[0] == "ada_filter"


def test_strategies_register_again_when_their_package_is_reloaded():
    before = strategies()
    importlib.reload(sys.modules["hf_ft.strategies"])
    assert strategies() == before
