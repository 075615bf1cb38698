"""Model cards from run directories, and pushing to a hub that is a local fake of its HTTP API."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hotloop.exporting import push
from hotloop.exporting.card import MARK, render_card, run_facts, write_card
from hotloop_core import ExportedFile, ExportReport
from hotloop_core.errors import ConfigError, ExportError
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

TOKEN = "hf_never_printed"
RECIPE = {
    "model": {"name": "owner/base", "bits": 4},
    "data": {"path": "rows.jsonl", "held_out": 0.05, "system": None},
    "lora": {"r": 16, "targets": ["q_proj", "v_proj"]},
    "schedule": {"steps": 12, "learning_rate": 0.0002},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    losses = {"steps": 12, "train_loss": 1.5, "held_out_before": 2.25, "held_out_after": 1.75}
    (folder / "report.json").write_text(json.dumps(losses))
    (folder / "data.json").write_text(json.dumps({"rows": 40, "form": "chat"}))
    return folder


@pytest.fixture
def report(tmp_path: Path) -> ExportReport:
    path = tmp_path / "out" / "m-Q8_0.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    file = ExportedFile(path=path, bytes=4, sha256="ab" * 32)
    return ExportReport(
        format="gguf", quants=("q8_0",), files=(file,), tensors=1, notes=("merged into X",)
    )


def test_a_card_says_base_data_settings_losses_and_files(run: Path, report: ExportReport) -> None:
    text = render_card(report, run_facts(run), name="mine")
    head = yaml.safe_load(text.split("---")[1])
    assert head == {
        "library_name": "gguf", "base_model": "owner/base", "base_model_relation": "quantized",
        "tags": ["hotloop"],
    }  # fmt: skip
    for line in (
        "# mine", "| path | rows.jsonl |", "| rows | 40 |", "| lora.r | 16 |",
        "| lora.targets | q_proj, v_proj |", "| schedule.learning_rate | 0.0002 |",
        "| held-out loss before, nats | 2.25 |", "| held-out loss after, nats | 1.75 |",
        f"| `m-Q8_0.gguf` | 4 | `{'ab' * 32}` |", "- merged into X",
    ):  # fmt: skip
        assert line in text
    assert "None" not in text


def test_a_local_base_is_no_link_on_the_hub(report: ExportReport) -> None:
    text = render_card(report, {"recipe": {"model": {"name": "/disk/base"}}}, name="mine")
    assert "base_model:" not in text and "`/disk/base`" in text


def test_a_card_of_our_own_is_renewed_and_a_persons_is_left(report: ExportReport) -> None:
    directory = report.files[0].path.parent
    card = write_card(directory, report, {}, name="one")
    assert card is not None and MARK in card.read_text()
    assert write_card(directory, report, {}, name="two") == card and "# two" in card.read_text()
    card.write_text("# written by hand")
    assert write_card(directory, report, {}, name="three") is None
    assert card.read_text() == "# written by hand"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        run_facts(tmp_path)


class Hub:
    """The part of the hub's API that a push uses: make a repository, ask how to send, one commit."""

    def __init__(self, server: HTTPServer) -> None:
        self.created: list[dict[str, Any]] = []
        self.commits: list[list[dict[str, Any]]] = []
        self.tokens: set[str | None] = set()
        server.expect_request("/api/repos/create", "POST").respond_with_handler(self.create)
        server.expect_request("/api/validate-yaml", "POST").respond_with_json(
            {"errors": [], "warnings": []}
        )
        address = "/api/models/owner/name"
        server.expect_request(f"{address}/preupload/main", "POST").respond_with_handler(self.ask)
        server.expect_request(f"{address}/commit/main", "POST").respond_with_handler(self.commit)
        self.url = server.url_for("").rstrip("/")

    def create(self, request: Request) -> Response:
        self.tokens.add(request.headers.get("Authorization"))
        self.created.append(request.get_json())
        return reply({"url": f"{self.url}/owner/name", "name": "owner/name"})

    def ask(self, request: Request) -> Response:
        files = [
            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
            for f in request.get_json()["files"]
        ]
        return reply({"files": files})

    def commit(self, request: Request) -> Response:
        self.commits.append([json.loads(line) for line in request.data.splitlines()])
        return reply({"commitUrl": f"{self.url}/owner/name/commit/1", "commitOid": "1" * 40})


def reply(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content), status, content_type="application/json")


@pytest.fixture
def hub(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.constants.HF_HUB_OFFLINE", False)
    return Hub(httpserver)


def files_of(report: ExportReport) -> tuple[Path, list[Path]]:
    directory = report.files[0].path.parent
    (directory / "README.md").write_text("# card")
    (directory / "private-notes.txt").write_text("not for the hub")
    return directory, [report.files[0].path, directory / "README.md"]


@pytest.mark.parametrize("private", [True, False])
def test_a_push_makes_the_repository_and_one_commit_of_these_files_alone(
    private: bool, hub: Hub, report: ExportReport, capfd: pytest.CaptureFixture[str]
) -> None:
    directory, files = files_of(report)
    options = {} if private else {"private": False}
    address = push(directory, "owner/name", files=files, token=TOKEN, endpoint=hub.url, **options)
    assert address.endswith("owner/name")
    assert hub.created[0]["name"] == "name" and hub.created[0]["organization"] == "owner"
    assert (
        bool(hub.created[0].get("private") or hub.created[0].get("visibility") == "private")
        == private
    )
    (commit,) = hub.commits
    sent = {
        item["value"]["path"]: base64.b64decode(item["value"]["content"])
        for item in commit
        if item["key"] == "file"
    }
    assert sent == {"m-Q8_0.gguf": b"GGUF", "README.md": b"# card"}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_refused_push_says_so_without_the_token(
    hub: Hub, httpserver: HTTPServer, report: ExportReport
) -> None:
    httpserver.clear()
    httpserver.expect_request("/api/repos/create").respond_with_handler(
        lambda _: reply({"error": f"token {TOKEN} may not write"}, 403)
    )
    directory, files = files_of(report)
    with pytest.raises(ExportError, match="did not take 'owner/name'") as refused:
        push(directory, "owner/name", files=files, token=TOKEN, endpoint=hub.url)
    assert TOKEN not in str(refused.value)
    assert files[0].read_bytes() == b"GGUF"


def test_a_hub_that_cannot_be_reached_is_reported(
    hub: Hub, httpserver: HTTPServer, report: ExportReport
) -> None:
    httpserver.stop()
    directory, files = files_of(report)
    with pytest.raises(ExportError, match="did not take"):
        push(directory, "owner/name", files=files, token=TOKEN, endpoint=hub.url)


def test_a_name_that_is_none_is_refused(report: ExportReport) -> None:
    directory, files = files_of(report)
    with pytest.raises(ExportError, match="did not take"):
        push(directory, "not a name/", files=files, token=TOKEN)
