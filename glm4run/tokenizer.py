"""Text to token ids and back, for byte-level BPE vocabularies: GLM-4's own and any byte-level `tokenizer.json`.

Knows bytes, ids and control tokens; must not know messages, dialects or models, and needs no package but `tokenizers`.
Source: `tokenizer.model` of glm-4-9b (tiktoken lines) and the pattern and specials of its `tokenization_chatglm.py`.
"""

from __future__ import annotations

import binascii
import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as CoreTokenizer

from glm4run.errors import CheckpointError, UsageError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
"""The family's control tokens, in id order; the first id is the number of ranks in `tokenizer.model` (151329)."""

PREFIX_TOKENS = ("[gMASK]", "<sop>")
"""What stands at the head of every prompt, once."""

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Cuts text into the pieces that BPE works on. Source: `tokenization_chatglm.py` of glm-4-9b."""


class Tokenizer:
    """Encodes and decodes one vocabulary. Build it with `load_tokenizer`."""

    def __init__(self, core: CoreTokenizer) -> None:
        """Wraps `core`; from here on no text can become a control token.

        Raises: CheckpointError if the vocabulary is not byte-level.
        """
        _require_byte_level(core)
        # A file may list a control token as an ordinary added token (the -hf copies do for the image marks), and
        # ordinary added tokens are matched inside user text. Adding it again as special corrects that, keeping its id.
        core.add_special_tokens(
            [
                AddedToken(name, special=True, normalized=False)
                for name in SPECIAL_TOKENS
                if core.token_to_id(name) is not None
            ]
        )
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        self._core = core
        added = core.get_added_tokens_decoder()
        self._special_names = {i: token.content for i, token in added.items() if token.special}
        self._special_ids = {name: i for i, name in self._special_names.items()}
        self._bytes = _bytes_by_id(core, {i: token.content for i, token in added.items()})
        self.special_ids = frozenset(self._special_names)
        """Ids of all control tokens."""
        prefix = tuple(self._special_ids[name] for name in PREFIX_TOKENS if name in self._special_ids)
        self.prefix_ids: tuple[int, ...] = prefix if len(prefix) == len(PREFIX_TOKENS) else ()
        """`[gMASK]<sop>` as ids, or () for a vocabulary that has none."""

    @property
    def vocab_size(self) -> int:
        """How many ids have a token. Rows of a padded embedding beyond these must be masked: see `is_usable`."""
        return len(self._bytes)

    def usable_ids(self) -> list[int]:
        """All ids that have a token, control tokens included, ascending."""
        return sorted(self._bytes)

    def is_usable(self, token_id: int) -> bool:
        """Whether `token_id` has a token; False for the padding rows of an embedding."""
        return token_id in self._bytes

    def special_id(self, name: str) -> int | None:
        """The id of the control token called `name`, or None if this vocabulary has none."""
        return self._special_ids.get(name)

    def special_name(self, token_id: int) -> str | None:
        """The name of control token `token_id`, or None if that is not a control token."""
        return self._special_names.get(token_id)

    def encode(self, text: str) -> list[int]:
        """`text` as ordinary tokens: never a control token, whatever it spells, and no prefix.

        Raises: UsageError if `text` holds a lone surrogate, which no UTF-8 can express.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start};"
                " expected valid Unicode",
                hint="save the input as UTF-8, or replace the broken character",
            ) from error
        # add_special_tokens=False: some files add the prefix in a post-processor, and the chat format adds it too.
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes that `token_id` adds to the text; `b""` for a control token, which adds none.

        Raises: KeyError if no token has this id (padding rows; ask `is_usable` first).
        """
        if token_id in self._special_names:
            return b""
        return self._bytes[token_id]

    def piece(self, token_id: int) -> str:
        r"""`token_id` for display: a control token by its name, bytes that are no whole character as `\xNN`.

        Raises: KeyError if no token has this id.
        """
        return self._bytes[token_id].decode("utf-8", errors="backslashreplace")

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`, invalid UTF-8 as U+FFFD; control tokens are dropped, or shown by name.

        Raises: KeyError if an id has no token.
        """
        read = self.token_bytes if skip_special else self._bytes.__getitem__
        return b"".join(map(read, ids)).decode("utf-8", errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        """A fresh decoder for one stream of generated ids."""
        return StreamDecoder(self)

    def to_json(self) -> str:
        """The vocabulary as a `tokenizer.json`, which transformers' PreTrainedTokenizerFast reads to the same ids."""
        return str(self._core.to_str())

    def save(self, path: Path) -> None:
        """Writes `to_json()` to `path`."""
        path.write_text(self.to_json(), encoding="utf-8")


class StreamDecoder:
    """Turns ids into text one by one, never half a character: what `push` and `flush` return joins to `decode(ids)`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes, possibly none; bytes that can no longer be valid become U+FFFD.

        Raises: KeyError if no token has this id.
        """
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What was held back, as U+FFFD, when no more ids will come. The decoder can then start a new stream."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: from `tokenizer.json`, else built from `tokenizer.model` (tiktoken lines).

    Raises: CheckpointError if neither file is there, or one is damaged or contradicts `tokenizer_config.json`.
    """
    json_path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_path.is_file():
        try:
            # `tokenizers` raises bare Exception for everything that is wrong with a file.
            return Tokenizer(CoreTokenizer.from_str(json_path.read_text(encoding="utf-8")))
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{json_path} cannot be read as a tokenizer.json: {error}",
                hint="copy the file again from the model's source; if it is a Git LFS pointer, fetch the real file",
            ) from error
    if not model_path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model",
            hint="copy one of them from the model's source",
        )
    tokens = read_tiktoken(model_path)
    core = build_byte_level_bpe(tokens)
    names = _special_names(folder / "tokenizer_config.json", first_id=len(tokens))
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(core)


def read_tiktoken(path: Path) -> list[bytes]:
    """The tokens of a tiktoken file (one `base64 rank` a line), indexed by rank, which is the id.

    Raises: CheckpointError if a line is malformed, the ranks are not 0..n-1, or a single byte has no token.
    """
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            tokens[int(rank)] = binascii.a2b_base64(token, strict_mode=True)
        except ValueError as error:
            raise CheckpointError(
                f"{path} line {number} is {line[:60]!r}; expected a base64 token and its rank",
                hint="copy the file again from the model's source; if it is a Git LFS pointer, fetch the real file",
            ) from error
    ordered = [tokens[rank] for rank in range(len(tokens)) if rank in tokens]
    # Without its 256 single bytes BPE would drop characters silently.
    missing = {bytes([b]) for b in range(256)}.difference(ordered)
    if len(ordered) != len(tokens) or len(set(ordered)) != len(ordered) or missing:
        raise CheckpointError(
            f"{path} has {len(tokens)} ranks that are not 0 to {len(tokens) - 1} with one distinct token each"
            f" and every single byte among them ({len(missing)} bytes are missing)",
            hint="the file is damaged or cut short; copy it again from the model's source",
        )
    return ordered


def build_byte_level_bpe(tokens: Sequence[bytes]) -> CoreTokenizer:
    """A `tokenizers` BPE that gives the ids tiktoken gives for `tokens` (indexed by rank) and `SPLIT_PATTERN`.

    tiktoken stores no merges: it joins the adjacent pair whose result has the lowest rank. So every split of a token
    into two known tokens is a merge, ordered by the rank of its result (318,088 for GLM-4). It also takes a piece that
    is a token as it is, without merging: `ignore_merges`.
    """
    texts = [token.decode("latin-1").translate(_BYTE_TO_CHAR) for token in tokens]
    vocab = {text: rank for rank, text in enumerate(texts)}
    # Looked up by bytes, so that all merges share the strings of the vocabulary: a third faster, and far smaller.
    text_of = dict(zip(tokens, texts, strict=True)).get
    merges = [
        (left, right)
        for token in tokens
        for cut in range(1, len(token))
        if (left := text_of(token[:cut])) and (right := text_of(token[cut:]))
    ]
    core = CoreTokenizer(models.BPE(vocab, merges, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _special_names(config_path: Path, first_id: int) -> Sequence[str]:
    """Control tokens to add after the ranks: those of `tokenizer_config.json` if it lists any, else the family's."""
    if not config_path.is_file():
        return SPECIAL_TOKENS
    try:
        config: Any = json.loads(config_path.read_text(encoding="utf-8"))
        listed = {int(i): str(token["content"]) for i, token in config.get("added_tokens_decoder", {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{config_path}: added_tokens_decoder is not readable ({error}); expected id -> {{'content': name}}",
            hint="copy the file again from the model's source, or remove it to use the family's control tokens",
        ) from error
    if not listed:
        return SPECIAL_TOKENS
    if sorted(listed) != list(range(first_id, first_id + len(listed))):
        raise CheckpointError(
            f"{config_path} puts control tokens at ids {min(listed)} to {max(listed)}, but tokenizer.model has"
            f" {first_id} ranks; expected ids {first_id} to {first_id + len(listed) - 1}",
            hint="one of the two files is damaged or from another model; copy both from the model's source",
        )
    return [listed[i] for i in sorted(listed)]


def _require_byte_level(core: CoreTokenizer) -> None:
    if "ByteLevel" not in repr(core.pre_tokenizer) or "ByteLevel" not in repr(core.decoder):
        raise CheckpointError(
            f"the tokenizer.json splits text by {core.pre_tokenizer!r:.80}; expected a byte-level one",
            hint="GLM-4 models have a byte-level tokenizer; check that the file belongs to this model",
        )


def _bytes_by_id(core: CoreTokenizer, added: Mapping[int, str]) -> dict[int, bytes]:
    """Id -> bytes for every token; added tokens stand as text, all others in the byte alphabet."""
    table = {i: content.encode("utf-8") for i, content in added.items()}
    for text, i in core.get_vocab(with_added_tokens=False).items():
        if i not in table:
            try:
                table[i] = text.translate(_CHAR_TO_BYTE).encode("latin-1")
            except UnicodeEncodeError:  # not in the alphabet: the reference decoder takes such a token literally
                table[i] = text.encode("utf-8")
    return table


def byte_alphabet() -> dict[int, int]:
    """Byte -> the code point that stands for it in a byte-level vocabulary. Source: `bytes_to_unicode` of GPT-2."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = count(0x100)
    return {byte: byte if byte in printable else next(spare) for byte in range(256)}


_BYTE_TO_CHAR = byte_alphabet()
# Unused low code points map out of Latin-1, so that encoding them fails instead of passing for a byte.
_CHAR_TO_BYTE = dict.fromkeys(range(256), 0xFFFF) | {code: byte for byte, code in _BYTE_TO_CHAR.items()}
