"""Corrections of guesses: fitted where the truth is known, kept beside the experts, refused when wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from moe_local.cache.errors import ExpertFileError, OptionError
from moe_local.offload.prefetch.auto import AutoPrefetcher
from moe_local.offload.prefetch.calibrate import WINDOW, Calibration, calibrate, windows_of
from moe_local.offload.prefetch.correction import (
    FILE_NAME,
    Correction,
    fit,
    read_corrections,
    write_corrections,
)
from moe_local.offload.prefetch.discover import Probe
from moe_local.offload.prefetch.recorder import Recorder

EXACT = {"experts": "fp32", "dense": "fp32", "device": "cpu"}


def logits_error(
    correction: Correction | None, x: torch.Tensor, later: torch.Tensor, w: torch.Tensor
) -> float:
    guess = x if correction is None else correction.apply(x)
    return float(((later - guess) @ w.T).square().mean())


@pytest.mark.parametrize(("tokens", "width"), [(400, 32), (48, 64)])
def test_a_linear_change_is_found_again(tokens: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    w, change, shift = draw(8, width), draw(width, width) / width, draw(width)
    x, fresh = draw(tokens, width) + 1, draw(200, width) + 1
    later, fresh_later = (t + t @ change + shift for t in (x, fresh))
    (found,) = fit(x, later, w, rank=8, ridges=[1e-4])
    assert found.down.shape == (width, 8)
    assert found.up.shape == (8, width)
    plain = logits_error(None, fresh, fresh_later, w)
    assert logits_error(found, x, later, w) < 1e-3 * plain
    assert logits_error(found, fresh, fresh_later, w) < (1e-3 if tokens > width else 0.5) * plain
    narrow, hard = fit(x, later, w, rank=2, ridges=[1e-4, 1e3])
    assert narrow.down.shape == (width, 2)
    assert logits_error(narrow, x, later, w) < plain
    assert float(hard.down.abs().max()) < float(narrow.down.abs().max())  # shrunk


def test_tokens_and_widths_solve_the_same_equations() -> None:
    generator = torch.Generator().manual_seed(1)
    w, x, later = (torch.randn(*s, generator=generator) for s in ((4, 40), (40, 40), (40, 40)))
    (by_width,) = fit(x, later, w, 4, [0.1])
    (by_tokens,) = fit(x[:39], later[:39], w, 4, [0.1])
    (again,) = fit(x[:39].repeat(2, 1), later[:39].repeat(2, 1), w, 4, [0.1])  # 78 tokens of the same
    assert torch.allclose(by_tokens.apply(x), again.apply(x), atol=1e-3)
    assert not torch.allclose(by_tokens.apply(x), by_width.apply(x), atol=1e-3)


@pytest.fixture(scope="module")
def calibrated(tiny_mixtral: Path) -> Iterator[tuple[moe_local.Model, Calibration]]:
    """A tiny Mixtral that has read random ids."""
    ids = torch.randint(3, 320, (1600,), generator=torch.Generator().manual_seed(3)).tolist()
    windows = [ids[i : i + 80] for i in range(0, len(ids), 80)]
    with moe_local.load(tiny_mixtral, context=64, prefetch="off", **EXACT) as model:
        seen: list[str] = []
        found = calibrate(
            model.hf, windows, lookahead=2, progress=lambda what, done, total: seen.append(what)
        )
        assert set(seen) == {"reading", "fitting"}
        yield model, found


def test_guesses_of_a_model_become_better(calibrated: tuple[moe_local.Model, Calibration]) -> None:
    _, found = calibrated
    assert [r.distance for r in found.recalls] == [1, 2]
    assert found.fitted_tokens > found.judged_tokens == 320
    for recall in found.recalls:
        assert 0.25 < recall.plain < recall.corrected <= 1
        assert recall.plain == pytest.approx(sum(p for _, p, _ in recall.by_layer) / len(recall.by_layer))
    assert set(found.corrections) <= {(0, 1), (1, 1), (0, 2)}


def test_the_recorder_writes_down_what_layers_saw_and_chose(
    calibrated: tuple[moe_local.Model, Calibration],
) -> None:
    hf = calibrated[0].hf
    ids = torch.tensor([[5, 77, 130, 9]])
    with torch.no_grad(), Probe(hf) as probe:
        hf(input_ids=ids[:, :1])
    with torch.no_grad(), Recorder(hf, probe.sites) as recorder:
        hf(input_ids=ids)
        for site, residuals, chosen in zip(probe.sites, recorder.residuals, recorder.chosen, strict=True):
            assert site is not None
            assert residuals[0].shape == (4, 64)
            assert torch.equal(site.route(residuals[0])[1], chosen[0])
    hf(input_ids=ids)
    assert len(recorder.chosen[0]) == 1  # the hooks are off


def test_too_little_text_is_refused(calibrated: tuple[moe_local.Model, Calibration]) -> None:
    with pytest.raises(OptionError, match=r"100 tokens in 10 windows are too few.*of 1280 tokens"):
        calibrate(calibrated[0].hf, [[5] * 10] * 10)


def test_a_text_is_cut_into_windows() -> None:
    windows = windows_of(range(1000), 600)
    assert [len(w) for w in windows] == [WINDOW, WINDOW, 600 - 2 * WINDOW]
    assert windows[1][0] == WINDOW
    assert sum(map(len, windows_of(range(100), 600))) == 100


def some(width: int = 64) -> dict[tuple[int, int], Correction]:
    generator = torch.Generator().manual_seed(width)
    shapes = (width, 2), (2, width), (width,)
    return {(0, 1): Correction(*(torch.randn(shape, generator=generator) for shape in shapes))}


def test_corrections_are_kept_whole(tmp_path: Path) -> None:
    assert read_corrections(tmp_path, "abc") is None
    before = some()
    path = write_corrections(tmp_path, before, "abc")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    after = read_corrections(tmp_path, "abc")
    assert after is not None
    assert after.keys() == before.keys()
    for name in ("down", "up", "bias"):
        assert torch.equal(getattr(after[0, 1], name), getattr(before[0, 1], name))


def damage_nothing(path: Path) -> None:
    pass


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


@pytest.mark.parametrize(
    ("damage", "fingerprint", "message"),
    [
        (damage_nothing, "xyz", "another checkpoint"),
        (cut, "abc", "cannot be read"),
        (garble, "abc", "be read"),
    ],
)
def test_a_foreign_or_damaged_file_is_one_line(
    tmp_path: Path, damage: Callable[[Path], None], fingerprint: str, message: str
) -> None:
    damage(write_corrections(tmp_path, some(), "abc"))
    with pytest.raises(ExpertFileError, match=rf"{message}.*moe-local calibrate MODEL") as caught:
        read_corrections(tmp_path, fingerprint)
    assert "\n" not in str(caught.value)


def test_load_takes_them_and_goes_on_without(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))  # where no earlier run has left a calibration
    folder = make_checkpoint("mixtral", seed=5)
    options: dict[str, Any] = {"slots": 3, "context": 64, **EXACT}
    for fewer in (options, {**options, "slots": None}):  # resident in the end
        with pytest.raises(OptionError, match=r"'learned' needs a calibration.*moe-local calibrate MODEL"):
            moe_local.load(folder, prefetch="learned", **fewer)
    ids = torch.tensor([[5, 77, 130]])
    with moe_local.load(folder, prefetch="off", **options) as plain:
        want = plain.generate(ids, max_new_tokens=12, do_sample=False)
        place = plain.expert_folder
        write_corrections(place, some(), fingerprint(place))
    with moe_local.load(folder, prefetch="learned", **options) as learned:
        assert learned._open().prefetcher._predictor._corrections.keys() == {(0, 1)}  # type: ignore[attr-defined]
        assert torch.equal(learned.generate(ids, max_new_tokens=12, do_sample=False), want)
        assert learned.stats().prefetch.issued > 0
        assert learned.stats().prefetch.state == "on"
    garble(place / FILE_NAME)
    with pytest.raises(ExpertFileError, match="cannot be read"):
        moe_local.load(folder, prefetch="learned", **options)
    with caplog.at_level(logging.WARNING), moe_local.load(folder, **options) as auto:
        assert isinstance(auto._open().prefetcher, AutoPrefetcher)
    assert [r for r in caplog.records if "guessing without it" in r.message]
    write_corrections(place, some(32), fingerprint(place))  # of another width: left out
    with moe_local.load(folder, prefetch="learned", **options) as learned:
        assert learned._open().prefetcher._predictor._corrections == {}  # type: ignore[attr-defined]


def fingerprint(folder: Path) -> str:
    from moe_local.offload.expert_file.expert_file import ExpertFile

    return ExpertFile.open(folder).fingerprint


def test_ids_are_the_same_while_auto_goes_on_and_off(
    tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoPrefetcher, "_promising", lambda self: True)
    ids = torch.tensor([[5, 77, 130]])
    options: dict[str, Any] = {"slots": 2, "context": 128, **EXACT}
    with moe_local.load(tiny_mixtral, prefetch="off", **options) as off:
        want = off.generate(ids, max_new_tokens=90, do_sample=False)
    with moe_local.load(tiny_mixtral, prefetch="auto", **options) as auto:
        assert torch.equal(auto.generate(ids, max_new_tokens=90, do_sample=False), want)
        stats = auto.stats().prefetch
        assert stats.issued > 0
        auto.check_integrity()
