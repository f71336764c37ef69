"""TRED's first stage on synthetic features: `python tests/benchmarks/known_features.py`.

How well held-out probes predict the label (y) and the nuisance (u) from P and N, also with every channel rescaled (*),
by seed.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.strategies.tred.test_disentangler import BOTH, CRITERIA, SEEDS, read_back


def main() -> None:
    rows = [(kind, name, weights, False) for kind in ("mask", "branches") for name, weights in CRITERIA.items()]
    rows = [
        (k, f"{n}, bottleneck {b:g}", dataclasses.replace(w, bottleneck=b), m) for b in (0, 1) for k, n, w, m in rows
    ]
    rows += [(kind, "both, mixed channels", BOTH, True) for kind in ("mask", "branches")]
    for kind, name, weights, mixed in rows:
        found = [read_back(seed, kind, weights, mixed)[0] for seed in SEEDS]
        shown = (f"{key} {' '.join(f'{f[key]:.2f}' for f in found)}" for key in ("Py", "Pu", "Pu*", "Ny", "Nu"))
        print(f"{kind:9s}{name:26s}{'   '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
