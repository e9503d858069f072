"""Publishing an export to the Hub: what is sent, what is refused, secrets that are never shown."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import publish
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import without_passwords
from tests.unit import tiny_run
from tests.unit.hub_stand_in import TOKEN, Hub

ROOT = Path(__file__).parents[2]
run, exported = tiny_run.run, tiny_run.exported


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def push(directory: Path, hub: Hub, *arguments: str, token: str | None = TOKEN) -> Any:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(directory.parent / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    if token:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-m", "checkpoints_tools.publish", "--hf-model", str(directory), "--repo", "me/rnd1"]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=600)


def test_publish_pushes_every_file(exported: Path, hub: Hub) -> None:
    done = push(exported, hub, "--private")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["me/rnd1"] == {path.name: path.read_bytes() for path in exported.iterdir()}
    assert hub.private["me/rnd1"] and f"{hub.url}/me/rnd1/commit/" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_a_dry_run_sends_nothing(exported: Path, hub: Hub) -> None:
    done = push(exported, hub, "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert not hub.requests and "SHA256SUMS" in done.stdout and "there is no token" in done.stdout
    assert all(path.name in done.stdout for path in exported.iterdir())


def test_what_the_hub_refuses_is_one_line_without_the_token(exported: Path, hub: Hub) -> None:
    wrong = "hf_" + "other" * 6
    done = push(exported, hub, token=wrong)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "the upload failed" in done.stderr
    assert wrong not in done.stdout + done.stderr
    done = push(exported, hub, token=None)
    assert done.returncode == 2 and "set HF_TOKEN" in done.stderr
    assert "me/rnd1" not in hub.repositories


def test_a_hub_that_does_not_answer_is_one_line(exported: Path, hub: Hub) -> None:
    hub.url = "http://127.0.0.1:9"
    done = push(exported, hub)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    done = push(exported, hub, token="hf_sec\x01ret")
    assert (
        done.returncode == 2
        and "contains an invalid character" in done.stderr
        and "ret" not in done.stderr.partition("hub")[0]
    )


def test_passwords_of_an_endpoint_are_not_shown(exported: Path, hub: Hub) -> None:
    secret = "pass:w@rd"
    hub.url = hub.url.replace("://", f"://me:{secret}@")
    done = push(exported, hub, "--dry-run")
    assert done.returncode == 0 and "on http://***@127.0.0.1:" in done.stdout
    hub.url = f"http://me:{secret}@127.0.0.1:9"
    failed = push(exported, hub)
    assert failed.returncode == 2
    assert not any(part in word for part in ("w@rd", "me:") for d in (done, failed) for word in (d.stdout, d.stderr))
    words = f"({hub.url}/x?y=a@b https://hub/b@c)"
    assert without_passwords(words) == "(http://***@127.0.0.1:9/x?y=a@b https://hub/b@c)"


@pytest.mark.parametrize("disabled", [True, False])
def test_a_hub_without_xet_is_told_of(exported: Path, disabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Xet token missing at http://me:secret@hub/x")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", disabled)
    monkeypatch.setattr(publish.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fail)
    with pytest.raises(
        UserError, match=r"the upload failed \(RuntimeError: Xet token missing at http://\*\*\*@hub/x\)"
    ) as caught:
        publish.push(exported, "me/rnd1", False, "message", TOKEN)
    assert ("HF_HUB_DISABLE_XET=1" in str(caught.value)) != disabled
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(UserError) as caught:
        publish.push(exported, "me/rnd1", False, "message", TOKEN)
    assert "HF_HUB_DISABLE_XET" not in str(caught.value)


def test_an_export_that_was_changed_is_not_published(exported: Path, tmp_path: Path) -> None:
    arguments = ["--hf-model", str(tmp_path / "out"), "--repo", "me/rnd1", "--dry-run"]
    with pytest.raises(UserError, match="no SHA256SUMS"):
        publish.main(arguments)
    with pytest.raises(UserError, match="is not a repository"):
        publish.main([*arguments[:3], "rnd1"])
    for change, message in (
        (lambda d: (d / "config.json").write_text("{}"), "is not what was exported"),
        (lambda d: (d / "notes.txt").write_text("x"), "is not in SHA256SUMS"),
        (lambda d: (d / "tokenizer.json").unlink(), "is missing"),
    ):
        shutil.copytree(exported, tmp_path / "out")
        change(tmp_path / "out")
        with pytest.raises(UserError, match=message):
            publish.main(arguments)
        shutil.rmtree(tmp_path / "out")
