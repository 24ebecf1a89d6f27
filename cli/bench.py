"""`moe-local bench`: where each millisecond of a token goes, compared with the hardware's lower bound."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import moe_local
from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.cache.keys import format_bytes, three_digits
from moe_local.cli.bench_options import Request, bench_flags
from moe_local.cli.completion import model_argument
from moe_local.cli.first_use import ready, yes_flag
from moe_local.cli.live import LivePicture
from moe_local.cli.options import LOAD_FLAGS, debug_flag, json_flag, load_flags
from moe_local.cli.plot import draw_picture
from moe_local.cli.render import ProgressBar, on_stderr, print_json, show_cursor
from moe_local.offload.options import LoadOptions
from moe_local.offload.system.home import moe_local_home
from moe_local.offload.system.interrupt import INTERRUPTED

if TYPE_CHECKING:
    import torch

    from moe_local import Model
    from moe_local.cache.routes import Routes
    from moe_local.offload.measure.sample import Step
    from moe_local.offload.measure.workloads import Workload
    from moe_local.offload.plan.bandwidth import Bandwidths


@click.command()
@model_argument(required=False)
@bench_flags
@json_flag
@yes_flag
@load_flags("parallel", *LOAD_FLAGS)
@debug_flag
def bench(model: str | None, request: Request, as_json: bool, options: dict[str, Any]) -> int:
    """Measure MODEL: latency, throughput, and where each millisecond of a token goes.

    Prints the floor first, from bandwidths measured in the same run: no token can take less. Then time to
    first token, time per output token and its parts, hit rates from an empty cache, what prefetch was worth,
    and the bytes that moved. --slots N measures a model that would fit as if it did not. Ctrl-C ends with
    what there is by then.

    \b
    Examples:
      moe-local bench demo --slots 4 --compare
      moe-local bench --synthetic mixtral-8x7b --json > bench.json
    """
    from moe_local.offload.measure.workloads import choose

    request.check(model)
    measurement = _Measurement(
        request,
        choose(request.workload, request.prompt_tokens, request.batch),
        say=lambda line: click.echo(line, err=as_json),
    )
    recording = None if request.routes is None else measurement.read(request.routes, options)
    wanted = LoadOptions.from_keywords(options)
    measurement.check_context(wanted.context or _default_context(model, request.synthetic))
    if request.synthetic is None:
        ready(str(model), options)
    measurement.measure_bandwidths(wanted.torch_device())
    with ProgressBar() as progress:
        if request.synthetic is None:
            loaded = _load(str(model), options, recording, progress)
        else:
            loaded = _load_synthetic(request, wanted, recording, measurement, progress)
    with loaded:
        document = measurement.run(loaded, wanted, recording)
    if as_json:
        print_json(document)
    _write_files(request, document, measurement.recorded)
    return INTERRUPTED if document["interrupted"] else 0


@dataclass(slots=True)
class _Measurement:
    """One run of the command: what to measure, and the notes that go with the figures."""

    request: Request
    chosen: list[Workload]
    say: Callable[[str], None]
    bandwidths: Bandwidths | None = None
    notes: list[str] = field(default_factory=list)
    recorded: Routes | None = None
    """The experts that the routers chose, with --record-routes."""

    def read(self, path: Path, options: dict[str, Any]) -> Routes:
        """Read the recording that is to choose the experts. Switches prefetch off in `options`, since its
        guesses would be made from unrelated hidden states."""
        from moe_local.cache.routes import read_routes

        recording = read_routes(path)
        note = f"{path.name} chose the experts: {Path(recording.model).name}, top-{recording.top_k}"
        if options.get("prefetch", "auto") != "off":
            options["prefetch"] = "off"
            note += "; without prefetch, since these hidden states have nothing to do with them"
        self.notes.append(note)
        return recording

    def measure_bandwidths(self, device: torch.device) -> None:
        """Measure before the model takes the memory, and again after the runs, unless VRAM is too full then.

        The better result counts, since the floor is what the hardware can do, not what a busy moment left.
        """
        from moe_local.offload.measure.document import best
        from moe_local.offload.plan import bandwidth
        from moe_local.offload.tiers.slow_link import held

        with contextlib.suppress(RuntimeError) if self.bandwidths else contextlib.nullcontext():
            measured = held(bandwidth.measure(moe_local_home(), device))
            self.bandwidths = best(self.bandwidths, measured) if self.bandwidths else measured

    def run(self, model: Model, options: LoadOptions, recording: Routes | None) -> dict[str, Any]:
        """Measure, and print the report; returns the JSON document."""
        from moe_local.cli.bench_report import heading, report
        from moe_local.offload.measure import document as documents
        from moe_local.offload.measure.bench import Bench
        from moe_local.offload.measure.floor import Floor
        from moe_local.offload.measure.routing import RouteRecorder, playing
        from moe_local.offload.measure.variants import Switches, expert_runner, timed_syncs

        request = self.request
        assert self.bandwidths is not None
        self.check_context(model.plan.request.context)
        top_k = None if recording is None else recording.top_k
        floor = Floor.of(model.plan, self.bandwidths, top_k)
        for line in heading(model, floor):
            self.say(line)
        with ExitStack() as stack:
            stack.enter_context(timed_syncs(model))
            recorder = None if request.record_routes is None else RouteRecorder(model, expert_runner(model))
            player = None if recording is None else stack.enter_context(playing(model, recording))
            switches = Switches(model, options)
            bench = Bench(
                model,
                switches,
                self.chosen,
                compare=request.compare,
                tokens=request.tokens,
                repeats=request.repeats,
                recorder=recorder,
                player=player,
                progress=None if request.watch else stack.enter_context(ProgressBar("runs")),
                watch=stack.enter_context(_watching(model)) if request.watch else None,
            )
            bench.run()
        try:
            if not bench.interrupted:
                self.measure_bandwidths(model.hf.device)
        except KeyboardInterrupt:  # the figures are complete already
            bench.interrupted = True
        said, floor = floor, Floor.of(model.plan, self.bandwidths, top_k)
        if floor.ms_per_token < 0.99 * said.ms_per_token:
            self.notes.append(
                f"{floor.tier.upper()} was faster behind the runs: the floor is "
                f"{three_digits(floor.ms_per_token)} ms/token, at {floor.bytes_per_s / 1e9:.1f} GB/s"
            )
        self.recorded = None if recorder is None else recorder.routes()
        document = documents.document(bench, floor, options, self.notes)
        for line in report(document):
            self.say(line)
        return document

    def check_context(self, context: int) -> None:
        """Raise OptionError if the workload with the long prompt needs more than `context` tokens."""
        longest = self.request.prompt_tokens + self.request.tokens
        if any(workload.name == "long" for workload in self.chosen) and longest > context:
            raise OptionError(
                f"--prompt-tokens and --tokens are {longest} together, the context holds {context}; "
                "lower them or raise --context"
            )


def _default_context(model: str | None, synthetic: str | None) -> int:
    """The context length if --context is not given. Raises the same errors as `load` for unknown models."""
    from moe_local.offload.checkpoint.hub import config_of
    from moe_local.offload.checkpoint.spec import model_spec
    from moe_local.offload.measure.synthetic import describe
    from moe_local.offload.plan.plan import default_context

    spec = model_spec(config_of(str(model))) if synthetic is None else describe(synthetic, 1).spec
    return default_context(spec)


def _load(name: str, options: dict[str, Any], recording: Routes | None, progress: ProgressBar) -> Model:
    if recording is not None:  # fail before minutes of downloading and converting
        from moe_local.offload.checkpoint.hub import config_of
        from moe_local.offload.checkpoint.spec import model_spec
        from moe_local.offload.measure.routing import check_routes

        check_routes(recording, model_spec(config_of(name)), name)
    return moe_local.load(name, **options, progress=progress)


def _load_synthetic(
    request: Request,
    wanted: LoadOptions,
    recording: Routes | None,
    measurement: _Measurement,
    progress: ProgressBar,
) -> Model:
    from moe_local.offload.load import load_made
    from moe_local.offload.measure import synthetic as synthetics
    from moe_local.offload.measure.routing import check_routes
    from moe_local.offload.measure.shapes import published_layers
    from moe_local.offload.plan.free_memory import free_ram

    synthetics.check_format(wanted.experts)
    name, layers = str(request.synthetic), request.layers
    if layers is None:
        layers = synthetics.most_layers(name, wanted.ram if wanted.ram is not None else free_ram())
    made, whole = synthetics.describe(name, layers), published_layers(name)
    note = f"the weights are made, and {layers} of {whole} layers"
    if recording is None:
        note += ": routing is as even as chance"
    else:
        check_routes(recording, made.spec, made.name)
    measurement.notes.append(note)
    size = format_bytes(made.dense_nbytes + made.experts_nbytes)
    measurement.say(f"{made.name} of {whole}: {size} in {made.folder}, made on first use")
    return load_made(made, lambda: synthetics.make(made, progress), wanted, progress)


def _write_files(request: Request, document: dict[str, Any], recorded: Routes | None) -> None:
    from moe_local.cache.routes import write_routes

    path: Path | None = None
    try:
        if (path := request.record_routes) is not None and recorded is not None:
            write_routes(path, recorded)
        if (path := request.plot) is not None:
            draw_picture(document, path)
    except OSError as error:
        raise MoeLocalError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _watching(model: Model) -> Iterator[Callable[[Step], None]]:
    """Draws the cache and the stalls on stderr; yields a function to call after each step."""
    from rich.live import Live

    with Live(console=on_stderr(), transient=True, auto_refresh=False) as live:
        show_cursor(live.console)
        picture = LivePicture(model)

        def show(step: Step) -> None:
            if (drawn := picture.after(step.ms, step.counts, step.tokens)) is not None:
                live.update(drawn, refresh=True)

        yield show
