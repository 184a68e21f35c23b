"""What belongs into the repository, what does not, and that its pages are true to the code."""

import ast
import configparser
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from hvd_imaging import errors

REPO = Path(__file__).resolve().parents[2]
OTHER = {".git", ".venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".import_linter_cache",
         "build", "dist", "quickstart"}  # fmt: skip


def repository_files():
    """Files of the repository: what git knows or would add, without git all that is not a cache."""
    listed = subprocess.run(
        ["git", "-C", str(REPO), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        return [REPO / name for name in listed.stdout.split("\0") if name and (REPO / name).is_file()]
    return [
        path
        for path in REPO.rglob("*")
        if path.is_file() and not OTHER & set(path.relative_to(REPO).parts) and ".egg-info" not in str(path)
    ]


def packages():
    """Distribution names of setup.cfg, all extras."""
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    lines = setup["options"]["install_requires"].splitlines()
    for extra in setup["options.extras_require"].values():
        lines += extra.splitlines()
    return {re.split(r"[<>=!~\[; ]", line.strip())[0] for line in lines if line.strip()}


def pins():
    """Name -> version of scripts/constraints.txt."""
    text = (REPO / "scripts/constraints.txt").read_text()
    return dict(line.split("==") for line in text.split() if "==" in line)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_is_pinned_to_one_version():
    pinned = {canonical(name) for name in pins()}
    assert {name for name in packages() if canonical(name) not in pinned} == set()
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins().values())


def test_versions_stand_in_one_place():
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    exact = re.findall(r"^(\S+)==(\S+)$", "\n".join(setup["options.extras_require"].values()), re.MULTILINE)
    assert all(pins()[name] == version for name, version in exact)


def test_no_paths_of_a_machine_and_no_package_index_in_the_files():
    machine = re.compile(
        r"(?<![\w.$}/-])/(?:home|work|root|Users)/[\w.-]+"  # somebody's folders
        r"|(?i:artifactory|nexus|[\w.-]*pypi[\w.-]*\.(?:org|com|net|io|internal|local))"  # registries
        r"|https?://(?:\d{1,3}\.){3}\d{1,3}"
        r"|--(?:extra-)?index-url"
    )
    found = []
    for path in repository_files():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(REPO)}: {match.group()}" for match in machine.finditer(text)]
    assert found == []


def test_files_are_small_and_no_data_is_checked_in():
    for path in repository_files():
        assert path.stat().st_size < 500_000, path
        assert path.suffix not in {".h5", ".dcm", ".gz", ".npz", ".key", ".whl", ".so"}, path


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len((REPO / "README.md").read_text().splitlines()) <= 150
    for page in [REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").glob("*.md")]:
        for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}#{anchor}"


def anchors(page):
    """Headings of a page as links name them."""
    heads = re.findall(r"^#+\s+(.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_index_and_the_readme_lead_to_every_page():
    index, readme = (REPO / "docs/index.md").read_text(), (REPO / "README.md").read_text()
    for page in sorted((REPO / "docs").glob("*.md")):
        if page.name != "index.md":
            assert f"({page.name})" in index and f"(docs/{page.name})" in readme, page.name


def test_every_exit_code_is_explained():
    text = (REPO / "docs/troubleshooting.md").read_text()
    kinds = [errors.HvdImagingError, *errors.HvdImagingError.__subclasses__()]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert listed == {0, 70, 130, errors.PARTIAL, errors.NOT_RELEASED, errors.TRY_AGAIN} | {kind.exit_code for kind in kinds}


def test_every_command_and_network_is_in_the_pages():
    from hvd_imaging.cli.main import COMMANDS
    from hvd_imaging.models import BUILDERS

    text = "".join(page.read_text() for page in [REPO / "README.md", *(REPO / "docs").glob("*.md")])
    assert [name for name in COMMANDS if f"hvd-imaging {name}" not in text] == []
    assert [name for name in BUILDERS if f"`{name}`" not in text] == []


def test_every_module_says_what_it_is_for():
    for path in sorted((REPO / "hvd_imaging").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not tree.body or ast.get_docstring(tree), f"{path.relative_to(REPO)}: no docstring"


def test_the_pages_name_commands_and_keys_that_exist():
    from hvd_imaging import config
    from hvd_imaging.cli.main import COMMANDS

    known = {*config.keys(config.RunConfig), *config.keys(config.IngestConfig)}
    known |= {key.rpartition(".")[0] for key in known}  # a whole section, as in data.augment=null
    sections = {key.split(".")[0] for key in known if "." in key}
    for page in [REPO / "README.md", *(REPO / "docs").glob("*.md")]:
        text = page.read_text()
        commands = set(re.findall(r"^\s*(?:\S+ -np \d \S* ?)?hvd-imaging ([a-z]+)", text, re.MULTILINE))
        assert commands <= set(COMMANDS), page.name
        keys = set(re.findall(rf"--set '?((?:{'|'.join(sections)})[\w.]*)=", text))
        whole = {key for key in keys if any(name.startswith(f"{key}.") for name in known)}  # data.augment=null
        assert keys - whole <= known, page.name


@pytest.mark.parametrize("name", ["scripts/setup_env.sh", "scripts/run_tests.sh", "scripts/quickstart.sh", ".ci/run"])
def test_scripts_can_be_started(name):
    path = REPO / name
    assert path.stat().st_mode & stat.S_IXUSR
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_ci_brings_debian_packages_and_runs_the_test_script():
    lines = [line for line in (REPO / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert [line for line in lines[1:] if not line.startswith("cd ")] == ["./scripts/ci_packages.sh", "exec ./scripts/run_tests.sh"]


def test_the_scripts_without_a_run():
    for name in ("setup_env.sh", "quickstart.sh"):
        done = subprocess.run([str(REPO / "scripts" / name), "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.startswith("Usage:")


def test_the_quickstart_keeps_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine").touch()
    done = subprocess.run(
        [str(REPO / "scripts/quickstart.sh"), str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "not empty" in done.stderr
    assert os.listdir(tmp_path) == ["mine"]


def test_the_licence_is_whole():
    text = (REPO / "LICENSE").read_text()
    assert "Apache License" in text and "TERMS AND CONDITIONS" in text and "END OF TERMS AND CONDITIONS" in text
