"""The tokenizer gives the reference's ids, never a control token from text, and never half a character."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as CoreTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from glm4run.errors import CheckpointError, UsageError
from glm4run.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, load_tokenizer, read_tiktoken

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizer"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real GLM-4 tokenizer is not at {SHARED}")

CORPUS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs; they're asleep.\n" * 3,
    "def f(x):\n    if x:\n        return [i for i in range(100)]\n\treturn None\r\n" * 3,
    "人工智能助手回答用户的问题，系统环境工作。\n你好，世界！ 系统 环境" * 3,
    "emoji 🚀😶‍🌫️🦙 and Äpfel, нещо, ½ …  trailing   ",
]
MIXED = (
    *(
        "'s",
        "'LL",
        "n't",
        "\u017f",
        "\u212a",
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "\r\n",
        "\n\n",
        "\u3000",
        "\xa0",
        "\u0085",
    ),
    *(
        "1",
        "23",
        "4567",
        "½",
        "٣",
        "a",
        "Word",
        "WORD",
        "élan",
        "的",
        "系统",
        " 系统",
        "你好",
        "こんにちは",
        "안녕",
        "មាន",
    ),
    *("🚀", "😶‍🌫️", "👨‍👩‍👧", "\u0301", "\u200d", "()", "==", "::", "//", "_", "!?", "......", "<|user|>", "[gMASK]"),
    *(
        "    def f(self):\n",
        "        return x\n",
        "\t\tif (a<b) {\r\n",
        "aaaaaaa",
        "=-=-=",
        "\x00",
        "\ufeff",
        "\U0010ffff",
    ),
)


def write_tiktoken(tokens: list[bytes], path: Path) -> None:
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens)))


@pytest.fixture(scope="session")
def small_tokens() -> list[bytes]:
    """A trained byte-level vocabulary of some 600 ranks."""
    core = CoreTokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    to_byte = byte_alphabet()
    assert sorted(to_byte) == sorted(alphabet)
    by_id = sorted(core.get_vocab().items(), key=lambda item: item[1])
    return [bytes(to_byte[char] for char in text) for text, _ in by_id]


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level vocabularies, apart from the code under test."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@pytest.fixture(scope="session")
def small_folder(small_tokens: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_tiktoken(small_tokens, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def small(small_folder: Path) -> Tokenizer:
    return load_tokenizer(small_folder)


@pytest.fixture(scope="session")
def real() -> Tokenizer:
    if not SHARED.is_dir():
        pytest.skip(f"the real GLM-4 tokenizer is not at {SHARED}")
    return load_tokenizer(SHARED)


def reference(tokens: list[bytes]) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("reference", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = rng.choices(MIXED, k=rng.randint(0, 25))
        parts += [chr(rng.randrange(0x20, 0xD800)) for _ in range(rng.randint(0, 8))]
        rng.shuffle(parts)
        texts.append("".join(parts))
    return texts


# --- ids equal the reference --------------------------------------------------------------------------------------


def vectors(name: str) -> list[dict[str, Any]]:
    data: Any = json.loads((SHARED / name).read_text(encoding="utf-8"))
    cases: list[dict[str, Any]] = data["vectors"] if isinstance(data, dict) else data
    return cases


@needs_shared
@pytest.mark.parametrize("name", ["llamacpp_glm4_vectors.json", "whole_piece_vectors.json"])
def test_published_vectors(real: Tokenizer, name: str) -> None:
    cases = vectors(name)
    assert len(cases) >= 6
    for case in cases:
        assert real.encode(case["text"]) == case["ids"], case["text"]
        assert real.decode(case["ids"]) == case["text"]


@needs_shared
def test_public_fingerprints(real: Tokenizer) -> None:
    known = set(json.loads((SHARED / "chkhsh.json").read_text(encoding="utf-8"))) - {"source"}
    ids = real.encode(vectors("llamacpp_glm4_vectors.json")[-1]["text"])
    assert {hashlib.sha256(str(i).encode()).hexdigest() for i in (ids, [*real.prefix_ids, *ids])} == known


@needs_shared
def test_equals_tiktoken_on_random_text(real: Tokenizer) -> None:
    oracle = reference(read_tiktoken(SHARED / "tokenizer.model"))
    for text in random_texts(2000, seed=20240630):
        ids = real.encode(text)
        assert ids == oracle.encode_ordinary(text), repr(text)
        assert real.decode(ids) == text


def test_small_vocabulary_equals_tiktoken(small: Tokenizer, small_tokens: list[bytes]) -> None:
    oracle = reference(small_tokens)
    for text in [*CORPUS, *random_texts(500, seed=7)]:
        assert small.encode(text) == oracle.encode_ordinary(text), repr(text)


def test_a_whole_piece_needs_no_merges(small_tokens: list[bytes], tmp_path: Path) -> None:
    # "zqj" has no split into two tokens, so merging alone could never produce it
    write_tiktoken([*small_tokens, b"zqj"], tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).encode("zqj") == [len(small_tokens)]


# --- control tokens -----------------------------------------------------------------------------------------------


@needs_shared
def test_real_ids_of_the_control_tokens(real: Tokenizer) -> None:
    assert [real.special_id(name) for name in SPECIAL_TOKENS] == list(range(151329, 151343))
    assert real.prefix_ids == (151331, 151333)
    assert real.vocab_size == 151343
    assert [i for i in range(151552) if not real.is_usable(i)] == list(range(151343, 151552))


def test_control_tokens_follow_the_ranks(small: Tokenizer, small_tokens: list[bytes]) -> None:
    first = len(small_tokens)
    assert [small.special_id(name) for name in SPECIAL_TOKENS] == list(range(first, first + 14))
    assert small.special_ids == frozenset(range(first, first + 14))
    assert small.special_name(first + 2) == "[gMASK]" and small.special_name(0) is None
    assert small.special_id("<think>") is None
    assert small.usable_ids() == list(range(first + 14)) and small.vocab_size == first + 14


@given(st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), st.text(max_size=8))).map("".join))
def test_text_never_becomes_a_control_token(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.special_ids.isdisjoint(ids)
    assert small.decode(ids) == text


@needs_shared
@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_real_control_name_in_text_is_text(real: Tokenizer, name: str) -> None:
    ids = real.encode(f"a{name} b\n{name}")
    assert real.special_ids.isdisjoint(ids) and real.decode(ids) == f"a{name} b\n{name}"


def test_a_lone_surrogate_is_named(small: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"U\+D83D at character 2"):
        small.encode("ab\ud83d")


# --- bytes and display --------------------------------------------------------------------------------------------


def test_bytes_and_pieces(small: Tokenizer, small_tokens: list[bytes]) -> None:
    assert [small.token_bytes(i) for i in range(len(small_tokens))] == small_tokens
    user = small.special_id("<|user|>")
    assert user is not None and small.token_bytes(user) == b"" and small.piece(user) == "<|user|>"
    assert small.piece(small_tokens.index(b"\xe4")) == r"\xe4"
    assert small.decode([user, *small.encode("hi")]) == "hi"
    assert small.decode([user, *small.encode("hi")], skip_special=False) == "<|user|>hi"


def test_padding_rows_have_no_token(small: Tokenizer) -> None:
    assert not small.is_usable(small.vocab_size) and not small.is_usable(-1)
    for read in (small.token_bytes, small.piece, lambda i: small.decode([i])):
        with pytest.raises(KeyError):
            read(small.vocab_size)


# --- streaming ----------------------------------------------------------------------------------------------------


@given(st.data())
def test_stream_joins_to_decode(small: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1)))
    stream = small.stream_decoder()
    assert "".join(map(stream.push, ids)) + stream.flush() == small.decode(ids)


@given(st.text())
def test_stream_of_valid_text_is_never_broken(small: Tokenizer, small_tokens: list[bytes], text: str) -> None:
    rank = {token: i for i, token in enumerate(small_tokens)}
    stream = small.stream_decoder()
    chunks = [stream.push(rank[bytes([byte])]) for byte in text.encode()]  # every character split into its bytes
    assert "".join(chunks) == text and stream.flush() == ""


def test_invalid_bytes_are_replaced_once_certain(small: Tokenizer, small_tokens: list[bytes]) -> None:
    stream = small.stream_decoder()
    rank = {token: i for i, token in enumerate(small_tokens)}
    assert stream.push(rank[b"\xf0"]) == ""
    assert stream.push(rank[b"\x9f"]) == ""
    assert stream.push(rank[b"A"]) == "\ufffdA"
    assert stream.push(rank[b"\xe4"]) == "" and stream.flush() == "\ufffd"
    assert stream.push(rank[b"B"]) == "B"  # usable again


# --- files --------------------------------------------------------------------------------------------------------


def test_json_round_trip(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert again.prefix_ids == small.prefix_ids and again.special_ids == small.special_ids
    assert [again.piece(i) for i in again.usable_ids()] == [small.piece(i) for i in small.usable_ids()]
    assert [again.token_bytes(i) for i in again.usable_ids()] == [small.token_bytes(i) for i in small.usable_ids()]
    for text in [*CORPUS, *random_texts(100, seed=3)]:
        assert again.encode(text) == small.encode(text)


@pytest.mark.transformers
def test_transformers_reads_the_saved_json(small: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path / "tokenizer.json")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [*CORPUS, *random_texts(100, seed=5)]:
        if not any(name in text for name in SPECIAL_TOKENS):
            assert fast.encode(text) == small.encode(text)
    assert fast.encode("[gMASK]<sop>") == list(small.prefix_ids)
    assert fast.decode(small.prefix_ids, skip_special_tokens=True) == ""


def test_a_post_processor_does_not_add_the_prefix(small: Tokenizer, tmp_path: Path) -> None:
    core = CoreTokenizer.from_str(small.to_json())
    pairs = list(zip(("[gMASK]", "<sop>"), small.prefix_ids, strict=True))
    core.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=pairs)
    core.enable_truncation(4)
    core.enable_padding(length=32)
    core.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(CORPUS[0]) == small.encode(CORPUS[0])


def test_a_control_token_listed_as_ordinary_is_still_control(small: Tokenizer, tmp_path: Path) -> None:
    data = json.loads(small.to_json())
    for token in data["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_ids == small.special_ids
    assert loaded.special_ids.isdisjoint(loaded.encode("".join(SPECIAL_TOKENS)))


def test_a_gpt2_style_file_without_control_tokens(small_tokens: list[bytes], small: Tokenizer, tmp_path: Path) -> None:
    model = json.loads(small.to_json())["model"]
    core = CoreTokenizer(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.prefix_ids == () and loaded.special_ids == frozenset()
    assert loaded.vocab_size == len(small_tokens)
    text = "12345 你好 <|user|> 🚀\n"
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text
    assert ids[:5] == [small_tokens.index(digit.encode()) for digit in "12345"]


def test_a_control_token_inside_the_vocabulary_keeps_its_id(small: Tokenizer, tmp_path: Path) -> None:
    data = json.loads(small.to_json())
    data["added_tokens"] = []
    data["model"]["vocab"]["<|endoftext|>"] = len(data["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_ids == {loaded.vocab_size - 1} == {loaded.special_id("<|endoftext|>")}
    assert loaded.token_bytes(loaded.vocab_size - 1) == b"" and loaded.prefix_ids == ()
    assert loaded.special_ids.isdisjoint(loaded.encode("a<|endoftext|>"))


def test_added_tokens_decoder_is_used_and_checked(small_tokens: list[bytes], tmp_path: Path) -> None:
    write_tiktoken(small_tokens, tmp_path / "tokenizer.model")
    first, config = len(small_tokens), tmp_path / "tokenizer_config.json"
    names = [*SPECIAL_TOKENS, "<|extra|>"]
    config.write_text(json.dumps({"added_tokens_decoder": {first + i: {"content": n} for i, n in enumerate(names)}}))
    assert load_tokenizer(tmp_path).special_id("<|extra|>") == first + 14
    config.write_text(json.dumps({"added_tokens_decoder": {151329: {"content": "<|endoftext|>"}}}))
    with pytest.raises(CheckpointError, match=f"151329.*{first} ranks"):
        load_tokenizer(tmp_path)
    config.write_text(json.dumps({"added_tokens_decoder": {"x": 3}}))
    with pytest.raises(CheckpointError, match="added_tokens_decoder"):
        load_tokenizer(tmp_path)
    config.write_text(json.dumps({"chat_template": "x"}))
    assert load_tokenizer(tmp_path).special_id("<|endoftext|>") == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "line 1"),
        (b"IQ== 0\nIg== one\n", "line 2"),
        (b"IQ== 0\n!!! 1\n", "line 2"),
        (b"IQ== 0\nIg== 2\n", "not 0 to 1"),
        (b"IQ== 0\nIQ== 1\n", "one distinct token"),
        (b"", "256 bytes are missing"),
        (bytes(range(256)), "line 1"),
    ],
)
def test_a_damaged_tokenizer_model_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": null}', "version https://git-lfs.github.com/spec/v1"])
def test_a_damaged_tokenizer_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    core = CoreTokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="byte-level"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, glm4run.tokenizer, glm4run.chat_format;"
        "sys.exit(', '.join({'torch', 'transformers', 'jinja2', 'tiktoken'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
