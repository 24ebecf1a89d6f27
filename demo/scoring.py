"""Asks a trained demo model questions and says whether its greedy answers are the right ones."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from transformers import MixtralForCausalLM, PreTrainedTokenizerBase

from moe_local.demo.corpus import Corpus
from moe_local.demo.gate import conversations

SAME_ANSWER = 0.85  # share of words in common, in order, from which two answers count as the same
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Reply:
    """One scored conversation; `accepted` are the intents of which `answer`, the last one, had to be."""

    turns: list[str]
    answer: str
    accepted: list[str]
    right: bool


def greedy_answers(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]]
) -> list[str]:
    """The greedy answer to each chat (a list of messages that ends with the user's)."""
    answers: list[str] = []
    for start in range(0, len(chats), _AT_ONCE):
        prompts = tokenizer.apply_chat_template(
            chats[start : start + _AT_ONCE],
            add_generation_prompt=True,
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            ids = model.generate(
                input_ids=prompts["input_ids"],
                attention_mask=prompts["attention_mask"],
                do_sample=False,
                max_new_tokens=80,
            )
        new = ids[:, prompts["input_ids"].shape[1] :]
        answers += [tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]
    return answers


def same(one: str, other: str) -> bool:
    """Whether two answers are the same but for a few words."""
    words = [text.lower().split() for text in (one, other)]
    return difflib.SequenceMatcher(None, words[0], words[1]).ratio() >= SAME_ANSWER


def score_table(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, table: str
) -> list[Reply]:
    """Holds every conversation of a table of `gate.py`; only the last answer is judged."""
    rows = conversations(table)
    chats: list[list[dict[str, str]]] = [[] for _ in rows]
    last = [""] * len(rows)
    for turn in range(max(len(turns) for turns, _ in rows)):
        open_rows = [i for i, (turns, _) in enumerate(rows) if turn < len(turns)]
        for i in open_rows:
            chats[i].append({"role": "user", "content": rows[i][0][turn]})
        for i, answer in zip(
            open_rows, greedy_answers(model, tokenizer, [chats[i] for i in open_rows]), strict=True
        ):
            chats[i].append({"role": "assistant", "content": answer})
            last[i] = answer
    return [
        Reply(turns, answer, accepted, any(same(answer, corpus.answer(intent)) for intent in accepted))
        for (turns, accepted), answer in zip(rows, last, strict=True)
    ]
