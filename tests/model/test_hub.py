"""Hub ids as folders and files: against a hub on loopback, and against caches laid out by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import TOKEN, Repository, lay_out, serve
from programs import evaluation
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tiny_run import ROOT, arguments, environment, log_lines

import train_ds
from model.loading import hub
from model.loading.hub import name_of, repository_of, resolve_file, resolve_folder
from model.loading.pretrained import load, load_for_training, resolve_start
from scripts import merge_lora
from utils.training import checkpoint as checkpoints

WRITTEN = ROOT / "tests/fixtures/written_before"
A, B = "a" * 40, "b" * 40
CASES = """
import json, sys, time
time.sleep = lambda seconds: None  # between a broken transfer and its second try
from model.loading.hub import resolve_file, resolve_folder
results = {}
for line in json.loads(sys.argv[1]):
    function, text = line.split(" ", 1)
    try:
        found = {"folder": resolve_folder, "file": resolve_file}[function](text, "--version")
        files = sorted(path.name for path in found.path.iterdir()) if found.path.is_dir() else [found.path.name]
        results[line] = [found.name, files]
    except ValueError as error:
        results[line] = str(error)
assert "torch" not in sys.modules
print(json.dumps(results))
"""


def start(cases: list[str], cache: Path, url: str, **variables: str) -> subprocess.Popen:
    """A process that resolves the cases, as huggingface_hub reads its environment when it is imported."""
    settings = {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= variables
    command = [sys.executable, "-c", CASES, json.dumps(cases)]
    return subprocess.Popen(
        command, env=environment(**settings), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def results(process: subprocess.Popen) -> dict[str, str | list]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()[-3000:]
    return json.loads(output)


@pytest.fixture(scope="module")
def served():
    weights = {"config.json": b"{}", "model.safetensors": b"abc" * 1000}
    repositories = {
        "org/llava": Repository(
            weights | {"pytorch_model.bin": b"x", "modeling.py": b"raise", "sub/config.json": b"{}", "a.pth": b"sam"}
        ),
        "org/bin": Repository({"config.json": b"{}", "pytorch_model-1-of-1.bin": b"abcd", "mm_projector.bin": b"x"}),
        "org/gated": Repository(weights, gated=True),
        "org/private": Repository(weights, private=True),
        "org/wrong": Repository(weights, wrong={"model.safetensors": b"xyz" * 1000}),
        "org/short": Repository(weights, wrong={"model.safetensors": b"ab"}),
        "org/cut": Repository(
            {"config.json": b"{}", "model.safetensors": b"cut" * 8_000_000}, cut={"model.safetensors"}
        ),
        "org/none": Repository({"config.json": b"{}"}),
        hub.SAM_REPOSITORY: Repository({"checkpoints/sam_vit_h_4b8939.pth": b"not Meta's"}),
    }
    with serve(repositories) as server:
        yield server


@pytest.fixture(scope="module")
def resolved(served, tmp_path_factory):
    """Case -> result, of one process without a token."""
    cases = ["folder org/llava", "folder org/llava@v1", f"folder org/llava@{Repository({}).commit}", "folder org/bin"]
    cases += [f"folder org/{name}" for name in ("gated", "private", "wrong", "short", "cut", "none", "unknown")]
    cases += ["folder org/llava@v7", "folder hub:org/llava", "folder org/llava:a.pth", "file org/llava:a.pth"]
    cases += ["file org/llava@v1:a.pth", "file org/llava:b.pth", "file org/bin", "file sam_vit_h", "folder a--b/c"]
    served.cache = tmp_path_factory.mktemp("cache")
    return results(start(cases, served.cache, served.url))


COMMIT = Repository({}).commit


def test_a_repository_becomes_a_folder_without_code_and_with_its_commit(resolved):
    expected = [f"org/llava@{COMMIT}", ["config.json", "model.safetensors"]]
    for case in ("org/llava", "org/llava@v1", f"org/llava@{COMMIT}", "hub:org/llava"):
        assert resolved[f"folder {case}"] == expected
    assert resolved["folder org/bin"] == [f"org/bin@{COMMIT}", ["config.json", "pytorch_model-1-of-1.bin"]]


def test_a_file_of_a_repository(resolved):
    assert resolved["file org/llava:a.pth"] == [f"org/llava@{COMMIT}:a.pth", ["a.pth"]]
    assert resolved["file org/llava@v1:a.pth"] == resolved["file org/llava:a.pth"]
    assert resolved["file org/bin"] == resolved["folder org/bin"]


def test_a_broken_transfer_goes_on_where_it_broke(resolved, served):
    assert resolved["folder org/cut"] == [f"org/cut@{COMMIT}", ["config.json", "model.safetensors"]]
    assert served.requests.count("GET /lfs/org/cut/model.safetensors") == 2
    assert served.ranges == ["bytes=10485760-"]  # huggingface_hub writes 10 MiB at a time


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("folder org/gated", ["is gated: accept its terms at http", "/org/gated", "hf auth login", "HF_TOKEN"]),
        ("folder org/private", ["has no repository", "that you may read", "hf auth login"]),
        ("folder org/unknown", ["is no path here", "has no repository", "/org/unknown"]),
        ("folder org/llava@v7", ["no branch, tag or commit v7", "/org/llava/commits lists them"]),
        ("folder org/wrong", ["model.safetensors arrived with other content", "was deleted; run again"]),
        ("folder org/short", ["another size than the hub lists; run again"]),
        ("folder org/none", ["holds none of model*.safetensors"]),
        ("folder org/llava:a.pth", ["names a file", "such as org/llava"]),
        ("file org/llava:b.pth", ["has no such file", f"/org/llava/tree/{COMMIT} lists"]),
        ("file sam_vit_h", ["is not Meta's file, whose SHA-256 is a7bf3b02f3eb", "give its path"]),
        ("folder a--b/c", ["cannot be downloaded: Cannot have --"]),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_way_out(resolved, case, words):
    assert resolved[case].startswith("--version ")
    for word in words:
        assert word in resolved[case]


def test_a_wrong_file_is_not_kept(resolved, served):
    assert not list(served.cache.glob("models--org--wrong/snapshots/*/model.safetensors"))
    assert not list(served.cache.glob("models--org--*/blobs/*.incomplete"))


def test_offline_the_cache_serves(resolved, served):
    cases = [f"folder org/{name}" for name in ("llava", "bin", "wrong", "new")]
    again = results(start(cases, served.cache, served.url, HF_HUB_OFFLINE="1"))
    assert again["folder org/llava"][0] == resolved["folder org/llava"][0]
    assert again["folder org/bin"] == resolved["folder org/bin"]
    assert f"the cache {served.cache} holds only a part of it; HF_HUB_OFFLINE" in again["folder org/wrong"]
    assert "holds nothing of it; HF_HUB_OFFLINE forbids" in again["folder org/new"]


def test_without_a_network_the_cache_serves(resolved, served):
    again = results(start(["folder org/llava", "folder org/new"], served.cache, "http://127.0.0.1:9"))
    assert again["folder org/llava"][0] == resolved["folder org/llava"][0]
    assert "the hub http://127.0.0.1:9 cannot be reached (ConnectError)" in again["folder org/new"]


def test_a_token_that_the_hub_refuses(served, tmp_path):
    [message] = results(start(["folder org/llava"], tmp_path, served.url, HF_TOKEN="hf_expired")).values()
    assert "HTTP 401, Invalid credentials in Authorization header; log in with hf auth login" in message


def test_a_token_opens_what_is_gated_for_processes_at_once(served, tmp_path):
    cases = ["folder org/gated", "folder org/private"]
    processes = [start(cases, tmp_path, served.url, HF_TOKEN=TOKEN, RANK=rank) for rank in ("0", "1")]
    first, second = map(results, processes)
    assert first == second
    assert first["folder org/private"] == [f"org/private@{COMMIT}", ["config.json", "model.safetensors"]]


# -- without a hub -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "(empty): no such folder"),
        ("nowhere", "nowhere: no such folder; give a path, or a repository of the hub: org/name"),
        ("/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("./llava/v1", "./llava/v1: no such folder"),
        ("hub:llava", "hub:llava: no such folder"),
        ("weights/no", "weights/no: no such folder, though weights is there. Correct the path; if the hub's"),
        ("weights/no", "write hub:weights/no"),
        ("weights/file", "weights/file: is no folder"),
        ("org/no", "is no path here, and the cache"),
    ],
)
def test_a_path_that_is_not_there(text, words, tmp_path, monkeypatch, hub_cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/file").touch()
    with pytest.raises(ValueError, match=r"^--base ") as error:
        resolve_folder(text, "--base")
    assert words in str(error.value)


def test_a_path_comes_before_the_hub(tmp_path, monkeypatch, hub_cache):
    lay_out(hub_cache, "org/name", {"model.safetensors": b"hub"}, A)
    lay_out(hub_cache, hub.SAM_REPOSITORY, {"checkpoints/sam_vit_b_01ec64.pth": b"sam"}, A)
    assert resolve_folder("org/name", "--base").name == f"org/name@{A}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "sam_vit_b").touch()
    assert vars(resolve_folder("org/name", "--base")) == {"path": Path("org/name"), "name": "org/name"}
    assert resolve_folder("hub:org/name", "--base").name == f"org/name@{A}"
    assert resolve_folder(f"org/name@{A}", "--base").name == f"org/name@{A}"  # as logs and checkpoints name it
    assert resolve_file("sam_vit_b", "--sam").path == Path("sam_vit_b")
    assert resolve_folder(tmp_path, "--base").path == tmp_path


@pytest.mark.parametrize("harm", ["link", "size", "unfinished"])
def test_a_damaged_cache(harm, hub_cache):
    snapshot = lay_out(hub_cache, "org/name", {"config.json": b"{}", "model.safetensors": b"hub"}, A)
    blob = snapshot / (snapshot / "model.safetensors").readlink()
    entries = {"model.safetensors": {"size": 3, "blob_id": "0" * 40}}
    if harm == "link":
        blob.unlink()
        words = f"the cache is damaged: {snapshot / 'model.safetensors'} leads to .*{blob.name}, which is gone. Connect"
    elif harm == "size":
        blob.write_bytes(b"hu")
        (snapshot.parents[1] / "trees").mkdir()
        (snapshot.parents[1] / f"trees/{A}.json").write_text(json.dumps({"format_version": 1, "files": entries}))
        words = f"has 2 bytes, the hub's file 3. Delete .*{blob.name}, and run again"
    else:
        blob.rename(f"{blob}.incomplete")
        (snapshot / "model.safetensors").unlink()
        words = "or the hub was not asked and the cache .* lacks them"
    with pytest.raises(ValueError, match=words):
        resolve_folder("org/name", "--version")


def test_names():
    path = f"/any where/hub/models--org--a-b/snapshots/{A}"
    assert name_of(path) == f"org/a-b@{A}"
    assert name_of(f"{path}/sub/sam.pth") == f"org/a-b@{A}:sub/sam.pth"
    assert name_of("weights/llava") == "weights/llava"
    assert repository_of(name_of(f"{path}/sam.pth")) == "org/a-b"
    assert repository_of("weights/llava") is None
    assert repository_of("org/name@main") is None


def test_results_of_a_model_of_the_hub_are_not_written_to_a_folder_of_its_name(tmp_path):
    assert evaluation.output_of("hub:org/name@v1") == Path("runs/org--name@v1/eval")
    assert evaluation.output_of(str(tmp_path)) == tmp_path / "eval"


# -- loading -----------------------------------------------------------------------------------------------------------


def test_finished_models_load_by_id(hub_cache):
    lay_out(hub_cache, "org/merged", WRITTEN / "merged", A)
    local, opened = load(WRITTEN / "merged", "fp32", "cpu"), load("org/merged", "fp32", "cpu")
    assert opened.fingerprint == local.fingerprint
    assert opened.folder == f"org/merged@{A}"
    assert {row.source for row in opened.report()} == {f"org/merged@{A}"}


@pytest.fixture
def base(hub_cache):
    """The hub ids of a base whose CLIP and SAM are in one repository each, laid out at commit A."""
    lay_out(hub_cache, "org/llava", WRITTEN / "base/llava", A)
    lay_out(hub_cache, "org/clip", WRITTEN / "base/clip", A)
    lay_out(hub_cache, "org/sam", {"checkpoints/sam.pth": (WRITTEN / "base/sam.pth").read_bytes()}, A)
    return {"version": "org/llava", "vision_tower": "org/clip", "vision_pretrained": "org/sam:checkpoints/sam.pth"}


def test_a_base_loads_by_ids(base):
    names = {setting: part.name for setting, part in resolve_start(**base).items()}
    assert names["vision_pretrained"] == f"org/sam@{A}:checkpoints/sam.pth"
    *_, rows = load_for_training(**base, precision="fp32")
    sources = {row.module: row.source for row in rows}
    assert sources["model"] == names["version"] == f"org/llava@{A}"
    assert sources["vision_tower"] == names["vision_tower"]
    assert sources["visual_model"] == names["vision_pretrained"]


def merged(tmp_path: Path, *flags: str) -> tuple[dict, str]:
    """Metadata and card of the folder that merge_lora.py writes."""
    assert merge_lora.main([*flags, "--output", str(tmp_path / "out")]) == 0
    return json.loads((tmp_path / "out/uground_run.json").read_text()), (tmp_path / "out/README.md").read_text()


def test_the_card_names_repositories_and_their_commits(base, tmp_path):
    flags = [part for name, text in base.items() for part in (f"--{name}", text)]
    config = str(WRITTEN / "run/config.yaml")
    meta, card = merged(tmp_path, "--config", config, *flags)
    assert {name: meta["config"]["model"][name] for name in base} == base  # as typed
    assert meta["resolved"]["version"] == f"org/llava@{A}"
    assert f"| org/sam@{A}:checkpoints/sam.pth |" in card
    assert "base_model:\n- org/llava\n- org/clip\n- org/sam\n" in card


def test_a_run_is_merged_with_the_commit_that_it_was_trained_on(base, hub_cache, tmp_path):
    """The branch has moved on since, to weights that do not fit the run."""
    run = tmp_path / "run"
    shutil.copytree(WRITTEN / "run", run)
    path = run / "checkpoints/step_00000006/meta.json"
    meta = json.loads(path.read_text())
    meta["config"]["model"] |= base
    meta["resolved"] = {name: part.name for name, part in resolve_start(**base).items()}
    path.write_text(json.dumps(meta))
    lay_out(hub_cache, "org/llava", {"config.json": b"{}", "model.safetensors": b"another"}, B)
    hub._download.cache_clear()
    assert resolve_folder("org/llava", "--version").name == f"org/llava@{B}"
    meta, _ = merged(tmp_path, "--checkpoint", str(run))
    assert meta["resolved"]["version"] == f"org/llava@{A}"
    assert meta["config"]["model"]["version"] == "org/llava"
    problems = checkpoints.differences(meta | {"base": {}, "resolved": {"version": f"org/llava@{B}"}}, meta)
    assert f"not the same: org/llava@{A} in the checkpoint, now org/llava@{B}" in problems[0]


@pytest.mark.slow
def test_a_run_records_commits_and_is_not_resumed_on_another(base, data, hub_cache, tmp_path, capsys, no_report):
    flags = arguments(tmp_path, data, tmp_path, no_eval="true", epochs=1, **base)
    assert train_ds.main(flags) == 0
    [started] = log_lines(tmp_path / "run", "start")
    meta = json.loads((checkpoints.find_checkpoint(tmp_path / "run") / "meta.json").read_text())
    for recorded in (started, meta):
        assert recorded["resolved"]["vision_pretrained"] == f"org/sam@{A}:checkpoints/sam.pth"
        assert recorded["config"]["model"]["version"] == "org/llava"
    assert {row["source"] for row in started["weights"] if row["module"] in ("model", "lm_head")} == {f"org/llava@{A}"}
    files = {path.name: path.read_bytes() for path in (WRITTEN / "base/llava").iterdir()}
    state = {name: value + 1 for name, value in load_tensors(files["model.safetensors"]).items()}
    lay_out(hub_cache, "org/llava", files | {"model.safetensors": save_tensors(state, {"format": "pt"})}, B)
    hub._download.cache_clear()
    capsys.readouterr()
    assert train_ds.main([*flags, "--auto_resume", "true", "--epochs", "3"]) == 2
    assert f"org/llava@{A} in the checkpoint, now org/llava@{B}" in capsys.readouterr().err
