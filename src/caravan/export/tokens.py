"""A tokenizer that adds by itself what the encoding puts around a text, and leaves room for it.

What stands before, between and after texts goes into the tokenizer's post-processor, and truncation
counts it in. Whether the ids are those of the model folder is not taken for granted: they are
compared over texts of many kinds (empty, spaces, other scripts, just too long) before anything is
handed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from caravan.errors import InputError

_WORDS = "sand dunes "
SHORT = (
    ("", "camels"),
    ("", "How long does a caravan take through the desert? 40 days (or more)."),
    ("Salt & gold", "Größe, naïve: 北京 🐪\n\tthe second line's end"),
    ("", "  spaces around, (brackets) and  two inside "),
    ("A title", ""),
    ("", ""),
)
"""Titles and texts that are compared whatever the lengths."""


def probes(length: int) -> list[tuple[str, str]]:
    """Titles and texts whose ids are compared, among them those that just fit and just do not."""
    words = (_WORDS * length).split()
    fit = [" ".join(words[:number]) for number in range(max(length - 8, 1), length + 2)]
    return [*SHORT, *(("", text) for text in fit), ("Dunes", " ".join(words)), ("", "a" * length)]


def framed(
    tokenizer: Any,
    length: int,
    before: Sequence[int],
    after: Sequence[int],
    between: Sequence[int] = (),
) -> Any:
    """A copy of a tokenizer that puts these ids around texts and pairs, padded on the right.

    Args:
        length: of the longest input, in tokens.

    Raises:
        InputError: it is none of the `tokenizers` library.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} is no tokenizer of the tokenizers library, which alone can"
            " add prompts by itself; export the model as merged"
        )
    frame = {"before": list(before), "between": list(between), "after": list(after)}

    def put(name: str, kind: int) -> list[str]:
        return [f"{name}:{kind}"] if frame[name] else []

    # The generic class takes the post-processor from its file; those of some models make their own.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = TemplateProcessing(
        single=[*put("before", 0), "$A:0", *put("after", 0)],
        pair=[*put("before", 0), "$A:0", *put("between", 0), "$B:1", *put("after", 1)],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            for name, ids in frame.items()
            if ids
        ],
    )
    padding = pad_token(tokenizer)
    if padding is None:
        raise InputError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no special token, and so none to pad"
            " with; export the model as merged"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        model_input_names=tokenizer.model_input_names,
        padding_side="right",
        truncation_side="right",
        split_special_tokens=tokenizer.split_special_tokens,
        **{**tokenizer.special_tokens_map, "pad_token": padding},
    )


def pad_token(tokenizer: Any, last: Sequence[int] = ()) -> str | None:
    """The tokenizer's padding, or another special token that can be it; None if there is none.

    Args:
        last: the id that every text ends with, which is then no padding.
    """
    own = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token)
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in (*own, *added):
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in last:
            return str(token)
    return None


def refuse_other_tokens(
    place: str, texts: Sequence[Any], wanted: Sequence[list[int]], found: Sequence[list[int]]
) -> None:
    """Compare ids text by text.

    Args:
        place: what is exported, for the message.

    Raises:
        InputError: with the first text that would be read differently.
    """
    for text, ours, theirs in zip(texts, wanted, found, strict=True):
        if ours != theirs:
            told = repr(text) if len(repr(text)) < 80 else f"{repr(text)[:77]}..."
            raise InputError(
                f"{place}: the exported tokenizer would read {told} as {_some(theirs)} where the"
                f" model reads {_some(ours)}, so nothing is written; export it as merged"
            )


def _some(ids: list[int]) -> str:
    return f"{ids}" if len(ids) < 24 else f"[{', '.join(map(str, ids[:20]))}, ...] ({len(ids)})"
