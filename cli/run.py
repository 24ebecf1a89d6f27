"""`moe-local run`: one prompt, one answer."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import moe_local
from moe_local.cli.answer import AnswerView
from moe_local.cli.completion import model_argument
from moe_local.cli.first_use import ready, yes_flag
from moe_local.cli.options import CHAT_FLAGS, Sampling, debug_flag, json_flag, load_flags, sampling_flags
from moe_local.cli.render import ProgressBar, print_json, print_status, status_line
from moe_local.cli.text_file import read_schema_file, read_stdin
from moe_local.offload.answer_format.answer_parser import AnswerParser

if TYPE_CHECKING:
    from moe_local.offload.answer_format.piece import Parser
    from moe_local.offload.engine.text import Prompt
    from moe_local.offload.records import GenerationStats
    from moe_local.offload.stream import TokenStream


@click.command()
@model_argument()
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text: no chat template.")
@click.option(
    "--json-schema",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Answer with JSON of the schema in this file.",
    envvar="MOE_LOCAL_JSON_SCHEMA",
    show_envvar=True,
)
@json_flag
@yes_flag
@load_flags(*CHAT_FLAGS)
@sampling_flags
@debug_flag
def run(
    model: str,
    prompt: str | None,
    raw: bool,
    json_schema: Path | None,
    as_json: bool,
    options: dict[str, Any],
    sampling: Sampling,
) -> None:
    """Answer PROMPT with MODEL and exit.

    The prompt is read from stdin if it is -, or if it is left out and something is piped in. The answer
    appears on stdout as it is generated or, with --json, as one document with text, message, token_ids,
    finish_reason and stats. What the model thinks before it answers is dim on a terminal, and else goes to
    stderr; in the document it is reasoning. With --raw, all that the model writes is text.

    \b
    Examples:
      moe-local run demo 'What is an expert?'
      moe-local run mixtral-8x7b - --max-tokens 128 --json < question.txt
      moe-local run mixtral-8x7b 'Who wrote Faust?' --json-schema person.json
    """
    text = _prompt(prompt)
    form: dict[str, Any] = {} if json_schema is None else {"json_schema": read_schema_file(json_schema)}
    ready(model, options)
    with ProgressBar() as progress:
        loaded = moe_local.load(model, **options, progress=progress)
    asked: Prompt = text
    if sampling.system is not None:
        asked = [*sampling.conversation(), {"role": "user", "content": text}]
    with loaded:
        answers = loaded.answers
        form |= sampling.template(answers) | ({} if raw else answers.options)
        stream = loaded.stream(asked, template=not raw, **sampling.generation(), **form)
        parser = AnswerParser(plain=True) if raw else answers.parser(stream.prompt_ids)
        if as_json:
            print_json({"model": model, **_document(stream, parser)})
        else:
            with AnswerView(markdown=False) as view, contextlib.closing(stream):
                try:
                    for token in stream:
                        view.show(parser.add(token.text))
                finally:
                    view.show(parser.flush(cut=stream.finish_reason != "stop"))
        if stream.filled_context:
            click.echo(_cut(loaded, stream.stats), err=True)
        elif json_schema is not None and stream.finish_reason == "length":
            click.echo(_incomplete(stream.max_new_tokens, parser), err=True)
    if sys.stderr.isatty() and not as_json:
        print_status(status_line(stream.stats))


def _document(stream: TokenStream, parser: Parser) -> dict[str, Any]:
    """The whole answer, its text without thoughts."""
    output = stream.output()
    pieces = [*parser.add(output.text), *parser.flush(cut=output.finish_reason != "stop")]
    reasoning = "".join(piece.reasoning for piece in pieces)
    document = {**output.to_dict(), "text": "".join(piece.content for piece in pieces)}
    return {**document, "reasoning": reasoning} if reasoning else document


def _cut(model: moe_local.Model, stats: GenerationStats) -> str:
    """The message that the context cut off the answer, and what to do about it."""
    request = model.plan.request
    most = request.spec.max_context
    remedy = f"raise --context, {most} at most" if request.context < most else "ask for less"
    return (
        f"the answer is cut off: {stats.prompt_tokens} tokens of prompt and {stats.new_tokens} of answer "
        f"fill the context of {request.context}; {remedy}"
    )


def _incomplete(limit: int, parser: Parser) -> str:
    """The message that a limit cut off what should have been JSON, and what to do about it."""
    what, more = "JSON", ""
    if parser.thinking:
        what, more = "thought", ", or turn thoughts off with --no-think where the model can"
    return f"the {what} is cut off after {limit} tokens, and there is no whole JSON; raise --max-tokens{more}"


def _prompt(given: str | None) -> str:
    """The prompt; read from stdin if it is "-", or if it is absent and stdin is a pipe."""
    if given is not None and given != "-":
        text, where = given, "PROMPT"
    elif given is None and sys.stdin.isatty():
        raise click.UsageError("there is no PROMPT; give one, or pipe it in")
    else:
        text, where = read_stdin().strip(), "the prompt on stdin"
    if not text.strip():
        raise click.UsageError(f"{where} is empty; write something to be answered")
    return text
