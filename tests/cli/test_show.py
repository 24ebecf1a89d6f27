from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from moe_local.cache.files import locked
from moe_local.cache.stats import RoutedTokens
from moe_local.cli.convert import weight_bytes
from moe_local.cli.library import nbytes
from moe_local.cli.show import list_models
from moe_local.offload.checkpoint.registry import ALIASES
from moe_local.offload.expert_file.usage import add_usage
from moe_local.offload.load import load


@pytest.fixture
def converted(invoke, home, tiny_mixtral):
    """Folder of the expert file of tiny_mixtral, converted by the command."""
    result = invoke("convert", str(tiny_mixtral), "--json")
    assert result.exit_code == 0, result.stderr
    return Path(json.loads(result.stdout)["folder"])


class TestConvert:
    def test_says_what_and_where(self, invoke, converted, tiny_mixtral):
        assert (converted / "manifest.json").is_file()
        again = invoke("convert", str(tiny_mixtral))
        assert again.exit_code == 0
        assert again.stdout == f"24 experts of {tiny_mixtral} in nf4, 288 KiB: {converted}\n"

    def test_out_and_format(self, invoke, home, tiny_mixtral, tmp_path):
        out = tmp_path / "here"
        result = invoke("convert", str(tiny_mixtral), "--experts", "bf16", "--out", str(out), "--json")
        document = json.loads(result.stdout)
        assert document["folder"] == str(out)
        assert document["experts"] == "bf16"
        assert document["num_experts"] == 24
        assert document["bytes"] > 24 * 64 * 96 * 3 * 2 - 1
        assert not home.exists()

    def test_unknown_format(self, invoke, home, tiny_mixtral):
        result = invoke("convert", str(tiny_mixtral), "--experts", "q4")
        assert result.exit_code == 2
        assert "use one of nf4" in result.stderr


def test_a_gguf_file_is_as_large_as_all_its_parts(tmp_path):
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(b"x" * 100 * number)
    (tmp_path / "other.gguf").write_bytes(b"x" * 7)
    for measure in (nbytes, weight_bytes):
        assert measure(tmp_path / "m-00001-of-00002.gguf") == 300
        assert measure(tmp_path / "other.gguf") == 7
        assert measure(tmp_path) == 307


class TestShow:
    def test_an_alias_without_weights(self, invoke, home):
        result = invoke("show", "mixtral-8x7b")
        assert result.exit_code == 0
        assert result.stdout == (
            "mixtral-8x7b: MixtralForCausalLM\n"
            "  parameters   46.7 B, 12.9 B active for a token\n"
            "  MoE layers   32 of 32 layers\n"
            "  experts      8 per layer, 2 per token, 176 M weights each\n"
            "  hidden size  4096\n"
            "  context      32768 tokens\n"
            "  in nf4       21.7 GiB experts, 1.14 GiB others\n"
            "  in int8      43.3 GiB experts, 1.74 GiB others\n"
            "  in q3        17.1 GiB experts, 2.99 GiB others\n"
            "  in q2        13.2 GiB experts, 2.99 GiB others\n"
            "  in mxfp4     22.3 GiB experts, 2.99 GiB others\n"
            "  in fp8       42.0 GiB experts, 2.99 GiB others\n"
            "  in bf16      84.0 GiB experts, 2.99 GiB others\n"
            "  in fp16      84.0 GiB experts, 2.99 GiB others\n"
            "  in fp32      168 GiB experts, 5.98 GiB others\n"
            "  checkpoint   not on this machine\n"
            "  router load  not known before the first run\n"
        )

    def test_json(self, invoke, converted, tiny_mixtral):
        document = json.loads(invoke("show", str(tiny_mixtral), "--json").stdout)
        assert document["architecture"] == "MixtralForCausalLM"
        assert (document["moe_layers"], document["experts_per_layer"], document["top_k"]) == (3, 8, 2)
        assert document["parameters"]["total"] > document["parameters"]["active"]
        assert document["checkpoint"]["folder"] == str(tiny_mixtral)
        assert [(file["format"], file["complete"]) for file in document["expert_files"]] == [("nf4", True)]
        assert document["router_load"] is None

    def test_a_run_makes_the_load_known(self, invoke, converted, tiny_mixtral):
        invoke("run", str(tiny_mixtral), "hello", "-n", "3", "--temperature", "0")
        load = json.loads(invoke("show", str(tiny_mixtral), "--json").stdout)["router_load"]
        assert min(load["tokens"]) >= 3
        assert sum(load["share"][0]) == pytest.approx(2)  # top-2
        assert load["starved"] == [], "a short run judges nothing"

    def test_starved_experts_are_named(self, invoke, converted, tiny_mixtral):
        even, uneven = (500,) * 8, (1995, 5, 0, 400, 400, 400, 400, 400)
        add_usage(converted, RoutedTokens((even, uneven, even), (2000, 2000, 2000)))
        text = invoke("show", str(tiny_mixtral)).stdout
        assert (
            "  router load  over 2000 tokens, an expert was chosen by 0.0 to 99.8 % of its layer's\n" in text
        )
        assert "  starved      2 experts under 1 %: 1 of layer 1 (0.25 %), 2 of layer 1 (0.00 %)\n" in text
        load = json.loads(invoke("show", str(tiny_mixtral), "--json").stdout)["router_load"]
        assert load["starved"] == [
            {"layer": 1, "expert": 1, "share": 0.0025},
            {"layer": 1, "expert": 2, "share": 0.0},
        ]

    def test_an_unknown_model(self, invoke, home):
        assert invoke("show", "mixtrl").exit_code == 4


class TestList:
    def test_what_is_here(self, invoke, converted, tiny_mixtral):
        listed = {entry["model"]: entry for entry in json.loads(invoke("list", "--json").stdout)}
        mine = listed[tiny_mixtral.name]
        assert [file["folder"] for file in mine["expert_files"]] == [str(converted)]
        assert not set(ALIASES) & set(listed)
        assert "nf4 3" in invoke("list").stdout  # KiB

    def test_all_names_the_aliases(self, invoke, home):
        result = invoke("list", "--all")
        assert result.exit_code == 0
        assert result.stdout.splitlines()[0].split() == ["MODEL", "CHECKPOINT", "EXPERTS"]
        assert ["mixtral-8x7b", "-", "-"] in [line.split() for line in result.stdout.splitlines()]

    def test_a_conversion_that_was_refused_is_none(self, invoke, converted):
        """What it leaves is an empty folder."""
        before = invoke("list").stdout
        (converted.parent / "q3-0123456789abcdef").mkdir()
        assert invoke("list").stdout == before

    def test_an_unfinished_conversion_says_so(self, invoke, converted, tiny_mixtral):
        (converted / "manifest.json").unlink()
        assert "nf4 unfinished" in invoke("list").stdout

    @pytest.mark.parametrize(("words", "said"), [("list", "nf4 3"), ("rm NAME --yes", "freed 3")])
    def test_needs_no_torch(self, converted, tiny_mixtral, words, said):
        """Which takes longer to import than all the rest."""
        words = words.replace("NAME", tiny_mixtral.name).split()
        code = f"""
import sys
from moe_local.cli.main import main
try: main({words})
except SystemExit as leaving: print(leaving.code, {{"torch", "transformers"}} & {{*sys.modules}})"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert said in done.stdout
        assert done.stdout.endswith("\n0 set()\n"), done.stderr


class TestRemove:
    def test_asks_on_a_terminal_only(self, invoke, converted, tiny_mixtral):
        result = invoke("rm", str(tiny_mixtral), input="y\n")
        assert result.exit_code == 2
        assert "add --yes" in result.stderr
        assert converted.is_dir()

    def test_frees_the_expert_file_only(self, invoke, converted, tiny_mixtral, home):
        size = sum(path.stat().st_size for path in converted.iterdir())
        result = invoke("rm", str(tiny_mixtral), "--yes", "--json")
        document = json.loads(result.stdout)
        assert document["removed"] == [str(converted)]
        assert document["freed_bytes"] == size
        assert list((home / "experts").iterdir()) == []
        assert (tiny_mixtral / "model.safetensors").is_file()
        again = invoke("rm", str(tiny_mixtral), "--yes")
        assert again.exit_code == 4
        assert "nothing to remove" in again.stderr

    def test_a_disk_that_lets_nothing_go(self, invoke, converted, tiny_mixtral, monkeypatch):
        def refuse(folder):
            raise OSError(errno.EROFS, "Read-only file system", str(folder))

        monkeypatch.setattr(shutil, "rmtree", refuse)
        result = invoke("rm", str(tiny_mixtral), "--yes")
        assert result.exit_code == 1
        assert result.stderr == f"moe-local: {converted} cannot be removed: Read-only file system\n"

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows removes no open file")
    def test_what_is_loaded_stays(self, invoke, converted, tiny_mixtral):
        """Its shards are opened as they are needed, so that an answer would find them gone."""
        with load(str(tiny_mixtral)):
            refused = invoke("rm", str(tiny_mixtral), "--yes")
        assert refused.exit_code == 1
        assert refused.stderr == (
            f"moe-local: {converted} is in use by a process that has {tiny_mixtral} loaded; "
            "end that first, then remove it\n"
        )
        assert converted.is_dir()
        assert invoke("rm", str(tiny_mixtral), "--yes").exit_code == 0

    def test_waits_for_no_conversion(self, invoke, converted, tiny_mixtral):
        with filelock.FileLock(f"{converted}.lock"):
            result = invoke("rm", str(tiny_mixtral), "--yes")
        assert result.exit_code == 1
        assert "is being converted by another process" in result.stderr
        assert converted.is_dir()

    def test_what_is_being_measured_stays(self, invoke, converted, tiny_mixtral):
        """And goes with the next conversion that is removed."""
        kept = converted.parent / "sensitivity-0123456789abcdef.json"
        for name in (kept.name, kept.with_suffix(".partial.json").name):
            (converted.parent / name).write_text("{}")
        with locked(kept):
            assert invoke("rm", str(tiny_mixtral), "--yes").exit_code == 0
        assert not converted.exists()
        assert len(list(converted.parent.glob("sensitivity-*.json"))) == 2
        assert invoke("convert", str(tiny_mixtral)).exit_code == 0
        assert invoke("rm", str(tiny_mixtral), "--yes").exit_code == 0
        assert not converted.parent.exists()

    def test_an_unfinished_conversion_goes_too(self, invoke, converted, tiny_mixtral):
        (converted / "manifest.json").unlink()
        assert invoke("rm", str(tiny_mixtral), "--yes").exit_code == 0
        assert not converted.exists()

    def test_a_users_folder_is_never_removed(self, invoke, converted, tiny_mixtral):
        result = invoke("rm", str(tiny_mixtral), "--yes", "--weights")
        assert result.exit_code == 2
        assert "yours to remove" in result.stderr
        assert converted.is_dir()

    def test_the_conversion_of_a_folder_that_is_gone(self, invoke, home, tiny_mixtral, tmp_path):
        folder = tmp_path / "moved-away"
        shutil.copytree(tiny_mixtral, folder)
        assert invoke("convert", str(folder)).exit_code == 0
        shutil.rmtree(folder)
        assert invoke("rm", str(folder), "--yes").exit_code == 4
        assert "moved-away" in invoke("list").stdout
        assert invoke("rm", "moved-away", "--yes").exit_code == 0
        assert "moved-away" not in invoke("list").stdout

    def test_a_copy_by_another_name_has_its_own(self, invoke, converted, tiny_mixtral, tmp_path):
        copy = tmp_path / "a copy"
        shutil.copytree(tiny_mixtral, copy)
        refused = invoke("rm", str(copy), "--yes")
        assert refused.exit_code == 4
        assert "nothing to remove" in refused.stderr
        assert invoke("convert", str(copy)).exit_code == 0
        removed = json.loads(invoke("rm", str(copy), "--yes", "--json").stdout)["removed"]
        assert [Path(folder).parent.name for folder in removed] == ["a--copy"]
        assert converted.is_dir()

    def test_another_folder_of_the_same_name_is_another_model(
        self, invoke, converted, tiny_mixtral, tmp_path, make_checkpoint
    ):
        other = tmp_path / "other" / tiny_mixtral.name
        shutil.copytree(make_checkpoint("mixtral", seed=1), other)
        assert invoke("rm", str(other), "--yes").exit_code == 4
        assert converted.is_dir()


def test_pull_list_and_rm_of_a_download(invoke, hub, mixtral_19, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    hub.add_repo("mistralai/Mixtral-8x7B-Instruct-v0.1", mixtral_19)
    pulled = invoke("pull", "mixtral-8x7b", "--json")
    assert pulled.exit_code == 0, pulled.stderr
    document = json.loads(pulled.stdout)
    assert document["bytes"] == sum(path.stat().st_size for path in mixtral_19.glob("*.safetensors"))
    listed = {entry["model"]: entry for entry in json.loads(invoke("list", "--json").stdout)}
    assert listed["mixtral-8x7b"]["checkpoint"]["folder"] == document["folder"]
    with load("mixtral-8x7b", experts="native"):
        refused = invoke("rm", "mixtral-8x7b", "--weights", "--yes")
    assert f"{document['folder']} is in use by a process" in refused.stderr
    assert Path(document["folder"], "config.json").is_file()
    removed = invoke("rm", "mixtral-8x7b", "--weights", "--yes")
    assert removed.exit_code == 0, removed.stderr
    assert "freed" in removed.stdout
    listed = {entry["model"] for entry in json.loads(invoke("list", "--json").stdout)}
    assert "mixtral-8x7b" not in listed


@pytest.mark.parametrize("everything", [False, True])
def test_a_machine_without_models_is_told_what_there_is(home, capsys, monkeypatch, everything):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list_models.callback(everything=everything, as_json=False)
    assert ("list --all also names" in capsys.readouterr().err) == (not everything)
