"""The distribution of |act(gate)|: counted in one pass, in bounded memory, exactly enough for any quantile.

What is counted is the gate *before* the activation. SiLU and GELU have a minimum, near which activations crowd so
densely (7 % within one bfloat16 number) that no histogram of |act(gate)| separates them; the gate itself has no such
point, and the activation is applied to the few distinct values at the end.
"""

import torch
from torch import Tensor

from cats_llm.calibration.distribution import MagnitudeDistribution
from cats_llm.errors import CatsError
from cats_llm.kernels.definition import Activation, gate_activation

# A bin is a range of float32 numbers with the same sign, exponent and first 12 bits of the mantissa, so that every
# bfloat16 and float16 number has a bin of its own, and in float32 a bin is 2^-12 of its value wide.
MANTISSA_BITS = 12
_SHIFT = 23 - MANTISSA_BITS
# magnitudes from 2^-64 to 2^64; smaller ones count as zero
_FIRST_BIN = (127 - 64) << MANTISSA_BITS
_BINS = 128 << MANTISSA_BITS
_CHUNK = 1 << 22


class GateHistogram:
    """Counts the gate pre-activations of one layer. 8 MiB whatever the number of tokens.

    Counts are integers: neither the order of batches nor their split over processes changes the result.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(2 * _BINS, dtype=torch.int64, device=device)
        # more than 0 once a value was NaN or infinite
        self.not_finite = torch.zeros((), dtype=torch.int64, device=device)
        # more than 0 once a value does not sit on the lower edge of its bin, as all 16-bit numbers do
        self.between = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, gate: Tensor) -> None:
        """Count every element of ``gate``, of any shape and floating dtype."""
        for chunk in gate.detach().reshape(-1).split(_CHUNK):
            bits = chunk.to(self.counts.device, torch.float32).view(torch.int32)
            if not len(bits):
                continue
            magnitude = bits & 0x7FFFFFFF
            self.not_finite += magnitude.amax() >= 0x7F800000
            self.between += (bits & ((1 << _SHIFT) - 1)).amax() > 0
            index = (magnitude >> _SHIFT).sub_(_FIRST_BIN).clamp_(0, _BINS - 1)
            index += (bits >> 31) & _BINS
            self.counts += torch.bincount(index, minlength=2 * _BINS)

    def tensors(self) -> list[Tensor]:
        """The state. Adding the states of two histograms merges them."""
        return [self.counts, self.not_finite, self.between]

    def check(self, layer: int) -> None:
        """Make sure that all that was counted was finite.

        Raises:
            CatsError: it was not.
        """
        if self.not_finite:
            raise CatsError(
                f"gate activations of layer {layer} are NaN or infinite; the weights are damaged "
                "or the dtype overflows: try --dtype float32."
            )

    def distribution(self, activation: Activation) -> MagnitudeDistribution:
        """The distribution of ``|activation(gate)|`` over all that was counted."""
        index = self.counts.nonzero().squeeze(1).cpu()
        counts = self.counts.cpu()[index]
        negative = index >= _BINS
        inside = index % _BINS
        bits = (inside + _FIRST_BIN) << _SHIFT
        if self.between:
            bits += 1 << (_SHIFT - 1)
        values = torch.where(inside == 0, 0.0, bits.to(torch.int32).view(torch.float32))
        gate = torch.where(negative, -values, values)
        return MagnitudeDistribution.from_values(gate_activation(gate, activation).abs().float(), counts)
