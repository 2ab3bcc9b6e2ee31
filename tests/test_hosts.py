"""What starts several processes, and what does not."""

import jax
import pytest

from rlhf_jax import hosts
from rlhf_jax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[001-004]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}


@pytest.fixture
def joined(monkeypatch):
    """What JAX would have been asked for."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: asked.append((a, k)))
    for variable in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(variable, raising=False)
    return asked


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("10.0.0.1:1234", 2, None), "go together"),
        ((None, 2, 1), "go together"),
        (("10.0.0.1", 2, 1), "a host and a port"),
        (("10.0.0.1:1234", 2, 2), "--process=2: of --processes=2 the first one is 0"),
    ],
)
def test_a_mistake_in_the_flags_is_said(given, told, joined):
    with pytest.raises(UserError, match=told):
        hosts.start(*given)
    assert not joined


@pytest.mark.parametrize("given", [(), ("localhost:1234", 1, 0)])
def test_nothing_is_started_for_one_process(given, joined):
    hosts.start(*given)
    assert not joined and hosts.count() == 1 and hosts.is_first()


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, []),  # all of the host's, where JAX would take the first
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, None),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        ({"SLURM_NTASKS": "1"}, "nothing"),
    ],
)
def test_slurm_is_found(changes, devices, joined, monkeypatch):
    for name, value in (SLURM | changes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hosts, "_index", 0)
    monkeypatch.setattr(hosts, "_count", 1)
    hosts.start()
    if devices == "nothing":
        assert not joined
    else:
        ((arguments, options),) = joined
        assert arguments == (None, 4, None) and options["local_device_ids"] == devices


def test_alone_everything_is_ones_own():
    assert hosts.by_first(lambda: (1, 2)) == (1, 2)  # not even JSON is made of it
    assert hosts.exchange({"a": 1}) == [{"a": 1}]
    assert hosts.anyone("stop", True) and not hosts.anyone("stop", False)
