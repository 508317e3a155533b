"""The screens of `glm4run vram`, for any width: a table where there is room, else a line for each cell."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from glm4run.memory import GIB, MIB, gib_text, tokens_text
from glm4run.vram.answers import (
    CARDS_PER_VENDOR,
    Card,
    Longest,
    Question,
    Row,
    cards_that_fit,
    gpus_to_split_over,
    ladder,
    layers_to_offload,
    longest_context,
    longest_contexts,
    make_rows,
    recommend,
)
from glm4run.vram.choices import Choice
from glm4run.vram.runtimes import Theirs

NARROW = 60  # columns below which there is no room for a table
Lines = Iterator[str]


def screen(question: Question, width: int) -> Lines:
    """The default answer: what fits, how far, how fast, and what to run next."""
    rows = make_rows(question)
    yield from heading(question, width)
    yield ""
    yield from grid(question, rows, width)
    yield from _speed_lines(question, rows, width)
    if any(row.fits for row in rows):
        yield from next_command(question, width)
    else:
        yield from remedies(question, rows, width)
    yield from footnotes(question, width)


def heading(question: Question, width: int) -> Lines:
    """The model, the device, what is free of it and who holds the rest."""
    target = question.target
    yield from wrap(f"{question.subject.name} on {target.name}", width)
    unit = "usable" if target.source in ("catalogue", "as given") else "free"
    yield from wrap(
        f"{gib_text(target.free_bytes)} of {gib_text(target.total_bytes)} GiB {unit} ({target.source})", width
    )
    reserved = question.reserve.of(target.total_bytes)
    if reserved:
        yield from wrap(f"  of it {gib_text(reserved)} GiB are left free (--reserve)", width, indent="  ")
    if target.calibration is not None:
        what = "process" if target.device == "cpu" else "CUDA context and slack"
        yield from wrap(f"  {what} measured here on {target.calibration.date} (--calibrate)", width, indent="  ")
    for holder in target.holders[:4]:
        yield from wrap(f"  {holder.name} (process {holder.pid}) holds {holder.bytes // MIB} MiB", width)
    for note in target.notes:
        yield from wrap(f"  {note}", width, indent="  ")


def grid(question: Question, rows: Sequence[Row], width: int) -> Lines:
    """The peak of every choice at every context, in GiB, and the longest context."""
    longest = {item.choice: item for item in longest_contexts(question)}
    by_choice = {choice: [row for row in rows if row.choice == choice] for choice in question.choices}
    if width < NARROW or len(question.contexts) > (width - 32) // 11:
        yield from _stacked(by_choice, longest, width)
        return
    contexts = [context_text(n) for n in question.contexts]
    yield f"{'GiB at the peak':<18}" + "".join(f"{text:>11}" for text in contexts) + "   longest context"
    for choice, cells in by_choice.items():
        marks = "".join(f"{_mark(row)} {gib_text(row.plan.peak_bytes):>6}".rjust(11) for row in cells)
        yield f"{choice_text(choice, question.choices):<18}{marks}   {longest_text(longest[choice])}"
    yield "+ fits   ~ fits with under 3 % of the device to spare   - does not fit"


def _stacked(by_choice: dict[Choice, list[Row]], longest: dict[Choice, Longest], width: int) -> Lines:
    for choice, cells in by_choice.items():
        yield from wrap(choice_text(choice, tuple(by_choice)), width)
        for row in cells:
            yield f"  {_mark(row)} {context_text(row.plan.context_len):>7} {gib_text(row.plan.peak_bytes):>7} GiB"
        yield from wrap(f"  longest: {longest_text(longest[choice])}", width)
    yield from wrap("+ fits, ~ barely, - does not fit", width)


def _mark(row: Row) -> str:
    return "~" if row.is_tight else "+" if row.fits else "-"


def choice_text(choice: Choice, among: Sequence[Choice]) -> str:
    """A choice by what tells it from the others; a star marks what this version does not execute."""
    parts = [choice.label]
    if len({other.kv_bits for other in among}) > 1 or choice.kv_bits != 16:
        parts.append(f"KV {choice.kv_bits}")
    if len({other.head_bits for other in among}) > 1:
        parts.append(f"head {choice.head_bits}")
    return " ".join(parts) + ("*" if choice.estimated else "")


def context_text(tokens: int) -> str:
    """`128k` and not 131072; 128000 stays, as 125k is not how it was meant."""
    return str(tokens) if tokens % 1000 == 0 else tokens_text(tokens)


def longest_text(longest: Longest) -> str:
    """Tokens, and what bounds them."""
    if not longest.tokens:
        return "none"
    return f"{longest.tokens}" + (" (the model's)" if longest.reason == "model" else "")


def _speed_lines(question: Question, rows: Sequence[Row], width: int) -> Lines:
    speeds = []
    for choice in question.choices:
        known = [row for row in rows if row.choice == choice and row.fits and row.speed is not None]
        for row in (known[:1] + known[-1:]) if len(known) > 1 else known:
            assert row.speed is not None
            low, high = (_speed_text(value) for value in row.speed.decode_tok_per_s)
            speeds.append(f"{choice.label} {low}-{high} at {context_text(row.plan.context_len)}")
    if speeds:
        yield from wrap(f"decode, tok/s: {', '.join(speeds)}", width)
        source = "from an eager torch runtime to the best engine measured on this class of device"
        if question.target.device == "cpu":
            source = "70 to 93 % of the read bandwidth that was measured here"
        yield from wrap(f"  {source}; see docs/vram.md", width, indent="  ")
    elif question.target.device == "cpu":
        yield from wrap("speed on a CPU depends on its memory: `glm4run vram --calibrate` measures that", width)


def _speed_text(tok_per_s: float) -> str:
    return f"{tok_per_s:.0f}" if tok_per_s >= 10 else f"{tok_per_s:.1f}"


def next_command(question: Question, width: int) -> Lines:
    """The exact line to run, and how to get there."""
    best = recommend(question)
    if best is None:
        return
    device = "" if question.target.device == "cpu" else " --device cuda"
    bits, place = best.choice.bits, question.subject.source
    steps = []
    if bits in ("8", "4"):
        options = "" if best.choice.group_size is None else f" --group-size {best.choice.group_size}"
        options += "" if best.choice.head_bits == 8 else f" --lm-head-bits {best.choice.head_bits}"
        steps.append(f"glm4run quantize {place} --bits {bits}{options} -o {place}-int{bits}")
        place = f"{place}-int{bits}"
    steps.append(f"glm4run chat {place} --ctx {best.tokens}{device}")
    yield ""
    yield f"next ({best.choice.label}):"
    for step in steps:
        yield f"  {step}"


def remedies(question: Question, rows: Sequence[Row], width: int) -> Lines:
    """What is short, and the ladder of what helps, the least loss first."""
    row = max(rows, key=lambda item: item.headroom_bytes)
    choice, context_len = row.choice, row.plan.context_len
    yield from wrap(
        f"nothing fits. The nearest, {choice_text(choice, question.choices)} at {context_text(context_len)}, "
        f"is short {gib_text(-row.headroom_bytes)} GiB. What helps, the least loss first, each on top of the others:",
        width,
    )
    steps = ladder(question, choice, context_len)
    for remedy in steps:
        mark, star = "+" if remedy.fits else "-", "" if remedy.runs_now else "*"
        yield from wrap(
            f"  {mark} {gib_text(remedy.plan_bytes):>6} ({gib_text(-remedy.saved_bytes)})  {remedy.what}{star} "
            f"({remedy.option})",
            width,
            indent="     ",
        )
    if not all(step.runs_now for step in steps):
        yield from wrap("  * estimated; this version does not run it yet", width, indent="    ")
    longest = longest_context(question, choice)
    as_is = f"{longest.tokens} tokens" if longest.tokens else "none"
    yield from wrap(f"  longest context that fits as it is: {as_is}", width)
    layers = layers_to_offload(question, choice, context_len)
    if layers is not None and question.target.device == "cuda":
        yield from wrap(f"  or {layers} layers in RAM* (slow: --offload {layers})", width)
    split = gpus_to_split_over(question, choice, context_len) if question.target.device == "cuda" else None
    if split is not None:
        yield from wrap(f"  or {split} such GPUs* (--gpus {split})", width)
    cards = cards_that_fit(question, choice, context_len, per_vendor=1)
    names = [f"{card.gpu.name} ({card.gpu.total_bytes // GIB} GiB)" for card in cards if card.gpu.is_supported]
    if names:
        yield from wrap(f"  or a larger card: {', '.join(names[:3])}", width, indent="    ")


def footnotes(question: Question, width: int) -> Lines:
    """What the stars mean, and what the plan leaves open."""
    estimated = list(dict.fromkeys(what for choice in question.choices for what in choice.estimated))
    if estimated:
        yield from wrap(f"* estimated; this version does not run it yet: {', '.join(estimated)}", width)
    for choice in question.choices[:1]:
        if choice.gpus > 1:
            kind = "tensor" if choice.split == "tp" else "pipeline"
            yield from wrap(f"numbers are those of the fullest of {choice.gpus} GPUs, {kind} split", width)
            if choice.split == "tp" and choice.gpus > question.subject.config.num_key_value_heads:
                heads = question.subject.config.num_key_value_heads
                yield from wrap(f"the model has {heads} KV heads: beyond {heads} GPUs each repeats one", width)
    config = question.subject.config
    if max(question.contexts) > config.max_position_embeddings:
        yield from wrap(f"beyond {config.max_position_embeddings} tokens with YaRN", width)


# --- other screens


def explain(question: Question, row: Row, width: int) -> Lines:
    """Every term of one plan with its formula, then what is left of the device."""
    plan = row.plan
    yield from heading(question, width)
    yield ""
    yield from wrap(
        f"{choice_text(row.choice, question.choices)}, {plan.context_len} tokens "
        f"({context_text(plan.context_len)}), chunks of {plan.chunk}:",
        width,
    )
    for term in plan.terms:
        line = f"  {term.bytes / MIB:>10.2f} MiB  {term.name:<20}{term.kind:<10}"
        if len(line) + len(term.formula) <= width:
            yield f"{line}{term.formula}"
            continue
        yield line if len(line.rstrip()) <= width else f"{term.bytes / MIB:>10.2f} MiB {term.name}"
        indent = " " * (18 if width >= NARROW else 2)
        yield from wrap(f"{indent}{term.formula}", width, indent=indent)
    held = question.target.total_bytes - question.free_bytes
    for nbytes, what in (
        (plan.peak_bytes, f"the plan's peak, {gib_text(plan.peak_bytes)} GiB"),
        (held, "taken already, not usable, or left free"),
        (row.headroom_bytes, "to spare" if row.fits else "short"),
        (question.target.total_bytes, "the device"),
    ):
        yield from wrap(f"  {nbytes / MIB:>10.2f} MiB  {what}", width, indent=" " * 18)


def max_context_table(question: Question, width: int) -> Lines:
    """The longest context of every choice."""
    yield from heading(question, width)
    yield ""
    for item in longest_contexts(question):
        reason = "bounded by the model" if item.reason == "model" else "bounded by the memory"
        text = f"{item.tokens:>8} tokens, {reason}" if item.tokens else "does not fit"
        yield from wrap(f"{choice_text(item.choice, question.choices):<18} {text}", width, indent="  ")
    yield from footnotes(question, width)


def cards_table(question: Question, width: int) -> Lines:
    """The smallest cards of every vendor for each choice at the longest asked context."""
    context_len = max(question.contexts)
    for choice in question.choices:
        cards = cards_that_fit(question, choice, context_len, per_vendor=CARDS_PER_VENDOR)
        yield from wrap(
            f"{question.subject.name}, {choice_text(choice, question.choices)}, {context_text(context_len)} tokens: "
            "the smallest cards that do, with 3 % to spare",
            width,
        )
        if not cards:
            yield "  none in the catalogue"
        elif width >= NARROW:
            yield f"  {'':<28}{'usable':>7}{'used':>6}{'longest':>9}{'decode':>10}{'prompt':>11}"
        for card in cards:
            yield from _card_lines(card, width)
        yield ""
    yield from wrap(
        "usable in GiB; longest context in tokens; decode in tok/s, from an eager torch runtime to the best engine "
        "measured; prompt in s to read all of it. Intel and Apple: estimated, this version does not drive them yet.",
        width,
    )
    yield from footnotes(question, width)


def _card_lines(card: Card, width: int) -> Lines:
    speed = card.speed
    decode = "" if speed is None else f"{speed.decode_tok_per_s[0]:.0f}-{speed.decode_tok_per_s[1]:.0f}"
    prompt = "" if speed is None or speed.prefill_s is None else f"{speed.prefill_s[0]:.0f}-{speed.prefill_s[1]:.0f}"
    usable = gib_text(card.gpu.usable_bytes)
    if width >= NARROW:
        name = textwrap.shorten(card.gpu.name, 28, placeholder="...")
        yield f"  {name:<28}{usable:>7}{card.used_share:>6.0%}{card.longest_tokens:>9}{decode:>10}{prompt:>11}"
        return
    yield from wrap(f"  {card.gpu.name}", width)
    yield from wrap(f"    {usable} GiB, {card.used_share:.0%} used, to {card.longest_tokens}", width, indent="    ")
    yield from wrap(f"    {decode} tok/s", width)


def theirs_table(question: Question, rows: Sequence[Theirs], width: int) -> Lines:
    """Another runtime's need beside ours."""
    yield from wrap(f"{question.subject.name} under {rows[0].runtime}, which is not glm4run:", width)
    yield ""
    ours = {(row.choice.bits, row.plan.context_len): row.plan for row in make_rows(question)}
    for row in rows:
        plan = ours.get((str(row.bits), row.context_len))
        beside = "" if plan is None else f" (glm4run {gib_text(plan.peak_bytes)})"
        yield from wrap(
            f"{context_text(row.context_len):>7} {row.bits:>2} bits {gib_text(row.peak_bytes):>7} GiB{beside}: "
            + ", ".join(f"{name} {nbytes / MIB:.0f} MiB" for name, nbytes in row.parts.items()),
            width,
            indent=" " * 8,
        )
    for note in dict.fromkeys(row.note for row in rows):
        yield from wrap(f"  {note}", width, indent="  ")


def wrap(text: str, width: int, *, indent: str = "") -> Lines:
    """Lines of at most `width` columns, the later ones indented."""
    yield from textwrap.wrap(
        text, max(width, 20), subsequent_indent=indent, drop_whitespace=True, break_long_words=False
    ) or [""]
