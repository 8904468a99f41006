"""lm-evaluation-harness: its own ways to run exported files, and `rankbook eval --tasks`, measure the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankbook.exporter.export import export
from rankbook.exporter.options import ExportOptions
from tests.ecosystem.environments import needs, run_in
from tests.exporter.checkpoints import make_checkpoint
from tests.tiny import write_text

pytestmark = needs("lm-eval")
TASK = """task: small_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}]
"""
SCRIPT = """
import json, sys
import rankbook
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from pathlib import Path
from rankbook.tools.evaluate.harness import evaluate_tasks
from rankbook.tools.evaluate.options import HarnessOptions

work, metric = Path(sys.argv[1]), "word_perplexity,none"


def theirs(kind, name):
    manager = TaskManager(include_path=str(work / "tasks"))
    given = f"pretrained={work / name}"
    done = simple_evaluate(kind, given, ["small_text"], bootstrap_iters=0, device="cpu", task_manager=manager)
    return done["results"]["small_text"][metric]


def own(name):
    options = HarnessOptions(tasks=("small_text",), task_folder=work / "tasks")
    return evaluate_tasks(rankbook.open_model(work / name), options)["small_text"][metric]


def refused(function, *given):
    try:
        return str(function(*given))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


ways = (("hf", "checkpoint"), ("onnxruntime", "onnx"), ("onnxruntime-genai", "onnx"))
found = {kind: theirs(kind, name) for kind, name in ways} | {name: own(name) for name in ("checkpoint", "onnx")}
errors = [refused(own, "last"), refused(theirs, "onnxruntime", "last"), refused(theirs, "onnxruntime-genai", "last")]
print(json.dumps([found, errors]))
"""


def test_every_way_gives_the_same_word_perplexity(tmp_path: Path):
    """The harness with transformers, ONNX Runtime or GenAI, and `rankbook eval --tasks` of both folders.

    All of them need the logits of every position: with those of the last alone each ends with an error, `rankbook
    eval` with a sentence.
    """
    model = {"hidden_size": 64, "initializer_range": 0.1}
    checkpoint = make_checkpoint(tmp_path, "llama", bits=4, model=model)
    export(checkpoint, tmp_path / "onnx", ExportOptions(logits="all", graph="ort"))
    export(checkpoint, tmp_path / "last", ExportOptions(graph="ort"))
    text = write_text(tmp_path / "text.txt", 600).read_text()
    rows = [json.dumps({"text": text[at : at + 100]}) for at in (0, 200, 400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "small.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    found, errors = json.loads(run_in("lm-eval", SCRIPT, tmp_path).splitlines()[-1])
    assert set(found) == {"hf", "onnxruntime", "onnxruntime-genai", "checkpoint", "onnx"}
    assert max(found.values()) == pytest.approx(min(found.values()), rel=1e-4), found
    assert "gives the logits of the last position only" in errors[0]
    assert all(error.startswith("IndexError") for error in errors[1:]), errors
