"""The link that `bench` measures on: it joins two ranks, it holds its rate, and nothing of it stays behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from hvd_imaging.bench.slow_link import Link, LinkError, queues, slow_link, why_not

MBIT, SIZE = 1000, 16_000_000

RANK = f"""
import json, socket, time
import numpy as np
from mpi4py import MPI

world = MPI.COMM_WORLD
sent, received = np.full({SIZE}, world.rank, np.uint8), np.empty({SIZE}, np.uint8)
world.Sendrecv(sent, 1 - world.rank, recvbuf=received)  # connects
world.Barrier()
began = time.perf_counter()
world.Sendrecv(sent, 1 - world.rank, recvbuf=received)
seconds = time.perf_counter() - began
here = {{"host": socket.gethostname(), "peer": int(received[-1]), "seconds": seconds, "size": world.size,
        "local": world.Split_type(MPI.COMM_TYPE_SHARED).size}}
found = world.gather(here)
if world.rank == 0:
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def allowed() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=30, check=True).stdout


def exchange(link: Link) -> list[dict]:
    """What each rank saw; processes that outlive the time limit end with the link."""
    command = link.mpirun([sys.executable, "-c", RANK])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.mpi
def test_two_ranks_meet_over_the_link_at_its_rate(allowed):
    with slow_link(MBIT) as link:
        first, second = exchange(link)
        assert all(name in namespaces() for name in link.names)
    assert (first["size"], second["size"]) == (2, 2)
    assert (first["peer"], second["peer"]) == (1, 0)
    # Two nodes to MPI: no memory is shared, so all of it went through the cable.
    assert first["host"] != second["host"] and (first["local"], second["local"]) == (1, 1)
    # A machine can be slower than the cable, never faster.
    least = 0.6 * SIZE * 8 / (MBIT * 1e6)
    assert first["seconds"] > least and second["seconds"] > least
    assert not any(name in namespaces() for name in link.names)


def test_nothing_is_left_after_an_exception(allowed):
    with pytest.raises(KeyError), slow_link() as link:
        program = "import time; print('inside', flush=True); time.sleep(600)"
        sleeper = subprocess.Popen([*link.enter(1), sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert sleeper.stdout.readline() == "inside\n"
        raise KeyError
    sleeper.communicate(timeout=10)
    assert sleeper.returncode == -signal.SIGKILL
    assert not any(name in namespaces() for name in link.names)


def test_a_rate_that_can_not_be_set_leaves_nothing(allowed):
    before = namespaces()
    with pytest.raises(LinkError, match="'tc "), slow_link(0):
        pass
    assert namespaces() == before


@pytest.mark.parametrize(
    ("mbit", "delay_ms", "expected"),
    [
        (1000, 0, ["root handle 1: tbf rate 1000mbit burst 250000 latency 20ms"]),
        (10, 0, ["root handle 1: tbf rate 10mbit burst 69632 latency 20ms"]),
        (None, 0, []),
        (None, 0.1, ["root netem delay 0.1ms limit 10000"]),
        (
            1000, 0.1,
            ["root handle 1: tbf rate 1000mbit burst 250000 latency 20ms", "parent 1:1 netem delay 0.1ms limit 10000"],
        ),
    ],
)  # fmt: skip
def test_queues(mbit, delay_ms, expected):
    assert [" ".join(words) for words in queues(mbit, delay_ms)] == expected
