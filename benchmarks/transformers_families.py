"""Split the architectures of Hugging Face transformers, and print how each compares with the unsplit model.

    python benchmarks/transformers_families.py [--docs] [family ...]

Every family is built small and random in float64, cut into 2, 3 and 4 stages, and run in train and eval
mode at two batch sizes, one of which was not traced. Outputs, gradients, buffers and state-dict names and
shapes are compared. The rows also go to benchmarks/results/transformers_families.json, and with --docs all
rows in that file, of earlier runs as well, to docs/families.md.
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

import torch  # noqa: E402
from tests.stages.families import FAMILIES, build_family  # noqa: E402
from tests.stages.oracle import check_split  # noqa: E402

_TOLERANCE = 1e-6
_RESULTS = _ROOT / "benchmarks" / "results" / "transformers_families.json"


def main(names: list[str], *, writes_docs: bool) -> None:
    """Try each family, and print the table as it grows."""
    warnings.simplefilter("ignore")
    print(
        f"{'family':22} {'kind':16} {'nodes':>6} {'layers':>6} {'stages':>8} {'outputs':>9} {'gradients':>9} {'s':>6}"
    )
    rows: dict[str, dict[str, Any]] = {}
    if _RESULTS.exists():
        rows = {row["family"]: row for row in json.loads(_RESULTS.read_text())}
    tried = names or list(FAMILIES)
    for name in tried:
        rows[name] = _try(name)
        print(_line(rows[name]), flush=True)
    num_equal = sum(not rows[name]["error"] for name in tried)
    print(
        f"{num_equal} of {len(tried)} families equal (outputs and all gradients within {_TOLERANCE:g} in float64)"
    )
    _RESULTS.parent.mkdir(exist_ok=True)
    known = [rows[name] for name in FAMILIES if name in rows]
    _RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    if writes_docs:
        (_ROOT / "docs" / "families.md").write_text(_page(known))


def _page(rows: list[dict[str, Any]]) -> str:
    import transformers

    equal = sum(not row["error"] for row in rows)
    lines = [
        "# Architectures of Hugging Face transformers, split",
        "",
        f"{equal} of {len(rows)} families of transformers {transformers.__version__} under torch {torch.__version__}.",
        "Made by `benchmarks/transformers_families.py --docs`: each is built small and random in float64 (xglm in",
        "float32, which its own code demands), cut into 2, 3 and 4 stages, and run in train and eval mode at two",
        "batch sizes, one of which was not traced. *bitwise*: not one bit differs from the unsplit model; else the",
        "largest difference relative to the largest magnitude. State-dict names and shapes are the model's everywhere.",
        "Seconds are those of tracing and of all runs, on a shared core.",
        "",
        "| family | kind | nodes | layers | stages | outputs | gradients | seconds |",
        "|---|---|---:|---:|---|---|---|---:|",
    ]
    for row in rows:
        if row["error"]:
            lines.append(f"| {row['family']} | {row['kind']} | | | | {row['error']} | | |")
            continue
        stages = ", ".join(map(str, row["stages"]))
        outputs, gradients = _equal(row["output_error"]), _equal(row["gradient_error"])
        lines.append(
            f"| {row['family']} | {row['kind']} | {row['num_nodes']} | {row['num_layers']} | {stages} "
            f"| {outputs} | {gradients} | {row['seconds']} |"
        )
    return "\n".join(lines) + "\n"


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
    arguments = [argument for argument in sys.argv[1:] if argument != "--docs"]
    main(arguments, writes_docs="--docs" in sys.argv)
