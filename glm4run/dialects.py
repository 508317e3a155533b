"""Which chat dialect a model folder speaks: each published chat template as data, found by its fingerprint.

No template is ever run, and an unknown one is never replaced by a generic one. Knows no messages and no tokens.
Source: the chat templates of glm-4-9b-chat, glm-4-9b-chat-1m, GLM-4-9B-0414 and GLM-Z1-9B-0414.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from glm4run.chat_texts import INTRO_CHATGLM, INTRO_GLM4, INTRO_Z1, TOOLS_HEADING
from glm4run.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one published chat template prints, as data."""

    name: str
    fingerprints: frozenset[str]
    """`template_fingerprint` of each file that prints this."""
    tools_heading: str
    """Stands before the tool list."""
    tools_in_messages: bool = False
    """2024: tools belong to a message and include built-in ones, and a message without content is not printed."""
    after_metadata: str = ""
    """Between a tool's name and the end of its line."""
    opens_thinking: bool = False
    """The prompt ends in `<think>`, so the answer starts inside the thought."""
    drops_thoughts: bool = False
    """History is printed without what stands up to `</think>`, and stripped."""


_ALL_DIALECTS = (
    Dialect(
        "chat-2024",
        frozenset({"27288f957f8364c990a2ce13bf5f8bf86921c4bce467ce698c76dcc69466d821"}),
        tools_heading=f"{INTRO_CHATGLM}\n\n{TOOLS_HEADING}",
        tools_in_messages=True,
    ),
    Dialect(
        "chat-2024-1m",
        frozenset({"cee9facd39c67f98e6b94d95fdc31ba00a069b9ccaf7bc25d9e54b7b1bb39c24"}),
        tools_heading=f"{INTRO_GLM4}\n\n{TOOLS_HEADING}",
        tools_in_messages=True,
    ),
    Dialect(
        "0414",
        frozenset(
            {
                "854b703e44ca06bdb196cc471c728d15dbab61e744fe6cdce980086b61646ed1",
                "73c14ae3709e59006780deb619440684d32832c1e3e9024194ffca00b2812a93",  # the embedded demo's own
            }
        ),
        tools_heading=f"{TOOLS_HEADING}\n",
        after_metadata=" ",
    ),
    Dialect(
        "0414-multiline",
        frozenset({"db700f25fa300e53634c6fc78dee86b7fbd6d27e624edb855b18a4078c83a822"}),
        tools_heading=f"{TOOLS_HEADING}\n",
    ),
    Dialect(
        "z1",
        frozenset({"adee3accece2e4a347280cb16580b3575d6164f2a0f4ac58a1a8392a346eb241"}),
        tools_heading=f"{INTRO_Z1}\n\n{TOOLS_HEADING}",
        opens_thinking=True,
        drops_thoughts=True,
    ),
)
DIALECTS: Mapping[str, Dialect] = MappingProxyType({dialect.name: dialect for dialect in _ALL_DIALECTS})
"""Every dialect by its name."""


def template_fingerprint(text: str) -> str:
    """SHA-256 (hex) of a chat template, whatever its line ends and the white space after its last character."""
    unified = text.replace("\r\n", "\n").replace("\r", "\n").rstrip()
    return hashlib.sha256(unified.encode("utf-8")).hexdigest()


def dialect_from_template(text: str) -> Dialect:
    """The dialect that a chat template prints.

    Raises: CheckpointError for an unknown template: a guess would answer, and answer nonsense.
    """
    fingerprint = template_fingerprint(text)
    for dialect in DIALECTS.values():
        if fingerprint in dialect.fingerprints:
            return dialect
    raise CheckpointError(
        f"the chat template with fingerprint {fingerprint} is unknown; expected one of the published GLM-4 templates",
        hint=f"known dialects: {', '.join(DIALECTS)}; restore the template file that came with the model"
        f" (the unknown one has fingerprint {fingerprint})",
    )


def read_template(folder: Path) -> str | None:
    """The chat template of a model folder: `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`.

    None if it has none, as a base model does. Raises: CheckpointError if a file is there but holds no usable template.
    """
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return _read_text(jinja)
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        if not path.is_file():
            continue
        try:
            data = json.loads(_read_text(path))
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}", hint="copy it again from the source") from error
        template = data.get("chat_template") if isinstance(data, dict) else None
        if isinstance(template, list):  # several named ones
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default", named)
        if template is not None and not isinstance(template, str):
            raise CheckpointError(
                f"chat_template in {path} is {template!r:.80}; expected a text, or a list with one named default",
                hint="copy the file again from the model's source",
            )
        if template is not None:
            return template
    return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}", hint="copy it again from the source") from error
