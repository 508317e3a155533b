"""The published figures: logs of llama.cpp and ollama to 0.01 MiB, GLM-4-9B's own table within 5 %, slopes within 1 %.

Source of the rows: the addresses in docs/vram.md. Where the shared table is at hand, its figures are the ones compared.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from glm4run.cards import load_cards
from glm4run.config import ModelConfig
from glm4run.memory import GIB, MIB
from glm4run.vram import runtimes
from glm4run.vram.hf_remote import replay_peak_bytes
from glm4run.vram.runtimes import GGML_BITS, GGML_KV_BYTES, kv_bytes

CHAT = load_cards()["glm-4-9b-chat"].config
# GLM-4-32B-0414: 61 layers, 2 KV heads of 128, hidden 6144. Source: its published config.
LARGE = dataclasses.replace(
    CHAT, hidden_size=6144, num_hidden_layers=61, num_attention_heads=48, intermediate_size=23040
)
QWEN = ModelConfig("glm", 3584, 28, 28, 4, 128, 18944, 152064, 32768, 1e-6)  # Qwen2.5-7B, whose slope is published

OFFICIAL = {  # id: tokens, bits, nvidia-smi's peak in MiB. Source: GLM-4's basic_demo table, A100-80GB
    "G1": (1000, 16, 19047),
    "G2": (8000, 16, 20629),
    "G3": (32000, 16, 27779),
    "G4": (128000, 16, 57379),
    "G5": (1000, 4, 8251),
    "G6": (8000, 4, 9613),
    "G7": (32000, 4, 16065),
}
LOGGED = {  # id: our figure in bytes, the log's in MiB
    "L1": (runtimes.llama_cpp_gpu_bytes(CHAT, "Q4_K_M"), 5622.60),
    "L2": (runtimes.llama_cpp_table_bytes(CHAT, "Q4_K_M", head=False), 333.00),
    "L3": (runtimes.llama_cpp_gpu_bytes(CHAT, "Q5_K_S", 18), 2468.01),
    "L4": (
        runtimes.llama_cpp_gpu_bytes(CHAT, "Q5_K_S") + runtimes.llama_cpp_table_bytes(CHAT, "Q5_K_S", head=False),
        6377.09,
    ),
    "L5": (kv_bytes(CHAT, 1024, GGML_KV_BYTES[16]), 40.00),
    "L6": (runtimes.llama_cpp_compute_bytes(CHAT, head_on_host="Q5_K_S"), 789.62),
    "L8": (kv_bytes(LARGE, 32768, GGML_KV_BYTES[16]), 1952.00),
    "L9": (kv_bytes(LARGE, 5120, GGML_KV_BYTES[8]), 162.03),
    "L10": (runtimes.llama_cpp_compute_bytes(LARGE), 308.00),
}


@pytest.mark.parametrize("row", sorted(LOGGED))
def test_logs_of_llama_cpp(row: str) -> None:
    ours, logged = LOGGED[row]
    assert abs(ours / MIB - logged) <= 0.01


@pytest.mark.parametrize("row", sorted(OFFICIAL))
def test_official_table_of_the_remote_code(row: str) -> None:
    tokens, bits, measured = OFFICIAL[row]
    assert replay_peak_bytes(CHAT, tokens, bits=bits) / MIB == pytest.approx(measured, rel=0.05)


def test_figures_are_those_of_the_shared_table(shared: Path) -> None:
    with (shared / "data" / "vram" / "vram_truth.csv").open(encoding="utf-8", newline="") as file:
        table = {row["id"]: row for row in csv.DictReader(file)}
    for name, (tokens, _, measured) in OFFICIAL.items():
        assert (int(table[name]["context_tokens"]), float(table[name]["measured_mib"])) == (tokens, measured)
    for name, (_, logged) in LOGGED.items():
        assert float(table[name]["measured_mib"]) == logged


def test_slope_of_transformers_with_a_fused_attention() -> None:
    """Qwen2.5-7B, 6144 to 30720 tokens: 15.38 to 19.97 GB. Source: its speed_benchmark page (rows X3 and X5)."""
    measured = (19.97 - 15.38) * GIB / (30720 - 6144)
    assert runtimes.hf_bytes_per_token(QWEN) == pytest.approx(measured, rel=0.01)


def test_replay_repeats_exactly() -> None:
    assert replay_peak_bytes(CHAT, 8000) == replay_peak_bytes(CHAT, 8000)


def test_fallback_of_13696_columns() -> None:
    """13696 is no multiple of 256: the K types of ffn_down fall back, which makes Q4_K_M 5.31 bits a weight."""
    gpu, table = LOGGED["L1"][0], LOGGED["L2"][0]
    assert round((gpu + table) * 8 / CHAT.num_parameters, 2) == 5.31
    even = dataclasses.replace(CHAT, intermediate_size=13824)
    assert runtimes._q4_k_m_down(even, 0) == "Q6_K"
    assert GGML_BITS[runtimes._q4_k_m_down(CHAT, 0)] == 8.5


def test_vllm_takes_its_share_and_says_whether_the_context_fits() -> None:
    """A 24 GB card at 0.9 held 53,376 tokens of bf16 (V1): the order of the answer, not its last digit."""
    usable = int(23.52 * GIB)
    assert 0 < runtimes.vllm_kv_tokens(CHAT, 16, 16, usable) < 131072
    for context_len, word in ((1024, "holds"), (131072, "too small")):
        row = runtimes.estimate("vllm", CHAT, context_len, bits=16, device_bytes=usable)
        assert row.peak_bytes == int(0.9 * usable)
        assert word in row.note
