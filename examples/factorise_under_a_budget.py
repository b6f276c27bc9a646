"""Replace weights by low-rank factors so that the whole checkpoint has a given size.

python examples/factorise_under_a_budget.py [MODEL] [OUT]
"""

import sys

from compress import Recipe, plan, run


def main(model: str = "demo", out: str = "example-factorised") -> None:
    """Ask what the model takes, take a tenth away, and give ranks where they remove most error."""
    quick = {"model": model, "out": out, "samples": 16, "seq_len": 128, "tasks": []}
    method: dict[str, object] = {"name": "svd_llm", "rank_multiple": 1, "allocation": "spectrum"}
    uniform = {**method, "allocation": "uniform"}
    before = plan(Recipe.from_mapping({**quick, "method": uniform})).plan.bytes_before

    method["budget"] = str(before * 9 // 10)
    report = run(Recipe.from_mapping({**quick, "method": method}))
    after = report.totals.tensor_bytes_after
    print(f"{before} bytes before, {after} after, at most {method['budget']}")
    for layer in report.layers:
        print(f"{layer.name}: {layer.form}")


if __name__ == "__main__":
    main(*sys.argv[1:])
