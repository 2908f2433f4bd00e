"""Tokenizer of the readers: a fast tokenizer of transformers without transformers.

transformers imports torch to load a tokenizer, which takes seconds of CPU in each reader. The driver loads the
tokenizer once, and readers get the object of the package tokenizers that does its work.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """The members of transformers' fast tokenizers that `redux.conversation` and the readers use.

    Args:
        backend: tokenizer of the package tokenizers, without truncation and padding.
        eos_token: end token.
        eos_token_id: its id.
        pad_token_id: id of the padding token.
        unk_token_id: id of the token for unknown words.
        model_max_length: number of positions of the language model.
        truncation_side: side at which text is truncated.
    """

    backend: Tokenizer
    eos_token: str | None
    eos_token_id: Any
    pad_token_id: Any
    unk_token_id: int | None
    model_max_length: int
    truncation_side: str

    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, list[Any]]:
        """Tokenize a text as transformers does: input_ids, and offset_mapping if it is wanted."""
        if truncation and max_length is not None:
            self.backend.enable_truncation(max_length, direction=self.truncation_side)
        try:
            encoded = self.backend.encode(text, add_special_tokens=add_special_tokens)
        finally:
            self.backend.no_truncation()
        return {"input_ids": encoded.ids} | ({"offset_mapping": encoded.offsets} if return_offsets_mapping else {})

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Return the id of a token; that of the unknown token if there is no such token."""
        token_id = self.backend.token_to_id(token)
        return self.unk_token_id if token_id is None else token_id


def load_text_tokenizer(folder: Path) -> TextTokenizer | None:
    """Load the tokenizer of a folder; None if the package tokenizers alone cannot do its work. Imports transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return None
    # Make a copy, because the settings of the original must not change.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return TextTokenizer(
        backend=backend,
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        unk_token_id=tokenizer.unk_token_id,
        model_max_length=tokenizer.model_max_length,
        truncation_side=tokenizer.truncation_side,
    )
