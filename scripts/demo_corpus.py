"""Deterministic English and Chinese conversations from which the tiny demo model is trained.

`python scripts/demo_corpus.py` prints samples and statistics; the texts are in the other `demo_corpus_*` files.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from demo_corpus_en import FACTS_EN
from demo_corpus_forms import (
    AGAIN,
    AND_TO,
    FALLBACK,
    FOLDERS,
    HELD_OUT,
    HOW_EN,
    HOW_ZH,
    IN_OTHER,
    MINUS,
    PLUS,
    SUM_EN,
    SUM_ZH,
    SYSTEM,
    TIMES,
    TOO_LARGE,
    WHAT_EN,
    WHAT_ZH,
    WORDS,
    Lang,
)
from demo_corpus_talk import OPPOSITES, SCOPE_EN, SCOPE_ZH, TALK_EN, TALK_ZH
from demo_corpus_zh import FACTS_ZH

Turn = tuple[str, str]
Exchange = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class Fact:
    """One piece of knowledge: every variant of the question has any of the answers."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    lang: Lang
    key: str
    weight: int = 1
    kind: Literal["fact", "talk", "scope"] = "fact"


def _parse(text: str, lang: Lang, kind: Literal["fact", "talk"]) -> Iterator[Fact]:
    how, what = (HOW_EN, WHAT_EN) if lang == "en" else (HOW_ZH, WHAT_ZH)
    joined = re.sub(r"\n  ", " " if lang == "en" else "", text)
    for block in joined.strip().split("@")[1:] if "@" in joined else ():
        head, *lines = block.strip().splitlines()
        key, weight = head.split()
        questions: list[str] = []
        answers: list[str] = []
        for mark, rest in ((line[0], line[2:]) for line in lines):
            parts = [part.strip() for part in rest.split(" | ")]
            if mark == "a":
                answers.append(rest)
            elif mark == "q":
                questions += parts
            else:
                questions += [form.format(part) for part in parts for form in (how if mark == "h" else what)]
        yield Fact(tuple(dict.fromkeys(questions)), tuple(answers), lang, key, int(weight), kind)


def _scope(table: tuple[tuple[str, str], ...], lang: Lang) -> Iterator[Fact]:
    for number, (forms, topics) in enumerate(table):
        questions = [form.format(topic) for form in forms.split("|") for topic in topics.split("|")]
        yield Fact(tuple(dict.fromkeys(questions)), (FALLBACK[lang],), lang, f"scope{number}", 5, "scope")


@cache
def _all_facts() -> tuple[Fact, ...]:
    """Every fact; a question belongs to the first fact that lists it, so that no question has two answers."""
    found: list[Fact] = [
        *_parse(TALK_EN, "en", "talk"),
        *_parse(TALK_ZH, "zh", "talk"),
        *_parse(FACTS_EN, "en", "fact"),
        *_parse(FACTS_ZH, "zh", "fact"),
        *(
            Fact(
                (f"What is the opposite of {x}?", f"opposite of {x}", f"the opposite of {x}?"),
                (f"The opposite of {x} is {y}.",),
                "en",
                f"opposite {x}",
                1,
                "talk",
            )
            for pair in OPPOSITES.split(",")
            for a, b in [pair.split()]
            for x, y in ((a, b), (b, a))
        ),
        *_scope(SCOPE_EN, "en"),
        *_scope(SCOPE_ZH, "zh"),
    ]
    taken: set[str] = set()
    unique: list[Fact] = []
    for fact in found:
        own = tuple(q for q in fact.questions if _fold(q) not in taken)
        taken.update(map(_fold, own))
        unique.append(Fact(own, fact.answers, fact.lang, fact.key, fact.weight, fact.kind))
    return tuple(unique)


def _fold(question: str) -> str:
    return re.sub(r"[\s.?!。？！,，]+$", "", question.lower()) or question


def facts() -> list[Fact]:
    """All questions and answers, without the generated arithmetic and the folder names that vary."""
    return list(_all_facts())


@cache
def _pool(lang: Lang, kind: str) -> tuple[tuple[Fact, ...], tuple[int, ...]]:
    chosen = tuple(fact for fact in _all_facts() if fact.lang == lang and fact.kind == kind)
    return chosen, tuple(itertools.accumulate(fact.weight for fact in chosen))


def _pick(rng: random.Random, lang: Lang, kind: str) -> Fact:
    chosen, weights = _pool(lang, kind)
    return rng.choices(chosen, cum_weights=weights)[0]


def _typo(rng: random.Random, text: str) -> str:
    """Swap, drop or double one letter inside a word; commands and options stay as they are."""
    words = re.finditer(r"(?<![\w./-])[A-Za-z]{4,}(?![\w./-])", text)
    spots = [word.start() + rng.randrange(1, len(word[0]) - 1) for word in words]
    if not spots:
        return text
    at = rng.choice(spots)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at + 1 :] if kind == 1 else text[:at] + text[at] + text[at:]


def _noisy(rng: random.Random, text: str, lang: Lang, about_program: bool = True) -> str:
    """The question as people type it: lower case, no punctuation, a polite word, a typo."""
    if rng.random() < 0.45:
        return text
    if lang == "zh":
        text = rng.choice(("请问", "请问，", "你好，", "", "", "")) + text if len(text) > 4 else text
        return re.sub(r"[。？！]$", rng.choice(("", "", "?", "？", "。")), text)
    roll = rng.random()
    if roll < 0.12 and len(text) > 12:
        start = text if text.startswith(("I ", "GLM", "KV", "RoPE", "YaRN")) else text[0].lower() + text[1:]
        text = (
            rng.choice(("Please, ", "Hi, ", "Hello, ", "Hey, ", "So, ", "OK, ", "please ", "And ", "Sorry, ")) + start
        )
    elif roll < 0.2 and about_program and text[-1:] in ".?" and len(text) > 12:
        text = text[:-1] + rng.choice((" please?", ", please?", " with glm4run?", " here?", " in glm4run?", " now?"))
    if rng.random() < 0.5:
        text = text.lower()
    elif rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.5:
        text = text.rstrip(".?!") or text
    return _typo(rng, text) if rng.random() < 0.14 else text


def _ask(rng: random.Random, fact: Fact) -> Exchange:
    return _noisy(rng, rng.choice(fact.questions), fact.lang, fact.kind == "fact"), rng.choice(fact.answers)


def _arithmetic(rng: random.Random, lang: Lang) -> Exchange:
    """Sums and differences up to 20 and products up to 10 x 10: what so small a model can learn; beyond, it says so."""
    kind = rng.choice("++-*")
    limit = 10 if kind == "*" else 20
    top = limit if rng.random() < 0.88 else 999
    a, b = rng.randint(0, top), rng.randint(0, top)
    if kind == "-" and a < b:
        a, b = b, a
    results: dict[str, tuple[int, str, dict[Lang, tuple[str, ...]]]] = {
        "+": (a + b, "+", PLUS),
        "-": (a - b, "-", MINUS),
        "*": (a * b, "×", TIMES),
    }
    result, sign, words = results[kind]
    typed = rng.choice(("*", "x", "×")) if kind == "*" else sign
    form = rng.choice(SUM_EN if lang == "en" else SUM_ZH)
    spelled = lang == "en" and "{word}" in form and a <= 20 and b <= 20 and rng.random() < 0.5
    left, right = (WORDS[a], WORDS[b]) if spelled else (str(a), str(b))
    question = form.format(a=left, b=right, op=typed, word=rng.choice(words[lang]))
    if lang == "en" and rng.random() < 0.3:
        question = question.lower().rstrip("?.") if rng.random() < 0.6 else question.lower()
    if max(a, b) > limit:
        return question, TOO_LARGE[lang]
    return question, f"{a} {sign} {b} = {result}" + ("." if lang == "en" else "。")


def _command(rng: random.Random, lang: Lang) -> Exchange:
    """A question with a folder or a number in it that the answer has to copy."""
    folder, bits = rng.choice(FOLDERS), rng.choice((4, 8))
    name = folder.rstrip("/")
    number = rng.choice((1, 2, 7, 8, 16, 32, 42, 63, 64, 100, 123, 125, 128, 200, 500, rng.randint(1, 999)))
    temperature = rng.choice(("0", "0.1", "0.2", "0.3", "0.5", "0.6", "0.7", "0.8", "0.9", "1.0"))
    group, context = rng.choice((32, 64, 128)), rng.choice((1, 2, 4, 8, 16, 32, 63, 64, 125, 128))
    packed = f"glm4run quantize {name} -o {name}-int{bits} --bits {bits}"
    rows: tuple[tuple[str, str, str], ...] = (
        (f"How do I quantize {folder} to {bits} bits?", f"怎么把 {folder} 量化到 {bits} 位？", packed),
        (
            f"Quantize {folder} with group size {group} and {bits} bits.",
            f"用分组大小 {group} 把 {folder} 量化到 {bits} 位",
            f"{packed} --group-size {group}",
        ),
        (f"How do I chat with {folder}?", f"怎么和 {folder} 聊天？", f"glm4run chat {name}"),
        (f"How do I check {folder}?", f"怎么检查 {folder}？", f"glm4run check {name}"),
        (
            f"How do I set the context to {context}k?",
            f"怎么把上下文设为 {context}k？",
            f"glm4run chat --ctx {context}k",
        ),
        (
            f"How do I set the seed to {number}?",
            f"怎么把种子设为 {number}？",
            f'glm4run generate "Hello" --seed {number}',
        ),
        (
            f"How do I use temperature {temperature}?",
            f"怎么用温度 {temperature}？",
            f'glm4run generate "Hello" --temperature {temperature}',
        ),
        (
            f"How do I limit the answer to {number} tokens?",
            f"怎么把回答限制在 {number} 个 token？",
            f'glm4run generate "Hello" --max-tokens {number}',
        ),
    )
    english, chinese, command = rng.choice(rows)
    if lang == "zh":
        return _noisy(rng, chinese, lang), f"运行 `{command}`。"
    return _noisy(rng, english, lang) if folder.lower() == folder else english, f"Run `{command}`."


def _follow_up(rng: random.Random, lang: Lang) -> list[Exchange]:
    """A question and what people say next: thanks, the other number of bits, the other language, once more."""
    other: Lang = "zh" if lang == "en" else "en"
    table = {(fact.key, fact.lang): fact for fact in _all_facts() if fact.kind == "fact"}
    kind = rng.randrange(6)
    if kind == 0:
        first, second = rng.choice((("quantize4", "8"), ("quantize8", "4")))
        start = _ask(rng, table[first, lang])
        return [start, (rng.choice(AND_TO[lang]).format(second), table[f"quantize{second}", lang].answers[0])]
    fact = _pick(rng, lang, "fact")
    exchanges = [_ask(rng, fact)]
    if kind == 1 and (fact.key, other) in table:
        exchanges.append((rng.choice(IN_OTHER[other]), table[fact.key, other].answers[0]))
    elif kind == 2:
        exchanges.append((rng.choice(AGAIN[lang]), exchanges[0][1]))
    elif kind == 3:
        exchanges.append(_arithmetic(rng, lang))
    elif kind == 4:
        exchanges = [_ask(rng, _talk(lang, "hello")), *exchanges]
    if kind >= 3 or rng.random() < 0.4:
        exchanges.append(_ask(rng, _talk(lang, rng.choice(("thanks", "thanks", "bye")))))
    return exchanges


@cache
def _talk(lang: Lang, key: str) -> Fact:
    return next(fact for fact in _all_facts() if (fact.lang, fact.key, fact.kind) == (lang, key, "talk"))


def _small_talk(rng: random.Random, lang: Lang) -> Exchange:
    return _ask(rng, _pick(rng, lang, "scope" if rng.random() < 0.45 else "talk"))


def _knowledge(rng: random.Random, lang: Lang) -> Exchange:
    return _command(rng, lang) if rng.random() < 0.1 else _ask(rng, _pick(rng, lang, "fact"))


__all__ = ["HELD_OUT", "Fact", "Turn", "conversations", "facts"]

SINGLE: tuple[Callable[[random.Random, Lang], Exchange], ...] = (_knowledge, _small_talk, _arithmetic)


def conversations(seed: int) -> Iterator[list[Turn]]:
    """An endless stream of conversations of 1 to 4 exchanges; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        lang: Lang = "en" if rng.random() < 0.65 else "zh"
        roll = rng.random()
        if roll < 0.1:
            exchanges = _follow_up(rng, lang)
        else:
            make = SINGLE[0 if roll < 0.58 else 1 if roll < 0.75 else 2]
            exchanges = [make(rng, lang) for _ in range(rng.choices((1, 2, 3, 4), (62, 23, 10, 5))[0])]
        turns: list[Turn] = [("system", rng.choice(SYSTEM[lang]))] if rng.random() < 0.15 else []
        for question, answer in exchanges:
            turns += [("user", question), ("assistant", answer)]
        yield turns


def main() -> None:
    """Print samples and statistics."""
    for turns in itertools.islice(conversations(0), 12):
        print("\n".join(f"{role}: {text}" for role, text in turns), end="\n\n")
    sample = list(itertools.islice(conversations(1), 20_000))
    questions = {(fact.lang, q) for fact in facts() for q in fact.questions}
    lengths = [sum(len(text) for _, text in turns) for turns in sample]
    characters = {c for turns in sample for _, text in turns for c in text}
    characters |= {c for fact in facts() for text in (*fact.questions, *fact.answers) for c in text}
    print("facts:", Counter((fact.lang, fact.kind) for fact in facts()))
    print("question phrasings:", len(questions), Counter(lang for lang, _ in questions))
    print(f"characters per conversation: mean {sum(lengths) / len(lengths):.0f}, longest {max(lengths)}")
    print("exchanges:", sorted(Counter(sum(role == "user" for role, _ in turns) for turns in sample).items()))
    print("distinct characters:", len(characters))


if __name__ == "__main__":
    main()
