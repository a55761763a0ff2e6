"""Entry point of `cats`: the commands, and how errors end."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from cats_llm.cli import (
    bench,
    calibrate,
    demo,
    densify,
    env,
    evaluate,
    finetune,
    generate,
    inspect,
    report,
    reproduce,
    sparsify,
    streams,
    tune,
)
from cats_llm.cli.signature import with_options
from cats_llm.errors import CatsError, first_line
from cats_llm.evaluation.batch import out_of_memory

app = typer.Typer(
    name="cats",
    help="Make a language model skip most of its MLP weights, without training (CATS).",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "calibrate": calibrate.command,
    "sparsify": sparsify.command,
    "densify": densify.command,
    "finetune": finetune.command,
    "inspect": inspect.command,
    "generate": generate.command,
    "eval": evaluate.command,
    "report": report.command,
    "reproduce": reproduce.command,
    "tune": tune.command,
    "env": env.command,
    "demo": demo.command,
}
for name, command in COMMANDS.items():
    app.command(name=name)(with_options(command))
bench.add_to(app)

# what a wrong command line raises; typer exports only a subclass of it
_UsageError: Any = typer.BadParameter.__base__

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 not read."""
    streams.print_any_text()
    with streams.show_log():
        code = _run(arguments)
    return streams.finish(code)


def _run(arguments: Sequence[str] | None) -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="cats", standalone_mode=False)
    except _UsageError as error:
        return _fail(error.format_message(), 2)
    except CatsError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except SystemExit as error:
        # how typer and rich end a command whose output nobody reads
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return streams.CLOSED_PIPE
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:  # a fault of ours, to be seen whole
            raise
        return _fail(sentence, 1)
    if code == _INTERRUPTED:  # newer versions of typer return it
        return _fail("interrupted; no output was written.", code)
    return code if isinstance(code, int) else 0


def _sentence(error: Exception) -> str | None:
    """What the machine, and not the program, is at fault for."""
    if out_of_memory(error):
        return (
            f"out of memory ({first_line(error)}); try a smaller --batch-size or --seq-length, --dtype bfloat16, or "
            "--device auto, where the command has them."
        )
    if isinstance(error, OSError) and error.strerror:
        place = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        return f"could not read or write{place}: {error.strerror}."
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return f"{error.object!r} is no UTF-8 text; rename or convert it."
    return None


def _fail(message: str, code: int) -> int:
    streams.print_error(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
