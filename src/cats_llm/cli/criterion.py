"""Options that say by what, and how much, a model is made sparse; and the config that follows from them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cats_llm.calibration.choose import Choice, choose_criterion, choose_sparsity, sparsity_for_bytes
from cats_llm.calibration.criterion import CANDIDATES, PARTS, Criterion
from cats_llm.calibration.distill import Distillation
from cats_llm.calibration.fit import fit
from cats_llm.calibration.scores import SCORES
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.coverage import Coverage
from cats_llm.cli import calibrate
from cats_llm.cli.output import percent, progress_console, show, table
from cats_llm.errors import CatsError
from cats_llm.text import TextSource

AUTO = "auto"
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}


def _criterion(text: str) -> str:
    try:
        return text if text == AUTO else str(Criterion.parse(text))
    except CatsError as error:
        raise typer.BadParameter(str(error)) from error


def _bytes(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([kMG]?B?)", text.strip())
    try:
        if match is None:
            raise ValueError(text)
        return float(match[1]) * _UNITS[match[2].upper()]
    except (ValueError, KeyError) as error:
        raise typer.BadParameter(f"{text!r} is no size; 3.2GB is 3.2e9 bytes.") from error


def _increase(text: str) -> float:
    try:
        value = float(text.rstrip().removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{text!r} is no increase; 5 lets perplexity grow by 5 %.")
    return value


Option = Annotated[
    str,
    typer.Option(
        "--criterion",
        parser=_criterion,
        metavar="SCORE[+PART...]",
        help=f"Which neurons are skipped: {', '.join(SCORES)}; and what is done about the error: {', '.join(PARTS)}. "
        f"{AUTO} takes the best of {len(CANDIDATES)} by measuring. Default: the paper's.",
    ),
]
BytesPerToken = Annotated[
    float | None,
    typer.Option(
        parser=_bytes,
        metavar="SIZE",
        show_default=False,
        help="Instead of --sparsity: as much as makes decoding a token read so many bytes of weights, as 3.2GB.",
    ),
]
MaxPerplexityIncrease = Annotated[
    float | None,
    typer.Option(
        parser=_increase,
        metavar="PERCENT",
        show_default=False,
        help="Instead of --sparsity: as much as perplexity allows, on the last eighth of the text.",
    ),
]
DISTILL_STEPS = Distillation().steps
DistillSteps = Annotated[int, typer.Option(min=1, help="Batches that the part distill learns the compensation from.")]


@dataclass(frozen=True)
class Asked:
    """What the options asked for.

    Attributes:
        criterion: the name of one, or auto.
        sparsity, size, increase: one of them: k, bytes a token, or a relative increase of perplexity.
        distill_steps: see `Distillation`.
        coverage: which tokens are sparse.
    """

    criterion: str
    sparsity: float | None
    size: float | None
    increase: float | None
    distill_steps: int
    coverage: Coverage

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.sparsity, self.size, self.increase)) != 1:
            raise typer.BadParameter("pass one of --sparsity, --bytes-per-token and --max-perplexity-increase.")
        if self.criterion == AUTO and self.increase is not None:
            raise typer.BadParameter(
                f"--criterion {AUTO} compares criteria at one sparsity; pass --sparsity or --bytes-per-token with it, "
                "or name a criterion."
            )

    @property
    def profile_is_enough(self) -> bool:
        """No text is needed if there is a profile."""
        return self.criterion == str(Criterion()) and self.increase is None

    def gate_sparsity(self, skeleton: Any) -> float | None:
        """The sparsity, unless it has to be found by measuring."""
        return self.sparsity if self.size is None else sparsity_for_bytes(skeleton, self.size)

    def config(
        self, model: Any, tokenizer: Any, data: TextSource, drawing: Mapping[str, Any]
    ) -> tuple[CatsConfig, Choice | None]:
        """Calibrate on a text source; ``drawing`` goes to `calibrate.load_batches`."""
        if self.profile_is_enough:
            sparsity = self.gate_sparsity(model)
            assert sparsity is not None
            profile = calibrate.run(model, tokenizer, data, **drawing)
            return profile.config(sparsity).with_coverage(self.coverage), None
        batches = calibrate.load_batches(model, tokenizer, data, **drawing)
        settings: dict[str, Any] = {
            "data": data.path,
            "coverage": self.coverage,
            "distillation": Distillation(self.distill_steps),
        }
        with progress_console.status("calibrating") as status:
            settings["notify"] = status.update
            sparsity = self.gate_sparsity(model)
            if self.criterion == AUTO:
                assert sparsity is not None
                choice = choose_criterion(model, batches, sparsity, **settings)
                return choice.config, choice
            criterion = Criterion.parse(self.criterion)
            if self.increase is not None:
                choice = choose_sparsity(model, batches, criterion, self.increase, **settings)
                return choice.config, choice
            assert sparsity is not None
            return fit(model, batches, sparsity, criterion, **settings), None


def show_choice(choice: Choice, by_divergence: bool) -> None:
    """Print what was measured."""
    rows = table("tried", "KL to dense, text held back" if by_divergence else "perplexity, text held back")
    for name, value in choice.measured.items():
        rows.add_row(name, f"{value:.4f}" if by_divergence else f"{'+' if value >= 0 else ''}{percent(value)}")
    show(rows)
