"""Load a model whose experts do not all fit, ask it something, and see what the cache did."""

import moe_local


def main() -> None:
    # Of a large model: moe_local.load("mixtral-8x7b", vram="20GiB", ram="40GiB").
    with moe_local.load("demo", slots=3) as model:  # 3 of 8 experts of each layer stay in fast memory
        print(model.plan.mode, "mode")
        out = model.generate("What is an expert?", max_new_tokens=64)
        print(out.text)
        print(f"{len(out.token_ids)} tokens, ended by {out.finish_reason}")
        print(f"{out.stats.hits} experts were there, {out.stats.misses} had to be brought")


if __name__ == "__main__":
    main()
