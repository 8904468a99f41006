"""Files that take embedded tokens are written of models alone that need no more than these."""

from __future__ import annotations

import pytest
import torch

from rankbook.exporter import embedded
from rankbook.exporter.exportable import _blank
from rankbook.exporter.skeleton import Skeleton, build
from rankbook.tools.dev.family_models import configuration


def skeleton(family: str) -> Skeleton:
    config = configuration(family)
    return build(_blank(config), torch.float32, config)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma3n_text", "model.embed_tokens_per_layer is looked up with them; export with --inputs ids"),
        ("gemma4_text", "it cannot be called without them; export with --inputs ids"),
    ],
)
def test_models_that_look_up_more_with_the_numbers_of_tokens_are_refused(family: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        embedded.require(skeleton(family))


@pytest.mark.parametrize("family", ["llama", "opt", "mamba"])  # positions are looked up in any case
def test_others_are_not(family: str) -> None:
    embedded.require(skeleton(family))
