from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_local.cache.errors import MoeLocalError, RoutesError
from moe_local.cache.routes import (
    COLUMNS,
    LayerBytes,
    LayerRoute,
    Phase,
    Routes,
    RouteStep,
    read_routes,
    write_routes,
)

HEADER = f"""# route_trace v1
# model=/models/a folder/tiny.gguf arch=mixtral n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=7
# layer=1 expert_bytes=200 dense_bytes=8
{COLUMNS}
"""
TABLE = """0,0,0,0,0,3,0.75,0,100
0,0,0,0,1,1,0.25,0,100
0,1,1,0,0,1,0.625,1,0
0,1,1,0,1,2,0.375,0,100
0,1,1,1,0,0,0.123457,0,200
0,1,1,1,1,3,1e-05,0,200
"""
TINY = Routes(
    model="/models/a folder/tiny.gguf",
    arch="mixtral",
    num_experts=4,
    top_k=2,
    layers=(LayerBytes(100, 7), LayerBytes(200, 8)),
    steps=(
        RouteStep(0, Phase.PREFILL, 0, (LayerRoute(0, (3, 1), (0.75, 0.25), (False, False), (100, 100)),)),
        RouteStep(
            0,
            Phase.DECODE,
            1,
            (
                LayerRoute(0, (1, 2), (0.625, 0.375), (True, False), (0, 100)),
                LayerRoute(1, (0, 3), (0.123457, 1e-05), (False, False), (200, 200)),
            ),
        ),
    ),
)


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "routes.csv"
    path.write_text(text)
    return path


def test_reads_steps_with_experts_in_the_routers_order(tmp_path: Path) -> None:
    routes = read_routes(_file(tmp_path, HEADER + TABLE))
    assert routes == TINY
    assert [step.step for step in routes.phase(Phase.DECODE)] == [1]


def test_writes_what_it_read_byte_by_byte(tmp_path: Path) -> None:
    write_routes(tmp_path / "copy.csv", TINY)
    assert (tmp_path / "copy.csv").read_text() == HEADER + TABLE


def test_layer_by_layer_recordings_become_steps(tmp_path: Path) -> None:
    """A prompt is recorded layer by layer, all its tokens in each."""
    rows = ["0,0,0,0,0,3,0.5,0,1", "0,0,0,0,1,1,0.5,0,1", "0,0,1,0,0,2,0.5,0,1", "0,0,1,0,1,1,0.5,0,1"]
    rows += [row.replace(",0,0,0,", ",0,0,1,", 1).replace("0,0,1,0,", "0,0,1,1,", 1) for row in rows]
    rows[4:6] = ["0,0,0,1,0,3,0.5,0,1", "0,0,0,1,1,1,0.5,0,1"]
    routes = read_routes(_file(tmp_path, HEADER + "\n".join(rows)))
    assert [[route.layer for route in step.layers] for step in routes.steps] == [[0, 1], [0, 1]]
    assert [route.experts for route in routes.steps[1].layers] == [(2, 1), (2, 1)]


def _replaced(line: int, text: str) -> str:
    lines = (HEADER + TABLE).splitlines()
    lines[line - 1] = text
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (
            1,
            "# route_trace v2",
            "'# route_trace v2' instead of '# route_trace v1'; only this version is read",
        ),
        (2, "# model=x", "not '# model=... arch=..."),
        (3, "# layer=1 expert_bytes=100 dense_bytes=7", "not '# layer=0 expert_bytes="),
        (4, COLUMNS, "not '# layer=1 expert_bytes="),
        (5, "turn,phase", "'turn,phase' instead of the columns turn,phase,step"),
        (6, "0,0,0,0,0,3,0.75,0", "8 columns instead of 9"),
        (6, "", "1 columns instead of 9"),
        (6, "0,0,0,0,0,-3,0.75,0,100", "'-3' is not a whole number"),
        (6, "0,0,0,0,0, 3,0.75,0,100", "' 3' is not a whole number"),
        (6, "0,0,0,0,0,²,0.75,0,100", "'²' is not a whole number"),
        (6, "0,0,0,0,0,3,x,0,100", "weight 'x' is not a finite number"),
        (6, "0,0,0,0,0,3,nan,0,100", "weight 'nan' is not a finite number"),
        (6, "0,2,0,0,0,3,0.75,0,100", "phase 2 is not below 2"),
        (6, "0,0,0,2,0,3,0.75,0,100", "layer 2 is not below 2"),
        (6, "0,0,0,0,0,4,0.75,0,100", "expert 4 is not below 4"),
        (6, "0,0,0,0,0,3,0.75,2,100", "residency 2 is not below 2"),
        (6, "0,0,0,0,1,3,0.75,0,100", "slot 1 where 0 is due"),
        (7, "0,0,0,0,1,3,0.25,0,100", "expert 3 was chosen twice by one token"),
        (7, "0,0,0,0,2,1,0.25,0,100", "slot 2 is not below 2"),
        (7, "0,0,1,0,0,1,0.25,0,100", "turn 0, step 0, layer 0 ends with 1 experts of 2"),
        (11, "0,0,1,1,1,3,1e-05,0,200", "turn 0, step 1, layer 1 ends with 1 experts of 2"),
    ],
)
def test_a_malformed_line_is_one_error_with_its_number(
    tmp_path: Path, line: int, text: str, message: str
) -> None:
    path = _file(tmp_path, _replaced(line, text))
    with pytest.raises(RoutesError) as caught:
        read_routes(path)
    assert isinstance(caught.value, MoeLocalError)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("0,1,1,0,0,1,0.5,0,1\n0,1,1,0,1,2,0.5,0,1\n", "line 13: turn 0, step 1, layer 0 comes twice"),
        ("0,0,1,0,0,1,0.5,0,1\n0,0,1,0,1,2,0.5,0,1\n", "line 13: turn 0, step 1, layer 0 is in both phases"),
        ("0,1,2,0,0,1,0.5,0,1\n", "line 12: turn 0, step 2, layer 0 ends with 1 experts of 2"),
    ],
)
def test_what_only_shows_at_the_end(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(RoutesError, match=message):
        read_routes(_file(tmp_path, HEADER + TABLE + extra))


@pytest.mark.parametrize("lines", [0, 1, 3, 4])
def test_a_file_cut_off_in_its_header(tmp_path: Path, lines: int) -> None:
    head = "".join(HEADER.splitlines(keepends=True)[:lines])
    with pytest.raises(RoutesError, match=rf"line {max(lines, 1)}: the file ends before its table begins"):
        read_routes(_file(tmp_path, head))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RoutesError, match=r"nothing\.csv: No such file"):
        read_routes(tmp_path / "nothing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RoutesError, match="not UTF-8"):
        read_routes(tmp_path / "binary.csv")


def test_a_failing_write_leaves_the_old_recording(tmp_path: Path) -> None:
    path = tmp_path / "routes.csv"
    write_routes(path, TINY)
    before = path.read_bytes()
    lopsided = TINY.steps[0].layers[0]._replace(weights=(1.0,))
    broken = Routes("m", "a", 4, 2, TINY.layers, (TINY.steps[0]._replace(layers=(lopsided,)),))
    with pytest.raises(ValueError, match="shorter"):
        write_routes(path, broken)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["routes.csv"]
