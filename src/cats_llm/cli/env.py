"""`cats env`: what this installation is and which kernels it uses."""

from cats_llm.benchmark import machine
from cats_llm.cli.output import Results, show, table


def command(results: Results) -> None:
    """Show versions, the machine, and the kernels and instruction set in use; attach it to a bug report.

    CATS_CPU_ISA=avx2 (or another name of `isas`) overrides the instruction set.

    Example: **cats env**
    """
    results.check()
    facts = machine.facts()
    results.write(facts)
    rows = table("what", "value")
    for name, value in facts.items():
        pairs = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else value
        rows.add_row(name, ", ".join(map(str, pairs)) if isinstance(pairs, list) else str(pairs))
    show(rows)
