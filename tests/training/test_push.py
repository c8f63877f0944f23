"""``merge_lora.py --push``: one commit to a hub on loopback, or a sentence that says why not."""

from __future__ import annotations

import pytest
from huggingface_hub import constants
from loopback_hub import TOKEN, WRITER, Repository, serve
from tiny_run import ROOT

from scripts import merge_lora
from utils.training.push import check_push, push

WRITTEN = ROOT / "tests/fixtures/written_before"


@pytest.fixture
def server(monkeypatch):
    files = {"model-00002-of-00002.safetensors": b"old", "figure.png": b"mine", "fp16/model.safetensors": b"mine"}
    with serve({"org/public": Repository(files)}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield hub


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "merged"
    path.mkdir()
    (path / "README.md").write_text("---\nlicense: other\n---\n")
    (path / "model.safetensors").write_bytes(b"new" * 100)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_merged_and_pushed(server, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(WRITTEN)
    flags = ["--checkpoint", "run", "--output", str(tmp_path / "merged"), "--push", "org/new", "--private"]
    assert merge_lora.main(flags) == 0
    repository = server.repositories["org/new"]
    assert repository.files == contents(tmp_path / "merged")
    assert repository.private
    assert repository.commits == ["Upload merged with scripts/merge_lora.py"]
    assert f"pushed to {server.url}/org/new/commit/eeee" in capsys.readouterr().out


def test_old_weights_of_a_repository_are_replaced(server, folder):
    assert push(folder, "org/public").startswith(f"{server.url}/org/public/commit/")
    repository = server.repositories["org/public"]
    assert repository.files == contents(folder) | {"figure.png": b"mine", "fp16/model.safetensors": b"mine"}
    assert len(repository.commits) == 1


def test_a_public_repository_is_not_taken_for_a_private_one(server, folder):
    with pytest.raises(ValueError, match=r"org/public: the repository exists, and is public; .* leave out --private"):
        push(folder, "org/public", private=True)
    assert not server.repositories["org/public"].commits


@pytest.mark.parametrize(
    ("repository", "token", "words"),
    [
        ("other/name", WRITER, r"does not let this token write there \(HTTP 403\)"),
        ("org/public", TOKEN, r"does not let this token write there \(HTTP 403\)"),
        ("a--b/c", WRITER, r"Cannot have -- or"),
    ],
)
def test_what_the_hub_refuses(server, folder, monkeypatch, repository, token, words):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=rf"^--push {repository}: .*{words}") as error:
        push(folder, repository)
    assert f"{folder} is complete; hf upload {repository} {folder} . tries again" in str(error.value)


def test_without_a_network(server, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"the hub http://127.0.0.1:9 cannot be reached \(.*\)\. /.* is complete"):
        push(folder, "org/new")


def test_what_is_known_before_the_work(server, monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match="is no repository of the hub, such as org/name"):
        check_push("name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids to upload"):
        check_push("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    flags = ["--checkpoint", str(WRITTEN / "run"), "--output", str(tmp_path / "merged")]
    assert merge_lora.main([*flags, "--push", "org/name"]) == 2
    assert "--push org/name: nobody is logged in; log in with hf auth login" in capsys.readouterr().err
    assert merge_lora.main([*flags, "--private"]) == 2
    assert not (tmp_path / "merged").exists()
