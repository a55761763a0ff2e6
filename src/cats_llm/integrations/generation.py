"""A decoding loop for `generate` that never waits for the GPU, with the model's step as one CUDA graph.

transformers' loop reads from the GPU after every token whether to stop, so the time of its Python code, about 0.7 ms,
comes on top of the GPU's. Pass `graph_decode` to `generate` as ``custom_generate`` to do without.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from cats_llm.model.token_mask import find_token_mask

logger = logging.getLogger(__name__)

_CHECK_EVERY = 16  # tokens between two looks at whether all sequences have ended
_KNOWN_INPUTS = {"attention_mask", "past_key_values", "use_cache", "position_ids", "cache_position", "logits_to_keep"}


def graph_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy decoding and sampling as `generate` does them, the same tokens, in less time on a GPU.

    Use it as ``model.generate(ids, cache_implementation="static", custom_generate=graph_decode)``. The first call
    compiles the model's step (unless ``disable_compile=True``); every call captures it as a CUDA graph. Where it does
    not apply (no static cache, sliding-window layers, several beams, scores asked for, inputs other than tokens) it
    says so and hands over to transformers' own loop. On a CPU the loop runs without graphs.

    Args:
        model: a causal language model.
        input_ids: prompts, (batch, length), padded on the left.
        logits_processor, stopping_criteria, generation_config: as prepared by `generate`.
        streamer: as for `generate`, which does not hand its own on: bind one with `functools.partial`.
        model_kwargs: what `generate` prepared for the model.

    Returns:
        (batch, length + new tokens), padded on the right.
    """
    # these import much, and few who import cats_llm generate
    from transformers.generation import EosTokenCriteria, MaxLengthCriteria

    obstacle = _obstacle(model, generation_config, model_kwargs)
    if obstacle is not None:
        logger.warning("graph_decode does not apply (%s); transformers' own loop is used", obstacle)
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
        )
    others = [c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
    ends = next((c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)), None)
    ends = None if ends is None else ends.to(input_ids.device)
    pad = generation_config._pad_token_tensor
    batch, prompt = input_ids.shape
    limit = generation_config.max_length
    ids = torch.zeros(batch, limit, dtype=input_ids.dtype, device=input_ids.device)
    ids[:, :prompt] = input_ids
    finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    step = _Step(model, input_ids, limit, not generation_config.disable_compile, model_kwargs)
    logits = step.prefill(input_ids, model_kwargs)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    length = prompt
    while True:
        scores = logits_processor(ids[:, :length], logits)
        if generation_config.do_sample:
            chosen = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            chosen = scores.argmax(-1)
        if ends is not None:
            chosen = torch.where(finished, pad.to(chosen), chosen)
            finished |= torch.isin(chosen, ends)
        ids[:, length] = chosen
        length += 1
        if length < limit:
            logits = step(chosen)  # launched before anything below waits for the token
        if streamer is not None:
            streamer.put(chosen.cpu())
        for criterion in others:
            finished |= criterion(ids[:, :length], None)
        look = bool(others) or streamer is not None or (length - prompt) % _CHECK_EVERY == 0
        if length == limit or (look and bool(finished.all())):
            break
    if streamer is not None:
        streamer.end()
    return ids[:, : length if others else _end(ids[:, :length], prompt, ends)]


def graph_applies(model: PreTrainedModel) -> bool:
    """Whether `graph_decode` can run the model as a CUDA graph; a static cache need not be there yet."""
    from transformers.cache_utils import StaticCache

    text = model.config.get_text_config(decoder=True)
    if model.device.type != "cuda" or not getattr(model, "_can_compile_fullgraph", False):
        return False
    try:
        cache = StaticCache(config=text, max_cache_len=1)
    except (AttributeError, KeyError, TypeError, ValueError):  # layers that no static cache is made for
        return False
    greedy = GenerationConfig(num_beams=1, return_dict_in_generate=False)
    return _obstacle(model, greedy, {"past_key_values": cache}) is None


def _obstacle(model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any]) -> str | None:
    """Why the loop cannot be used, or None."""
    from transformers.cache_utils import StaticCache, StaticLayer

    cache = model_kwargs.get("past_key_values")
    unknown = [name for name, value in model_kwargs.items() if name not in _KNOWN_INPUTS and value is not None]
    if model.config.is_encoder_decoder:
        return "the model has an encoder"
    if generation_config.num_beams > 1 or generation_config.return_dict_in_generate:
        return "several beams or more than tokens were asked for"
    if unknown:
        return f"the model gets {', '.join(sorted(unknown))}"
    if not isinstance(cache, StaticCache):
        return 'there is no static cache; pass cache_implementation="static"'
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        return "the cache has layers with a sliding window"
    rule = find_token_mask(model)
    if rule is not None and rule.coverage.dense_first_tokens:
        return "which new tokens are sparse depends on their position"
    if len({p.device for p in model.parameters()}) > 1:
        return "the model is spread over several devices"
    return None


class _Step:
    """The model's step for one more token of every sequence; on a GPU, a CUDA graph from the second call on."""

    def __init__(
        self, model: PreTrainedModel, input_ids: Tensor, limit: int, may_compile: bool, model_kwargs: dict[str, Any]
    ) -> None:
        self.cache = model_kwargs["past_key_values"]
        self.cuda = input_ids.is_cuda
        self.model = model
        self.forward: Callable[..., Any] = _compiled(model) if self.cuda and may_compile else model
        self.token = torch.zeros(len(input_ids), 1, dtype=input_ids.dtype, device=input_ids.device)
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None
        prompt_mask = model_kwargs.get("attention_mask")
        if prompt_mask is not None and not bool(prompt_mask.all()):
            # what comes after the prompt is hidden by causality until it is there
            self.mask = torch.ones(len(input_ids), limit, dtype=prompt_mask.dtype, device=input_ids.device)
            self.mask[:, : prompt_mask.shape[1]] = prompt_mask
            self.positions = prompt_mask.sum(1, keepdim=True)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def prefill(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Logits after the prompt, (batch, vocabulary)."""
        inputs = self.model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        inputs |= {"logits_to_keep": 1, "return_dict": True}
        logits: Tensor = self.model(**inputs).logits
        return logits[:, -1].float()

    def __call__(self, chosen: Tensor) -> Tensor:
        """Logits after one more token, (batch, vocabulary), overwritten by the next call."""
        self.token.copy_(chosen[:, None])
        self.calls += 1
        if not self.cuda:
            return self._run()
        if self.calls == 1:
            # compiles, and lets every kernel set itself up; on the stream that may be captured
            return self._aside(self._run)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._run()
        self.graph.replay()
        return self.logits

    def _run(self) -> Tensor:
        logits: Tensor = self.forward(
            input_ids=self.token,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        ).logits
        if self.positions is not None:
            self.positions.add_(1)
        return logits[:, -1].float()

    @staticmethod
    def _aside(run: Callable[[], Tensor]) -> Tensor:
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            out = run()
        main.wait_stream(side)
        out.record_stream(main)
        return out


def _compiled(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward, compiled without graphs of its own; compiled code is kept with the model."""
    compiled: Callable[..., Any] | None = model.__dict__.get("_cats_compiled_step")
    if compiled is None:
        compiled = torch.compile(model.forward, options={"triton.cudagraphs": False})
        model.__dict__["_cats_compiled_step"] = compiled
    return compiled


def _end(ids: Tensor, prompt: int, ends: Tensor | None) -> int:
    """Where `generate` would have stopped: when the last sequence has ended."""
    if ends is None or ids.shape[1] == prompt:
        return ids.shape[1]
    ended = torch.isin(ids[:, prompt:], ends)
    first = torch.where(ended.any(1), ended.int().argmax(1) + 1, ids.shape[1] - prompt)
    return prompt + int(first.max())
