"""Commands with wrong flags and damaged files: they must end with status 0 or 2, and say why in one line."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from hf_ft.cli.compare import CompareFlags
from hf_ft.cli.flags import DataFlags, MethodFlags
from hf_ft.comparison import Settings
from hf_ft.core.config import strategies
from hf_ft.core.options import options
from tests.faults.materials import Materials, copied
from tests.faults.mutants import (
    WORDS,
    Chance,
    damaged_bytes,
    damaged_database,
    damaged_image,
    damaged_json,
    damaged_lines,
    damaged_pickle,
    damaged_tensors,
    reshaped,
)
from tests.faults.processes import run
from tests.faults.results import RIGHT, WRONG, Case, Outcome
from tests.faults.workloads import failed

NUMBER = 1000
SHARE = 10  # one training run in this many also uses other splits, and the like
# Flags whose large values rightly take long, and those that need hardware, other programs or compilers.
LONG = ("max_steps", "num_train_epochs", "trials", "seeds", "most_trials", "search_epochs", "search_seeds", "particles",
        "iterations", "gradient_accumulation_steps", "dataloader_num_workers", "dataloader_prefetch_factor",
        "relationship_steps", "disentangling_epochs", "hours")  # fmt: skip
LEFT_OUT = ("torch_compile", "torch_compile_backend", "torch_compile_mode", "deepspeed", "fsdp", "fsdp_config", "debug",
            "resume_from_checkpoint", "use_cpu", "local_rank", "ddp_backend")  # fmt: skip
Make = Callable[[Materials, Path, Chance], Sequence[str]]


def cases(number: int, seed: int, materials: Materials) -> Iterator[Case]:
    """This many damaged inputs, of all kinds in turn."""
    kinds = list(KINDS)
    for index in range(number):
        kind = kinds[index % len(kinds)]

        def made(folder: Path, kind: str = kind, index: int = index) -> Outcome:
            command = KINDS[kind](materials, folder, random.Random(f"{seed} {index}"))
            return _tried(command, folder)

        yield Case("mutations", kind, index, made)


def _tried(command: Sequence[str], folder: Path) -> Outcome:
    ended = run(command, folder)
    shown = " ".join(word if len(word) < 60 else f"{word[:50]}..." for word in command)
    found = failed(ended, (0, 2))
    if found is None and (folder / "executed").exists():
        found = WRONG, "code in a file was executed"
    if found is None and ended.code == 2 and " error: " not in ended.err.strip().splitlines()[-1]:
        found = WRONG, f"the last line says nothing: {ended.err.strip().splitlines()[-1]}"
    return (
        Outcome(RIGHT, f"{ended.code} after {shown}") if found is None else Outcome(found[0], f"{found[1]} <- {shown}")
    )


# --- flags and config files ---------------------------------------------------------------------------------


def _names(*kinds: Any) -> list[str]:
    return [field.name for kind in kinds for field in fields(kind) if field.init and field.name not in LEFT_OUT]


def _strategy_options(names: Sequence[str]) -> list[str]:
    return [f"{name}.{option.name}" for name in names for option in options(strategies()[name])]


def _value(name: str, chance: Chance) -> str:
    words = WORDS
    if name.rpartition(".")[2] in LONG:
        words = tuple(word for word in words if word not in ("1e308", "9" * 30, "0x10", "1_000"))
    return chance.choice(words)


def _flags(materials: Materials, folder: Path, chance: Chance) -> Sequence[str]:
    strategy = chance.choice(list(strategies()))
    together = _names(DataFlags, MethodFlags, TrainingArguments)
    command, known = chance.choice(
        (
            (materials.train("--strategy", strategy), [*together, *_strategy_options([strategy]) * 10]),
            (materials.train("--strategy", strategy), [*together, *_strategy_options([strategy]) * 10]),
            (materials.compare(), _names(DataFlags, CompareFlags, Settings, Settings, TrainingArguments)),
            (materials.search(), [option.name for option in options(strategies()["blockwise"])]),
            (["blocks", str(materials.resnet)], ["head", "blocks", "scheme", "length"]),
            (["advise", "--model", str(materials.resnet), "--dataset", str(materials.photos)], _names(DataFlags)),
            (["describe", strategy], ["help"]),
        )
    )
    for _ in range(chance.choice((1, 1, 1, 2))):
        command = _changed(list(command), known, chance)
    return command


def _changed(command: list[str], known: Sequence[str], chance: Chance) -> list[str]:
    kind, name = chance.randrange(10), chance.choice(known)
    if kind == 0:
        del command[chance.randrange(len(command))]
    elif kind == 1:
        command.insert(chance.randrange(len(command) + 1), chance.choice(WORDS))
    elif kind == 2:
        command += [f"--{name[:-1]}", _value(name, chance)]
    elif kind == 3:
        command += [f"--{name}"]
    elif kind == 4:
        command += [f"--{name}={_value(name, chance)}"]
    else:
        command += [f"--{name}", _value(name, chance)]
    return command


def _yaml(materials: Materials, folder: Path, chance: Chance) -> Sequence[str]:
    strategy = chance.choice(list(strategies()))
    content: dict[str, Any] = {
        "model": str(materials.resnet),
        "dataset": str(materials.photos),
        "strategy": [strategy, "l2_sp"] if strategy != "l2_sp" else [strategy],
        "l2_sp": {"alpha": 0.1, "beta": 0.01},
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_kwargs": {},
        "metrics": ["accuracy"],
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": "out",
    }
    kept = {name: content[name] for name in ("use_cpu", "output_dir")}
    if chance.random() < 0.7:
        changed = reshaped(content, chance)
        changed = changed | kept if isinstance(changed, dict) else changed
        text = yaml.safe_dump(changed, allow_unicode=True).encode()
    else:
        text = damaged_lines(yaml.safe_dump(content).encode(), chance)
    more = (
        b"\nx: &x [1, *x]\n",
        b"\nmodel: !!python/object/apply:os.mkdir [executed]\n",
        b"\n? [a]\n: b\n",
        b"\n\t- x\n",
    )
    (folder / "config.yaml").write_bytes(text + (chance.choice(more) if chance.random() < 0.1 else b""))
    return ["train", "config.yaml", "--max_steps", "1", "--output_dir", "out", "--use_cpu", "true"]


# --- data ---------------------------------------------------------------------------------------------------


def _table(materials: Materials, folder: Path, chance: Chance) -> Sequence[str]:
    rows = list(csv.DictReader(materials.reviews.read_text(encoding="utf-8").splitlines()))
    kind = chance.choice(("csv", "tsv", "json", "jsonl"))
    if kind in ("json", "jsonl") and chance.random() < 0.6:
        content: Any = reshaped(rows, chance)
        lines = content if kind == "jsonl" and isinstance(content, list) else [content]
        text = "\n".join(map(json.dumps, lines)).encode()
    else:
        text = damaged_lines(_written(rows, kind), chance)
    file = folder / f"table.{kind}"
    file.write_bytes(text)
    columns = ["--label_column", chance.choice(("label", "score", "text", "none"))] if chance.random() < 0.3 else []
    return materials.train_texts(file.name, *columns)


def _written(rows: Sequence[dict[str, str]], kind: str) -> bytes:
    if kind == "json":
        return json.dumps(rows, indent=0).encode()
    if kind == "jsonl":
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _images(materials: Materials, folder: Path, chance: Chance) -> Sequence[str]:
    photos = folder / "photos"
    shutil.copytree(materials.photos, photos)
    for _ in range(chance.choice((1, 1, 3))):
        file = chance.choice(sorted(path for path in photos.rglob("*.png") if path.is_file()))
        content = file.read_bytes()
        kind = chance.randrange(8)
        if kind == 0:
            file.unlink()
            chance.choice((lambda: file.mkdir(), lambda: file.symlink_to("nowhere"), lambda: file.symlink_to(file)))()  # noqa: B023
        elif kind == 1:
            shutil.move(file, file.with_suffix(chance.choice((".jpg", ".txt", "", ".PNG", ".gif"))))
        elif kind == 2:
            chance.choice((lambda: shutil.rmtree(file.parent), lambda: shutil.rmtree(file.parent.parent)))()  # noqa: B023
            break
        else:
            file.write_bytes(damaged_image(content, chance))
    more = chance.choice(((), (), ("--on_corrupt", "skip"), ("--on_corrupt", "refuse")))
    return [*materials.train(*more), "--dataset", "photos"]


# --- checkpoints, results and studies -----------------------------------------------------------------------


def _damage(file: Path, chance: Chance) -> None:
    """Damage a file according to its format; one in twenty is missing, or a folder."""
    if chance.random() < 0.05:
        file.unlink()
        if chance.random() < 0.5:
            file.mkdir()
    elif file.suffix in (".pt", ".pth", ".bin"):
        damaged_pickle(file, chance)
    elif file.suffix == ".db":
        damaged_database(file, chance)
    else:
        damage = {".json": damaged_json, ".safetensors": damaged_tensors, ".log": damaged_lines}.get(file.suffix)
        file.write_bytes((damage or damaged_bytes)(file.read_bytes(), chance))


def _model(materials: Materials, folder: Path, chance: Chance) -> Sequence[str]:
    texts = chance.random() < 0.3
    source = materials.bert if texts else materials.resnet
    shutil.copytree(source, folder / "model")
    _damage(chance.choice(sorted((folder / "model").iterdir())), chance)
    if texts:
        return [*materials.train_texts(str(materials.reviews)), "--model", "model"]
    others = (
        ["blocks", "model"],
        [*materials.search(), "--model", "model"],
        [*materials.compare(), "--model", "model"],
    )
    return chance.choice(others) if chance.random() < 0.2 else [*materials.train(), "--model", "model"]


def _resumed(materials: Materials, folder: Path, chance: Chance) -> Sequence[str]:
    copied(materials.trained, folder)
    checkpoint = folder / "out" / "checkpoint-4"
    names = ["ft_config.json", "ft_state.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt"]
    names += ["rng_state.pth", "model.safetensors", "ft_modules.safetensors", "ft_files.json", "config.json"]
    _damage(checkpoint / chance.choice([name for name in names if (checkpoint / name).exists()]), chance)
    resume = chance.choice(("true", "out/checkpoint-4"))
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no", "--save_total_limit", "2")
    together = ("--strategy", "lp_ft", "--strategy", "tred", *saving, "--resume_from_checkpoint", resume)
    return materials.train(*together, steps=6)


def _results(materials: Materials, folder: Path, chance: Chance) -> Sequence[str]:
    (folder / "out").mkdir()
    shutil.copy(materials.compared / "out" / "results.json", folder / "out")
    _damage(folder / "out" / "results.json", chance)
    return ["compare", "--report", "out"]


def _comparison(materials: Materials, folder: Path, chance: Chance) -> Sequence[str]:
    copied(materials.compared, folder)
    files = [file for file in sorted((folder / "out").rglob("*")) if file.suffix in (".json", ".safetensors", ".db")]
    _damage(chance.choice([*files, *[folder / "out" / "compare.db"] * len(files)]), chance)
    return materials.compare()


def _sqlite(materials: Materials, folder: Path, chance: Chance) -> Sequence[str]:
    copied(materials.searched, folder)
    _damage(next((folder / "out").glob("*.db")), chance)
    return materials.search()


def _journal(materials: Materials, folder: Path, chance: Chance) -> Sequence[str]:
    copied(materials.journal, folder)
    _damage(folder / "out" / "study.log", chance)
    return materials.search("--storage", "out/study.log")


KINDS: dict[str, Make] = {
    "flags": _flags,
    "YAML file": _yaml,
    "table": _table,
    "images": _images,
    "model": _model,
    "checkpoint": _resumed,
    "results.json": _results,
    "comparison": _comparison,
    "SQLite study": _sqlite,
    "journal study": _journal,
}
