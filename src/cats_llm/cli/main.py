"""Entry point of `cats`: the commands, and how errors end."""

import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console

from cats_llm.cli import (
    bench,
    calibrate,
    demo,
    env,
    evaluate,
    finetune,
    generate,
    inspect,
    report,
    reproduce,
    sparsify,
    tune,
)
from cats_llm.errors import CatsError

app = typer.Typer(
    name="cats",
    help="Make a language model skip most of its MLP weights, without training (CATS).",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (calibrate, sparsify, finetune, inspect, generate, evaluate, report, reproduce, bench, tune, env, demo):
    module.add_to(app)

# what a wrong command line raises; typer exports only its subclass
_UsageError: Any = typer.BadParameter.__mro__[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="cats", standalone_mode=False)
    except _UsageError as error:
        return _fail(error.format_message(), 2)
    except CatsError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; no output was written.", 130)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {message}", markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
