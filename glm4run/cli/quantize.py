"""`glm4run quantize`: a checkpoint to a packed folder, and the card of what that cost."""

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
    method: Annotated[
        str,
        typer.Option(
            help="rtn: round to nearest, the fastest; mse: search scales; hqq: half-quadratic; calibrated: awq: "
            "activation-aware scaling; gptq: second-order rounding, the best and the slowest"
        ),
    ] = "mse",
    head_bits: Annotated[
        int, typer.Option("--lm-head-bits", help="8; 4 is faster and loses more; 16 keeps the output head dense")
    ] = 8,
    recipe: Annotated[
        str | None, typer.Option(help="Instead of bits, groups and head: int4-g32, int4-careful, int8-g64, a TOML file")
    ] = None,
    target_bpw: Annotated[
        float | None, typer.Option(help="Choose bits and groups per linear for so many bits per weight of the layers")
    ] = None,
    target_gib: Annotated[float | None, typer.Option(help="The same, for so many GiB of file")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A UTF-8 text for the calibrated methods; default: a built-in one")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How much of it is used")] = 32768,
    device: Annotated[str, typer.Option(help="Where calibrated methods compute: cpu, cuda or cuda:N")] = "cpu",
    report: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to measure perplexity and KL divergence against the source on")
    ] = None,
    report_windows: Annotated[int, typer.Option(help="Windows of 512 tokens of it")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists")] = False,
) -> None:
    """Pack the weights of SOURCE into int4 or int8, tensor by tensor; the folder appears when it is complete.

    A run that was interrupted goes on where it was when the same command is given again.
    """
    from glm4run_quantize import quantize_checkpoint
    from glm4run_quantize.measured import Measure

    if not source.is_dir():
        raise UsageError(f"no folder {source}", hint="give the folder that holds config.json and the safetensors files")
    if report is not None and not report.is_file():
        raise UsageError(f"no file {report}", hint="--report takes a text to measure on")
    if report_windows < 1:
        raise UsageError(f"{report_windows} windows to report on", hint="1 at least")
    plain = recipe is None and target_bpw is None and target_gib is None
    suffix = f"int{bits}" if plain else "packed"
    target = output if output is not None else source.resolve().with_name(f"{source.resolve().name}-{suffix}")
    what = f"quantizing to {bits} bits" if plain else "quantizing"
    with byte_progress(what) as progress:
        result = quantize_checkpoint(
            source,
            target,
            bits=bits,
            group_size=group_size,
            method=method,
            head_bits=head_bits,
            recipe=recipe,
            target_bpw=target_bpw,
            target_gib=target_gib,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            device=device,
            report=None if report is None else Measure(report, windows=report_windows),
            overwrite=overwrite,
            progress=progress,
        )
    for notice in result.notices:
        talk(f"notice: {notice}", style="yellow", only="notice:")
    _print_report(result)
    note(f"next: glm4run chat {target}")


def _print_report(report: QuantizeReport) -> None:
    from rich.filesize import decimal
    from rich.table import Table

    from glm4run.model_folders import describe_report
    from glm4run_quantize.report import bits_per_weight, sqnr_db

    table = Table("linear", "scheme", "bits/weight", "SQNR dB", title=f"{report.recipe}, {report.method}")
    for kind, tensors in report.by_kind().items():
        schemes = sorted({tensor.scheme.describe() for tensor in tensors})
        table.add_row(kind, ", ".join(schemes), f"{bits_per_weight(tensors):.3f}", f"{sqnr_db(tensors):.1f}")
    stderr_console().print(table)
    worst = ", ".join(f"{t.name} ({t.sqnr_db:.1f} dB)" for t in report.worst(3))
    talk(f"lost most: {worst}")
    if report.held_out is not None:
        rounded = sum(t.kept == "rtn" for t in report.tensors)
        talk(
            f"held-out text: KL divergence {report.held_out.kl_mean:.4g}, by rounding to nearest "
            f"{report.held_out.kl_mean_rtn:.4g}; {rounded} linears were better rounded, and are"
        )
    measured = describe_report(report.as_json())
    if measured is not None:
        talk(measured)
    talk(
        f"{report.output}: {decimal(report.total_bytes)}, {report.bits_per_weight:.3f} bits per packed weight, "
        f"{report.seconds:.1f} s"
    )
