"""Options said once: what a command offers, what a section of YAML may hold, and what is said of a wrong value."""

from dataclasses import MISSING, dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from cats_llm.checkpoint.config import check_sparsity
from cats_llm.cli.signature import Change, with_options
from cats_llm.errors import CatsError
from cats_llm.options import build, from_mapping, option, option_fields


@dataclass(frozen=True)
class Inner:
    name: str = option(help="A name.", positional=True, metavar="NAME")
    column: str = option("text", help="A column.")


@dataclass(frozen=True)
class Config:
    inner: Inner
    rate: float = option(1e-5, help="A rate.", flags=("--rate", "--lr"), minimum=0.0)
    steps: int | None = option(None, help="Steps.", minimum=1, default_text="as many as it takes")
    shares: tuple[float, ...] = option(
        (0.0, 0.5), help="Shares.", parse=lambda text: check_sparsity(float(text)), expected="shares from 0 to 1"
    )
    texts: tuple[str, ...] = option((), help="Texts.", repeated=True)
    kind: str = option("a", help="A kind.", choices=("a", "b"))
    fast: bool = option(False, help="Fast.", panel="speed")
    deep: bool = option(True, help="Deep.")
    computed: list[str] = field(default_factory=list)  # no option


def call(words, command):
    seen = []
    app = typer.Typer()
    app.command()(with_options(command(seen)))
    result = CliRunner().invoke(app, words)
    return seen[0] if seen else None, result


def takes_config(seen):
    def command(config: Config, extra: Annotated[int, typer.Option()] = 3) -> None:
        """Do it."""
        seen.append((config, extra))

    return command


def test_a_command_is_called_with_what_was_typed():
    words = "n --lr 0.5 --steps 2 --shares 0.1,0.2 --texts x --texts y --kind b --fast --no-deep --extra 4 --column c"
    (config, extra), _ = call(words.split(), takes_config)
    assert extra == 4
    assert config == Config(Inner("n", "c"), 0.5, 2, (0.1, 0.2), ("x", "y"), "b", True, False)


def test_defaults_are_those_of_the_dataclass():
    (config, extra), _ = call(["n"], takes_config)
    assert (config, extra) == (Config(Inner("n")), 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["n", "--rate", "-1"], "greater than or equal to 0"),
        (["n", "--steps", "0"], "greater than or equal to 1"),
        (["n", "--shares", "0.5,1.5"], "1.5"),
        (["n", "--shares", "0.5,x"], "shares from 0 to 1"),
        (["n", "--kind", "c"], "one of a, b"),
        ([], "NAME"),
    ],
)
def test_wrong_values_are_wrong_usage(words, said):
    seen, result = call(words, takes_config)
    assert seen is None
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_help_shows_every_option_its_default_and_its_panel():
    _, result = call(["--help"], takes_config)
    text = " ".join(result.output.replace("│", " ").split())
    for name in option_fields(Config):
        assert f"--{name}" in text or name == "name"
    for shown in ("Do it.", "A rate.", "as many as it takes", "0.0,0.5", "speed", "--no-deep"):
        assert shown in text, shown
    assert "--no-fast" not in text


def test_a_command_may_have_other_defaults_and_fewer_options():
    def command(seen):
        def inner(config: Annotated[Inner, Change(defaults={"name": "m", "column": "c"})]) -> None:
            seen.append(config)

        return inner

    seen, _ = call([], command)
    assert seen == Inner("m", "c")

    def fewer(seen):
        def inner(config: Annotated[Inner, Change(without=("column",))]) -> None:
            seen.append(config)

        return inner

    seen, _ = call(["n"], fewer)
    assert seen == Inner("n")
    _, result = call(["n", "--column", "c"], fewer)
    assert result.exit_code == 2


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner("m", "c")


def test_a_dataclass_inside_another_has_the_defaults_that_the_outer_one_gives_it():
    def command(seen):
        def inner(config: Outer) -> None:
            seen.append(config)

        return inner

    assert {name: field.default for name, field in option_fields(Outer).items()} == {"name": "m", "column": "c"}
    assert call([], command)[0] == Outer()
    assert call(["n"], command)[0] == Outer(Inner("n", "c"))
    assert from_mapping(Outer, {"column": "d"}, "x: ") == Outer(Inner("m", "d"))


def test_a_command_may_say_what_an_option_means_in_it():
    def explains(seen):
        def inner(config: Annotated[Inner, Change(helps={"column": "Of a table."})]) -> None:
            """Do it."""

        return inner

    _, result = call(["--help"], explains)
    assert "Of a table." in result.output
    assert "A column." not in result.output


@pytest.mark.parametrize(
    "mark", [Change({"colour": "red"}), Change({}, {"colour": "Red."}), Change(without=["colour"])]
)
def test_a_mark_for_an_option_that_is_not_there_is_a_mistake_of_ours(mark):
    def command(config: Annotated[Inner, mark]) -> None:
        """Nothing."""

    with pytest.raises(TypeError, match="no option colour"):
        with_options(command)


def test_two_options_of_one_name_are_a_mistake_of_ours():
    @dataclass
    class Twice:
        inner: Inner
        name: str = option("", help="")

    with pytest.raises(TypeError, match="two options named name"):
        option_fields(Twice)


def test_a_section_of_yaml_fills_the_dataclass():
    values = {"name": " n ", "rate": 1, "steps": 3, "shares": [0, 0.25], "texts": ["x"], "fast": True}
    config = from_mapping(Config, values, "f.yaml: part.")
    assert config == Config(Inner("n"), 1.0, 3, (0.0, 0.25), ("x",), "a", True)
    assert isinstance(config.rate, float)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "n", "rat": 1}, "f.yaml: part.rat is unknown; did you mean rate?"),
        ({"name": "n", "zzz": 1}, "f.yaml: part.zzz is unknown; known here are column, deep, fast, kind"),
        ({}, "f.yaml: part.name is missing; it should be text."),
        ({"name": 3}, "f.yaml: part.name is '3' and should be text."),
        ({"name": " "}, "f.yaml: part.name is ' ' and should be text."),
        ({"name": "n", "rate": "fast"}, "f.yaml: part.rate is 'fast' and should be a number, 0 or more."),
        ({"name": "n", "rate": -1}, "f.yaml: part.rate is '-1' and should be a number, 0 or more."),
        ({"name": "n", "rate": float("nan")}, "f.yaml: part.rate is 'nan' and should be a number, 0 or more."),
        ({"name": "n", "rate": True}, "f.yaml: part.rate is 'True' and should be a number, 0 or more."),
        ({"name": "n", "steps": 1.5}, "f.yaml: part.steps is '1.5' and should be a whole number, 1 or more."),
        ({"name": "n", "steps": None}, "f.yaml: part.steps is 'None' and should be a whole number, 1 or more."),
        ({"name": "n", "shares": [1]}, "f.yaml: part.shares is '[1]' and should be shares from 0 to 1."),
        ({"name": "n", "shares": [0.5, 0.5]}, "f.yaml: part.shares is '[0.5, 0.5]' and should be shares from 0 to 1."),
        ({"name": "n", "shares": 0.5}, "f.yaml: part.shares is '0.5' and should be shares from 0 to 1."),
        ({"name": "n", "texts": []}, "f.yaml: part.texts is '[]' and should be a list of different values, each text."),
        ({"name": "n", "kind": "c"}, "f.yaml: part.kind is 'c' and should be one of a, b."),
        ({"name": "n", "fast": 1}, "f.yaml: part.fast is '1' and should be true or false."),
        ({"name": "n", 3: 1}, "f.yaml: part.3 is unknown"),
    ],
)
def test_a_wrong_section_is_one_sentence(values, said):
    with pytest.raises(CatsError) as error:
        from_mapping(Config, values, "f.yaml: part.")
    assert str(error.value).startswith(said)


def test_a_section_cannot_set_what_it_may_not():
    with pytest.raises(CatsError, match="column is unknown"):
        from_mapping(Inner, {"name": "n", "column": "c"}, "part.", without=["column"])


def test_a_section_may_hold_what_is_read_elsewhere():
    values = {"name": "n", "value": [1, 2]}
    config = from_mapping(Config, values, "part.", beside=["value"], computed={"computed": [3]})
    assert (config.inner, config.computed) == (Inner("n"), [3])
    with pytest.raises(CatsError, match="valeu is unknown; did you mean value"):
        from_mapping(Inner, {"name": "n", "valeu": 1}, "part.", beside=["value"])


def test_what_a_dataclass_refuses_is_said_with_the_place():
    @dataclass(frozen=True)
    class Even:
        number: int = option(help="")

        def __post_init__(self):
            if self.number % 2:
                raise CatsError("number is odd.")

    with pytest.raises(CatsError, match=r"^f.yaml: part.number is odd.$"):
        from_mapping(Even, {"number": 3}, "f.yaml: part.")


def test_fields_tell_their_types_and_defaults():
    fields = option_fields(Config)
    assert (fields["steps"].type, fields["steps"].several, fields["steps"].default) == (int, False, None)
    assert (fields["shares"].type, fields["shares"].several) == (float, True)
    assert fields["name"].default is MISSING
    assert build(Inner, {"name": "n", "other": 1}) == Inner("n")
