"""How fast are tokens generated, what does the memory allow, and what do others need for the same model?

Method. All contenders hold the model at the same time: each configuration of moe-local (slots x prefetch x
activations x miss x policy) in this process, each peer in its own process and environment. A round gives all
of them the same prompt, one after the other, so that a disturbance hits all alike. The contender that begins
changes from round to round, and so does the prompt, so that no cached keys and values can be reused. The
first round warms up and does not count. Decoding is greedy; the ids of configurations with the same
activations must agree.
  ms/token  from the first new token to the last; the median over rounds, with the lowest and highest
  prefill   prompt tokens per second, from the call to the first new token
  floor     bytes that a token must move / the best bandwidth measured in the run (that of RAM is also
            measured after each round): the dense part and a token's experts once from the fastest tier, and
            the counted misses once from the tier below. Only transfers from different tiers overlap, so the
            slowest decides.
  bits      per weight that a decoded token reads, scales included
  ratio     tokens per second of ours over the peer's, or of one policy over another, in the same round: the
            median, and the interval that holds the true median with 95 % confidence (ratio.py)
The prompt is text from this repository. On a GPU, --vram bounds the card (24GiB stands for a consumer card).
--synthetic writes a checkpoint of random weights below MOE_LOCAL_HOME and keeps it, as peers keep their
files; llama.cpp is installed there on first use (peers/install.py).
--isa avx2 measures for a processor with AVX2 only: our library, llama.cpp and, by the environment, torch.
--parallel N continues N sequences together instead of one; together.py says how, and what its columns mean.

Run: python benchmarks/decode.py MODEL [--slots 2 4 8] [--prefetch off router] [--tokens 24] [--rounds 9]
     python benchmarks/decode.py --synthetic mixtral-8x7b --layers 4 --device cpu --peer llama.cpp
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import together
import torch
from contenders import Configuration, Contender
from instruction_set import missing, use
from made import Made
from peers.client import PEERS, Peer, Setup, start
from peers.install import PROCESSORS
from ratio import Ratio
from report import finish, parser_of, versions
from synthetic import NAMED_SHAPES, mixtral_19_shards

import moe_local
from moe_local.cache.keys import format_bytes
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.hub import resolve
from moe_local.offload.options import ACTIVATIONS
from moe_local.offload.plan import bandwidth
from moe_local.offload.plan.bandwidth import Bandwidths, measure, ram_bandwidth
from moe_local.offload.system.home import moe_local_home

WITH_ROWS = ([], ["llama.cpp"])
"""Peers that continue several sequences together, if any."""
ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.isa != "native":
        use(options.isa)
    if options.synthetic:
        options.model = str(write_synthetic(options.synthetic, options.layers))
    if options.made:
        options.made = Made(options.made, options.layers)
        options.model = options.made.checkpoint.name
    with contextlib.ExitStack() as stack:
        configurations = [stack.enter_context(loaded(options, *choice)) for choice in choices(options)]
        peers = [stack.enter_context(peer) for peer in started_peers(options, configurations)]
        compare = compare_together if options.parallel else compare_single
        compare(options, configurations, peers)


def write_synthetic(name: str, layers: int | None) -> Path:
    """Write a checkpoint with random weights, unless it exists already; returns its folder."""
    shape = NAMED_SHAPES[name]
    shape = dataclasses.replace(shape, layers=layers or shape.layers)
    folder = moe_local_home() / "benchmarks" / f"{name}-{shape.layers}-layers"
    if not (folder / "model.safetensors.index.json").exists():
        mixtral_19_shards(folder, shape, quiet=False)
    return folder


def choices(options: argparse.Namespace) -> Iterator[tuple[int | None, str, str, str, str]]:
    yield from itertools.product(
        options.slots, options.prefetch, options.activations, options.miss, options.policy
    )


@contextlib.contextmanager
def loaded(
    options: argparse.Namespace, slots: int | None, prefetch: str, activations: str, miss: str, policy: str
) -> Iterator[Configuration]:
    extra = {"vram": options.vram} if options.vram else {}
    load = options.made.load if options.made else functools.partial(moe_local.load, options.model)
    with load(
        device=options.device,
        slots=slots,
        prefetch=prefetch,
        experts=options.experts,
        activations=activations,
        dense=options.dense,
        context=options.context,
        miss=miss,
        policy=policy,
        parallel=max(options.parallel or [1]),
        **extra,
    ) as model:
        yield Configuration(
            model, slots=slots, prefetch=prefetch, activations=activations, miss=miss, policy=policy
        )


def started_peers(options: argparse.Namespace, configurations: Sequence[Configuration]) -> Iterator[Peer]:
    """Start each peer; llama.cpp once for each of its settings. On a GPU, transformers may use as much VRAM
    as our plan does."""
    made = options.made and options.made.checkpoint
    checkpoint = made or Checkpoint.open(resolve(options.model), options.model)
    plan = configurations[0].model.plan
    gpu = plan.request.vram is not None
    setup = Setup(
        options.context,
        vram=plan.used()["vram"] if gpu else None,
        random=options.random_peers,
        sequences=max(options.parallel or [1]),
        isa=options.isa,
    )
    for name in options.peer:
        llama_cpp = name == "llama.cpp"
        for layers in options.n_cpu_moe if llama_cpp and gpu else [0]:
            for attention in options.flash_attention if llama_cpp else ["auto"]:
                setup = dataclasses.replace(setup, n_cpu_moe=layers, flash_attention=attention)
                yield start(name, checkpoint.folder, checkpoint.fingerprint, setup)


def compare_single(
    options: argparse.Namespace, configurations: Sequence[Configuration], peers: Sequence[Peer]
) -> None:
    model = configurations[0].model
    contenders: list[Contender] = [*configurations, *peers]

    def answer(contender: Contender, number: int) -> None:
        prompt = prompt_ids(model, options.prompt_tokens, number)
        contender.answer(prompt, options.tokens, keep=number > 0)

    bandwidths, each = measure_rounds(model, options.rounds, contenders, answer)
    check_equal(configurations)
    report(options, configurations, peers, bandwidths, each)


def compare_together(
    options: argparse.Namespace, configurations: Sequence[Configuration], peers: Sequence[Peer]
) -> None:
    model = configurations[0].model
    used = together.experts_per_token(model)
    ours = [together.OursTogether(one, count) for one in configurations for count in options.parallel]
    theirs = [together.PeerTogether(peer, count, used) for peer in peers for count in options.parallel]

    def run(contender: together.Together, number: int) -> None:
        sizes = together.lengths(contender.count, options.prompt_tokens)
        starts = (997 * (number * len(sizes) + i) for i in range(len(sizes)))
        prompts = [prompt_ids(model, size, start) for size, start in zip(sizes, starts, strict=True)]
        contender.run(prompts, options.tokens, keep=number > 0)

    bandwidths, each = measure_rounds(model, options.rounds, [*ours, *theirs], run)
    rows, peer_rows = ([each.summary(bandwidths) for each in side] for side in (ours, theirs))
    pairs = itertools.product(ours, theirs)
    ratios = [together.ratio(one, peer) for one, peer in pairs if one.count == peer.count]
    print_bandwidth(bandwidths, each)
    together.print_table([*rows, *peer_rows], ratios)
    figures = {"parallel": options.parallel, "configurations": rows, "peers": peer_rows, "ratios": ratios}
    finish({**about(options, model, bandwidths, each), **figures}, options.json)


T = TypeVar("T")


def measure_rounds(
    model: moe_local.Model, rounds: int, contenders: list[T], run: Callable[[T, int], None]
) -> tuple[Bandwidths, list[float]]:
    """Let all contenders run in turn, in rounds 0 to `rounds`. Returns the best bandwidths, and that of RAM
    after each round."""
    device = model.hf.device
    before = measure(moe_local_home(), device)
    each = []
    for number in range(rounds + 1):
        first = number % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            run(contender, number)
        each.append(ram_bandwidth())
        print(f"round {number} of {rounds}", file=sys.stderr)
    best = fastest(before, measure(moe_local_home(), device))
    return dataclasses.replace(best, ram=max(best.ram, *each)), each


def prompt_ids(model: moe_local.Model, count: int, start: int) -> list[int]:
    """`count` ids of real text, repeated as needed, beginning with its `start`-th. Without a tokenizer, ids
    are made from the text's bytes."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    if model.tokenizer is None:
        ids = [3 + byte for byte in text.encode()]
    else:
        ids = model.tokenizer(text)["input_ids"]
    return [ids[(start + i) % len(ids)] for i in range(count)]


def check_equal(configurations: Sequence[Configuration]) -> None:
    """Slots and prefetch must not change a token. Other activations may, and so may misses of a GPU that the
    CPU computes."""
    by_activations: dict[str, Configuration] = {}
    for configuration in configurations:
        if configuration.miss != "fetch" and configuration.model.hf.device.type != "cpu":
            continue
        other = by_activations.setdefault(configuration.activations, configuration)
        if [a.ids for a in configuration.answers] != [a.ids for a in other.answers]:
            raise SystemExit(f"ids differ between {other.name} and {configuration.name}")


def fastest(before: Bandwidths, after: Bandwidths) -> Bandwidths:
    """The better of two measurements of each: the floor is what the hardware can do in an idle moment."""
    pick = {name: max(getattr(before, name), getattr(after, name)) for name in ("vram", "ram", "h2d", "disk")}
    return Bandwidths(**pick, measured=before.measured, disk_cached=before.disk_cached)


def report(
    options: argparse.Namespace,
    configurations: Sequence[Configuration],
    peers: Sequence[Peer],
    bandwidths: Bandwidths,
    ram_each: Sequence[float],
) -> None:
    rows = [configuration.summary(bandwidths) for configuration in configurations]
    peer_rows = [peer.summary(bandwidths) for peer in peers]
    ratios = [ratio(ours, peer) for ours in configurations for peer in peers]
    pairs = itertools.combinations(configurations, 2)
    ratios += [ratio(one, other) for one, other in pairs if one.but_policy == other.but_policy]
    print_bandwidth(bandwidths, ram_each)
    print_tables([*rows, *peer_rows], ratios)
    figures = {"configurations": rows, "peers": peer_rows, "ratios": ratios}
    finish({**about(options, configurations[0].model, bandwidths, ram_each), **figures}, options.json)


def about(
    options: argparse.Namespace, model: moe_local.Model, bandwidths: Bandwidths, ram_each: Sequence[float]
) -> dict[str, Any]:
    """What a result says besides its figures."""
    plan = model.plan.to_dict()
    return {
        "benchmark": "decode",
        "model": Path(options.model).name,
        "prompt_tokens": options.prompt_tokens,
        "experts": options.experts,
        "dense": options.dense,
        "expert_bytes": plan["bytes"]["expert"],
        "expert_size": format_bytes(plan["bytes"]["expert"]),
        "moe_layers": plan["moe_layers"],
        "tokens": options.tokens,
        "rounds": options.rounds,
        "isa": options.isa,
        "bandwidths": bandwidths.to_dict(),
        "ram_bandwidth_by_round": list(ram_each),
        "machine": machine(model),
    }


def ratio(ours: Configuration, peer: Contender) -> dict[str, Any]:
    """Ratios of tokens per second, ours over the peer's, paired by round."""
    decode = Ratio.of([1 / a.ms_per_token for a in ours.answers], [1 / a.ms_per_token for a in peer.answers])
    prefill = Ratio.of(
        [a.prefill_tokens_per_s for a in ours.answers], [a.prefill_tokens_per_s for a in peer.answers]
    )
    return {"ours": ours.name, "peer": peer.name, "decode": decode.to_dict(), "prefill": prefill.to_dict()}


def print_bandwidth(bandwidths: Bandwidths, ram_each: Sequence[float]) -> None:
    print(
        f"RAM read at {bandwidths.ram / 1e9:.1f} GB/s at best, {statistics.median(ram_each) / 1e9:.1f} mostly"
    )


def print_tables(rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'':40} {'bits':>5} {'MB/tok':>7} {'ms/token':>8} {'min':>7} {'max':>7} {'floor':>6} {'share':>6} "
        f"{'prefill':>8} {'stall':>6} {'hits':>5}"
    )
    for row in rows:
        ms = row["ms_per_token"]
        cache = f"{row['stall_ms_per_token']:6.1f} {row['hit_rate']:5.0%}" if "hit_rate" in row else ""
        print(
            f"{row['name']:40} {row['bits_per_weight']['all']:5.2f} {row['read_bytes_per_token'] / 1e6:7.0f} "
            f"{ms['median']:8.1f} {ms['min']:7.1f} {ms['max']:7.1f} {row['floor_ms_per_token']:6.1f} "
            f"{row['share_of_floor']:6.1%} {row['prefill_tokens_per_s']['median']:8.1f} {cache}"
        )
    for row in ratios:
        decode, prefill = Ratio(**row["decode"]), Ratio(**row["prefill"])
        print(f"{row['ours']} / {row['peer']}: decode {decode}, prefill {prefill}")


def machine(model: moe_local.Model) -> dict[str, Any]:
    device = model.hf.device
    return {
        "machine": bandwidth.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **versions(),
    }


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the model."""
    parser.add_argument("model", nargs="?", help="an alias, a Hub id or a folder")
    parser.add_argument("--synthetic", choices=NAMED_SHAPES, help="random weights of this shape instead")
    parser.add_argument("--made", metavar="NAME", help="as --synthetic of `moe-local bench`: experts in NF4")
    parser.add_argument("--layers", type=int, help="of the synthetic or made model")


def choose_model(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse no model, several models, and --layers for a model whose layers are given."""
    if sum(given is not None for given in (options.model, options.synthetic, options.made)) != 1:
        parser.error("give either MODEL or --synthetic NAME or --made NAME")
    if options.layers is not None and (options.model is not None or options.layers < 1):
        parser.error(f"--layers {options.layers} needs --synthetic or --made and is at least 1")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=9)
    model_flags(parser)
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=[])
    parser.add_argument(
        "--random-peers", action="store_true", help="peers make weights of their own in the model's shapes"
    )
    parser.add_argument(
        "--n-cpu-moe",
        type=int,
        nargs="+",
        default=[0],
        help="on a GPU, layers whose experts llama.cpp keeps in RAM; one peer each",
    )
    parser.add_argument(
        "--flash-attention",
        choices=("auto", "on", "off"),
        nargs="+",
        default=["auto"],
        help="llama.cpp's attention, one peer each; default: auto",
    )
    parser.add_argument("--isa", choices=PROCESSORS, default="native", help="default: all that there is")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--slots", type=int, nargs="+", default=[None])
    parser.add_argument("--prefetch", nargs="+", help="default: off router; off for a synthetic model")
    parser.add_argument("--miss", nargs="+", default=["auto"], help="default: auto")
    parser.add_argument("--policy", nargs="+", default=["adaptive"], help="default: adaptive")
    parser.add_argument("--experts", default="nf4")
    parser.add_argument(
        "--activations", nargs="+", help="default: native; all there are for a synthetic model"
    )
    parser.add_argument("--dense", help="default: auto; nf4 for a synthetic model")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--vram")
    parser.add_argument("--prompt-tokens", type=int, help="default: 64; 128 for a synthetic model")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument(
        "--parallel",
        type=int,
        nargs="+",
        metavar="N",
        help="continue N sequences together; several are compared",
    )
    options = parser.parse_args(arguments)
    choose_model(parser, options)
    if options.made and options.peer and not options.random_peers:
        parser.error("--made makes experts in NF4 only, which no peer reads; add --random-peers")
    if options.rounds < 1 or options.tokens < 2:
        least = "use 1 and 2 at least"
        parser.error(f"--rounds {options.rounds} --tokens {options.tokens} measures nothing; {least}")
    in_batches = options.device == "cpu" and options.peer in WITH_ROWS
    if options.parallel and (min(options.parallel) < 1 or not in_batches):
        parser.error(
            "--parallel counts sequences, 1 or more, and needs --device cpu and no peer but llama.cpp"
        )
    if options.isa != "native" and (unset := missing(options.isa)):
        parser.error(f"--isa {options.isa} needs {unset} in the environment, or torch uses more")
    made = options.model is None
    options.prefetch = options.prefetch or (["off"] if made else ["off", "router"])
    options.activations = options.activations or (list(ACTIVATIONS) if made else ["native"])
    options.dense = options.dense or ("nf4" if made else "auto")
    options.prompt_tokens = options.prompt_tokens or (128 if made else 64)
    return options


if __name__ == "__main__":
    main()
