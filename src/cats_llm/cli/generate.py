"""`cats generate`: continue a prompt, streamed."""

import functools
import time
from typing import Annotated, Any

import typer

from cats_llm.checkpoint.files import check_output, write_json
from cats_llm.cli import options
from cats_llm.cli.output import percent, progress_console, quiet_libraries
from cats_llm.cli.streams import read_prompt
from cats_llm.errors import CatsError
from cats_llm.integrations.generation import graph_decode
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.model.accounting import sparsity_of
from cats_llm.model.decode_linear import use_decode_linears
from cats_llm.model.surgery import thresholds


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
        bool, typer.Option("--graph", help="On a GPU, decode as one CUDA graph. Compiles first: for long outputs.")
    ] = False,
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
    result = run(
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


def run(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    stream: bool = False,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    graph: bool = False,
) -> dict[str, Any]:
    """Continue a prompt. Returns its text, number of tokens, and decode speed.

    ``graph`` decodes by `graph_decode`, with a static cache.

    Raises:
        CatsError: the prompt holds no token, or there is no chat template.
    """
    import torch
    from transformers import set_seed

    if chat:
        if not tokenizer.chat_template:
            raise CatsError("the tokenizer has no chat template; leave out --chat.")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs.input_ids.numel() == 0:
        raise CatsError("the prompt is empty; pass some text with --prompt.")
    set_seed(seed)
    clock = _Clock(tokenizer if stream else None)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    loop: dict[str, Any] = {"streamer": clock}
    if graph:
        # generate does not hand its streamer on to a custom loop
        loop = {"cache_implementation": "static", "custom_generate": functools.partial(graph_decode, streamer=clock)}
    with torch.no_grad():
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=max_new_tokens,
            **loop,
            **({"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | sampling),
        )
    new = output[0, inputs.input_ids.shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "tokens_per_second": clock.rate(),
    }


class _Clock:
    """A streamer for `generate` that notes when tokens come and, given a tokenizer, prints them."""

    def __init__(self, tokenizer: Any = None) -> None:
        from transformers import TextStreamer

        self.printer = TextStreamer(tokenizer) if tokenizer is not None else None
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, value: Any) -> None:
        if self.prompt_seen:
            self.times.append(time.perf_counter())
        self.prompt_seen = True
        if self.printer is not None:
            self.printer.put(value)

    def end(self) -> None:
        if self.printer is not None:
            self.printer.end()

    def rate(self) -> float | None:
        """Tokens a second from the first new token on, so that prefill does not count."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])
