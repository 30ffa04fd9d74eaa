"""A vision model on this machine, by transformers: the schema is enforced token by token.

Only this module of the package imports torch. Nothing is downloaded and no code of a checkpoint is run.
"""

from __future__ import annotations

import asyncio
import io
import threading
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, StoppingCriteria
from transformers.utils import logging

from loraport.errors import BackendError, LoraPortError, OutOfMemoryError
from loraport_dataset.captioning.answers import Answer, Message, Refused

_TALKER = "Take a model that was made to be talked with."


class LocalModel:
    """A describer that runs an image-text-to-text model of transformers, one picture at a time.

    `checkpoint` is a folder, or the id of one in the hub's cache on this machine. Raises BackendError for what is no
    such model, OutOfMemoryError where it doesn't fit.
    """

    def __init__(self, checkpoint: str, max_tokens: int, device: str | None = None):
        self._device = device or _best_device()
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self._processor = AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
            model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, local_files_only=True, dtype="auto")
            self._model = model.to(self._device).eval()
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(checkpoint) from error
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise BackendError(
                f"{checkpoint} cannot be used as a vision model: {_first_line(error)}",
                hint=_hint(checkpoint, error),
            ) from error
        self._checkpoint = checkpoint
        self._tokenizer: Any = getattr(self._processor, "tokenizer", None)
        if self._tokenizer is None or not getattr(self._processor, "chat_template", None):
            raise BackendError(f"{checkpoint} has no chat template with pictures.", hint=_TALKER)
        self._ends = _end_tokens(self._model.generation_config.eos_token_id, self._tokenizer.eos_token_id)
        self._vocabulary: LLTokenizer | None = None

    async def close(self) -> None:
        self._stop.set()

    async def answer(self, messages: list[Message], schema: dict[str, Any] | None) -> Answer:
        """Raises Refused where the grammar leaves no token, OutOfMemoryError where the answer doesn't fit, BackendError
        for a model that cannot do this."""
        try:
            return await asyncio.to_thread(self._generate, messages, schema)
        except asyncio.CancelledError:
            self._stop.set()  # the thread ends with the next token
            raise

    def _generate(self, messages: list[Message], schema: dict[str, Any] | None) -> Answer:
        try:
            return self._answer(messages, schema)
        except (Refused, LoraPortError):
            raise
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(self._checkpoint) from error
        except Exception as error:  # chat templates and models raise whatever they like
            raise BackendError(
                f"{self._checkpoint} cannot describe a picture: {_first_line(error)}", hint=_TALKER
            ) from error

    def _answer(self, messages: list[Message], schema: dict[str, Any] | None) -> Answer:
        pictures = [Image.open(io.BytesIO(message.picture)) for message in messages if message.picture is not None]
        prompt = self._processor.apply_chat_template(_turns(messages), add_generation_prompt=True, tokenize=False)
        inputs = self._processor(images=pictures, text=[prompt], return_tensors="pt")
        inputs = inputs.to(self._device, self._model.dtype)  # whole numbers stay whole
        length = inputs["input_ids"].shape[1]
        processors = [] if schema is None else [SchemaMask(self._matcher(schema), length)]
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs,
                max_new_tokens=self._max_tokens,
                logits_processor=processors,
                stopping_criteria=[_Stopped(self._stop)],
                eos_token_id=self._ends,
                pad_token_id=self._ends[0],
            )[0, length:]
        cut_off = int(tokens[-1]) not in self._ends
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, cut_off, prompt_tokens=length, answer_tokens=len(tokens))

    def _matcher(self, schema: dict[str, Any]) -> LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = from_tokenizer(self._tokenizer, eos_token=self._ends)
        # No blanks between the parts, which is how captions are trained.
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(self._vocabulary, grammar)
        assert not matcher.is_error(), matcher.get_error()
        return matcher


class SchemaMask(LogitsProcessor):
    """Leaves the model only the tokens with which the text can still become JSON of the schema."""

    def __init__(self, matcher: LLMatcher, prompt_tokens: int):
        self._matcher, self._seen = matcher, prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids: (1, tokens so far); scores: (1, vocabulary)."""
        new = input_ids[0, self._seen :].tolist()
        self._seen += len(new)
        if new and not self._matcher.consume_tokens(new):
            raise Refused(f"the grammar could not follow the model: {self._matcher.get_error()}")
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()
        mask = torch.zeros(scores.shape[-1], dtype=torch.bool)
        most = min(len(mask), len(allowed))
        mask[:most] = allowed[:most]
        return scores.masked_fill(~mask.to(scores.device), float("-inf"))  # type: ignore[return-value]


class _Stopped(StoppingCriteria):
    """Ends the generation when the run is over."""

    def __init__(self, stop: threading.Event):
        self._stop = stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)  # type: ignore[return-value]


def _turns(messages: list[Message]) -> list[dict[str, Any]]:
    """The conversation for a chat template; what the system says goes before the first question, since not every
    template knows a system."""
    system = "\n\n".join(message.text for message in messages if message.role == "system")
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "system":
            continue
        text = f"{system}\n\n{message.text}" if system and not turns else message.text
        picture = [] if message.picture is None else [{"type": "image"}]
        turns.append({"role": message.role, "content": [*picture, {"type": "text", "text": text}]})
    return turns


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _end_tokens(*ends: int | list[int] | None) -> list[int]:
    """Every token that ends an answer, of the generation's settings or else of the tokenizer."""
    for end in ends:
        if end is not None:
            return list(end) if isinstance(end, list) else [end]
    raise BackendError("The model has no token that ends an answer.", hint=_TALKER)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _hint(checkpoint: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return "pip install 'loraport[caption-local]' brings what local vision models need."
    if not Path(checkpoint).exists():
        return "Nothing is downloaded here: give a folder, or get the checkpoint first with `hf download`."
    return "Give the folder of a checkpoint of transformers with config.json, weights, tokenizer and processor."


def _out_of_memory(checkpoint: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{checkpoint} does not fit into the device's memory.",
        hint="Take a smaller model, send smaller pictures (--max-side), or use an endpoint.",
    )
