"""Split the architectures of Hugging Face transformers, and print how each compares with the unsplit model.

    python benchmarks/transformers_families.py [family ...]

Every family is built small and random in float64, cut into 2, 3 and 4 stages, and run in train and eval
mode at two batch sizes, one of which was not traced. Outputs, gradients, buffers and state-dict names and
shapes are compared. The rows also go to benchmarks/results/transformers_families.json.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "src")]

from tests.stages.families import FAMILIES, build_family  # noqa: E402
from tests.stages.oracle import check_split  # noqa: E402

_TOLERANCE = 1e-6


def main(names: list[str]) -> None:
    """Try each family, and print the table as it grows."""
    warnings.simplefilter("ignore")
    print(
        f"{'family':22} {'kind':16} {'nodes':>6} {'layers':>6} {'stages':>8} {'outputs':>9} {'gradients':>9} {'s':>6}"
    )
    rows = []
    for name in names or list(FAMILIES):
        rows.append(_try(name))
        print(_line(rows[-1]), flush=True)
    num_equal = sum(not row["error"] for row in rows)
    print(
        f"{num_equal} of {len(rows)} families equal (outputs and all gradients within {_TOLERANCE:g} in float64)"
    )
    results = _ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "transformers_families.json").write_text(json.dumps(rows, indent=1) + "\n")


def _try(name: str) -> dict[str, Any]:
    start_s = time.perf_counter()
    row: dict[str, Any] = {"family": name, "kind": FAMILIES[name].kind, "error": ""}
    try:
        model, make_inputs = build_family(name)
        report = check_split(model, make_inputs, batches=(3, 2), tolerance=_TOLERANCE)
        row |= vars(report)
    except Exception as error:  # the table shows what failed
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    return row | {"seconds": round(time.perf_counter() - start_s, 1)}


def _line(row: dict[str, Any]) -> str:
    if row["error"]:
        return f"{row['family']:22} {row['kind']:16} {row['error']}"
    stages = ",".join(map(str, row["stages"]))
    return (
        f"{row['family']:22} {row['kind']:16} {row['num_nodes']:6} {row['num_layers']:6} {stages:>8} "
        f"{_equal(row['output_error']):>9} {_equal(row['gradient_error']):>9} {row['seconds']:6}"
    )


def _equal(error: float) -> str:
    return "bitwise" if error == 0 else f"{error:.0e}"


if __name__ == "__main__":
    main(sys.argv[1:])
