from __future__ import annotations

import json

import pytest

from moe_local.offload.doctor import check_up
from moe_local.offload.doctor.finding import Finding, fail, warn

FOUND = [
    Finding("python", "3.11", facts={"version": "3.11"}),
    warn("GPU", "no CUDA device", "none is needed", devices=0),
]


@pytest.fixture
def found(monkeypatch, home):
    """What the check-up finds; and its arguments, as `asked`."""
    findings = list(FOUND)
    monkeypatch.setattr(check_up, "check_up", lambda *folders, measure: iter(findings))
    return findings


def test_a_line_each_and_the_remedy_below(invoke, found):
    result = invoke("doctor")
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["ok", "python", "3.11"],
        ["warn", "GPU", "no", "CUDA", "device"],
        ["->", "none", "is", "needed"],
        ["1", "ok,", "1", "warn,", "0", "fail"],
    ]


def test_a_failure_is_exit_code_1(invoke, found):
    found.append(fail("disk", "full", "make room"))
    assert invoke("doctor").exit_code == 1
    result = invoke("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False


def test_json_is_one_document(invoke, found):
    document = json.loads(invoke("doctor", "--json").stdout)
    assert document["ok"] is True
    assert document["counts"] == {"ok": 1, "warn": 1, "fail": 0}
    assert document["findings"][1] == {
        "name": "GPU",
        "text": "no CUDA device",
        "level": "warn",
        "remedy": "none is needed",
        "facts": {"devices": 0},
    }


def test_the_real_one_without_measuring(invoke, home):
    result = invoke("doctor", "--no-measure", "--json")
    document = json.loads(result.stdout)
    assert {finding["name"] for finding in document["findings"]} >= {"torch", "CPU", "RAM", "CPU kernels"}
    assert result.exit_code == (0 if document["ok"] else 1)
