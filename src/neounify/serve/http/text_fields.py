"""What the bodies of text answers have in common: how tokens are drawn, and when they end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field

from neounify.decode.sampling import MAX_LOGPROBS, SamplingSettings
from neounify.serve.http.fields import MOST_TEXT, AnsweredFields, Number

Text = Annotated[str, Field(max_length=MOST_TEXT)]
TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
Alternatives = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Stop = Annotated[str, Field(max_length=1000)]


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    include_usage: bool = False


class TextFields(AnsweredFields):
    """The fields of chat and of completions alike."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        (
            "metadata",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        )
    )
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "frequency_penalty": (0,),
        "ignore_eos": (False,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "logit_bias": ({},),
        "min_tokens": (0,),
        "presence_penalty": (0,),
        "priority": (0,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "stop_token_ids": ([],),
        "typical_p": (1,),
        "use_beam_search": (False,),
    }

    model: str = Field("", max_length=200)
    n: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="Answers to the same prompt; answer i is drawn with seed + i."
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: Number = Field(0.0, description="0 takes the likeliest token.")
    top_p: Number = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(
        0, description="0: all tokens. Extension."
    )
    min_p: Number = Field(
        0.0, description="Drops tokens less than that fraction as likely as the best. Extension."
    )
    repetition_penalty: Number = Field(1.0, description="1 is none. Extension.")
    max_tokens: TokenCount | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = Field(default_factory=list)

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, *, seed: int | None, logprobs: int | None = None) -> SamplingSettings:
        """How tokens are drawn. Raises RequestError for values out of range."""
        return SamplingSettings(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            logprobs=logprobs,
        )
