"""The report on a phone and in print: nothing is clipped, no label lies on another."""

from __future__ import annotations

import json
import subprocess

import pytest

from rlhf_jax.report.curves import draw_curves, running_mean
from rlhf_jax.report.plots import draw
from rlhf_jax.report.report import write_report
from tests.report.test_report import BROWSER, FLAGS, needs_browser

# Says how far anything reaches beyond the page, and which tables are wider than what shows them.
MEASURE = """
<script>
addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth - innerWidth;
  const shown = [...document.querySelectorAll(".scroll")];
  const clipped = shown.filter(e => e.scrollWidth > e.clientWidth + 1);
  const texts = clipped.map(e => e.innerText.slice(0, 40));
  document.title = `${innerWidth} beyond ${wide} clipped ${texts}`;
});
</script>
"""


@needs_browser
def test_no_table_is_clipped_on_a_phone(bare_run, tmp_path):
    others = {name: {"gold_reward": 0.1, "eos_rate": 1.0} for name in ("pretrain", "sft")}
    (bare_run / "evaluation.json").write_text(json.dumps({"others": others}))
    page = write_report(bare_run).read_text()
    policy = page[page.index('<meta http-equiv="Content-Security') :].partition(">")[0] + ">"
    (tmp_path / "page.html").write_text(page.replace(policy, MEASURE))
    frame = "<iframe src='page.html' style='width: 390px; height: 8000px; border: 0'></iframe>"
    frame += "<script>onload = () => setTimeout(() => document.title = "
    frame += "document.querySelector('iframe').contentDocument.title, 500)</script>"
    (tmp_path / "phone.html").write_text(frame)
    command = [BROWSER, *FLAGS, "--allow-file-access-from-files", "--dump-dom"]
    result = subprocess.run(
        [*command, f"file://{tmp_path}/phone.html"], capture_output=True, text=True, timeout=120
    )
    assert "<title>390 beyond 0 clipped</title>" in result.stdout, result.stdout[:500]


def places(svg: str) -> list[str]:
    return [line for line in svg.split("<text")[1:] if "<" in line]


def test_bars_lie_where_their_names_would_not_fit():
    groups = [f"family {n}" for n in range(12)]
    spec = {"kind": "grouped_bars", "title": "T", "ylabel": "mean"}
    many = draw(spec | {"groups": groups, "series": {"sft": [0.5] * 12, "dpo": [0.7] * 12}})
    few = draw(spec | {"groups": groups[:3], "series": {"sft": [0.5] * 3, "dpo": [0.7] * 3}})

    def heights(plot):
        labels = [t for t in places(plot.svg) if ">family " in t]
        return len({t.partition('y="')[2].partition('"')[0] for t in labels}), len(labels)

    assert heights(few) == (1, 3) and heights(many) == (12, 12)


def test_a_scattered_curve_is_a_mean_over_its_points():
    assert running_mean([1.0, 3.0] * 20)[1:-1] == pytest.approx([5 / 3, 7 / 3] * 19)
    assert running_mean([1.0, 3.0] * 20)[0] == 1.0
    smooth = [0.1 * n for n in range(40)]
    assert running_mean(smooth) == smooth and running_mean([1.0, 3.0] * 6) == [1.0, 3.0] * 6
    gap = running_mean([1.0, 3.0] * 10 + [float("nan")] + [3.0, 1.0] * 10)
    assert gap[20] != gap[20] and gap[19] == 2.0
    steps = range(40)
    noisy = draw_curves("Loss", {"loss": (steps, [1.0, 3.0] * 20)})
    calm = draw_curves("Loss", {"loss": (steps, smooth)})
    assert noisy.svg.count("<use") - calm.svg.count("<use") == 40  # its points
    assert noisy.csv.splitlines()[1:3] == ["loss,0,1.0", "loss,1,3.0"]
