"""`glm4run bench`: how fast does this run here, and how much of the memory's bandwidth is that?"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm4run.cli import options
from glm4run.cli.console import note, stderr_console, talk, write_json
from glm4run.cli.groups import with_groups
from glm4run.errors import UsageError
from glm4run.machine import commit, cpu_name

if TYPE_CHECKING:
    import torch

    from glm4run.benchmark import Bandwidth, CopyProbe, ReadProbe, Row
    from glm4run.generate import LoadedModel

SLOWER = 1.1  # a packed format that takes this much longer than bf16 is worth a warning


@with_groups
def bench(
    *,
    model: Annotated[
        str | None, typer.Argument(help="Folder or name; default: the newest packed model, else the demo")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Prefill these many tokens; a list such as 128,512; 0 for none")
    ] = "128,512",
    generate: Annotated[int, typer.Option(min=0, help="Decode this many tokens; 0 for none")] = 32,
    depth: Annotated[str, typer.Option(help="Tokens already in the context, such as 0,8k")] = "0",
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each test; the median counts")] = 3,
    loading: options.Loading,
    check_plan: Annotated[
        bool,
        typer.Option(
            "--check-plan", help="Compare the memory plan with the measured peak; the bandwidth is then not measured"
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Measures prefill and decoding speed beside the machine's read bandwidth.

    Several backends one after the other: --backend native,torch.
    """
    prompts, depths = _sizes("--prompt", prompt), _sizes("--depth", depth)
    prompts = tuple(size for size in prompts if size)
    if not prompts and not generate:
        raise UsageError("--prompt 0 and --generate 0 leave nothing to measure")
    longest = max(depths) + max((*prompts, generate + 2))
    if check_plan and "," in loading.backend:
        raise UsageError("--check-plan is for one backend", hint="a second one would start from the peak of the first")
    rows: list[Row] = []
    reading = _Reading()
    for name in loading.backend.split(","):
        _, loaded = options.load(model, dataclasses.replace(loading, backend=name), ctx=str(longest))
        if not check_plan:  # what is read through is a GiB, and no part of the plan
            reading.start(loaded.device)
        rows += _measure(loaded, prompts, generate, depths, repeat, reading, compares=not check_plan)
        if check_plan:
            options.say_plan_check(loaded, longest)
        del loaded  # before the next backend loads its own arrangement of the weights
    if as_json:
        write_json(_as_json(rows, reading))
    else:
        _print(rows, reading.kind)


def _sizes(option: str, text: str) -> tuple[int, ...]:
    sizes = []
    for word in text.split(","):
        size = 0 if word.strip() == "0" else options.parse_context(word.strip(), option)
        assert size is not None
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


class _Reading:
    """The probe of the memory's bandwidth, from the first model to the end of the command."""

    def __init__(self) -> None:
        self.probe: ReadProbe | CopyProbe | None = None
        self.bandwidth: Bandwidth | None = None
        self.machine, self.kind = cpu_name(), "read"

    def start(self, device: torch.device) -> None:
        """On `device`, where the model is."""
        if self.probe is not None:
            return
        import torch

        from glm4run.benchmark import CopyProbe, ReadProbe, remember_bandwidth

        if device.type == "cuda":
            self.probe = CopyProbe(device)
            self.bandwidth = self.probe.best()
            self.machine, self.kind = torch.cuda.get_device_name(device), "copy"
            note(f"copy bandwidth of {self.machine}: {self.bandwidth.best_gb_per_s:.0f} GB/s, read and written")
            return
        self.probe = ReadProbe()
        with stderr_console().status("measuring the read bandwidth"):
            self.bandwidth = self.probe.best()
        remember_bandwidth(self.bandwidth)
        threads = f"{self.bandwidth.threads} thread{'s' if self.bandwidth.threads > 1 else ''}"
        note(f"read bandwidth: {self.bandwidth.best_gb_per_s:.1f} GB/s with {threads}")


def _measure(
    loaded: LoadedModel,
    prompts: tuple[int, ...],
    generate: int,
    depths: tuple[int, ...],
    repeat: int,
    reading: _Reading,
    *,
    compares: bool,
) -> list[Row]:
    from glm4run.benchmark import measure, slower_than_bf16

    with stderr_console().status("laying weights out"):
        if not loaded.settle():
            talk("warning: no memory for panels: weights are read from their files", style="yellow", only="warning:")
    with stderr_console().status("measuring") as status:
        rows = list(
            measure(
                loaded,
                prompts=prompts,
                generate=generate,
                depths=depths,
                repeat=repeat,
                probe=reading.probe,
                bandwidth=reading.bandwidth,
                progress=lambda what: status.update(f"measuring {what}"),
            )
        )
        for tokens in (*((1,) if generate else ()), *prompts) if compares else ():
            status.update(f"comparing with bf16 over {tokens} tokens")
            factor = slower_than_bf16(loaded, tokens)
            if factor is not None and factor > SLOWER:
                talk(
                    f"warning: over {tokens} tokens this packed format takes {factor:.1f} times as long as bf16 here "
                    f"({loaded.backend_detail})",
                    style="yellow",
                    only="warning:",
                )
    return rows


def _as_json(rows: list[Row], reading: _Reading) -> dict[str, Any]:
    bandwidth = reading.bandwidth
    return {
        "machine": reading.machine,
        "commit": commit(),
        "read_bandwidth_gb_per_s": None if bandwidth is None else round(bandwidth.best_gb_per_s, 2),
        "rows": [
            {
                "test": row.test,
                "depth": row.depth,
                "tok_per_s": round(row.tok_per_s, 3),
                "bytes_per_token": row.bytes_per_token,
                "gb_per_s": round(row.gb_per_s, 3),
                "fraction_of_bandwidth": _rounded(row.fraction_of_bandwidth),
                "backend": row.backend,
            }
            for row in rows
        ],
    }


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def _print(rows: list[Row], kind: str) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(
        caption="pp: prefill, tg: decoding. Decoding reads every weight once a token; share is of the "
        f"{kind} bandwidth just measured."
    )
    for column in ("test", "depth", "tok/s", "per token", "GB/s", "share", "backend"):
        table.add_column(column, justify="left" if column in ("test", "backend") else "right")
    for row in rows:
        decoding = row.test.startswith("tg")
        table.add_row(
            row.test,
            str(row.depth),
            f"{row.tok_per_s:.2f}",
            decimal(row.bytes_per_token),
            f"{row.gb_per_s:.1f}" if decoding else "",
            f"{row.fraction_of_bandwidth:.0%}" if decoding and row.fraction_of_bandwidth is not None else "",
            row.backend,
        )
    Console(file=sys.stdout, highlight=False).print(table)
