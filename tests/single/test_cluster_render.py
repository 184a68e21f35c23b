"""Batch scripts: against golden files, through shellcheck, and with values that ask for quotes."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_imaging.cluster.render import Array, Wish, chain_script, command, directives, parse_chain, scripts
from hvd_imaging.cluster.request import Request, gpus, make_requests, megabytes, seconds, site_folders
from hvd_imaging.cluster.templates import directive, names, render, words
from hvd_imaging.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"
WISH = Wish(
    Path("runs/unet3d"), Path("/data/ada/lung"), "/data/ada/venv/bin", Path("runs/unet3d/slurm/run.yaml"), "dataset",
    source="/archive/ct", recipe=Path("recipe.yaml"), assignments={"train": ["train.epochs=20"], "ingest": ["preprocess.spacing=[2,1,1]"]},
)  # fmt: skip
GPU = Request(nodes=4, ntasks_per_node=1, gres="gpu:1", time="01:00:00")
SITE = Request(
    nodes=2, ntasks_per_node=2, cpus_per_task=8, gres="gpu:a100:2", mem="120G", time="1-12:00:00", partition="gpu", account="imaging",
    exclusive=True, mail_user="ada@hospital.example", modules=["gcc/12", "openmpi/4.1"], launcher="srun", container="/images/hvd.sif",
    container_options=["--bind=/data"], stage="disk", options=["--reservation=night"],
)  # fmt: skip
ARRAY = Array("sweep.yaml", (("--run-dir", "runs/s/000", "--set", "train.learning_rate=0.1"), ("--run-dir", "runs/s/001", "--set", "a=1 'b' $c")), 1)


def cases():
    from dataclasses import replace

    chain = dict.fromkeys(("ingest", "train", "evaluate", "compress"), GPU)
    made = {f"{script.step}-gpu": script.text for script in scripts(list(chain), WISH, chain)}
    made["train-container"] = scripts(["train"], WISH, {"train": SITE})[0].text
    made["train-horovodrun"] = scripts(["train"], WISH, {"train": Request(nodes=2, launcher="horovodrun", requeue=False)})[0].text
    array = replace(WISH, array=ARRAY, run_dir=Path("runs/s"))
    made["train-array"] = scripts(["train"], array, {"train": Request(setup=["source ~/venv/bin/activate"])})[0].text
    odd = replace(WISH, run_dir=Path("runs/it's 100% \"new\""), folder=Path("/data/a b/$HOME"))
    made["train-quoted"] = scripts(["train"], odd, {"train": Request(job_name="""a 'b' "c" \\d""")})[0].text
    jobs = scripts(list(chain), WISH, chain)
    made["chain"] = chain_script(jobs, {script.step: Path(f"/data/ada/my runs/slurm/{script.step}.sbatch") for script in jobs})
    return made


@pytest.mark.parametrize("name", sorted(cases()))
def test_scripts_are_as_they_were_signed(name):
    """After a change that is meant: ``python tests/single/test_cluster_render.py``, and read the difference."""
    assert cases()[name] == (GOLDEN / f"{name}.sh").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on PATH")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", "-s", "bash", "-e", "SC1090,SC1091,SC2016", *sorted(GOLDEN.glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_script_of_odd_names_is_run_as_it_is_meant(tmp_path):
    """By bash itself, with programs that write down their words."""
    folder = tmp_path / "a b $HOME"
    programs = folder / "it's"
    programs.mkdir(parents=True)
    wish = Wish(Path('runs/"x"'), folder, str(programs), Path("run's.yaml"), assignments={"train": ["a=[1, 'b']", "c=`date`"]})
    (script,) = scripts(["train"], wish, {"train": Request(time="60")})
    (programs / "hvd-imaging").write_text('#!/bin/bash\npwd\nprintf "%s\\n" "$@"\nexit 7\n')
    (programs / "hvd-imaging").chmod(0o755)
    environ = {**os.environ, "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(["bash"], input=script.text, capture_output=True, text=True, env=environ, timeout=30)
    assert done.returncode == 7 and not done.stderr
    lines = done.stdout.splitlines()
    assert lines[1] == str(folder) and lines[2:-1] == command("train", wish, script.request)[1:]
    assert lines[-1].endswith("train: ended with code 7")


@pytest.mark.parametrize(
    ("code", "asked", "count", "requeued"),
    [(75, "USR1", 0, True), (75, "USR1", 50, False), (75, "TERM", 0, False), (205, None, 0, True), (255, None, 0, True),
     (0, None, 0, False), (5, "USR1", 0, False), (70, None, 0, False), (143, "USR1", 0, True)],
)  # fmt: skip
def test_what_is_queued_again(tmp_path, code, asked, count, requeued):
    """The script's own decision, run by bash: the command leaves when it is asked to, after a second signal of another kind even."""
    wish = Wish(Path("run"), tmp_path, str(tmp_path), Path("run.yaml"))
    (script,) = scripts(["train"], wish, {"train": Request(time="60")})
    signal = f"kill -{asked} $PPID; sleep 10" if asked else ":"
    for name, text in {
        "hvd-imaging": f"trap 'exit {code}' USR1\n{signal} &\nwait\nexit {code}", "scontrol": 'echo "scontrol $*"', "sleep": "exec /bin/sleep 0.05",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environ = {**os.environ, "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(count)}
    done = subprocess.run(["bash"], input=script.text, capture_output=True, text=True, env=environ, timeout=30)
    assert ("scontrol requeue 17" in done.stdout) is requeued, (done.stdout, done.stderr)
    assert f"ended with code {code}" in done.stdout
    if not requeued:
        assert done.returncode == code


def test_words_of_sbatch():
    assert directive("nodes", 4) == "--nodes=4" and directive("exclusive") == "--exclusive"
    assert directive("job-name", 'a "b" \\c') == '--job-name="a \\"b\\" \\\\c"'
    assert words(["a b", "c", "$d"]) == "'a b' c '$d'" and shlex.split(words(["it's"])) == ["it's"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("30", 1800), ("10:30", 630), ("01:02:03", 3723), ("2-0", 172800), ("1-02:03", 93780), ("1-02:03:04", 93784), ("UNLIMITED", float("inf"))],
)
def test_slurms_times(text, value):
    assert seconds(text) == value


def test_sizes_and_gpus():
    assert [megabytes(text) for text in (None, "0", "512", "64G", "1T", "2048K")] == [None, 0, 512, 65536, 1048576, 2]
    assert [gpus(text) for text in (None, "(null)", "gpu", "gpu:2", "gpu:a100:4(S:0-1),ssd:1", "gres/gpu:3", "gpu:v100:1,gpu:a100:2")] == [0, 0, 1, 2, 4, 3, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"time": "soon"}, "expected minutes, HH:MM:SS or D-HH:MM:SS, found 'soon'"),
        ({"mem": "much"}, "expected a size such as 64G, found 'much'"),
        ({"nodes": 0}, "nodes"),
        ({"job_name": "a\nb"}, "job_name: expected printable characters in one line"),
        ({"options": ["--x\n--y"]}, "options: expected printable characters in one line"),
        ({"container": "x.sif"}, "container: needs launcher=srun"),
    ],
)
def test_a_wrong_request_is_named(values, message):
    with pytest.raises(ConfigError, match="^submit: ") as caught:
        make_requests(["train"], values)
    assert message in str(caught.value)


def test_site_defaults_given_values_and_single_steps(tmp_path):
    near, far = tmp_path / "near", tmp_path / "far"
    for folder, text in ((near, "partition: gpu\nmodules: [openmpi]\n"), (far, "partition: cpu\naccount: imaging\n")):
        folder.mkdir()
        (folder / "site.yaml").write_text(text)
    found = make_requests(["train", "evaluate"], {"nodes": 4, "qos": None}, ["evaluate:nodes=1", "evaluate:ntasks-per-node=2"], [near, far])
    assert (found["train"].nodes, found["train"].partition, found["train"].account, found["train"].modules) == (4, "gpu", "imaging", ["openmpi"])
    assert (found["evaluate"].nodes, found["evaluate"].ntasks_per_node, found["evaluate"].partition) == (1, 2, "gpu")
    with pytest.raises(ConfigError, match=r"--for test:nodes=1: expected STEP:OPTION=VALUE with one of the steps train"):
        make_requests(["train"], {}, ["test:nodes=1"])
    with pytest.raises(ConfigError, match="unknown key; nearest valid keys: nodes"):
        make_requests(["train"], {}, ["train:node=1"])
    (near / "site.yaml").write_text("partitions: gpu\n")
    with pytest.raises(ConfigError, match=r"site.yaml: partitions: unknown key; nearest valid keys: partition"):
        make_requests(["train"], {}, [], [near, far])
    environ = {"HVD_IMAGING_SLURM": "/site/a:/site/b", "HOME": "/data/ada"}
    assert [str(folder) for folder in site_folders(environ)] == ["/site/a", "/site/b", "/data/ada/.config/hvd-imaging/slurm", "/etc/hvd-imaging/slurm"]


def test_a_sites_own_template_comes_first(tmp_path):
    (tmp_path / "train.sbatch.j2").write_text(
        '{% extends "_leaving.sbatch.j2" %}\n{% block environment %}\nexport LICENSE={{ licence | sh }}\n{% endblock %}\n'
    )
    wish = Wish(Path("run"), Path("/x"), "/bin", Path("run.yaml"), variables={"licence": "a b"})
    (script,) = scripts(["train"], wish, {"train": Request()}, [tmp_path])
    assert "export LICENSE='a b'\n" in script.text and "trap 'ask requeue' USR1" in script.text
    with pytest.raises(ConfigError, match=r"train.sbatch.j2, line 3: 'licence' is undefined; known variables: .*command.*--var NAME=VALUE"):
        scripts(["train"], Wish(Path("run"), Path("/x"), "/bin", Path("run.yaml")), {"train": Request()}, [tmp_path])
    with pytest.raises(ConfigError, match="--var ranks: this name is taken"):
        scripts(["train"], Wish(Path("run"), Path("/x"), "/bin", Path("run.yaml"), variables={"ranks": "1"}), {"train": Request()})
    (tmp_path / "train.sbatch.j2").write_text("{% if %}\n")
    with pytest.raises(ConfigError, match=r"train.sbatch.j2, line 1: "):
        render("train", {}, [tmp_path])
    with pytest.raises(ConfigError, match="template 'trian.sbatch.j2': not found; there are compress, evaluate, ingest, train"):
        render("trian", {}, [tmp_path / "none"])
    assert names([]) == ["compress", "evaluate", "ingest", "train"]


@pytest.mark.parametrize("text", ["train,ingest", "train,train", "export", ""])
def test_a_chain_has_an_order(text):
    with pytest.raises(ConfigError, match="expected some of ingest,train,evaluate,compress in this order"):
        parse_chain(text)


def test_what_a_step_needs_is_asked_for():
    bare = Wish(Path("run"), Path("/x"), "/bin", Path("run.yaml"))
    with pytest.raises(ConfigError, match="expected --source ARCHIVE"):
        command("ingest", bare, Request())
    with pytest.raises(ConfigError, match="expected --recipe FILE"):
        command("compress", bare, Request())
    with pytest.raises(ConfigError, match="--array: takes one step"):
        scripts(["train", "evaluate"], Wish(Path("run"), Path("/x"), "/bin", Path("run.yaml"), array=ARRAY), {})


def test_a_percent_sign_in_the_folder_is_no_pattern_of_sbatch():
    wish = Wish(Path("runs/100%j"), Path("/x"), "/bin", Path("run.yaml"))
    assert "--output=/x/runs/100%%j/slurm/train-%j.out" in directives("train", wish, Request())


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in cases().items():
        (GOLDEN / f"{name}.sh").write_text(text)
    sys.exit(0)


LINE = "x\n#SBATCH --wrap=evil\ntouch owned"
PLACES = {
    "run_dir": {"run_dir": Path(LINE)}, "folder": {"folder": Path("/" + LINE)}, "path": {"path": LINE}, "config": {"config": Path(LINE)},
    "dataset": {"dataset": LINE}, "source": {"source": LINE}, "recipe": {"recipe": Path(LINE)}, "set": {"assignments": {"train": [LINE]}},
    "ingest-set": {"assignments": {"ingest": [LINE]}}, "array file": {"array": Array(LINE, (("a",),))}, "array row": {"array": Array("a", (("b", LINE),))},
    "variable": {"variables": {"mine": LINE}},
}  # fmt: skip


@pytest.mark.parametrize("control", ["\n", "\r", "\x0b", "\x1b", "\x85", "\u2028"])
@pytest.mark.parametrize("place", PLACES)
def test_no_value_brings_a_line_of_its_own(place, control):
    from dataclasses import replace

    def changed(value):
        if isinstance(value, str | Path):
            return type(value)(str(value).replace("\n", control))
        if isinstance(value, Array):
            return Array(changed(value.file), changed(value.rows))
        if isinstance(value, dict):
            return {key: changed(inner) for key, inner in value.items()}
        return type(value)(changed(inner) for inner in value)

    wish = replace(WISH, **{key: changed(value) for key, value in PLACES[place].items()})
    steps = ["train"] if wish.array else ["ingest", "train", "evaluate", "compress"]
    with pytest.raises(ConfigError, match="expected printable characters in one line, which go into a batch script") as caught:
        scripts(steps, wish, dict.fromkeys(steps, GPU))
    assert control not in str(caught.value)
