"""A conversation, token by token, with what each token had to wait for."""

import moe_local


def main() -> None:
    messages = []
    with moe_local.load("demo", slots=3) as model:
        for question in ("What is an expert?", "Why does prefetch help?"):
            messages.append({"role": "user", "content": question})
            print(">>>", question)
            answer, waited = "", 0.0
            for token in model.stream(messages, max_new_tokens=64):
                print(token.text, end="", flush=True)
                answer += token.text
                waited += token.stall_ms
            messages.append({"role": "assistant", "content": answer})
            print(f"\n    waited {waited:.1f} ms for experts")


if __name__ == "__main__":
    main()
