"""`moe-local calibrate`: fit corrections to the guesses of prefetch, and report how much they help."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import moe_local
from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.cli.completion import model_argument
from moe_local.cli.first_use import ready, yes_flag
from moe_local.cli.options import WholeNumber, debug_flag, json_flag, load_flags
from moe_local.cli.render import ProgressBar, print_json, print_table
from moe_local.cli.text_file import read_text_file

if TYPE_CHECKING:
    from moe_local.offload.prefetch.calibrate import Calibration

DEMO_SEED = 11


@click.command()
@model_argument()
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="MOE_LOCAL_TEXT",
    show_envvar=True,
    help="A text file like what the model will read and write; by default Python's documentation.",
)
@click.option(
    "--tokens",
    type=WholeNumber(1),
    default=8192,
    show_default=True,
    envvar="MOE_LOCAL_TOKENS",
    show_envvar=True,
    help="Tokens to read.",
)
@click.option(
    "--lookahead",
    type=WholeNumber(1),
    default=3,
    show_default=True,
    envvar="MOE_LOCAL_LOOKAHEAD",
    show_envvar=True,
    help="Fit guesses up to this many layers ahead.",
)
@json_flag
@yes_flag
@load_flags("vram", "ram", "slots", "experts", "dense", "miss", "device")
@debug_flag
def calibrate(
    model: str, text: Path | None, tokens: int, lookahead: int, as_json: bool, options: dict[str, Any]
) -> None:
    """Fit a correction to the guesses of prefetch, from what MODEL computes on some text.

    A later layer's router, asked early, does not see what the layers between will add; a small matrix learns
    part of that. It is kept beside the converted experts, and prefetch takes it from then on. Recall is the
    share of a layer's experts that are guessed, on text that was held back.

    \b
    Example:
      moe-local calibrate mixtral-8x7b --text notes.txt
    """
    if options.get("experts") == "native":
        raise OptionError(
            "a calibration lies beside converted experts, and with --experts native there are none; "
            "leave it out"
        )
    content = None if text is None else read_text_file(text)
    from moe_local.offload.expert_file.expert_file import ExpertFile
    from moe_local.offload.prefetch.calibrate import calibrate as run
    from moe_local.offload.prefetch.correction import write_corrections

    ready(model, options)
    with (
        ProgressBar() as progress,
        moe_local.load(model, prefetch="off", progress=progress, **options) as loaded,
    ):
        windows = _windows(loaded, content, tokens)
        found = run(loaded.hf, windows, lookahead=lookahead, progress=progress)
        file = ExpertFile.open(loaded.expert_folder)
        try:
            path = write_corrections(file.folder, found.corrections, file.fingerprint)
        except OSError as error:
            raise MoeLocalError(f"{file.folder} cannot be written to ({error.strerror})") from error
    if as_json:
        print_json({"model": model, "file": str(path), **_figures(found)})
    else:
        _show(found)
        click.echo(f"fitted on {found.fitted_tokens} tokens, judged on {found.judged_tokens}: {path}")


def _windows(model: moe_local.Model, text: str | None, tokens: int) -> list[list[int]]:
    from moe_local.offload.prefetch.calibrate import windows_of

    if model.tokenizer is None:
        raise OptionError(f"the checkpoint of {model.name} has no tokenizer, so no text can be read")
    if text is None and model.name == "demo":
        windows: list[list[int]] = []
        for messages in _conversations():
            ids = model.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            windows.append(list(ids))
            if sum(map(len, windows)) >= tokens:
                return windows
    if text is None:
        from moe_local.demo.documents import documents

        text = "\n\n".join(documents()[0])
    ids = model.tokenizer(text[: 16 * tokens], add_special_tokens=False, verbose=False)["input_ids"]
    return windows_of(ids, tokens)


def _conversations() -> Iterator[list[dict[str, str]]]:
    """An endless sequence of conversations like those that the demo model was trained on."""
    from moe_local.demo.corpus import Corpus

    corpus, rng = Corpus(), random.Random(DEMO_SEED)
    while True:
        messages = []
        for turn in corpus.conversation(rng):
            messages += [{"role": "user", "content": turn.question}]
            messages += [{"role": "assistant", "content": turn.answer}]
        yield messages


def _show(found: Calibration) -> None:
    print_table(
        ("layers ahead", "recall of the router", "corrected"),
        [(str(r.distance), f"{100 * r.plain:.1f} %", f"{100 * r.corrected:.1f} %") for r in found.recalls],
    )


def _figures(found: Calibration) -> dict[str, Any]:
    return {
        "fitted_tokens": found.fitted_tokens,
        "judged_tokens": found.judged_tokens,
        "recall": [
            {
                "distance": r.distance,
                "router": r.plain,
                "corrected": r.corrected,
                "by_layer": [{"layer": t, "router": a, "corrected": b} for t, a, b in r.by_layer],
            }
            for r in found.recalls
        ],
    }
