"""Made-up results of comparisons in their JSON form: seeded random numbers that look like real ones."""

import dataclasses
import functools
import math

import numpy as np
import torch

from hf_ft.inference.calibration import SplitCalibration

CLASSES = ("functional", "defective")
SIZES = {"train": 350, "validation": 150, "test": 600, "ood": 400}
SHARE = 0.32  # of the second class
BLOCKS = ("block0", "block1", "block2", "block3", "block4", "block5", "features")
EPOCHS = 8
BUDGET = 190.0  # wall-clock seconds of tuning
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
HOSTILE = "<script>alert('x')</script> & \"q\" | `b` </style>"

# Name: how good it is, seconds per training run, weights trained.
FINISHED = {
    "full": (0.80, 31.0, 2_226_434),
    "linear_probe": (0.755, 6.2, 2_562),
    "lp_ft": (0.812, 22.0, 2_226_434),
    "l2_sp": (0.803, 33.5, 2_226_434),
    "daft": (0.835, 32.0, 2_226_434),
    "blockwise": (0.82, 17.4, 1_682_000),
    "tred": (0.81, 44.0, 2_226_434),
    "layer_decay": (0.828, 31.5, 2_226_434),
    "amcf": (0.826, 58.0, 3_914_000),
    "delta": (0.801, 45.0, 2_226_434),
    "bss": (0.79, 36.0, 2_226_434),
    "attention_transfer": (0.798, 43.0, 2_226_434),
    "gradual_unfreezing": (0.809, 19.0, 2_226_434),
    "lp_ft+l2_sp": (0.814, 24.0, 2_226_434),
}


def comparison(seeds=3, hostile=False):
    """A whole comparison: 14 contenders that finished and four that did not, with out-of-distribution data."""
    random = np.random.default_rng(7)
    labels = {split: _labels(random, SIZES[split]) for split in ("validation", "test", "ood")}
    contenders = [_contender(random, labels, name, *FINISHED[name], seeds) for name in FINISHED]
    contenders += _others(random, labels, hostile)
    return {
        "format": 1,
        "title": HOSTILE if hostile else "mobilenet_v2 on elpv (made-up figures)",
        "command": "hf-ft compare --model mobilenet_v2 --dataset elpv --strategies all --labelled 500 --trials 6 "
        f"--seeds {seeds} --num_train_epochs 8 --output_dir runs/compare",
        "metric": "balanced_accuracy",
        "greater_is_better": True,
        "model": {"name": "mobilenet_v2", "parameters": 2_226_434, "image_size": 96, "task": "image"},
        "data": {
            "name": "elpv",
            "classes": [CLASSES[0], HOSTILE if hostile else CLASSES[1]],
            "sizes": SIZES,
            "class_counts": {split: _counts(size) for split, size in SIZES.items()},
            "skipped": {"train": 2, "test": 0},
            "notices": ["ELPV: CC-BY-NC-SA-4.0."],
            "notes": ["150 of the 500 labelled images were set aside for validation, stratified by class."],
            "checks": _checks(HOSTILE if hostile else CLASSES[1]),
        },
        "labels": {split: rows.tolist() for split, rows in labels.items()},
        "settings": {"epochs": EPOCHS, "batch_size": 32, "optim": "sgd", "trials": 6, "seeds": seeds, "hours": None},
        "versions": {"hf_ft": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"processor": "x86_64", "cores": 2, "gpu": None, "memory_gb": 16},
        "seconds": 7_384.0,
        "contenders": contenders,
        "advice": _advice(),
        "mistakes": _mistakes(hostile),
        **_won(contenders),
    }


def _checks(label):
    """One test image that is also in train, and one that is nearly the same."""
    first = {"split": "train", "row": 7, "file": "cells/7.png", "label": CLASSES[0]}
    others = ({"split": "test", "row": 2, "file": "", "label": label}, {"split": "test", "row": 3, "file": label})
    said = ("1 sample of test equal to train", "1 sample of test nearly equal to train")
    kinds = zip(("same", "near"), others, strict=True)
    return {"said": said, "duplicates": [{"kind": kind, "samples": [first, one]} for kind, one in kinds], "sets": 30}


def smallest():
    """One contender, one seed, a regression: no classes, no test split, an error as the metric."""
    run = _training(
        seed=0,
        params={"learning_rate": 0.01},
        validation=0.412,
        scores={"validation": {"mse": 0.412, "mae": 0.5}},
        curve=[{"epoch": 1.0, "loss": 0.9, "validation": 0.412}],
        seconds=2.0,
    )
    full = _entry("full", "finished", trials=[run], chosen=0, runs=[run])
    return comparison() | {
        "title": "tiny on numbers",
        "metric": "mse",
        "greater_is_better": False,
        "data": {"name": "numbers", "classes": [], "sizes": {"train": 20, "validation": 10}},
        "labels": {},
        "mistakes": None,
        "contenders": [full],
        "advice": None,
        "winner": "full",
        "winner_seed": 0,
    }


def many_classes(count=120):
    """As :func:`comparison`, with the winner's predictions over this many classes."""
    content, random = comparison(), np.random.default_rng(1)
    truth = np.arange(SIZES["test"]) % count
    wrong = random.random(len(truth)) < 0.2
    predicted = np.where(wrong, (truth + random.integers(1, 4, len(truth))) % count, truth)
    content["data"] |= {"classes": [f"class {c}" for c in range(count)], "class_counts": {}}
    content["labels"]["test"] = truth.tolist()
    winner = next(c for c in content["contenders"] if c["name"] == content["winner"])
    for run in winner["runs"]:
        run["predictions"]["test"] = predicted.tolist()
    return content


def many_strategies(more=20):
    """As :func:`comparison`, with this many more strategies, many of which score and cost about the same."""
    content, random = comparison(), np.random.default_rng(3)
    labels = {split: np.array(rows) for split, rows in content["labels"].items()}
    content["contenders"] += [
        _contender(random, labels, f"strategy_{i}+l2_sp", random.uniform(0.78, 0.83), random.uniform(20, 40), 2_000, 3)
        for i in range(more)
    ]
    return content | _won(content["contenders"])


def _won(contenders):
    finished = [c for c in contenders if c["status"] == "finished"]
    best = max(finished, key=lambda c: np.mean([run["validation"] for run in c["runs"]]))
    return {"winner": best["name"], "winner_seed": max(best["runs"], key=lambda run: run["validation"])["seed"]}


def _labels(random, rows):
    return (random.permutation(rows) < SHARE * rows).astype(int)


def _counts(size):
    second = math.ceil(SHARE * size)
    return [size - second, second]


def _predictions(random, labels, skill):
    right = random.random(len(labels)) < np.where(labels == 1, skill - 0.06, skill + 0.06)
    return np.where(right, labels, 1 - labels)


def _scores(predicted, labels):
    recalls = [float((predicted[labels == c] == c).mean()) for c in (0, 1)]
    accuracy = float((predicted == labels).mean())
    return {"accuracy": accuracy, "balanced_accuracy": sum(recalls) / 2, "macro_f1": accuracy - 0.01}


def _training(**given):
    """One of :class:`hf_ft.comparison.results.Training`, as a dict; two cores compute all the time."""
    return {
        "compute": 1.9 * given.get("seconds", 0.0),
        "params": {},
        "best_epoch": 1.0,
        "scores": {},
        "curve": [],
        "seconds": 0.0,
        "evaluation_seconds": 0.6,
        "passes": 2_800,
        "peak_memory_mb": 700.0,
        "parameters_trained": 0,
        "checkpoint_mb": None,
        "predictions": {},
        "distortion": {},
        "warnings": [],
        "error": "",
        "versions": {},
    } | given


def _entry(name, status, **given):
    """One of :class:`hf_ft.comparison.results.Contender`, as a dict."""
    return {
        "name": name,
        "configs": [{"ft_type": part} for part in name.split("+")],
        "status": status,
        "reason": "",
        "notes": [],
        "space": {"learning_rate": "1e-05 to 0.3"},
        "measure_seconds": 0.0,
        "allowed_seconds": 1.9 * BUDGET,
        "trials": [],
        "chosen": None,
        "on_edge": [],
        "runs": [],
        "found": {},
        "learned": "",
    } | given


def _curve(random, top):
    rises = 1 - np.exp(-np.arange(1, EPOCHS + 1) / 2.2)
    scores = 0.5 + (top - 0.5) * rises + 0.012 * random.standard_normal(EPOCHS)
    return [
        {"epoch": float(i + 1), "loss": float(0.75 - 0.5 * rises[i]), "validation": float(scores[i])}
        for i in range(EPOCHS)
    ]


def _trial(random, number, name, skill, seconds, rate):
    far = abs(math.log10(rate / 0.02))
    score = float(np.clip(skill - 0.035 * far**2 + 0.01 * random.standard_normal(), 0.5, 1))
    params = {"learning_rate": float(f"{rate:.4g}")}
    if "l2_sp" in name:
        params["l2_sp.alpha"] = float(f"{0.001 * 10 ** random.uniform(0, 3):.4g}")
    if rate > 0.2 and name not in ("linear_probe", "daft"):
        error = "ValueError: training diverged: the loss is nan at step 40."
        return _training(seed=0, params=params, validation=None, seconds=seconds / 3, error=error)
    return _training(seed=0, params=params, validation=score, curve=_curve(random, score), seconds=seconds)


def _run(random, labels, seed, skill, seconds, weights, params):
    predicted = {split: _predictions(random, rows, skill - 0.08 * (split == "ood")) for split, rows in labels.items()}
    scores = {split: _scores(rows, labels[split]) for split, rows in predicted.items()}
    best = scores["validation"]["balanced_accuracy"]
    return _training(
        seed=seed,
        params=params,
        validation=best,
        best_epoch=float(random.integers(4, EPOCHS + 1)),
        scores=scores,
        curve=_curve(random, best),
        seconds=float(seconds * random.uniform(0.95, 1.05)),
        peak_memory_mb=float(650 + weights / 2e4 + random.uniform(0, 40)),
        parameters_trained=weights,
        checkpoint_mb=9.1 if weights < 3e6 else 22.4,
        predictions={split: rows.tolist() for split, rows in predicted.items()},
        distortion={split: _distortion(random, weights, 1 + (split == "ood")) for split in ("test", "ood")},
        **_calibration(seed),
    )


@functools.cache
def _calibration(seed):
    """The calibration of logits that are about twice too large; the same for all strategies."""
    random, found = torch.Generator().manual_seed(seed), {}
    for split in ("validation", "test", "ood"):
        labels = torch.randint(0, 2, (SIZES[split],), generator=random)
        logits = torch.randn(len(labels), 2, generator=random, dtype=torch.float64)
        logits[torch.arange(len(labels)), labels] += 1.0
        found[split] = dataclasses.asdict(SplitCalibration.of(2.0 * logits, labels, 2.1))
    return {"temperature": 2.1 + 0.1 * seed, "calibration": found}


def _mistakes(hostile):
    """Three of 100 wrong samples; the second list has a thumbnail."""
    sample = {
        "sample": HOSTILE if hostile else "defective/cell0001.png",
        "true": 1,
        "predicted": 0,
        "probability": 0.98,
    }
    picture = {"shown": PIXEL, "sample": "a_long_name_of_a_file_without_any_space_in_it_0002.png"}
    least = [sample | {"probability": 0.51}, sample | {"probability": 0.52} | picture]
    return {"split": "test", "number": 100, "calibrated": True, "surest": [sample], "least_sure": least}


def _distortion(random, weights, factor):
    if weights < 10_000:
        return {block: {"cosine": 1.0, "relative_l2": 0.0} for block in BLOCKS}
    moved = {block: 0.04 * factor * (i + 1) * random.uniform(0.8, 1.2) for i, block in enumerate(BLOCKS)}
    return {block: {"cosine": 1 - far**2 / 2, "relative_l2": far} for block, far in moved.items()}


def _contender(random, labels, name, skill, seconds, weights, seeds):
    count = min(12, int(BUDGET / seconds))
    rates = (0.01, *10 ** random.uniform(-5, math.log10(0.3), count - 1))
    trials = [_trial(random, i, name, skill, seconds, rate) for i, rate in enumerate(rates)]
    scored = [i for i, trial in enumerate(trials) if trial["validation"] is not None]
    chosen = max(scored, key=lambda i: trials[i]["validation"])
    params = trials[chosen]["params"]
    runs = [_run(random, labels, seed, skill, seconds, weights, params) for seed in range(seeds)]
    more = {"blockwise": _blockwise, "amcf": _amcf, "tred": _tred}.get(name, dict)()
    if name == "linear_probe":
        more |= {"on_edge": ["learning_rate"]}
    return _entry(name, "finished", trials=trials, chosen=chosen, runs=runs, **more)


def _others(random, labels, hostile):
    reason = "source data are needed: give --source_dataset." + (HOSTILE if hostile else "")
    broken = [_training(seed=0, params={"learning_rate": 0.01}, validation=None, error="RuntimeError: out of memory")]
    some = _contender(random, labels, "lwf", 0.8, 35.0, 2_226_434, 1)
    notes = [HOSTILE] if hostile else ["lwf runs in its source-free form, since no source data were given"]
    return [
        _entry("soft", "cannot run", reason=reason),
        _entry("co_tuning", "failed", reason="no trial ended well", trials=broken),
        some | {"status": "unfinished", "reason": "the time was up after 1 of 3 runs", "notes": notes},
        _entry("l2_sp+bss", "not reached", reason="the time was up"),
    ]


def _blockwise():
    names = ("stage4", "stage3", "stage2", "stage1", "stage0", "stem")
    means = (0.801, 0.823, 0.797, 0.772, 0.741, 0.702)
    layers = ((13, 16), (9, 12), (6, 8), (3, 5), (1, 2), (0, 0))
    scores = [_block(name, low, high, mean) for name, (low, high), mean in zip(names, layers, means, strict=True)]
    head = _block("head", 0, -1, 0.755)
    content = {
        "scheme": "stage",
        "metric": "balanced_accuracy",
        "layers": 17,
        "seeds": [0, 1],
        "scores": scores,
        "baselines": {"head": head},
    }
    return {"found": {"scores": content}, "learned": "best: stage3, 0.823 ± 0.014, quarter 3", "measure_seconds": 61.0}


def _block(name, low, high, mean):
    layers = list(range(low, high + 1))
    quarter = 2 * (low + high) // 17 + 1 if layers else 0
    candidate = {"name": name, "modules": [name], "layers": layers, "quarter": quarter, "parameters": 1000}
    return {
        "candidate": candidate,
        "scores": [mean - 0.01, mean + 0.01],
        "pruned": name == "stage0",
        "epochs": 10,
        "seconds": 9.0,
    }


def _amcf():
    random = np.random.default_rng(3)
    positions = sorted(
        {(int(a), int(b)) for a, b in zip(random.integers(0, 52, 14), random.integers(0, 49, 14), strict=True)}
    )
    evaluations = [
        {
            "position": list(position),
            "score": None if position[0] > 49 else 0.82 - ((position[0] - 20) / 90) ** 2 + 0.01 * random.random(),
            "epochs": 2,
            "seconds": 4.0,
            "pruned": position[1] > 44,
            "steps": [0.7],
        }
        for position in positions
    ]
    swarm = {
        "metric": "balanced_accuracy",
        "members": ["mobilenet_v2", "efficientnet-lite0"],
        "layers": [52, 49],
        "generations": [],
        "evaluations": evaluations,
        "stopped": "",
    }
    return {"found": {"swarm": swarm}, "learned": "Some layers stay frozen.", "measure_seconds": 56.0}


def _tred():
    history = [
        {"classifier": 0.7 / (i + 1), "reconstruction": 0.02 / (i + 1), "mmd": 0.4, "total": 0.9 / (i + 1)}
        for i in range(20)
    ]
    figures = {
        "p_share": 0.61,
        "n_share": 0.74,
        "reconstruction": 0.0,
        "accuracy": 0.89,
        "chance": 0.68,
        "p_varies": 0.31,
        "n_varies": 0.52,
        "p_label": 0.21,
        "n_label": 0.01,
        "f_label": 0.07,
    }
    info = {"layer": "conv_1x1", "figures": figures, "history": history, "verdict": "", "non_negative": True}
    return {
        "found": info,
        "learned": "Disentangled the output of `conv_1x1`: p_share 0.61, n_share 0.74.",
        "measure_seconds": 7.5,
    }


def _advice():
    reasons = [
        {"text": "features tell the classes apart: a linear probe reaches 0.76", "figure": "probe", "value": 0.76}
    ]
    return {"recommendations": [{"strategy": name, "score": 1.0, "reasons": reasons} for name in ("lp_ft", "full")]}
