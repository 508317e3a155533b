"""How long reading a prompt takes: the work of its tokens, and the speeds that were measured before.

The linears cost every token the same; attention costs a token the more, the more tokens stand before it. Each has a
speed of its own, and both are fitted to what this session has measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm4run.config import ModelConfig

# A multiply-add of attention beside one of a packed linear, until enough is measured to tell (docs/performance.md:
# 118 GFLOP/s beside 620). Without it a first prediction of a long prompt would come out far too short.
ATTENTION_COST = 5.0
GUESS_WEIGHT = 0.05  # of that, beside one measurement
FADING = 0.7  # of older measurements, at each new one


@dataclass(frozen=True)
class Work:
    """Floating point operations of reading tokens."""

    linears: float
    attention: float


def reading_work(config: ModelConfig, tokens: int, before: int = 0) -> Work:
    """Of `tokens` that come behind `before` others.

    Two operations for each weight of the layers' linears; causal attention has 4 L H D for each pair of positions, so
    2 L H D (n^2 - m^2) from position m to n.
    """
    query = config.num_attention_heads * config.head_dim
    kv = 2 * config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * query + kv + 3 * config.intermediate_size)
    end = before + tokens
    return Work(
        2.0 * config.num_hidden_layers * layer * tokens,
        2.0 * config.num_hidden_layers * query * (end * end - before * before),
    )


class ReadingSpeed:
    """Seconds an operation, of linears and of attention, from reading that was timed.

    Least squares of relative errors in two unknowns, newer measurements weighing more; the guess `ATTENTION_COST` is
    one weak equation more, so that a single measurement is enough to predict from.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._moments = [0.0] * 5  # sums of ll, la, aa, l, a: operations by the seconds that were measured
        self._scale = 0.0  # linears by seconds of the last measurement, for the guess

    def note(self, tokens: int, before: int, seconds: float) -> None:
        """`tokens` behind `before` others took so long."""
        if tokens <= 0 or seconds <= 0:
            return
        work = reading_work(self._config, tokens, before)
        linears, attention = work.linears / seconds, work.attention / seconds
        new = (linears * linears, linears * attention, attention * attention, linears, attention)
        self._moments = [FADING * old + more for old, more in zip(self._moments, new, strict=True)]
        self._scale = linears

    def seconds(self, tokens: int, before: int = 0) -> float | None:
        """The prediction; None before anything has been measured."""
        if not self._scale:
            return None
        per_linear, per_attention = self._fit()
        work = reading_work(self._config, tokens, before)
        return work.linears * per_linear + work.attention * per_attention

    def _fit(self) -> tuple[float, float]:
        """Seconds an operation, of linears and of attention."""
        ll, la, aa, linears, attention = self._moments
        cost = ATTENTION_COST
        weight = GUESS_WEIGHT * self._scale**2  # of the equation: per_attention - cost * per_linear = 0
        with_guess = ll + weight * cost**2, la - weight * cost, aa + weight
        determinant = with_guess[0] * with_guess[2] - with_guess[1] ** 2
        per_linear = (with_guess[2] * linears - with_guess[1] * attention) / determinant
        per_attention = (with_guess[0] * attention - with_guess[1] * linears) / determinant
        if per_linear > 0 and per_attention > 0:
            return per_linear, per_attention
        # Measurements that contradict each other: only the guess tells the two apart.
        per_linear = (linears + cost * attention) / (ll + 2 * cost * la + cost**2 * aa)
        return per_linear, cost * per_linear
