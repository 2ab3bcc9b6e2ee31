"""Draws README's figures from finished runs: benchmarks/town.svg and benchmarks/frontier.svg.

python benchmarks/readme_plot.py [runs]
    from runs/dpo, and from runs/{ppo,grpo,online_dpo,best_of_n}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlhf_jax.evaluation.plots import draw

COMPARED = ("ppo", "grpo", "online_dpo", "best_of_n")


def main() -> None:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    if (runs / "dpo").is_dir():
        plots = evaluation(runs / "dpo")["plots"]
        write("town", next(plot for plot in plots if plot["title"] == "Gold reward by component"))
    present = [name for name in COMPARED if (runs / name / "evaluation.json").is_file()]
    if present:
        series = {name: evaluation(runs / name)["frontier"] for name in present}
        title = "Gold (solid) and proxy reward against √KL"
        write("frontier", {"kind": "frontier", "title": title, "series": series, "wide": True})


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def write(name: str, spec: dict[str, Any]) -> None:
    svg = draw(spec).svg.replace("currentColor", "#1f2328")
    svg = svg.replace('style="', 'style="background: white; ', 1)
    if "xmlns=" not in svg.split(">", 1)[0]:
        svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    Path(__file__).with_name(f"{name}.svg").write_text(svg, "utf-8")


if __name__ == "__main__":
    main()
