"""Draws README's figure from a finished run of experiments/dpo.py: benchmarks/town.svg.

python benchmarks/readme_plot.py [runs/dpo]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlhf_jax.evaluation.plots import draw


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dpo")
    plots = json.loads((run / "evaluation.json").read_text())["plots"]
    spec = next(plot for plot in plots if plot["title"] == "Gold reward by component")
    svg = draw(spec).svg.replace("currentColor", "#1f2328")
    svg = svg.replace('style="', 'style="background: white; ', 1)
    if "xmlns=" not in svg.split(">", 1)[0]:
        svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    Path(__file__).with_name("town.svg").write_text(svg, "utf-8")


if __name__ == "__main__":
    main()
