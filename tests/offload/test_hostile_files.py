"""Files that are damaged, or made to do harm: an error of ours in one line, or a sane result; nothing else.

Nothing hangs, and no memory is taken but a small multiple of the file's size.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_local
from moe_local.cache.errors import CheckpointError, ExpertFileError, MoeLocalError, OptionError, RoutesError
from moe_local.cache.files import parse_json
from moe_local.cache.routes import LayerBytes, LayerRoute, Phase, Routes, RouteStep, read_routes, write_routes
from moe_local.offload.allocation.sensitivity import LayerSensitivity, Sensitivity
from moe_local.offload.checkpoint.checkpoint import Checkpoint, parse_config
from moe_local.offload.checkpoint.files import file_inside, read_index
from moe_local.offload.checkpoint.gguf_file import GgufFile
from moe_local.offload.checkpoint.gguf_model import config_fields
from moe_local.offload.checkpoint.shards import read_header
from moe_local.offload.checkpoint.tokenizer import load_tokenizer
from moe_local.offload.expert_file import expert_file
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.expert_file.expert_file import MANIFEST, read_manifest
from moe_local.offload.expert_file.intent import INTENT, Intent
from moe_local.offload.expert_file.usage import FILE_NAME, read_usage
from moe_local.offload.plan import bandwidth
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.mix import Mix, is_mixed
from support import gguf_models, hostile, random_experts

SECONDS = 5.0
"""Of the processor, for one small file; the slowest honest one takes a fiftieth."""

Read = Callable[[Path], None]
Found = TypeVar("Found")


def in_time(work: Callable[[], Found]) -> Found:
    """What `work` returns. Tried again if it took long: a machine that stands still may count that, too."""
    for _ in range(3):
        start = time.thread_time()
        found = work()
        if time.thread_time() - start < SECONDS:
            return found
    raise AssertionError(f"three times it took more than {SECONDS} seconds of the processor")


@dataclass
class Reader:
    """A reader, and an honest file for it. `read` also checks what a file that is accepted says."""

    name: str
    honest: bytes
    read: Read
    error: type[MoeLocalError] | None
    """What a bad file raises; None: it counts as none."""
    resealed: Callable[[Any], bytes] | None = None
    """From damaged fields to a file that a checksum or a length does not give away."""
    reach: int | None = None
    """Bytes at the start that say what the file is; None: all."""


def safetensors(path: Path) -> None:
    end = 0
    for tensor in sorted(read_header(path), key=lambda tensor: (tensor.start, tensor.nbytes)):
        assert tensor.start >= end
        end = tensor.start + tensor.nbytes
    assert end in (0, path.stat().st_size)


def index(path: Path) -> None:
    for name in read_index(path, "get it again").values():
        assert (path.parent / name).parent == path.parent
        assert "\n" not in name


def manifest(path: Path) -> None:
    for layer in read_manifest(path.parent).layers:
        assert layer.path.parent == path.parent
        for layout, offset in zip(layer.layouts, layer.offsets, strict=True):
            assert 0 < offset < offset + layout.nbytes <= layer.nbytes
            assert all(s.offset + s.nbytes <= layout.nbytes for s in layout.segments)


def gguf(path: Path) -> None:
    file = GgufFile.open(path)
    for tensor in file.shards.tensors.values():
        assert tensor.start >= 0
        assert tensor.start + tensor.nbytes <= path.stat().st_size
    config_fields(file)


def routes(path: Path) -> None:
    for step in read_routes(path).steps:
        assert all(len(layer.experts) == 2 for layer in step.layers)


def usage(path: Path) -> None:
    read_usage(path.parent)


def bandwidths(path: Path) -> None:
    found = bandwidth.saved(path.parent)
    assert all(0 < rate < float("inf") for rate in (found.disk, found.ram, found.h2d, found.vram))


def intent(path: Path) -> None:
    found = Intent.read(path.parent, PRINT)
    if found is not None:
        assert is_mixed(found.experts) == (found.mix is not None)
        assert found.mix is None or found.mix.counts()


def sensitivity(path: Path) -> None:
    found = Sensitivity.read(path, PRINT)
    if found is not None:
        shape = [["nf4"] * len(layer.uses) for layer in found.layers]
        assert not found.measured(["nf4"]) or 0 <= found.expected(shape) < float("inf")


def config(path: Path) -> None:
    parse_config(path)


READERS = [
    "safetensors",
    "index",
    "manifest",
    "gguf",
    "routes",
    "usage",
    "bandwidths",
    "intent",
    "sensitivity",
    "config",
]

PRINT = "0" * 32


@pytest.fixture(scope="module")
def make_reader(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Reader]:
    """make_reader("gguf") -> the reader, its honest file made."""
    folder = tmp_path_factory.mktemp("honest")
    checkpoint = make_checkpoint("mixtral", shards=3)

    def make(name: str) -> Reader:
        if name == "safetensors":
            raw = min(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size).read_bytes()
            length = int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8 : 8 + length])
            few = dict(list(header.items())[:4])
            data = max(entry["data_offsets"][1] for key, entry in few.items() if key != "__metadata__")

            def seal(fields: Any) -> bytes:
                text = json.dumps(fields).encode()
                return struct.pack("<Q", len(text)) + text + bytes(data)

            return Reader("model.safetensors", seal(few), safetensors, CheckpointError, seal)
        if name == "index":
            fields = {"metadata": {}, "weight_map": {f"model.{n}": f"{n}.safetensors" for n in "abc"}}
            honest = json.dumps(fields).encode()
            return Reader("model.safetensors.index.json", honest, index, CheckpointError, _plain)
        if name == "manifest":
            source = random_experts.RandomExperts(layers=2, experts=2)
            file = convert_experts(source, codec_for("nf4"), folder / "experts")
            return Reader(
                MANIFEST, (file.folder / MANIFEST).read_bytes(), manifest, ExpertFileError, _with_checksum
            )
        if name == "gguf":
            path, _ = gguf_models.write(make_checkpoint("mixtral"), folder, {"ffn_down_exps.weight": "Q8_0"})
            start = min(tensor.start for tensor in GgufFile.open(path).shards.tensors.values())
            return Reader("model.gguf", path.read_bytes(), gguf, CheckpointError, reach=start)
        if name == "routes":
            layer = LayerRoute(0, (1, 3), (0.5, 0.25), (True, False), (0, 10))
            steps = (RouteStep(0, Phase.PREFILL, 0, (layer,)), RouteStep(0, Phase.DECODE, 1, (layer,)))
            write_routes(folder / "r.csv", Routes("m", "moe", 4, 2, (LayerBytes(10, 20),), steps))
            return Reader("r.csv", (folder / "r.csv").read_bytes(), routes, RoutesError)
        if name == "usage":
            honest = json.dumps({"counts": [[1, 2], [3, 4]], "tokens": [3, 7]}).encode()
            return Reader(FILE_NAME, honest, usage, None, _plain)
        if name == "bandwidths":
            bandwidth.save(bandwidth.Bandwidths(), folder)
            honest = (folder / bandwidth.FILE_NAME).read_bytes()
            return Reader(bandwidth.FILE_NAME, honest, bandwidths, None, _plain)
        if name == "intent":
            Intent("m", PRINT, "mixed:6", Mix("mixed:6", (("nf4", "int8"), ("q2",))), "ram=1").keep(folder)
            return Reader(INTENT, (folder / INTENT).read_bytes(), intent, None, _with_checksum)
        if name == "sensitivity":
            layer = LayerSensitivity(0.5, (0.1, 1.9), {"nf4": (0.01, 0.02), "int8": (0.001, 0.002)})
            Sensitivity("m", PRINT, "abc", 512, (layer, layer)).save(folder / "s.json")
            return Reader("s.json", (folder / "s.json").read_bytes(), sensitivity, None, _plain)
        honest = (checkpoint / "config.json").read_bytes()
        return Reader("config.json", honest, config, CheckpointError, _plain)

    made: dict[str, Reader] = {}
    return lambda name: made.setdefault(name, made.get(name) or make(name))


def _plain(fields: Any) -> bytes:
    return json.dumps(fields).encode()


def _with_checksum(fields: Any) -> bytes:
    if isinstance(fields, dict):
        fields.pop("checksum", None)
        with contextlib.suppress(ValueError):
            fields["checksum"] = expert_file.checksum_of(fields)
    return json.dumps(fields).encode()


def refused_or_sane(reader: Reader, folder: Path, data: bytes) -> None:
    """Read it as a user's command would."""
    path = folder / reader.name
    path.write_bytes(data)

    def read() -> tuple[str, int]:
        """The error's line, and the most memory that was taken."""
        line, expected = "", reader.error or ()
        tracemalloc.start()
        try:
            reader.read(path)
        except expected as error:
            line = str(error)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return line, peak

    line, peak = in_time(read)
    assert len(line) < 1500
    assert peak < 64 * len(data) + 2**21, f"{peak} bytes for a file of {len(data)}"


def fuzz(reader: Reader, folder: Path, examples: int) -> None:
    files = hostile.damaged_bytes(reader.honest, reader.reach or len(reader.honest))
    if reader.resealed is not None:
        honest = (
            json.loads(reader.honest[8 : 8 + int.from_bytes(reader.honest[:8], "little")])
            if (reader.name.endswith(".safetensors"))
            else json.loads(reader.honest)
        )
        files = st.one_of(files, hostile.damaged_json(honest).map(reader.resealed))

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(files)
    def run(data: bytes) -> None:
        refused_or_sane(reader, folder, data)

    run()


@pytest.mark.parametrize("name", READERS)
def test_damaged(name: str, make_reader: Any, tmp_path: Path) -> None:
    reader = make_reader(name)
    (tmp_path / reader.name).write_bytes(reader.honest)
    reader.read(tmp_path / reader.name)
    fuzz(reader, tmp_path, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_in_many_ways(name: str, make_reader: Any, tmp_path: Path) -> None:
    reader = make_reader(name)
    (tmp_path / reader.name).write_bytes(reader.honest)
    reader.read(tmp_path / reader.name)
    fuzz(reader, tmp_path, 1500)


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("gguf", "routes")])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, "1e999", '"\\ud800"', "NaN"]
)
def test_json_that_leads_nowhere(name: str, text: str, make_reader: Any, tmp_path: Path) -> None:
    reader = make_reader(name)
    data = text.encode()
    if name == "safetensors":
        data = struct.pack("<Q", len(data)) + data
    refused_or_sane(reader, tmp_path, data)
    if reader.error is not None:
        with pytest.raises(reader.error):
            reader.read(tmp_path / reader.name)


def test_sizes_beyond_measure_in_a_config(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """transformers would build a billion layers before it finds that their weights are missing."""
    fields = json.loads((make_checkpoint("mixtral") / "config.json").read_text())
    for change in (
        {"num_hidden_layers": 10**9},
        {"num_local_experts": 10**9},
        {"vocab_size": 10**30},
        {"vocab_size": -(10**400)},
        {"text_config": {"num_hidden_layers": 10**9}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(
            CheckpointError, match=r"^.*config\.json: .* is (1e\+|of ).*, and no model has more"
        ):
            moe_local.fit(tmp_path)


@pytest.mark.slow
def test_any_config_beside_weights(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The whole way to an opened checkpoint: a config that is accepted, or one line."""
    folder = Path(shutil.copytree(make_checkpoint("mixtral"), tmp_path / "model"))
    honest = json.loads((folder / "config.json").read_text())

    @settings(max_examples=600, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile.damaged_json(honest))
    def run(fields: Any) -> None:
        (folder / "config.json").write_bytes(json.dumps(fields).encode())

        def line() -> str:
            try:
                Checkpoint.open(folder)
            except MoeLocalError as error:
                return str(error)
            return ""

        assert "\n" not in in_time(line)

    run()


# --- links and names


@pytest.mark.parametrize("name", ["..", "../layer-00000.safetensors", "/etc/passwd", ""])
def test_shards_in_a_manifest_lie_beside_it(name: str, make_reader: Any, tmp_path: Path) -> None:
    reader = make_reader("manifest")
    fields = json.loads(reader.honest)
    fields["layers"][1]["file"] = name
    (tmp_path / MANIFEST).write_bytes(_with_checksum(fields))
    with pytest.raises(ExpertFileError, match=r"is damaged \(ValueError: a shard called"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\0b", "a\nb", "\x1b[31m"],
)
def test_names_in_an_index_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}))
    with pytest.raises(CheckpointError, match="it names no files beside it"):
        read_index(path, "get it again")


def test_links_stay_in_the_folder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint("mixtral", shards=3), tmp_path / "model"))
    shard = min(folder.glob("*.safetensors"))
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to("../elsewhere.safetensors")
    for call in (Checkpoint.open, moe_local.load, moe_local.convert):
        with pytest.raises(CheckpointError, match="is a link that leads out of its folder"):
            call(folder)
    shard.unlink()
    (tmp_path / "elsewhere.safetensors").rename(folder / "inside")
    shard.symlink_to("inside")
    Checkpoint.open(folder)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)  # the user's own link to the folder is his own
    Checkpoint.open(linked)


def test_the_hub_caches_links_stay_in_the_model(tmp_path: Path) -> None:
    """Snapshots link to blobs beside them, and to no other model's."""
    for name in ("a", "b"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "snapshots" / "1").mkdir(parents=True)
        (tmp_path / name / "blobs" / "x").write_text("")
        (tmp_path / name / "snapshots" / "1" / "own").symlink_to("../../blobs/x")
        (tmp_path / name / "snapshots" / "1" / "other").symlink_to("../../../a/blobs/x")
    snapshot = tmp_path / "b" / "snapshots" / "1"
    assert file_inside(snapshot, "own").is_file()
    with pytest.raises(CheckpointError, match="leads out"):
        file_inside(snapshot, "other")


# --- code


class Bomb:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_read(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Neither alone nor beside safetensors, in whatever file people have kept pickles in."""
    folder = Path(shutil.copytree(make_checkpoint("mixtral"), tmp_path / "model"))
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    names = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "training_args.bin")
    for name in names:
        (folder / name).write_bytes(bomb)
    with moe_local.load(folder, slots=2, context=64) as model:
        model.generate([5, 6], max_new_tokens=2)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"only pickled weights .*which can run code when read"):
        moe_local.load(folder)
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(CheckpointError):
        moe_local.load(folder)
    assert not exploded.exists()


def test_code_in_a_checkpoint_never_runs(tiny_mixtral: Path, tmp_path: Path) -> None:
    """What auto_map names is ignored where transformers has its own, and refused where it has none."""
    folder = Path(shutil.copytree(tiny_mixtral, tmp_path / "model"))
    exploded = tmp_path / "exploded"
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil", "custom_generate/generate"):
        path = folder / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"import os\nos.mkdir({str(exploded)!r})\nclass Evil: pass\ndef generate(*a, **k): pass\n"
        )
    changes = {
        "config.json": {
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
        "generation_config.json": {"AutoModel": "modeling_evil.Evil"},
    }
    for name, auto_map in changes.items():
        fields = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(fields | {"auto_map": auto_map}))
    with moe_local.load(folder, slots=2, context=64) as model:
        model.generate("hello", max_new_tokens=2)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "evil"}))
    with pytest.raises(CheckpointError, match="brings code of its own, which moe-local never runs"):
        moe_local.load(folder)
    assert not exploded.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}{{ cycler.__init__.__globals__.os.mkdir('PATH') }}",
        "{{ (lipsum|attr('__globals__'))['os'].mkdir('PATH') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% include '/etc/passwd' %}",
        "{{ ",
    ],
)
def test_chat_templates_run_in_the_sandbox(template: str, tiny_mixtral: Path, tmp_path: Path) -> None:
    from moe_local.offload.engine.text import encode_prompt

    exploded = tmp_path / "exploded"
    tokenizer = load_tokenizer(tiny_mixtral)
    tokenizer.chat_template = template.replace("PATH", str(exploded))
    with pytest.raises(OptionError) as caught:
        encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])
    assert "\n" not in str(caught.value)
    assert not exploded.exists()


def test_parse_json_raises_one_kind_of_error() -> None:
    for text in ("[" * 10**6, "1" * 10**6, b"\xff", "{"):
        with pytest.raises(ValueError):  # noqa: PT011 - each has words of its own
            parse_json(text)
