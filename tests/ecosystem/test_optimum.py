"""Optimum's `ORTModelForCausalLM`, with the transformers that it pins, runs exported folders as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankbook.calibration.checkpoint.extras import LIBRARY
from rankbook.exporter.export import export
from rankbook.exporter.options import ExportOptions
from rankbook.tools.generation.loop import GenerateOptions, generate
from rankbook.tools.runtimes import open_model
from tests.ecosystem.environments import needs, refused_in, run_in
from tests.exporter.checkpoints import make_checkpoint

pytestmark = needs("optimum")
PROMPTS = ("the quick", "brown fox jumps over", "a")
SCRIPT = f"""
import json, sys
from pathlib import Path
import onnxruntime
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

folder, prompts = sys.argv[1], sys.argv[2:]
options = onnxruntime.SessionOptions()
if (library := Path(folder, {LIBRARY!r})).is_file():
    options.register_custom_ops_library(str(library))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)
found = []
for prompt in prompts:
    given = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1]:].tolist()
    found.append(tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens)
print(json.dumps(found))
"""


@pytest.mark.parametrize("graph", ["standard", "ort"])
def test_the_same_tokens_as_generate(graph, tmp_path: Path):
    folder = make_checkpoint(tmp_path, "llama", bits=4, model={"hidden_size": 64, "initializer_range": 0.2})
    export(folder, tmp_path / "out", ExportOptions(graph=graph))
    model = open_model(tmp_path / "out", "bodies")
    wanted = [list(generate(model, prompt, GenerateOptions(max_new_tokens=12)).ids) for prompt in PROMPTS]
    assert json.loads(run_in("optimum", SCRIPT, tmp_path / "out", *PROMPTS).splitlines()[-1]) == wanted


ALONE = """
import sys
import transformers

transformers.pipeline("text-generation", sys.argv[1])
"""


def test_a_checkpoint_is_refused_where_rankbook_is_not_installed(tmp_path: Path):
    """That version of transformers would warn, skip the packed layers and go on with random numbers in their place."""
    folder = make_checkpoint(tmp_path, "llama", bits=4)
    assert "rankbook" in refused_in("optimum", ALONE, folder)
