"""Several processes, one a host, that run one program on the devices of all of them.

Every process takes the same way: it reads the same data, drives the same steps and makes the same
decisions. So whatever a decision hangs on must be the same everywhere: numbers are read back by
`global_arrays.to_host`, files are looked at and rewards asked for `by_first`, a clock or a signal
is seen by `anyone`. The first process alone writes what a run leaves beside its arrays. With one
process nothing is started, and all of this is what it would be without.

What processes tell each other goes through JAX's coordination service, which takes messages of any
size and keeps no device waiting. A process whose peer dies is aborted by that service: nothing
here, or above, counts on cleaning up.

JAX and NumPy are imported where they are needed: a user's reward function runs without them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rlhf_jax.errors import Preempted, UserError

if TYPE_CHECKING:
    import jax
    from jax.sharding import NamedSharding

_PATIENCE = 24 * 3600 * 1000  # ms for a process that is slow; one that is dead ends the others
_SHUTDOWN = 60  # s that a process which ends waits for the others
_RAISED = (UserError, Preempted, OSError, RuntimeError)  # the last one stands for all others
_index, _count = 0, 1
_number = 0  # of messages, the same in every process
_is_asked = False  # whether this is the first process, inside of `telling`
_late: dict[str, jax.Array] = {}


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes, before JAX's first computation, if there are any.

    Without arguments JAX looks for a cluster: SLURM, Open MPI, Kubernetes, Cloud TPU.

    Args:
      coordinator: host:port of the first process, at which the others reach it.
      processes: how many there are.
      process: which of them this is, from 0 on.

    Raises:
      UserError: some arguments are given and others are not, or they do not fit.
    """
    if coordinator is None and processes is None and process is None:
        cluster = _cluster()
        processes = 1 if cluster is None else cluster.get_process_count()
    elif coordinator is None or processes is None or process is None:
        raise UserError("--coordinator=host:port, --processes and --process go together")
    elif not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator}: a host and a port, such as 10.0.0.1:1234")
    elif not 0 <= process < processes:
        raise UserError(f"--process={process}: of --processes={processes} the first one is 0")
    if processes > 1:
        _join(coordinator, processes, process)


def _join(coordinator: str | None, processes: int, process: int | None) -> None:
    import jax

    global _index, _count
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        local_device_ids=[] if _has_its_host() else None,
        shutdown_timeout_seconds=_SHUTDOWN,
    )
    atexit.register(_settle)  # before JAX's own leave-taking, which was registered earlier
    _index, _count = jax.process_index(), jax.process_count()
    if not is_first():  # what it would say, the first one says
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        logging.disable(logging.WARNING)


def _cluster() -> Any:
    """JAX's own description of the cluster that this process is part of; None if it is of none."""
    from jax._src.clusters import ClusterEnv  # `jax.distributed` would start a lone process too

    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    return next((kind for kind in kinds if kind.is_env_present()), None)


def _has_its_host() -> bool:
    """Whether this process has all devices of its host, as far as the environment says.

    Under SLURM and Open MPI JAX would otherwise give it one of them.
    """
    on_each = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 1(x4)
    beside = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    told = "JAX_LOCAL_DEVICE_IDS" in os.environ
    return not told and beside == "1" and re.fullmatch(r"1(\(x\d+\))?", on_each) is not None


def count() -> int:
    """How many processes there are."""
    return _count


def is_first() -> bool:
    """Whether this is the process that writes, and the only one if there are no others."""
    return _index == 0


def name() -> str:
    """This process and its host, for a message."""
    return f"process {_index} on {socket.gethostname()}"


def exchange(value: Any) -> list[Any]:
    """What every process passes, in their order; each calls this. JSON values."""
    if _count == 1:
        return [value]
    number = _next_message()
    _tell(number, value)
    told = [_hear(number, each) for each in range(_count)]
    _forget(number)
    return told


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """Whoever makes a mistake inside makes it for all.

    Raises:
      UserError: it was raised inside; unless all processes made the same mistake, the message
        names the one that did.
    """
    mistake = None
    try:
        yield
    except UserError as error:
        if _count == 1:
            raise
        mistake = str(error)
    heard = exchange([name(), mistake])
    of_all = len({told for _, told in heard}) == 1
    for process, told in heard:
        if told is not None:
            raise UserError(told if of_all else f"{process}: {told}")


@contextlib.contextmanager
def telling() -> Iterator[list[Any]]:
    """Brings JSON values that the first process appends to the list inside into all processes.

    The others wait at the end. Inside, and in a thread beside the program, the first one asks
    nobody.

    Raises:
      UserError, Preempted, OSError: raised inside by the first process; whatever else it raises is
        raised there, and a RuntimeError in the others.
    """
    global _is_asked
    said: list[Any] = []
    if _count == 1 or _is_asked or threading.current_thread() is not threading.main_thread():
        yield said
        return
    number = _next_message()
    if not is_first():
        yield said
        told = _hear(number, 0)
        _forget(number)
        if "raised" in told:
            raise _RAISED[told["raised"]](told["text"])
        said += told["said"]
        return
    _is_asked = True
    try:
        yield said
    except Exception as error:
        kinds = (i for i, kind in enumerate(_RAISED) if isinstance(error, kind))
        _tell(number, {"raised": next(kinds, len(_RAISED) - 1), "text": str(error)})
        _forget(number)
        raise
    finally:
        _is_asked = False
    _tell(number, {"said": said})
    _forget(number)


def by_first(function: Callable[[], Any]) -> Any:
    """The JSON value that the function returns in the first process, which alone calls it.

    For the rest see `telling`.
    """
    with telling() as said:
        if is_first():
            said.append(function())
    return said[0]


def anyone(what: str, flag: bool) -> bool:
    """Whether the flag is set in any process; the same answer in each, that calls this.

    With several processes it is the answer to the call before, of the same `what`: this one's is
    on its way through the devices meanwhile, and nothing waits for it.
    """
    if _count == 1:
        return flag
    import jax
    import numpy as np

    place, any_of = _all_devices()
    flags = jax.make_array_from_callback((place.mesh.size,), place, lambda _: np.array([flag]))
    before, _late[what] = _late.get(what), any_of(flags)
    return before is not None and bool(before)


def _settle() -> None:
    """Waits for the answers of `anyone` that are still on their way.

    A process that ended before would take its part of a sum with it, and another, whose devices
    wait for that part, would never end.
    """
    for flag in _late.values():
        with contextlib.suppress(RuntimeError):  # of one that died: nothing is to be waited for
            flag.block_until_ready()
    _late.clear()


@functools.cache
def _all_devices() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """Where one flag lies on each device, and what says whether any of them is set."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    any_of = jax.jit(lambda flags: flags.any(), out_shardings=whole)
    return NamedSharding(mesh, PartitionSpec("all")), any_of


def _next_message() -> int:
    """The number of a message.

    Raises:
      RuntimeError: this process fails by itself. The others wait for it elsewhere: it has to end.
    """
    global _number
    failure = sys.exc_info()[1]
    if not isinstance(failure, UserError | Preempted | None):
        raise RuntimeError("this process fails, and waits for no other") from failure
    _number += 1
    return _number


def _service() -> Any:
    from jax._src.distributed import global_state  # as Orbax does; JAX shows it nowhere else

    return global_state.client


def _tell(number: int, value: Any) -> None:
    _service().key_value_set_bytes(f"rlhf_jax/{number}/{_index}", json.dumps(value).encode())


def _hear(number: int, process: int) -> Any:
    key = f"rlhf_jax/{number}/{process}"
    return json.loads(_service().blocking_key_value_get_bytes(key, _PATIENCE))


def _forget(number: int) -> None:
    """Waits until every process has heard a message, which the service then keeps no longer."""
    _service().wait_at_barrier(f"rlhf_jax/{number}", _PATIENCE)
    if is_first():
        _service().key_value_delete(f"rlhf_jax/{number}/")
