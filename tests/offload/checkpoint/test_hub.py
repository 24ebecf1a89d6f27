"""Finding and downloading models, against a Hub on 127.0.0.1."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_local.cache.errors import CheckpointError, DoesNotFitError, ModelNotFoundError, MoeLocalError
from moe_local.offload.checkpoint import hub_download
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.hub import HubModel, cached_folder, config_of, locate, resolve

MIXTRAL = "mistralai/Mixtral-8x7B-Instruct-v0.1"


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries there are milliseconds, not seconds."""
    pause = hub_download._Sink.pause
    monkeypatch.setattr(hub_download._Sink, "pause", lambda self, seconds: pause(self, seconds / 100))


@pytest.fixture
def repo(mixtral_19: Path, tmp_path: Path) -> Path:
    """The folder of a Hub repository like Mixtral's: shards, and copies for other programs."""
    folder = shutil.copytree(mixtral_19, tmp_path / "repo")
    (folder / "consolidated.00.pt").write_bytes(b"\0" * 1000)
    (folder / "pytorch_model.bin").write_bytes(b"\0" * 1000)
    (folder / "consolidated.safetensors").write_bytes(b"\0" * 1000)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "README.md").write_text("a model")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


class TestLocate:
    def test_alias_in_any_case(self) -> None:
        assert locate("Mixtral-8x7B") == HubModel(MIXTRAL, "mixtral-8x7b")

    @pytest.mark.parametrize(
        "name",
        [
            "org/model-1.5B",
            "hf.co/org/model-1.5B",
            "https://huggingface.co/org/model-1.5B",
            "https://huggingface.co/org/model-1.5B/",
            "https://huggingface.co/org/model-1.5B/tree/main",
            " org/model-1.5B ",
        ],
    )
    def test_hub_ids(self, name: str) -> None:
        assert locate(name) == HubModel("org/model-1.5B", "org/model-1.5B")

    def test_hub_id_of_an_alias_is_called_by_it(self) -> None:
        assert locate(f"hf.co/{MIXTRAL}") == HubModel(MIXTRAL, "mixtral-8x7b")

    def test_folder(self, tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert locate(tiny_mixtral) == tiny_mixtral
        assert locate(str(tiny_mixtral)) == tiny_mixtral
        monkeypatch.chdir(tiny_mixtral.parent)
        assert locate(f"./{tiny_mixtral.name}").resolve() == tiny_mixtral  # type: ignore[union-attr]

    @pytest.mark.parametrize("name", ["", "mixtral-8x7", "/no/such", "./nothing", "a/b/c", "org/na me"])
    def test_nonsense(self, name: str) -> None:
        with pytest.raises(ModelNotFoundError, match="not found") as error:
            locate(name)
        one_line(error)

    @pytest.mark.parametrize("begin", ["", "hf.co/"])
    def test_a_file_of_a_hub_repository(self, begin: str) -> None:
        with pytest.raises(ModelNotFoundError, match="download the file and give it; did you"):
            locate(f"{begin}unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M")

    def test_a_file_that_is_no_gguf(self, tmp_path: Path) -> None:
        notes = tmp_path / "notes.txt"
        notes.write_text("a file")
        with pytest.raises(ModelNotFoundError, match=r"notes\.txt is a file, but no GGUF file"):
            locate(notes)

    def test_a_file_in_a_folder_is_no_hub_id(
        self, tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "some.bin").write_bytes(b"noise")
        with pytest.raises(
            ModelNotFoundError, match=r"models/some\.bin is a file, but no GGUF file; a model"
        ):
            locate("models/some.bin")
        with pytest.raises(ModelNotFoundError, match=r"there is no file models/none\.gguf; check its path"):
            locate("models/none.gguf")
        monkeypatch.chdir(tiny_mixtral.parent)
        name = f"{tiny_mixtral.name}/model.safetensors"
        with pytest.raises(
            ModelNotFoundError, match=f"but no GGUF file; give its folder, {tiny_mixtral.name}$"
        ):
            locate(name)

    def test_near_matches_are_offered(self) -> None:
        with pytest.raises(ModelNotFoundError, match="did you mean mixtral-8x7b") as error:
            resolve("mixtral-8x7")
        assert error.value.exit_code == 4


class TestDownload:
    def test_only_what_is_needed(self, hub: Any, repo: Path, mixtral_19: Path) -> None:
        hub.add_repo(MIXTRAL, repo)
        folder = resolve("mixtral-8x7b")
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in mixtral_19.iterdir())
        assert not [name for name in hub.sent if name.endswith((".pt", ".bin", ".md")) or "consol" in name]
        sent = {name: count for name, count in hub.sent.items() if name.endswith(".safetensors")}
        assert sent == {p.name: p.stat().st_size for p in mixtral_19.glob("*.safetensors")}
        assert Checkpoint.open(folder).fingerprint == Checkpoint.open(mixtral_19).fingerprint

    def test_second_time_needs_no_network(self, hub: Any, repo: Path) -> None:
        hub.add_repo(MIXTRAL, repo)
        folder = resolve(MIXTRAL)
        hub.close()
        assert resolve("mixtral-8x7b") == folder
        assert resolve("mixtral-8x7b", download=False) == folder
        assert config_of(MIXTRAL).num_hidden_layers == 3

    def test_update_asks_the_hub(self, hub: Any, tiny_mixtral: Path, tmp_path: Path) -> None:
        served = shutil.copytree(tiny_mixtral, tmp_path / "served")
        hub.add_repo("org/model", served)
        old = resolve("org/model")
        (served / "generation_config.json").write_text('{"eos_token_id": 5}')
        assert resolve("org/model") == old
        new = resolve("org/model", update=True)
        assert new != old
        assert "5" in (new / "generation_config.json").read_text()
        assert hub.sent["model.safetensors"] == (served / "model.safetensors").stat().st_size

    def test_broken_connections_are_taken_up(self, hub: Any, mixtral_19: Path) -> None:
        """One file is cut in its middle; its second half is asked for, and the whole hash is right."""
        hub.add_repo("org/model", mixtral_19)
        shard = max(mixtral_19.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        hub.cut_after = 16 * 1024
        folder = resolve("org/model")
        assert hub.sent[shard.name] == shard.stat().st_size
        assert hub.requests.total() < 100
        assert hub.requests[f"GET /org/model/resolve/{folder.name}/{shard.name}"] == 2
        assert (folder / shard.name).read_bytes() == shard.read_bytes()

    def test_a_server_without_ranges_starts_over(self, hub: Any, tiny_mixtral: Path) -> None:
        hub.add_repo("org/model", tiny_mixtral)
        hub.ranges, hub.cut_after = False, 500_000
        folder = resolve("org/model")
        shard = tiny_mixtral / "model.safetensors"
        assert hub.requests[f"GET /org/model/resolve/{folder.name}/{shard.name}"] == 2
        assert (folder / shard.name).read_bytes() == shard.read_bytes()

    def test_a_busy_server_is_asked_again(self, hub: Any, tiny_mixtral: Path) -> None:
        hub.add_repo("org/model", tiny_mixtral)
        content = (tiny_mixtral / "tokenizer.json").read_bytes()
        hub.unavailable = 2
        file = hub_download.HubFile("tokenizer.json", len(content), None, "blob")
        hub_download.download_blobs("org/model", "main", [file], progress=False)
        assert (hub_download.blobs_folder("org/model") / "blob").read_bytes() == content
        assert hub.requests["GET /org/model/resolve/main/tokenizer.json"] == 3

    def test_a_server_that_sends_too_little(
        self, hub: Any, tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add_repo("org/model", tiny_mixtral)
        monkeypatch.setattr(hub_download, "RETRIES", 1)
        file = hub_download.HubFile("config.json", 10**6, None, "blob")
        with pytest.raises(MoeLocalError, match=r"sends \d+ of 1000000 bytes"):
            hub_download.download_blobs("org/model", "main", [file], progress=False)

    def test_a_damaged_part_is_found_by_its_hash(self, hub: Any, tiny_mixtral: Path) -> None:
        sha256 = hub.add_repo("org/model", tiny_mixtral).etag("model.safetensors")
        blobs = hub_download.blobs_folder("org/model")
        blobs.mkdir(parents=True)
        (blobs / f"{sha256}.incomplete").write_bytes(b"rubbish")
        with pytest.raises(CheckpointError, match="arrived damaged"):
            resolve("org/model")
        resolve("org/model")

    def test_single_file_repository_with_a_bar(
        self,
        hub: Any,
        tiny_qwen3_moe: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        hub.add_repo("org/model", tiny_qwen3_moe)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        folder = resolve("hf.co/org/model")
        assert (folder / "tokenizer.json").is_file()
        captured = capsys.readouterr()
        assert "org/model" in captured.err
        assert captured.out == ""

    def test_quiet_when_stderr_is_no_terminal(
        self, hub: Any, tiny_qwen3_moe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.add_repo("org/model", tiny_qwen3_moe)
        resolve("org/model")
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", "")


class TestKilled:
    def test_download_goes_on_after_sigkill(
        self, hub_server: Any, make_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        """Killed in the middle of a shard: no byte that reached the disk is sent again."""
        served = make_checkpoint("mixtral", shards=3)
        repo = hub_server.add_repo("org/model", served)
        sizes = {path.name: path.stat().st_size for path in served.glob("*.safetensors")}
        total, half = sum(sizes.values()), min(sizes.values()) // 2
        command = [
            sys.executable,
            "-c",
            "from moe_local.offload.checkpoint.hub import *; print(resolve('org/model'))",
        ]
        env = {"PATH": "/usr/bin:/bin", **hub_server.env(tmp_path / "hf")}
        blobs = tmp_path / "hf" / "hub" / "models--org--model" / "blobs"
        # Not all that are unfinished: huggingface_hub's own come first, and may be renamed at any moment.
        parts = [blobs / f"{repo.etag(name)}.incomplete" for name in sizes]
        hub_server.held_at = half

        def unfinished() -> int:
            return sum(part.stat().st_size for part in parts if part.exists())

        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 200
        while unfinished() < half and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kept = unfinished()
        assert kept >= half
        hub_server.held_at = None
        hub_server.settle()
        hub_server.sent.clear()
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
        sent = sum(count for name, count in hub_server.sent.items() if name.endswith(".safetensors"))
        assert sent <= total - kept
        folder = Path(done.stdout.strip())
        assert Checkpoint.open(folder).fingerprint == Checkpoint.open(served).fingerprint
        assert not list(blobs.glob("*.incomplete"))


class TestRefusals:
    def test_gated(self, hub: Any, tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add_repo("org/model", tiny_mixtral, gated=True)
        with pytest.raises(MoeLocalError, match=r"gated: accept its licence at .*/org/model .*HF_TOKEN"):
            resolve("org/model")
        monkeypatch.setenv("HF_TOKEN", "bad-token")
        with pytest.raises(MoeLocalError, match="gated") as error:
            resolve("org/model")
        one_line(error)
        monkeypatch.setenv("HF_TOKEN", "good-token")
        assert (resolve("org/model") / "model.safetensors").is_file()

    def test_no_such_repository(self, hub: Any) -> None:
        with pytest.raises(ModelNotFoundError, match="no public repository at") as error:
            resolve("mistralai/Mixtral-8x7B-Instruct")
        assert "did you mean mixtral-8x7b" in one_line(error)

    def test_not_downloaded(self, hub: Any) -> None:
        with pytest.raises(ModelNotFoundError, match="moe-local pull mixtral-8x7b"):
            resolve("mixtral-8x7b", download=False)

    def test_no_network(self, hub: Any) -> None:
        hub.close()
        with pytest.raises(MoeLocalError, match="no connection to http://127") as error:
            resolve("org/model")
        assert one_line(error).endswith("; go online and run again")
        part = hub_download.blobs_folder("org/model") / f"{64 * 'a'}.incomplete"
        part.parent.mkdir(parents=True)
        part.write_bytes(b"begun")
        with pytest.raises(MoeLocalError, match="go online and run again, it continues"):
            resolve("org/model")

    def test_offline_mode(self, hub: Any, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        hub.add_repo("org/model", repo)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(MoeLocalError, match="is not on this machine and HF_HUB_OFFLINE is set") as error:
            resolve("org/model")
        assert one_line(error).endswith("; go online and run again")
        assert not hub.requests

    def test_no_space(self, hub: Any, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add_repo("org/model", repo)
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda path: usage(0, 0, 2**20))
        with pytest.raises(DoesNotFitError, match=r"needs 51\d MiB .*where 1\.00 MiB are free") as error:
            resolve("org/model")
        assert "HF_HUB_CACHE" in one_line(error)
        assert not [name for name in hub.sent if name.endswith(".safetensors")]

    def test_disk_that_fills_up_meanwhile(
        self, hub: Any, tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add_repo("org/model", tiny_mixtral)

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(hub_download, "_get", full)
            with pytest.raises(DoesNotFitError, match=r"disk is full at model\.safetensors"):
                resolve("org/model")
        resolve("org/model")

    def test_pickles_only(self, hub: Any, repo: Path) -> None:
        for path in repo.glob("*.safetensors*"):
            path.unlink()
        hub.add_repo("org/model", repo)
        with pytest.raises(CheckpointError, match="only pickled weights") as error:
            resolve("org/model")
        one_line(error)
        assert cached_folder("org/model") is None

    def test_shard_missing_on_the_hub(self, hub: Any, repo: Path) -> None:
        (repo / "model-00007-of-00019.safetensors").unlink()
        hub.add_repo("org/model", repo)
        with pytest.raises(CheckpointError, match=r"lacks model-00007-of-00019\.safetensors \(1 of 19"):
            resolve("org/model")


class TestConfigOf:
    def test_alias_without_network(self, hub: Any) -> None:
        assert config_of("Mixtral-8x7B").hidden_size == 4096
        assert not hub.requests

    def test_hub_id_of_an_alias_is_called_by_it(self) -> None:
        assert locate(f"hf.co/{MIXTRAL}") == HubModel(MIXTRAL, "mixtral-8x7b")

    def test_folder(self, tiny_mixtral: Path) -> None:
        assert config_of(tiny_mixtral).hidden_size == 64

    def test_hub_id_takes_the_config_alone(self, hub: Any, repo: Path) -> None:
        hub.add_repo("org/model", repo)
        assert config_of("org/model").num_local_experts == 8
        assert set(hub.sent) <= {"config.json"}
        assert cached_folder("org/model") is None

    def test_what_load_would_take(self, hub: Any, repo: Path) -> None:
        """Of a checkpoint that is not here the Hub's newest, of one that is here its own."""

        def publish(context: int) -> None:
            fields = json.loads((repo / "config.json").read_text()) | {"max_position_embeddings": context}
            (repo / "config.json").write_text(json.dumps(fields))

        hub.add_repo(MIXTRAL, repo)
        publish(100)
        assert config_of(MIXTRAL, to_load=True).max_position_embeddings == 100
        publish(200)
        assert config_of(MIXTRAL).max_position_embeddings == 100  # of no other does it know without asking
        assert config_of(MIXTRAL, to_load=True).max_position_embeddings == 200
        folder = resolve(MIXTRAL)
        publish(300)
        hub.requests.clear()
        assert config_of(MIXTRAL, to_load=True).max_position_embeddings == 200
        assert resolve(MIXTRAL) == folder
        assert not hub.requests

    def test_repository_without_config(self, hub: Any, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "README.md").write_text("nothing")
        hub.add_repo("org/model", tmp_path / "empty")
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            config_of("org/model")

    def test_no_network(self, hub: Any) -> None:
        hub.close()
        with pytest.raises(MoeLocalError, match="no connection to") as error:
            config_of("org/model")
        one_line(error)
