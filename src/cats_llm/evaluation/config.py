"""What an evaluation compares and measures: the options of `cats eval`."""

from dataclasses import dataclass
from pathlib import Path

from cats_llm.checkpoint.config import parse_sparsity
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError, UsageError
from cats_llm.evaluation.methods import METHODS
from cats_llm.evaluation.task import TaskOptions
from cats_llm.evaluation.tasks import TASK_SETS
from cats_llm.loading import ModelSource
from cats_llm.options import Panel, option
from cats_llm.text import RowFormat, same_text


@dataclass(frozen=True)
class EvaluationConfig:
    """Variants of a model, the texts and tasks to measure them on, and how.

    Raises:
        CatsError: there is nothing to measure, or thresholds are to come from two places.
    """

    panel = Panel.SPARSITY

    source: ModelSource
    text: tuple[str, ...] = option(
        (),
        help="Measure perplexity on a .txt, .jsonl or .parquet file, a folder, or a hub dataset. Repeatable.",
        metavar="FILE|DATASET",
        repeated=True,
        panel=Panel.DATA,
    )
    tasks: tuple[str, ...] = option(
        (), help=f"Tasks of lm-eval, YAML files, or sets: {', '.join(TASK_SETS)}.", metavar="NAME,...", panel=Panel.DATA
    )
    data_dir: Path | None = option(
        None, help="Folder with the tasks' data, where there is no hub: TASK.jsonl.", panel=Panel.DATA
    )
    rows: RowFormat = RowFormat(split="test")
    sparsity: tuple[float, ...] = option(
        (),
        help="Shares to skip, as 0,0.5,0.7,0.9: of neurons, or of inputs for methods that skip those; 0 is dense.",
        metavar="K,...",
        parse=parse_sparsity,
    )
    method: tuple[str, ...] = option(
        ("cats",), help=f"Of {', '.join(METHODS)}; or criteria, as cats sparsify takes them.", metavar="NAME,..."
    )
    profile: Path | None = option(None, help="From cats calibrate, for the thresholds.")
    calibration: str | None = option(None, help="Text to calibrate on, if there is no profile.", metavar="FILE|DATASET")
    equal_bytes: bool = option(
        False, help="Let methods that skip inputs (teal, teal-greedy, wina) skip as many weights as CATS at the same K."
    )
    checkpoint: tuple[str, ...] = option(
        (), help="A saved checkpoint to evaluate beside MODEL. Repeatable.", metavar="FOLDER", repeated=True
    )
    against: str | None = option(
        None, help="The dense model to compare with. Default: MODEL's own weights without thresholds.", metavar="BASE"
    )
    coverage: TokenPolicy = TokenPolicy()
    task_options: TaskOptions = TaskOptions()
    samples: int | None = option(
        None, help="At most so many windows of a text. Default: all.", minimum=1, panel=Panel.MEASURING
    )
    seq_length: int = option(1024, help="Tokens a sequence.", minimum=2, panel=Panel.MEASURING)
    stride: int | None = option(
        None,
        help="Tokens from the start of a window of text to that of the next. Default: no overlap.",
        minimum=1,
        panel=Panel.MEASURING,
    )
    batch_size: int = option(4, help="Sequences computed at a time.", minimum=1, panel=Panel.MEASURING)
    seed: int | None = option(
        None, help="Draw the sequences in this random order. Default: in the order of the text.", panel=Panel.MEASURING
    )
    cache: Path | None = option(
        None,
        help="Where measurements are kept, so that a stopped run goes on. Default: in CATS_CACHE or ~/.cache.",
        panel=Panel.OUTPUT,
    )
    no_cache: bool = option(False, help="Measure everything again, and keep nothing.", panel=Panel.OUTPUT)

    def __post_init__(self) -> None:
        if not self.text and not self.tasks:
            raise UsageError("there is nothing to measure: pass --text, --tasks or both.")
        if self.profile is not None and self.calibration is not None:
            raise UsageError("pass either --profile or --calibration, not both.")

    def check_held_out(self, calibration: str | None) -> None:
        """Refuse to report results on the text that thresholds were chosen on.

        Raises:
            CatsError: one of the texts is it.
        """
        for text in self.text:
            same = calibration is not None and same_text(calibration, text)
            if same and (Path(text).exists() or self.rows.split == "train"):
                raise CatsError(
                    f"{text} is the text that the thresholds come from; results on it would be too good, so evaluate "
                    "on another one."
                )

    def text_names(self) -> dict[str, str]:
        """The paths by the names of their tasks: the file's without its ending, each its own."""
        names: dict[str, str] = {}
        for text in self.text:
            name = Path(text).stem or text
            while name in names:
                name += "'"
            names[name] = text
        return names
