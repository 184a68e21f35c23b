"""What is said of a request before it is queued: tables of queues and machines as Slurm prints them."""

import pytest

from hvd_imaging.cluster.auto import Candidate, choose, numbers
from hvd_imaging.cluster.judge import Need, clock, judge
from hvd_imaging.cluster.request import Request
from hvd_imaging.cluster.slurm import parse_accounting, parse_nodes, parse_partitions, parse_queue, parse_show
from hvd_imaging.planning.pace import measured_pace
from hvd_imaging.planning.scaling import allreduce_seconds

PARTITIONS = parse_partitions(
    "PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL Default=YES MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP TotalNodes=3\n"
    "PartitionName=gpu AllowGroups=ALL Default=NO MaxNodes=2 MaxTime=UNLIMITED State=UP TotalNodes=3\n"
    "PartitionName=old Default=NO MaxNodes=1 MaxTime=01:00:00 State=DOWN\n"
)
NODES = parse_nodes(
    "c1|cpu|idle|0/16/0/16|64000|(null)\nc2|cpu|mix|12/4/0/16|64000+|(null)\nc3|cpu|down*|0/0/16/16|64000|(null)\n"
    "g1|gpu|idle|0/32/0/32|256000|gpu:a100:4(S:0-1)\ng2|gpu|alloc|32/0/0/32|256000|gpu:a100:4\ng3|gpu|idle|0/32/0/32|256000|gpu:a100:2\n"
    "o1|old|idle|0/4/0/4|8000|(null)\nnonsense\n"
)


def said(step="train", need=None, **request):
    found = judge(step, Request(**request), need or Need(gpu=bool(request.get("gres"))), PARTITIONS, NODES)
    return [("! " if finding.fatal else "") + finding.text for finding in found]


def test_a_request_that_fits_gets_no_word():
    assert said(nodes=2, cpus_per_task=4, time="08:00:00") == []
    assert said(partition="gpu", nodes=1, ntasks_per_node=4, gres="gpu:4", time="5-0", need=Need(4 * 2**30, 8, 600)) == []


@pytest.mark.parametrize(
    ("request_", "need", "text"),
    [
        ({"partition": "fast"}, None, "! train: partition 'fast' does not exist; there are cpu, gpu, old"),
        ({"partition": "old", "time": "30"}, None, "train: partition 'old' takes no jobs now (down or drained)"),
        ({"time": "3-0"}, None, "! train: --time 3-0 is longer than partition 'cpu' permits (48 h); a shorter one is enough"),
        ({"time": "4"}, None, "! train: --time 4 ends before anything is learned: 180 s before the limit"),
        ({"nodes": 4}, None, "! train: 4 nodes asked for, at most 3 of partition 'cpu' fit; give --nodes 3 or fewer"),
        ({"nodes": 3, "partition": "gpu", "gres": "gpu:1"}, None, "! train: 3 nodes asked for, at most 2 of partition 'gpu' fit"),
        ({"nodes": 3}, None, "train: only 2 of 3 fitting nodes are up: the job waits until 3 are"),
        ({"nodes": 2, "exclusive": True}, None, "train: 1 of 3 fitting nodes are free now: the job waits for 2"),
        ({"ntasks_per_node": 5, "cpus_per_task": 4}, None, "! train: 20 cores asked for on each node, the largest node of partition 'cpu' has 16 cores"),
        ({"gres": "gpu:1"}, None, "! train: 1 GPU asked for on each node, the largest node of partition 'cpu' has 0 GPUs"),
        ({"mem": "100G"}, None, "! train: 100G of memory asked for on each node, the largest node of partition 'cpu' has 64000 MiB"),
        ({"partition": "gpu", "gres": "gpu:4"}, None, "train: 4 GPUs a node for 1 ranks: 3 would stand idle; give --ntasks-per-node 4"),
        ({"partition": "gpu", "gres": "gpu:2", "ntasks_per_node": 4}, None, "train: 4 ranks share 2 GPUs of a node"),
        ({"partition": "gpu", "gres": "gpu:1"}, Need(gpu=False), "train: 1 GPU on each node would stand idle: this step computes on the CPU"),
        ({"partition": "gpu"}, Need(), "train: all nodes of this partition have GPUs, and the job asks for none"),
        ({"ntasks_per_node": 8}, Need(10 * 2**30, gpu=False), "! train: about 10.0 GiB a rank, 80.0 GiB a node estimated, the largest node has 62 GiB"),
        ({"mem": "8G"}, Need(10 * 2**30, gpu=False), "train: about 10.0 GiB a rank, 10.0 GiB a node estimated, --mem 8G is less"),
        ({"nodes": 2, "ntasks_per_node": 4}, Need(batch=4, gpu=False), "! train: 8 ranks share train.batch_size=4"),
        ({"time": "10", "requeue": False}, Need(checkpoint_s=600, gpu=False), "! train: a checkpoint takes 10 min to come, the job has 7 min"),
        ({"time": "10"}, Need(checkpoint_s=600, gpu=False), "train: a checkpoint takes 10 min to come, the job has 7 min: it lives by the one before"),
    ],
)  # fmt: skip
def test_what_is_said(request_, need, text):
    found = said(need=need, **request_)
    assert any(line.startswith(text) for line in found), found


def test_only_steps_that_leave_are_asked_for_a_checkpoint():
    assert said("evaluate", time="2") == []
    assert said("compress", time="2")[0].startswith("! compress: --time 2 ends before")


def test_a_cluster_without_a_default_queue_or_nodes():
    found = judge("train", Request(), Need(gpu=False), PARTITIONS[1:], NODES)
    assert found[0].fatal and "no partition given and the cluster has no default; give --partition, one of gpu, old" in found[0].text
    assert "has no nodes" in judge("train", Request(), Need(gpu=False), PARTITIONS, [])[0].text


def test_what_slurm_prints_of_jobs():
    (waits, runs) = parse_queue("7|PENDING|BeginTime||0:00|1:00:00|2026-11-24T01:10:57\n8_3|RUNNING|None|n[1-2]|1-02:03:04|UNLIMITED|N/A\nrubbish\n")
    assert (waits.id, waits.state, waits.reason, waits.left_s, waits.start) == ("7", "PENDING", "BeginTime", 3600, "2026-11-24T01:10:57")
    assert (runs.id, runs.nodes, runs.used_s, runs.left_s, runs.reason, runs.start) == ("8_3", "n[1-2]", 93784, None, "", "")
    (job,) = parse_show(
        "JobId=12 JobName=a 'b' c=d UserId=root(0) JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Restarts=2 ExitCode=0:9 "
        "RunTime=00:01:02 TimeLimit=00:10:00 StartTime=2026-11-24T01:10:57 NodeList=n[1-2] NumNodes=2"
    )
    assert (job.id, job.state, job.restarts, job.code, job.used_s, job.nodes) == ("12", "FAILED", 2, 137, 62, "n[1-2]")
    (task,) = parse_show("JobId=14 ArrayJobId=13 ArrayTaskId=1 JobState=RUNNING ExitCode=0:0 NodeList=(null)")
    assert (task.id, task.code, task.nodes) == ("13_1", None, "")
    done, cancelled = parse_accounting("5|COMPLETED|0:0|n1|62|2026-11-24T01:10:57\n6|CANCELLED by 1000|0:15|n1|3|Unknown\n\n")
    assert (done.state, done.code, done.used_s) == ("COMPLETED", 0, 62) and (cancelled.state, cancelled.code) == ("CANCELLED", 143)


def test_seconds_for_people():
    assert [clock(value) for value in (5, 119, 600, 3600, 9000, float("inf"))] == ["5 s", "119 s", "10 min", "1 h", "2 h 30 min", "no limit"]


def test_the_number_of_nodes_that_ends_first():
    assert numbers(1) == [1] and numbers(6) == [1, 2, 4, 6] and numbers(8) == [1, 2, 4, 8]
    few, many, wasteful = Candidate(2, 0, 1000, 0.95), Candidate(8, 0, 300, 0.8), Candidate(16, 0, 250, 0.4)
    assert choose([few, many, wasteful]) is many
    assert choose([few, Candidate(8, 800, 300, 0.8)]) is few
    assert choose([Candidate(4, 0, 310, 0.9), many]).nodes == 4  # within 5 %
    assert choose([wasteful]) is wasteful


def test_the_pace_of_an_earlier_run():
    """4 ranks, 10 steps of 8 samples: 20 samples each in 2 s, 0.5 s of exchange over a link that is found again."""
    begin = {"event": "start", "steps_per_epoch": 10}
    epoch = {"event": "epoch", "world_size": 4, "examples": 80, "compute_seconds": 2.0, "exchange_seconds": 0.5}
    pace = measured_pace([begin, epoch], 16, 4e6)
    assert not pace.guessed and pace.job.sample_s == pytest.approx(0.1) and pace.job.samples == 16
    assert allreduce_seconds(4e6, 4, pace.link, "ring") == pytest.approx(0.05)
    assert measured_pace([begin, {**epoch, "world_size": 1, "exchange_seconds": 0}], 16, 4e6).guessed
    assert measured_pace([begin], 16, 4e6) is None
