"""The training text: repeatable, whole, and without the questions that the model is judged by."""

from __future__ import annotations

import random
import re

import pytest

from moe_local.demo.corpus import Corpus
from moe_local.demo.gate import BASIC, BLIND, OPEN, conversations, held_out, normalize
from moe_local.demo.intents import ASPECTS, load_book
from moe_local.demo.phrasing import Choices, expand


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


def test_the_same_seed_draws_the_same_conversations(corpus: Corpus) -> None:
    one, other = (
        [corpus.conversation(rng) for _ in range(200)] for rng in (random.Random(5), random.Random(5))
    )
    assert one == other
    assert one != [corpus.conversation(random.Random(6)) for _ in range(200)]


def test_a_second_corpus_draws_what_the_first_did(corpus: Corpus) -> None:
    assert Corpus().conversation(random.Random("1/2"), 4) == corpus.conversation(random.Random("1/2"), 4)


def test_no_held_out_question_is_drawn(corpus: Corpus) -> None:
    rng = random.Random(1)
    forbidden = held_out()
    drawn = {normalize(turn.question) for _ in range(10_000) for turn in corpus.conversation(rng)}
    assert len(forbidden) > 180
    assert not drawn & forbidden


def test_a_held_out_question_is_drawn_again_when_it_comes_up() -> None:
    corpus = Corpus()
    rng = random.Random(3)
    first = corpus.conversation(random.Random(3), 1)[0]
    corpus._held_out = frozenset({normalize(first.question)})
    assert corpus.conversation(rng, 1)[0].question != first.question


def test_no_pattern_sign_or_open_slot_reaches_a_question(corpus: Corpus) -> None:
    rng = random.Random(2)
    for _ in range(3000):
        for turn in corpus.conversation(rng):
            assert not re.search(r"[{}()|;]", turn.question), turn
            assert turn.question.strip(), turn


def test_every_answer_is_a_whole_sentence_and_its_own() -> None:
    answers = {name: intent.answer for name, intent in load_book().intents.items()}
    for name, answer in answers.items():
        assert re.fullmatch(r"[A-Za-z].*[.?]", answer), name
    assert len(set(answers.values())) == len(answers)


def test_every_topic_has_all_aspects_and_every_command_its_wishes() -> None:
    book = load_book()
    for key in book.topics:
        assert all(f"{key}.{aspect}" in book.intents for aspect in ASPECTS)
    assert list(book.commands) == [
        "chat",
        "run",
        "serve",
        "fit",
        "bench",
        "convert",
        "pull",
        "list",
        "show",
        "rm",
        "doctor",
    ]
    assert all(command.wishes for command in book.commands.values())


def test_every_gate_line_accepts_known_intents(corpus: Corpus) -> None:
    for table in (BASIC, OPEN, BLIND):
        for turns, intents in conversations(table):
            assert turns
            assert all(corpus.answer(intent) for intent in intents)


def test_two_topics_are_answered_with_a_sentence_each(corpus: Corpus) -> None:
    assert corpus.answer("token+attention").startswith("A token is")
    assert "Attention lets" in corpus.answer("token+attention")


def test_nested_choices_expand() -> None:
    seen = {expand(random.Random(seed), "(a (b|c)|d) e") for seed in range(30)}
    assert seen == {"a b e", "a c e", "d e"}


def test_patterns_of_many_readings_come_more_often() -> None:
    choices = Choices(["hi", "(a|b|c|d|e|f|g|h) (i|j|k|l|m|n|o|p)"])
    rng = random.Random(0)
    assert sum(choices.draw(rng) == "hi" for _ in range(1000)) < 350
