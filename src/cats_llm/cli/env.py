"""`cats env`: what this installation is and which kernels it uses."""

import typer

from cats_llm.benchmark import machine
from cats_llm.cli import options
from cats_llm.cli.output import show, table
from cats_llm.outputs import check_output, write_json


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="env")(command)


def command(json: options.JsonFile = None, force: options.Force = False) -> None:
    """Show versions, the machine, and the kernels and instruction set in use; attach it to a bug report.

    CATS_CPU_ISA=avx2 (or another name of `isas`) overrides the instruction set.

    Example: **cats env**
    """
    if json is not None:
        check_output(json, force)
    facts = machine.facts()
    if json is not None:
        write_json(json, facts, force)
    rows = table("what", "value")
    for name, value in facts.items():
        pairs = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else value
        rows.add_row(name, ", ".join(map(str, pairs)) if isinstance(pairs, list) else str(pairs))
    show(rows)
