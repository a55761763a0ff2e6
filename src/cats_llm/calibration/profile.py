"""The calibration profile: all that was learned about a model's activations, in one file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from cats_llm.calibration.distribution import MagnitudeDistribution
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.errors import CatsError
from cats_llm.model.structure import find_gated_mlps
from cats_llm.outputs import write_file

_KEY = "cats_profile"
NOT_RUN = "layers_not_run"
"""Where the record names layers that text did not reach."""
VERSION = 1


@dataclass(frozen=True)
class Profile:
    """The distribution of |act(gate)| in every layer, from which any sparsity can be asked for.

    Attributes:
        layers: by layer index.
        record: what was calibrated on what: model, revision, data, tokens, date, versions.
        not_run: layers with a gated MLP that text does not reach (of models that also see or hear). They get the
            threshold 0, which keeps every neuron, and count as dense.
    """

    layers: dict[int, MagnitudeDistribution]
    record: dict[str, Any]

    @property
    def not_run(self) -> list[int]:  # noqa: D102  # see above
        return list(self.record.get(NOT_RUN) or [])

    def config(self, sparsity: float) -> CatsConfig:
        """Thresholds for a gate sparsity, the same share in every layer that text reaches (paper, section 3.1).

        Args:
            sparsity: k, the share of neurons to skip, in [0, 1).

        Raises:
            CatsError: ``sparsity`` is out of range.
        """
        chosen = {layer: distribution.threshold(sparsity) for layer, distribution in self.layers.items()}
        chosen |= dict.fromkeys(self.not_run, (0.0, 0.0))
        return CatsConfig(
            thresholds={layer: threshold for layer, (threshold, _) in chosen.items()},
            sparsity=sparsity,
            layer_sparsity={layer: achieved for layer, (_, achieved) in chosen.items()},
            calibration=self.record,
        )

    def check_model(self, model: nn.Module) -> None:
        """Make sure that the profile can be of this model.

        Raises:
            CatsError: the layers differ in number or in size.
        """
        mlps = {mlp.layer: mlp for mlp in find_gated_mlps(model)}
        tokens = self.record.get("tokens") or 0
        for layer in sorted(mlps.keys() | self.layers.keys()):
            neurons = mlps[layer].intermediate_size if layer in mlps else 0
            counted = self.layers[layer].total if layer in self.layers else 0
            if layer in self.not_run and layer in mlps:
                continue  # nothing was counted, so nothing can differ
            if counted != tokens * neurons:
                raise CatsError(
                    f"the profile was made with another model ({self.record.get('model')}): layer {layer} had "
                    f"{counted // tokens if tokens else 0} neurons there and has {neurons} here; calibrate this model."
                )

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the profile as a safetensors file.

        Raises:
            CatsError: the file exists and ``force`` is False, or it cannot be written.
        """
        tensors = {}
        layers = {}
        for layer, distribution in self.layers.items():
            tensors[f"{layer}.edges"] = distribution.edges
            tensors[f"{layer}.counts"] = distribution.counts
            layers[str(layer)] = {"maximum": distribution.maximum, "zeros": distribution.zeros}
        header = json.dumps({"version": VERSION, "layers": layers, "record": self.record})
        with write_file(path, force) as temporary:
            temporary.write_bytes(save(tensors, metadata={_KEY: header}))

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read a profile.

        Raises:
            CatsError: there is no such file, it is damaged, or it is no profile.
        """
        path = Path(path)
        if not path.is_file():
            raise CatsError(f"there is no calibration profile {path}; make one with cats calibrate.")
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError as error:
            raise CatsError(f"the name {path} is not UTF-8, and safetensors opens no other; rename it.") from error
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_KEY, "null"))
                if header is None:
                    raise CatsError(f"{path} is a safetensors file but no calibration profile.")
                if header["version"] > VERSION:
                    raise CatsError(f"{path} is a profile of version {header['version']}; upgrade cats-llm to read it.")
                layers = {}
                for layer, facts in header["layers"].items():
                    if not math.isfinite(facts["maximum"]):
                        raise ValueError("maximum")
                    layers[int(layer)] = MagnitudeDistribution(
                        file.get_tensor(f"{layer}.edges"),
                        file.get_tensor(f"{layer}.counts"),
                        float(facts["maximum"]),
                        int(facts["zeros"]),
                    )
                if not layers:
                    raise ValueError("layers")
                return cls(layers, dict(header["record"]))
        except CatsError:
            raise
        except (SafetensorError, OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
            raise CatsError(f"{path} is not a calibration profile, or it is damaged; calibrate again.") from error
