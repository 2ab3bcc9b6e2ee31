"""Where a sweep lies: sweeps of one config that differ are kept apart, one that goes on is not."""

from __future__ import annotations

from rlhf_jax.sweep.__main__ import main
from rlhf_jax.sweep.grid import make_cells
from rlhf_jax.sweep.sweep import find_directory


def test_sweeps_of_one_config_have_directories_of_their_own(tiny, tmp_path, monkeypatch):
    """Each line is run as it stands, and again; what runs is replaced by what it leaves behind."""
    monkeypatch.chdir(tmp_path)
    places = []

    def run_grid(sweep, runner, baseline, seeds, metric):
        places.append(sweep.directory.name)
        for cell in sweep.cells:
            (sweep.directory / f"{cell.name},seed=0").mkdir(exist_ok=True)

    monkeypatch.setattr("rlhf_jax.sweep.sweep.run_grid", run_grid)

    def swept(*flags):
        assert main([f"--config={tiny}:preference", *flags]) == 0
        return places.pop().removeprefix("tiny-preference-sweep")

    betas, names = "--grid=loss.beta=0.05,0.1", "--grid=loss.name=sigmoid,ipo"
    for _ in range(2):
        assert swept(betas) == swept(betas, "--seeds=2", "--metric=eval/loss") == ""
        assert swept(names) == "-2"
        assert swept(betas, "--config.train.steps=2") == "-3"
        assert swept(betas, "--seeds-from=pretrain") == "-4"
        assert swept() == "-5" and swept("--grid=loss.beta=1,2") == "-6"
    assert swept(betas + ",0.5") == swept("--grid=loss.beta=0.1") == ""  # more or fewer values
    assert swept(names, "--workdir=runs/other") == "other"


def test_fields_are_set_in_two_words_or_by_one_dash_as_in_main(tiny, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("rlhf_jax.sweep.sweep.run_grid", lambda sweep, *_: seen.append(sweep.flags))
    command = ["--config", f"{tiny}:preference", f"--workdir={tmp_path}/sweep"]
    fields = ["--config.train.steps", "2", "-config.loss.beta=0.2", "--noconfig.train.tensorboard"]
    assert main([*command, *fields, "--config.train.wandb", "-"]) == 0
    assert seen == [(
        "--config.train.steps=2", "--config.loss.beta=0.2", "--noconfig.train.tensorboard",
        "--config.train.wandb=-",
    )]  # fmt: skip
    assert main([*command, "--parents=elsewhere"]) == 2
    assert capsys.readouterr().err == "error: of rlhf_jax.main alone: --parents\n"


def test_a_sweep_of_an_older_version_goes_on_where_it_is(tmp_path):
    cells = make_cells({"loss.beta": ["0.05", "0.1"]})
    varied = {"grid": {"loss.beta": ["0.05", "0.1"]}, "search": "", "flags": [], "seeds_from": ""}
    place = tmp_path / "dpo-sweep"
    (place / "beta=0.1,seed=0").mkdir(parents=True)
    assert find_directory(place, varied, cells) == place
    others = make_cells({"loss.name": ["ipo"]})
    changed = varied | {"grid": {"loss.name": ["ipo"]}}
    assert find_directory(place, changed, others) == tmp_path / "dpo-sweep-2"
    (place / "search.journal").touch()
    searched = varied | {"grid": {}, "search": "loss.beta=0.01..1"}
    assert find_directory(place, searched, []) == place
