"""Files by convention: pins, citation, pre-commit, Docker, Slurm; they agree with what they repeat."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils.diagnostics.drivers import PAGE, TORCH_FOR_DRIVER, torch_for

ROOT = Path(__file__).resolve().parents[1]


def pins(name: str) -> dict[str, str]:
    """Canonical package name -> version of a file in which every line is NAME==VERSION."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)]
    return {canonicalize_name(package): version for package, _, version in (line.partition("==") for line in lines)}


# -- versions ----------------------------------------------------------------------------------------------------------


def test_the_lock_has_every_package_of_the_requirements_and_what_they_need() -> None:
    locked, required = pins("constraints.txt"), pins("requirements.txt")
    assert {name: locked.get(name) for name in required} == required
    missing = set()
    for name, version in locked.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        needs = map(Requirement, (installed.requires or ()) if installed.version == version else ())
        missing |= {need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})}
    missing -= {"pip", "setuptools", "wheel"}  # which pip freeze leaves out
    assert not {canonicalize_name(name) for name in missing} - locked.keys()


def test_pins_are_within_the_ranges_of_the_project() -> None:
    ranges = re.findall(r'^    "(.*)",$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    required = pins("requirements.txt")
    for need in map(Requirement, ranges):
        assert need.specifier.contains(required[canonicalize_name(need.name)]), need


# -- drivers -----------------------------------------------------------------------------------------------------------


def test_the_page_has_the_rows_that_doctor_prints() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    for lowest, fix in TORCH_FOR_DRIVER:
        assert f"| {f'from {lowest}' if lowest else 'older'} | {fix} |" in text
    pair = {name: pins("requirements.txt")[name] for name in ("torch", "torchvision")}
    assert " ".join(f"{name}=={version}" for name, version in pair.items()) in text


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ("580.95.05", "CUDA 13"),
        ("579.1", "CUDA 12.6"),
        ("525.60.13", "CUDA 12.6"),
        ("470.2", "another machine"),
        ("unknown", "a matching torch"),
    ],
)
def test_the_torch_for_a_driver(driver: str, words: str) -> None:
    assert words in torch_for(driver)
    assert torch_for(driver).endswith(f"({PAGE})")


# -- small files -------------------------------------------------------------------------------------------------------


def test_the_citation_is_that_of_the_readme() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    readme, paper = (ROOT / "README.md").read_text(encoding="utf-8"), citation["preferred-citation"]
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for text in (paper["title"], names, paper["journal"], str(paper["year"])):
        assert f"{{{text}}}" in readme


def test_pre_commit_runs_the_checks_of_the_tests() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    script = (ROOT / "scripts/run_tests.sh").read_text()
    assert [hook["entry"] for hook in hooks] == re.findall(r"^    (\.venv/bin/(?!python).*)$", script, re.MULTILINE)


def test_the_image_copies_files_that_exist_and_leaves_out_what_git_ignores() -> None:
    copied = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    assert all((ROOT / name).exists() for names in copied for name in names)
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert ignored <= left_out


# -- Slurm -------------------------------------------------------------------------------------------------------------

STAND_INS = {  # Slurm's programs and torchrun; srun starts its command once per node, as Slurm does
    "scontrol": 'if [ "$1" = show ]; then printf "a1\\na2\\n"; else echo "$@" >>requeued; fi',
    "srun": 'shift 3; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    "torchrun": 'echo "$@" >>launched; [ ! -e hang ] || { touch hangs; exec sleep 30; }',
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """A working folder with stand-ins; the environment of a job on two nodes of four GPUs."""
    bin_folder = tmp_path / ".venv/bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "activate").touch()
    for name, code in STAND_INS.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (bin_folder / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "a[1-2]"}
    job |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}
    return os.environ | job | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}


def test_slurm_starts_a_launcher_per_node(tmp_path: Path, cluster: dict[str, str]) -> None:
    arguments = ["--config", "configs/tiny.yaml", "--dataset", "refer_seg||vqa"]
    subprocess.run(["bash", ROOT / "scripts/slurm.sh", *arguments], env=cluster, check=True, timeout=20)
    common = "--nproc_per_node 4 --master_addr a1 --master_port 20041 train_ds.py --auto_resume true"
    assert (tmp_path / "launched").read_text().splitlines() == [
        f"--nnodes 2 --node_rank {rank} {common} {' '.join(arguments)}" for rank in (0, 1)
    ]
    assert not (tmp_path / "requeued").exists()


def test_slurm_queues_a_job_again_before_its_time_is_over(tmp_path: Path, cluster: dict[str, str]) -> None:
    (tmp_path / "hang").touch()
    command = ["bash", ROOT / "scripts/slurm.sh"]
    with subprocess.Popen(command, env=cluster, start_new_session=True, stderr=subprocess.PIPE) as job:
        while not (tmp_path / "hangs").exists():
            assert job.poll() is None
        job.send_signal(signal.SIGUSR1)
        try:
            assert job.wait(timeout=20) != 0
        finally:
            os.killpg(job.pid, signal.SIGKILL)
    assert (tmp_path / "requeued").read_text() == "requeue 41\n"


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shell_scripts_are_clean() -> None:
    subprocess.run(["shellcheck", "-x", *(ROOT / "scripts").glob("*.sh")], check=True, cwd=ROOT, timeout=60)
