"""Every family of causal language models that transformers knows: sparse, or refused for a reason that holds.

`PYTHONPATH=tests/support python tests/model/test_every_family.py` writes the table of docs/models.md.
"""

import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import cats_llm
import tiny
from cats_llm import CatsConfig, CatsError

DOC = Path(__file__).parents[2] / "docs" / "models.md"
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
EXPERTS, NONE, MORE, TWO = "experts", "no gated MLP", "computes more", "two gated MLPs a layer"
REASONS = {
    "routes tokens through experts": EXPERTS,
    "has no gated MLP": NONE,
    "computes more": MORE,
    "two gated MLPs in layer": TWO,
}
# a gated MLP, as modeling files write it
GATED = re.compile(
    r"(act_fn|activation_fn|activation|act|F\.silu)"
    r"\((self\.\w+\(\w+\)|gate|input|\w+\[0\]|\w+\[\.\.\., 0, :\])\) \* |\* self\.(act_fn|activation_fn)\(gate\)"
)


@dataclass(frozen=True)
class Outcome:
    """What becomes of a family: `verdict` is "sparse", one of `REASONS`, or "not built"."""

    verdict: str
    detail: str


def build(family: str) -> nn.Module:
    """The family's default model without weights, or, if its config does not say enough for that, a tiny one."""
    with torch.device("meta"):
        try:
            return transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[family]())
        except Exception:
            return transformers.AutoModelForCausalLM.from_config(tiny.tiny_config(family))


@cache
def outcome(family: str) -> Outcome:
    try:
        model = build(family)
    except Exception as error:  # whatever a config class raises that cannot stand alone
        return Outcome("not built", f"{type(error).__name__}")
    try:
        mlps = cats_llm.find_gated_mlps(model)
    except CatsError as error:
        return Outcome(next(REASONS[reason] for reason in REASONS if reason in str(error)), str(error))
    parts = mlps[0].roles
    return Outcome("sparse", f"{type(mlps[0].module).__name__}: {', '.join(parts.projections)}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refusal_has_its_true_reason(family):
    found = outcome(family)
    if found.verdict in ("sparse", "not built"):
        return
    source = inspect.getsource(inspect.getmodule(type(build(family))))
    if found.verdict == EXPERTS:
        assert re.search(r"class \w*(Experts|MoE|Moe)\w*\(", source), found.detail
    elif found.verdict == NONE:
        code = "\n".join(line for line in source.splitlines() if "#" not in line)
        assert not GATED.search(code), f"{family} is refused although its code has a gated MLP: {found.detail}"
    elif found.verdict == MORE:
        assert re.search(r"it (has other weights too \(\w+\)|limits large values|has one step more)", found.detail)
    else:
        assert found.verdict == TWO


def sparse_families() -> list[str]:
    return [family for family in FAMILIES if outcome(family).verdict == "sparse"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_is_what_the_model_computes_with(family):
    """With a threshold of 0 a model is the dense one to the bit, with a huge one its MLPs give no more than a bias."""
    if outcome(family).verdict != "sparse":
        return
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny.tiny_config(family)).float().eval()
    mlps = cats_llm.find_gated_mlps(model)
    with torch.no_grad():
        for mlp in mlps:
            mlp.gate_linear.weight.normal_(0, 0.1)  # some families begin with zeros
    dense = logits(model)
    profile = cats_llm.calibrate(model, [ids()])
    cats_llm.sparsify(model, profile.config(0.0))
    assert torch.equal(logits(model), dense)
    cats_llm.sparsify(model, CatsConfig({mlp.layer: 1e30 for mlp in mlps}))
    empty = logits(model)
    cats_llm.densify(model)
    for mlp in mlps:
        bias = getattr(mlp.down_linear, "bias", None)
        mlp.module.register_forward_hook(
            lambda _m, _i, y, bias=bias: torch.zeros_like(y) if bias is None else bias.expand_as(y)
        )
    torch.testing.assert_close(empty, logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.equal(empty, dense), "the MLPs do not matter: the test proves nothing"


def ids() -> torch.Tensor:
    return torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def table() -> str:
    """The part of docs/models.md that follows from the sweep."""
    outcomes = {family: outcome(family) for family in FAMILIES}
    verdicts = ("sparse", *REASONS.values(), "not built")
    by_verdict = {verdict: [f for f in FAMILIES if outcomes[f].verdict == verdict] for verdict in verdicts}
    lines = [
        f"transformers {transformers.__version__}: {len(FAMILIES)} families of causal language models, "
        + ", ".join(f"{len(names)} {verdict}" for verdict, names in by_verdict.items())
        + ".",
        "",
        "| families | what becomes of them |",
        "|---|---|",
    ]
    by_names: dict[str, list[str]] = {}
    for family in by_verdict["sparse"]:
        by_names.setdefault(outcomes[family].detail.partition(": ")[2], []).append(family)
    for names, families in sorted(by_names.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {', '.join(families)} | sparse ({names}) |")
    for family in [*by_verdict[MORE], *by_verdict[TWO]]:
        lines.append(f"| {family} | refused: {outcomes[family].detail} |")
    lines.append(f"| {', '.join(by_verdict[EXPERTS])} | refused: tokens are routed through experts |")
    lines.append(f"| {', '.join(by_verdict[NONE])} | refused: no gated MLP |")
    lines.append(f"| {', '.join(by_verdict['not built'])} | not tried: their config class alone builds no model |")
    return "\n".join(lines) + "\n"


BEGIN = "<!-- written by tests/model/test_every_family.py -->\n"


def test_the_table_in_the_docs_is_what_was_found():
    text = DOC.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2]
    if not written.startswith(f"transformers {transformers.__version__}:"):
        pytest.skip(f"the table was written with another transformers than {transformers.__version__}")
    assert written == table(), "run PYTHONPATH=tests/support python tests/model/test_every_family.py"


if __name__ == "__main__":
    head = DOC.read_text(encoding="utf-8").partition(BEGIN)[0]
    DOC.write_text(head + BEGIN + table(), encoding="utf-8")
