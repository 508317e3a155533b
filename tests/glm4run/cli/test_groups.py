"""Options that belong together are spelled once and read from any place of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from glm4run.cli.groups import with_groups


@dataclass(frozen=True, kw_only=True)
class Size:
    width: Annotated[int, typer.Option(min=1, help="How wide")] = 3
    unit: Annotated[str | None, typer.Option("-u", "--unit")] = None


@with_groups
def draw(
    *,
    name: Annotated[str, typer.Argument()],
    size: Size,
    loud: Annotated[bool, typer.Option("--loud")] = False,
) -> None:
    """Draws."""
    typer.echo(f"{name} {size} {loud}")


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(draw)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["x"], f"x {Size()} False"),
        (["--width", "5", "x", "--loud"], f"x {Size(width=5)} True"),
        (["x", "-u", "cm"], f"x {Size(unit='cm')} False"),
    ],
)
def test_fields_are_options(arguments: list[str], printed: str) -> None:
    assert run(*arguments) == (0, printed + "\n")


def test_a_field_is_checked_and_described_as_a_parameter_is() -> None:
    code, text = run("x", "--width", "0")
    assert code == 2
    assert "--width" in text
    code, text = run("--help")
    assert code == 0
    assert "How wide" in text
    assert "--size" not in text
