"""Continue a prompt: what `cats generate` and the demo run."""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cats_llm.chat import render
from cats_llm.errors import CatsError
from cats_llm.integrations.generation import graph_applies, graph_decode
from cats_llm.model.architecture import check_predicts_tokens, text_alone
from cats_llm.model.tokens import check_tokens, learned_positions
from cats_llm.options import option


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and how many."""

    max_new_tokens: int = option(128, help="Stop after so many tokens.", minimum=1)
    temperature: float = option(0.0, help="0 always takes the most likely token.", minimum=0.0)
    top_p: float = option(1.0, help="Draw from the likeliest tokens of this mass.", minimum=0.0, maximum=1.0)
    chat: bool = option(False, help="Apply the tokenizer's chat template.")
    seed: int = option(0, help="Of the random draws, if temperature is above 0.")
    graph: bool | None = option(
        None,
        help="Decode as one CUDA graph, compiled first, for long outputs. Default: on a GPU, without compiling.",
        flags=("--graph/--no-graph",),
    )


def continue_prompt(
    model: Any, tokenizer: Any, prompt: str, decoding: Decoding | None = None, *, stream: bool = False
) -> dict[str, Any]:
    """Continue a prompt. Of the checkpoint's own generation settings only the special tokens are used.

    Args:
        decoding: with ``graph``, by `graph_decode`, with a static cache; where that is None, if the model is on a GPU
            and it applies. None: the most likely tokens.
        stream: print the text as it comes.

    Returns:
        The text, the number of tokens, and how many came a second.

    Raises:
        CatsError: the model predicts no tokens, the prompt holds none or such as it cannot read, or there is no chat
            template that takes it.
    """
    from transformers import set_seed

    decoding = decoding or Decoding()
    check_predicts_tokens(model, "generating text")
    ids = _encoded(tokenizer, prompt, decoding.chat)
    check_tokens(model, ids, tokenizer)
    length = ids.shape[1]
    room, limit = decoding.max_new_tokens, learned_positions(model)
    if limit is not None:
        room = min(room, limit - length)
    if room < 1:
        raise CatsError(f"the prompt has {length} tokens, but the model has learned {limit} positions; shorten it.")
    set_seed(decoding.seed)
    readable = _Readable(tokenizer)
    clock = _Clock(readable if stream else None)
    settings: dict[str, Any] = {"max_new_tokens": room, "do_sample": False}
    if decoding.temperature > 0:
        # top_k 0: all tokens; left out, transformers would take 50
        settings |= {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    loop: dict[str, Any] = {"streamer": clock}
    if decoding.graph or (decoding.graph is None and graph_applies(model)):
        settings["cache_implementation"] = "static"
        # compiling pays only for long outputs, so it has to be asked for
        settings["disable_compile"] = decoding.graph is None
        # generate does not hand its streamer on to a custom loop
        loop = {"custom_generate": functools.partial(graph_decode, streamer=clock)}
    with torch.no_grad(), text_alone(model), _own_settings(model, settings) as config:
        ids = ids.to(model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **loop)
    new = output[0, length:].tolist()
    return {
        "text": readable.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "tokens_per_second": clock.rate(),
    }


def _encoded(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """input_ids, (1, T)."""
    try:
        if chat:
            if not getattr(tokenizer, "chat_template", None):
                raise CatsError("the tokenizer has no chat template; leave out --chat.")
            text = render([{"role": "user", "content": prompt}], tokenizer, "the prompt", generation_prompt=True)
            encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            encoded = tokenizer(prompt)["input_ids"]
    except CatsError:
        raise
    except (TypeError, ValueError) as error:
        raise CatsError("the tokenizer cannot read the prompt; it must be valid text.") from error
    if not encoded:
        raise CatsError("the prompt is empty; pass some text with --prompt.")
    return torch.tensor([encoded])


@contextmanager
def _own_settings(model: Any, settings: dict[str, Any]) -> Iterator[Any]:
    """Generation settings that hold the checkpoint's special tokens and ``settings``; its own come back at the end.

    `generate` fills up what it is given from the model's own ones, so these have to be out of the way.
    """
    from transformers import GenerationConfig

    before = getattr(model, "generation_config", None)
    tokens = {name: _tokens(getattr(before, name, None)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    eos = tokens["eos_token_id"]
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    config = GenerationConfig(**tokens, **settings)
    model.generation_config = GenerationConfig()
    try:
        yield config
    finally:
        model.generation_config = before


def _tokens(value: Any) -> int | list[int] | None:
    """A token or several, as config files name them; anything else is nothing."""
    if isinstance(value, list):
        return [token for token in value if _tokens(token) is not None] or None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


class _Readable:
    """A tokenizer that passes over tokens it does not know: models often have more than their tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.size = max([len(tokenizer), *(number + 1 for number in tokenizer.get_vocab().values())])

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        """The text of the tokens."""
        text: str = self.tokenizer.decode([token for token in tokens if token < self.size], **options)
        return text


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
