"""A CATS checkpoint from a dense one, as `cats sparsify` makes it: from names and options to the written folder."""

from dataclasses import dataclass
from pathlib import Path

from cats_llm.calibration.criteria.search import Choice, Notify, find_config
from cats_llm.calibration.criteria.target import SparsityTarget
from cats_llm.calibration.profile import Profile
from cats_llm.calibration.sampling import Sampling
from cats_llm.checkpoint.tensors import check_tensors
from cats_llm.checkpoint.write import Written, check_source, write_checkpoint
from cats_llm.conversion import as_folder
from cats_llm.errors import UsageError
from cats_llm.loading import ModelSource
from cats_llm.model.architecture import check_reads_text
from cats_llm.model.structure import find_gated_mlps
from cats_llm.model.weight_traffic import Sparsity, sparsity_of
from cats_llm.options import Panel, option
from cats_llm.progress import Track, untracked
from cats_llm.text import RowFormat, TextSource


@dataclass(frozen=True)
class SparsifyConfig:
    """Which model is made how sparse, and what it is calibrated on.

    Raises:
        CatsError: thresholds are to come from nowhere, or from two places.
    """

    source: ModelSource
    target: SparsityTarget
    profile: Path | None = option(None, help="From cats calibrate; then no text is needed.", panel=Panel.SPARSITY)
    data: str | None = option(
        None, help="Text to calibrate on, if there is no profile.", metavar="FILE|DATASET", panel=Panel.DATA
    )
    rows: RowFormat = RowFormat()
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        if (self.profile is None) == (self.data is None):
            raise UsageError("pass either --profile, or --data to calibrate on.")


@dataclass(frozen=True)
class SparsifiedModel:
    """What was written.

    Attributes:
        choice: the config, and what was measured to choose it.
        sparsity: that the config gave on the calibration tokens.
        written: the checkpoint's files.
        unused: weights that were copied, though no part of the model that config.json describes.
    """

    choice: Choice
    sparsity: Sparsity
    written: Written
    unused: list[str]


def sparsify_model(
    config: SparsifyConfig,
    out: Path,
    *,
    force: bool = False,
    notify: Notify | None = None,
    track: Track = untracked,
) -> SparsifiedModel:
    """Calibrate a model, unless a profile says enough, and write its files with a CATS config.

    Args:
        config: what is made of what.
        out: the folder to write.
        force: replace it, if it is there.
        notify: told in a few words what is being done, where that is more than one pass over the text.
        track: shows how much of that pass is done.

    Raises:
        CatsError: the model cannot be made sparse, or not as asked; or from loading, calibrating and writing.
    """
    source, target = config.source, config.target
    # before gigabytes of weights are read
    skeleton = source.skeleton()
    check_reads_text(skeleton)
    find_gated_mlps(skeleton)
    target.gate_sparsity(skeleton)  # refuses a number of bytes that cannot be had
    choice = None
    if config.profile is not None:
        choice = find_config(skeleton, Profile.load(config.profile), target)
    with as_folder(source, out) as folder:
        check_source(folder.path, out, with_weights=not folder.temporary)
        unused = check_tensors(skeleton, folder.path)
        if choice is None:
            model, tokenizer = folder.source.load(), folder.source.tokenizer()
            if folder.temporary:
                model.config.name_or_path = source.model  # for the record
            text = TextSource(str(config.data), config.rows)
            shown = track if target.profile_is_enough else untracked
            batches = config.sampling.batches(text, tokenizer, model, shown)
            choice = find_config(model, batches, target, data=config.data, tokenizer=tokenizer, notify=notify)
            del model
        written = write_checkpoint(folder.path, out, choice.config, force, link=folder.temporary)
    return SparsifiedModel(choice, sparsity_of(skeleton, choice.config.layer_sparsity), written, unused)
