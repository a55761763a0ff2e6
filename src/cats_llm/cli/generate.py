"""`cats generate`: continue a prompt, streamed."""

from typing import Annotated

import typer

from cats_llm.cli.output import Results, progress_console, quiet_libraries
from cats_llm.cli.streams import read_prompt
from cats_llm.continuation import Decoding, continue_prompt
from cats_llm.loading import ModelSource
from cats_llm.model.decode_linear import use_decode_linears
from cats_llm.model.sparsify import thresholds
from cats_llm.model.weight_traffic import sparsity_of
from cats_llm.number_format import percent


def command(
    source: ModelSource,
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from stdin.", show_default=False)],
    decoding: Decoding,
    results: Results,
    decode_linears: Annotated[
        bool, typer.Option(help="Decode attention projections and lm_head on our own kernels too.")
    ] = True,
) -> None:
    """Continue a prompt with a CATS or dense model; tokens a second at the end.

    Example: **cats generate mistral-cats50 --prompt "Once upon a time" --max-new-tokens 200**
    """
    results.check()
    prompt = read_prompt(prompt)
    quiet_libraries()
    model, tokenizer = source.load(), source.tokenizer()
    if not decode_linears:
        use_decode_linears(model, False)
    continuation = continue_prompt(model, tokenizer, prompt, decoding, stream=True)
    config = model.config.quantization_config if thresholds(model) else None
    sparse = sparsity_of(model, config.layer_sparsity).gate if config is not None else None
    kind = "dense model" if sparse is None else f"CATS model, {percent(sparse)} gate sparsity at calibration"
    rate = continuation["tokens_per_second"]
    speed = "" if rate is None else f", {rate:.1f} tokens/s after the first"
    progress_console.print(f"\n[{kind}] {continuation['tokens']} tokens{speed}")
    results.write({"model": source.model, "sparse": sparse is not None, "prompt": prompt, **continuation})
