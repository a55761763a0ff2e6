"""Commands whose options are the fields of dataclasses (`cats_llm.options`)."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, is_dataclass, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from cats_llm.errors import CatsError, UsageError
from cats_llm.options import OptionField, build, option_fields


@dataclass(frozen=True)
class Change:
    """What differs in one command: ``source: Annotated[ModelSource, Change(defaults={"dtype": "float32"})]``.

    Attributes:
        defaults: other defaults, by option.
        helps: what options mean here.
        without: options that the command does not have.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    helps: Mapping[str, str] = field(default_factory=dict)
    without: Collection[str] = ()


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its parameters that are dataclasses.

    The command itself is called with the dataclasses, built from what the user typed.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    configs: dict[str, tuple[type, dict[str, OptionField]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        config, change = get_args(hint) if get_origin(hint) is Annotated else (hint, Change())
        if not (is_dataclass(config) and isinstance(config, type)):
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        fields = option_fields(config)
        unknown = {*change.defaults, *change.helps, *change.without} - fields.keys()
        if unknown:
            raise TypeError(f"{config.__name__} has no option {', '.join(sorted(unknown))}")
        for name, text in change.helps.items():
            fields[name] = replace(fields[name], option=replace(fields[name].option, help=text))
        fields = {name: field for name, field in fields.items() if name not in change.without}
        configs[parameter.name] = (config, fields)
        parameters += [_parameter(field, change.defaults.get(name, field.default)) for name, field in fields.items()]

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        arguments: dict[str, Any] = {}
        for name, (config, fields) in configs.items():
            try:
                arguments[name] = build(config, {n: _of_typer(values.pop(n), field) for n, field in fields.items()})
            except UsageError as error:
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
