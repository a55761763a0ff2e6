"""`cats generate`: continue a prompt, streamed."""

from typing import Annotated

import typer

from cats_llm.cli import options
from cats_llm.cli.output import percent, progress_console, quiet_libraries
from cats_llm.cli.streams import read_prompt
from cats_llm.continuation import continue_prompt
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.model.decode_linear import use_decode_linears
from cats_llm.model.sparsify import thresholds
from cats_llm.model.weight_traffic import sparsity_of
from cats_llm.outputs import check_output, write_json


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="generate")(command)


def command(
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from stdin.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this mass.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the tokenizer's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random draws, if temperature is above 0.")] = 0,
    decode_linears: Annotated[
        bool, typer.Option(help="Decode attention projections and lm_head on our own kernels too.")
    ] = True,
    graph: Annotated[
        bool | None,
        typer.Option(
            "--graph/--no-graph",
            help="Decode as one CUDA graph, compiled first, for long outputs. Default: on a GPU, without compiling.",
            show_default=False,
        ),
    ] = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    force: options.Force = False,
) -> None:
    """Continue a prompt with a CATS or dense model; tokens a second at the end.

    Example: **cats generate mistral-cats50 --prompt "Once upon a time" --max-new-tokens 200**
    """
    if json is not None:
        check_output(json, force)
    text = read_prompt(prompt)
    quiet_libraries()
    loaded = load_model(model, dtype, device, revision, trust_remote_code)
    tokenizer = load_tokenizer(model, revision, trust_remote_code)
    if not decode_linears:
        use_decode_linears(loaded, False)
    result = continue_prompt(
        loaded,
        tokenizer,
        text,
        stream=True,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        graph=graph,
    )
    config = loaded.config.quantization_config if thresholds(loaded) else None
    sparse = sparsity_of(loaded, config.layer_sparsity).gate if config is not None else None
    kind = "dense model" if sparse is None else f"CATS model, {percent(sparse)} gate sparsity at calibration"
    rate = result["tokens_per_second"]
    speed = "" if rate is None else f", {rate:.1f} tokens/s after the first"
    progress_console.print(f"\n[{kind}] {result['tokens']} tokens{speed}")
    if json is not None:
        write_json(json, {"model": model, "sparse": sparse is not None, "prompt": text, **result}, force)
