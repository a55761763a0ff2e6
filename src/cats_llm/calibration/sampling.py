"""Which sequences of a text are calibrated on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cats_llm import distributed
from cats_llm.options import Panel, option
from cats_llm.progress import Track, untracked
from cats_llm.text import TextSource, batched, check_length, load_sequences


@dataclass(frozen=True)
class Sampling:
    """Sequences drawn from a text, and how many are computed at a time."""

    panel = Panel.DATA

    samples: int = option(256, minimum=1, help="At most so many sequences.")
    seq_length: int = option(1024, minimum=2, help="Tokens a sequence.")
    batch_size: int = option(4, minimum=1, help="Sequences computed at a time.")
    seed: int | None = option(None, help="Draw the sequences in this random order. Default: in the order of the text.")

    def batches(
        self, source: TextSource | str, tokenizer: Any, model: Any, track: Track = untracked
    ) -> Iterable[Tensor]:
        """The batches, int64 (B, T), that this process computes; of several each gets others.

        A batch holds the same sequences whatever the number of processes, so that the same bits are computed.

        Args:
            source: the text.
            tokenizer: of the model.
            model: tells how long its sequences may be.
            track: shows how many of the batches are computed.

        Raises:
            CatsError: the model reads no sequences so long, or the text cannot be read or is too short.
        """
        check_length(self.seq_length, model.config)
        sequences = load_sequences(source, tokenizer, self.seq_length, samples=self.samples, seed=self.seed)
        batches = distributed.share(batched(sequences, self.batch_size))
        most = range(distributed.rank(), -(-self.samples // self.batch_size), distributed.world_size())
        return track(batches, "calibrating", len(most))
