"""Commands whose options are the fields of dataclasses (`cats_llm.options`)."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, is_dataclass, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from cats_llm.errors import CatsError
from cats_llm.options import OptionField, build, option_fields


class Defaults(dict[str, Any]):
    """Other defaults in one command: ``source: Annotated[ModelSource, Defaults(dtype="float32")]``."""


class Help(dict[str, str]):
    """What options mean in one command: ``config: Annotated[FinetuneConfig, Help(dtype="Of the base model.")]``."""


class Without:
    """Options that one command does not have: ``source: Annotated[ModelSource, Without("revision")]``."""

    def __init__(self, *names: str) -> None:
        self.names = names


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its parameters that are dataclasses.

    The command itself is called with the dataclasses, built from what the user typed.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    configs: dict[str, tuple[type, dict[str, OptionField]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        config, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not (is_dataclass(config) and isinstance(config, type)):
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        defaults = {k: v for mark in marks if isinstance(mark, Defaults) for k, v in mark.items()}
        left_out = {name for mark in marks if isinstance(mark, Without) for name in mark.names}
        fields = {name: field for name, field in option_fields(config).items() if name not in left_out}
        helps = {k: v for mark in marks if isinstance(mark, Help) for k, v in mark.items()}
        unknown = (defaults.keys() | left_out | helps.keys()) - option_fields(config).keys()
        if unknown:
            raise TypeError(f"{config.__name__} has no option {', '.join(sorted(unknown))}")
        fields |= {n: replace(fields[n], option=replace(fields[n].option, help=text)) for n, text in helps.items()}
        configs[parameter.name] = (config, fields)
        parameters += [_parameter(field, defaults.get(name, field.default)) for name, field in fields.items()]

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        arguments: dict[str, Any] = {}
        for name, (config, fields) in configs.items():
            try:
                arguments[name] = build(config, {n: _of_typer(values.pop(n), field) for n, field in fields.items()})
            except CatsError as error:
                raise typer.BadParameter(str(error)) from error
        command(**arguments, **values)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def _of_typer(value: Any, field: OptionField) -> Any:
    """Several values, which typer gives as a list or as None, as the dataclass holds them."""
    if field.several and field.option.repeated:
        return field.default if value is None else tuple(value)
    return value


def _parameter(field: OptionField, default: Any) -> inspect.Parameter:
    """The field as typer wants a parameter of a command."""
    about = field.option
    kind: Any = field.type
    more: dict[str, Any] = {"help": about.help, "metavar": about.metavar, "rich_help_panel": about.panel}
    if about.parse is not None or about.choices is not None or (field.several and not about.repeated):
        more["parser"] = _parser(field)
        kind = str
        more["metavar"] = about.metavar or field.name.upper()
    elif kind in (int, float):
        more |= {"min": about.minimum, "max": about.maximum}
    if field.several and about.repeated:
        kind = list[kind]
    if default is None or default == ():
        default, kind, more["show_default"] = None, kind | None, about.default_text or False
    elif default is MISSING:
        more["show_default"] = False
    elif about.default_text is not None:
        more["show_default"] = about.default_text
    if field.several and isinstance(default, tuple):
        default = list(default) if about.repeated else ",".join(str(member) for member in default)
    make: Any = typer.Argument if about.positional else typer.Option
    flags = about.flags or ((f"--{field.name.replace('_', '-')}",) if kind is bool and default is False else ())
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, make(*flags, **more)],
    )


def _parser(field: OptionField) -> Callable[[Any], Any]:
    def parse(text: Any) -> Any:
        if not isinstance(text, str):  # a default
            return text
        try:
            if field.several and not field.option.repeated:
                return tuple(field.parse(part.strip()) for part in text.split(","))
            return field.parse(text)
        except CatsError as error:
            raise typer.BadParameter(str(error)) from error
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is given and should be {field.expected}.") from error

    return parse
