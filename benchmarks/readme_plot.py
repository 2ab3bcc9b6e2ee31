"""Draws README's figures from finished runs: benchmarks/town.svg and benchmarks/frontier.svg.

python -m benchmarks.readme_plot [runs]
    from runs/dpo, and from runs/{ppo,grpo,online_dpo,best_of_n}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlhf_jax.report.plots import draw

COMPARED = ("ppo", "grpo", "online_dpo", "best_of_n")


def main() -> None:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    finished = [name for name in ("dpo", *COMPARED) if (runs / name / "evaluation.json").is_file()]
    if not finished:
        names = ", ".join(("dpo", *COMPARED))
        sys.exit(f"error: nothing to draw: {runs} has no evaluation.json of {names}")
    if "dpo" in finished:
        write("town", plot(runs / "dpo", "Gold reward by component"))
    if series := {name: frontier(runs / name) for name in finished if name != "dpo"}:
        title = "Gold and proxy reward against √KL"
        write("frontier", {"kind": "frontier", "title": title, "series": series, "wide": True})


def plot(run: Path, title: str) -> dict[str, Any]:
    for spec in evaluation(run).get("plots", []):
        if spec["title"] == title:
            return spec
    sys.exit(f"error: {run}/evaluation.json has no plot {title!r}; run the experiment again")


def frontier(run: Path) -> dict[str, Any]:
    points = evaluation(run).get("frontier")
    if not points:
        sys.exit(f"error: {run}/evaluation.json has no frontier; run the experiment again")
    return points


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text("utf-8"))


def write(name: str, spec: dict[str, Any]) -> None:
    svg = draw(spec).svg.replace("currentColor", "#1f2328")
    svg = svg.replace('style="', 'style="background: white; ', 1)
    if "xmlns=" not in svg.split(">", 1)[0]:
        svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    Path(__file__).with_name(f"{name}.svg").write_text(svg, "utf-8")


if __name__ == "__main__":
    main()
