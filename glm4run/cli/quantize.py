"""`glm4run quantize`: a checkpoint to a packed folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glm4run.cli.console import byte_progress, note, stderr_console, talk
from glm4run.errors import UsageError

if TYPE_CHECKING:
    from glm4run_quantize.report import QuantizeReport


def quantize(
    source: Annotated[Path, typer.Argument(help="The folder of an unpacked checkpoint, in any layout")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The new folder; default: SOURCE-int4 beside SOURCE")
    ] = None,
    bits: Annotated[int, typer.Option(help="4 or 8 bits per weight")] = 4,
    group_size: Annotated[
        int | None, typer.Option(help="32, 64 or 128 for every linear; default: the recipe of the bits")
    ] = None,
    method: Annotated[str, typer.Option(help="How weights are rounded: rtn, round to nearest")] = "rtn",
    head_bits: Annotated[
        int, typer.Option("--lm-head-bits", help="8; 4 is faster and loses more; 16 keeps the output head dense")
    ] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists")] = False,
) -> None:
    """Pack the weights of SOURCE into int4 or int8, tensor by tensor; the folder appears when it is complete."""
    from glm4run_quantize import quantize_checkpoint

    if not source.is_dir():
        raise UsageError(f"no folder {source}", hint="give the folder that holds config.json and the safetensors files")
    target = output if output is not None else source.resolve().with_name(f"{source.resolve().name}-int{bits}")
    with byte_progress(f"quantizing to {bits} bits") as progress:
        report = quantize_checkpoint(
            source,
            target,
            bits=bits,
            group_size=group_size,
            method=method,
            head_bits=head_bits,
            overwrite=overwrite,
            progress=progress,
        )
    for notice in report.notices:
        talk(f"notice: {notice}", style="yellow", only="notice:")
    _print_report(report)
    note(f"next: glm4run chat {target}")


def _print_report(report: QuantizeReport) -> None:
    from rich.filesize import decimal
    from rich.table import Table

    from glm4run_quantize.report import sqnr_db

    table = Table("linear", "scheme", "bits/weight", "SQNR dB", title=f"{report.recipe}, {report.method}")
    for kind, tensors in report.by_kind().items():
        first = tensors[0]
        table.add_row(kind, first.scheme.describe(), f"{first.bits_per_weight:.3f}", f"{sqnr_db(tensors):.1f}")
    stderr_console().print(table)
    talk(
        f"{report.output}: {decimal(report.total_bytes)}, {report.bits_per_weight:.3f} bits per packed weight, "
        f"{report.seconds:.1f} s"
    )
