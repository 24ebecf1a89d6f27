"""`moe-local bench`: one document, files that appear whole, and a line for whatever is wrong."""

from __future__ import annotations

import io
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from moe_local.cache.cache_map import CacheMap, Cell
from moe_local.cache.routes import Phase, read_routes
from moe_local.cache.stats import StallSeconds, Stats
from moe_local.cli import live
from moe_local.cli import plot as plots
from moe_local.cli.live import LiveAnswer, LivePicture, draw_map, draw_stalls
from moe_local.offload.measure.sample import Taker
from moe_local.offload.plan import bandwidth
from moe_local.offload.plan.bandwidth import Bandwidths

SHORT = ("--tokens", "4", "--repeats", "1", "--prompt-tokens", "20", "--batch", "2", "--device", "cpu")


@pytest.fixture
def bench(invoke: Any, home: Path, tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench(*arguments) -> the result of measuring the tiny model with 3 slots; bandwidths are given."""
    told = iter([Bandwidths(ram=1e10, disk=1e9), Bandwidths(ram=2e10, disk=5e8)])
    monkeypatch.setattr(bandwidth, "measure", lambda home, device: next(told))

    def run(*arguments: str) -> Any:
        return invoke("bench", str(tiny_mixtral), "--slots", "3", *SHORT, *arguments)

    return run


def test_json_is_one_document_with_the_keys_that_others_rely_on(bench: Any, tmp_path: Path) -> None:
    routes = tmp_path / "routes.csv"
    result = bench("--json", "--workload", "single,chat", "--record-routes", str(routes))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["floor"]["bytes_per_s"] == 2e10, "the better of both measurements"
    for name, inner in (
        ("tpot_ms", {"mean", "p50", "p95", "p99"}),
        ("tokens_per_s", {"prefill", "decode"}),
        ("stall_ms_per_token", {"demand", "late_prefetch", "disk", "cpu", "sync"}),
        ("hit_rate", {"cold", "steady", "by_layer"}),
        ("prefetch", {"issued", "used", "late", "wasted_bytes", "misses_covered"}),
        ("bytes_per_token", {"h2d", "disk"}),
        ("peak_bytes", {"vram", "ram"}),
    ):
        assert inner <= set(found[name])
    assert {"ttft_s", "machine", "floor"} <= set(found)
    assert set(found["workloads"]) == {"single", "chat"}
    lines = result.stderr.splitlines()
    assert lines[1].startswith("floor  "), "before anything is measured"
    assert any(line.startswith("chat ") for line in lines)
    recorded = read_routes(routes)
    assert len({step.turn for step in recorded.steps}) == 5
    assert sum(step.phase is Phase.DECODE for step in recorded.steps) == 5 * 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["routes.csv"]


@pytest.mark.slow
def test_a_picture(bench: Any, tmp_path: Path) -> None:
    """matplotlib's first import builds a cache of fonts."""
    from matplotlib.backend_bases import FigureCanvasBase

    png = tmp_path / "figures.png"
    shown = bench("--workload", "single", "--plot", str(png), "--json")
    assert shown.exit_code == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    svg = tmp_path / "figures.SVG"
    plots.draw_picture(json.loads(shown.stdout), svg)
    assert b"<svg" in svg.read_bytes()
    assert FigureCanvasBase.get_supported_filetypes().keys() >= {*plots.KINDS}


def test_tables_for_people(bench: Any) -> None:
    result = bench("--compare", "--workload", "single,batch")
    assert result.exit_code == 0, result.stderr
    words = result.stdout
    assert "disk, 3 of 8 experts a layer in RAM" in words
    for row in ("single", "batch", "no cache", "no prefetch", "policy lfu", "peak", "note"):
        assert any(line.startswith(row) for line in words.splitlines()), row
    assert "no interval from 1 rounds" in words
    assert "note   RAM was faster behind the runs: the floor is " in words
    assert ", at 20.0 GB/s\n" in words
    assert "one after the other; --parallel N steps its prompts together" in words


def test_a_recording_drives_the_model(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routes = tmp_path / "routes.csv"
    assert bench("--workload", "single", "--record-routes", str(routes)).exit_code == 0
    told = iter([Bandwidths()] * 2)
    monkeypatch.setattr(bandwidth, "measure", lambda home, device: next(told))
    result = bench("--workload", "single", "--routes", str(routes), "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["options"]["prefetch"] == "off"
    assert any("routes.csv chose the experts" in note for note in found["notes"])


def test_ctrl_c_gives_what_there_is(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, left = Taker.answer, iter(range(2))

    def interrupted(taker: Taker, prompt: list[int]) -> str:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return answer(taker, prompt)

    monkeypatch.setattr(Taker, "answer", interrupted)
    result = bench("--workload", "single", "--repeats", "3", "--json")
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    assert (found["interrupted"], found["repeats"]) == (True, 1)
    assert found["tpot_ms"]["mean"] > 0


def test_a_full_card_is_measured_once(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's out of memory is a RuntimeError. A Ctrl-C does no harm by then, either."""
    for failure, code in ((RuntimeError("CUDA out of memory"), 0), (KeyboardInterrupt(), 130)):
        told: list[Any] = [Bandwidths(ram=1e10), failure]

        def measure(home: Path, device: Any, told: list[Any] = told) -> Bandwidths:
            found = told.pop(0)
            if isinstance(found, BaseException):
                raise found
            return found

        monkeypatch.setattr(bandwidth, "measure", measure)
        result = bench("--workload", "single", "--json")
        assert result.exit_code == code, result.stderr
        assert json.loads(result.stdout)["floor"]["bytes_per_s"] == 1e10


FOREIGN = """# route_trace v1
# model=big.gguf arch=big n_layer=1 n_expert=128 n_expert_used=1
# layer=0 expert_bytes=10 dense_bytes=10
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,1,1,0,10
0,1,1,0,0,1,1,0,10
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--routes", "foreign.csv"], 1, "of another model: big.gguf has 128 experts a layer, "),
        (["--routes", "cut.csv"], 1, "cut.csv, line 6: 5 columns instead of 9"),
        (["--routes", "absent.csv"], 1, "cannot read routes from absent.csv: No such file"),
        (["--record-routes", "nowhere/r.csv"], 2, "there is no folder nowhere; make it first"),
        (
            ["--plot", "x.bmpx"],
            2,
            "--plot cannot draw x.bmpx; end its name in .png, .svg, ",
        ),
        (["--plot", "x"], 2, "--plot cannot draw x;"),
        (["--plot", "."], 2, ". is a folder; name a file to write"),
        (["--routes", "foreign.csv", "--record-routes", "r.csv"], 2, "leave one of them out"),
        (["--workload", "chats"], 2, "unknown workload 'chats'"),
        (["--tokens", "1"], 2, "--tokens 1 measures nothing; use 2 or more"),
        (["--repeats", "0"], 2, "--repeats 0 measures nothing"),
        (["--layers", "3"], 2, "--layers 3 is of a synthetic model only"),
        (["--synthetic", "mixtral-8x7b"], 2, "give either MODEL or --synthetic NAME"),
        (["--watch"], 2, "--watch draws on a terminal, and stderr is not one"),
        (["--slots", "1"], 2, "slots 1 is below the 2 experts"),
        (["--prompt-tokens", "500", "--context", "64"], 2, "are 504 together, the context holds 64"),
    ],
)
def test_one_line_for_what_is_wrong(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("foreign.csv").write_text(FOREIGN)
    Path("cut.csv").write_text(FOREIGN[: FOREIGN.rindex(",1,1,0")])
    before = sorted(folder.iterdir())
    result = bench(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("of", "holds"),
    [
        (["mixtral-8x7b"], 8192),
        (["demo"], 2048),
        (["demo", "-c", "64"], 64),
        (["--synthetic", "deepseek-v3"], 8192),
    ],
)
def test_a_prompt_beyond_the_context_is_refused_before_anything_is_read(
    invoke: Any, home: Path, monkeypatch: pytest.MonkeyPatch, of: list[str], holds: int
) -> None:
    monkeypatch.setattr(bandwidth, "measure", None)
    result = invoke("bench", *of, "--prompt-tokens", "999999")
    assert result.exit_code == 2
    assert f"are 1000031 together, the context holds {holds}; lower them or raise --context" in result.stderr


def test_without_matplotlib(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    result = bench("--plot", str(tmp_path / "p.png"))
    assert result.exit_code == 1
    assert result.stderr == (
        "moe-local: --plot needs matplotlib, which is not installed: pip install matplotlib\n"
    )


def test_a_disk_that_fills_up_loses_no_figures(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_local.cache.routes.write_routes", full)
    result = bench("--workload", "single", "--json", "--record-routes", str(tmp_path / "r.csv"))
    assert result.exit_code == 1
    assert json.loads(result.stdout)["tpot_ms"]
    assert result.stderr.splitlines()[-1].endswith("r.csv: No space left on device")


def test_the_benchmark_is_the_same_command(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["latency.py", "--tokens", "1", "demo"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(repository / "benchmarks" / "latency.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "--tokens 1 measures nothing" in capsys.readouterr().err


def test_a_map_of_the_cache() -> None:
    cells = ((Cell.ABSENT, Cell.RESIDENT, Cell.LOADING), (Cell.USED, Cell.MISSED, Cell.ABSENT))
    lines = draw_map(CacheMap(cells), 5, 5).plain.splitlines()
    assert lines[:2] == ["   0 ·□▒", "   1 ■×·"]
    assert [line[5:] for line in draw_map(CacheMap(cells), 1, 2).plain.splitlines()[:1]] == ["×▒"]


def test_bars_are_as_long_as_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = draw_stalls({"disk": 2.0, "demand": 0.0, "cpu": 1.0}, 8.0).plain.splitlines()
    assert [(line.split()[0], line.count("█")) for line in lines] == [("disk", 10), ("cpu", 5), ("other", 25)]
    assert lines[2].endswith("5.00 ms")
    assert draw_stalls({"disk": 0.0}).plain == "no stalls"


def test_bars_fit_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, bar in (("50", 24), ("66", 40), ("10", 1)):
        monkeypatch.setenv("COLUMNS", columns)
        (line,) = draw_stalls({"late_prefetch": 12345.678}).plain.splitlines()
        assert line.count("█") == bar
        assert len(line) <= max(int(columns), 27)


def test_the_picture_shows_the_last_step(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now))
    picture = LivePicture(fake)
    counts = Stats(stall=StallSeconds(disk=0.004))
    assert picture.after(10.0, counts) is None, "the first look is to compare with"
    assert picture.after(10.0, counts) is not None
    assert picture.after(10.0, counts) is None, "so soon"
    now += live.LOOK_SECONDS
    assert picture.after(10.0, counts) is None, "to compare with"
    assert picture.after(10.0, counts) is not None


def test_an_answer_leaves_the_picture_its_room(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of text may be more than a screen."""
    now = 5.0
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now))
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, height=15)
    with LiveAnswer(fake, console) as answer:
        for number in range(400):
            answer.show(f"{number} ", 1.0)
            now += live.LOOK_SECONDS
        shown = [
            "".join(part.text for part in line).rstrip()
            for line in console.render_lines(answer._live.get_renderable())
        ]
    assert len(shown) < console.height
    assert {"   0 ·□··", "   1 ···▒"} <= set(shown)
    written = [number for line in shown for number in line.split() if number.isdigit()]
    assert "398" in written or "399" in written
    hides, shows = (out.getvalue().rindex(f"\x1b[?25{letter}") for letter in "lh")
    assert hides < shows, "the cursor is there for the shell, whatever ends this"
