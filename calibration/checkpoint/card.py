"""The model card: README.md of a checkpoint or of an exported folder, made of what is known about it.

What the README of the source says stays: its front matter (licence, languages, ...) at the top, its text below.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from rankbook.calibration.checkpoint.extras import GENAI_CONFIG
from rankbook.calibration.checkpoint.files import write_text_atomic
from rankbook.calibration.notes import note
from rankbook.plugins.layer_spec import LayerSpec

CARD = "README.md"
BESIDE = "README.source.md"
"""Where a README of the source goes that is no text."""

_BEGIN, _END = "<!-- card of rankbook: begin -->", "<!-- card of rankbook: end -->"
_OLD = re.compile(f"{_BEGIN}.*?{_END}\n*", re.DOTALL)
_FIRST, _LAST = "<!-- results of rankbook: begin -->", "<!-- results of rankbook: end -->"
_RESULTS = re.compile(f"{_FIRST}.*?{_LAST}\n*", re.DOTALL)
_USAGE = "## How to run\n"
_MEASURES = {
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the unquantized model",
    "kl": "KL divergence from the unquantized model, nats",
    "top1_agreement": "same most likely token as the unquantized model",
}
_FRONT = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*$\n*", re.DOTALL | re.MULTILINE)
_CHECKPOINT = """
```sh
pip install rankbook
rankbook generate FOLDER --prompt "Once upon a time"
rankbook export FOLDER -o onnx      # one ONNX file for ONNX Runtime and TensorRT
```

```python
import rankbook

model, tokenizer = rankbook.load("FOLDER")
```

After `import rankbook`, `AutoModelForCausalLM.from_pretrained` of transformers loads the folder too.
"""
_EXPORTED = """
```sh
pip install 'rankbook[cpu]'
rankbook generate FOLDER --prompt "Once upon a time"
```

`model.onnx` is one file with the operators of its packed layers as functions of standard ONNX.
"""
_SERVED = """
```sh
vllm serve FOLDER
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

transformers needs the package compressed-tensors; rankbook is not needed.
"""
_GENAI = """
ONNX Runtime GenAI runs the folder as it is (`pip install onnxruntime-genai`):

```python
import onnxruntime_genai as og

model = og.Model("FOLDER")
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=64)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""


def write_checkpoint_card(folder: Path, layers: Mapping[str, LayerSpec], manifest: Mapping[str, Any]) -> None:
    """Write the card of a checkpoint into its folder, in front of the README of the source where there is one.

    Args:
        folder: Holds what was copied from the source.
        layers: Packed layers by name.
        manifest: What ``rankbook.json`` says.
    """
    base = str(manifest.get("source", {}).get("hub_id", ""))
    _write(folder, _title(manifest), _facts(layers, manifest), _CHECKPOINT, base)


def write_export_card(
    folder: Path, layers: Mapping[str, LayerSpec], manifest: Mapping[str, Any], settings: Mapping[str, str]
) -> None:
    """Write the card of an exported folder in place of its checkpoint's; ``settings`` say what the file is."""
    usage = _EXPORTED + (_GENAI if (folder / GENAI_CONFIG).is_file() else "")
    _write(folder, f"{_title(manifest)}, ONNX", {**_facts(layers, manifest), **settings}, usage)


def write_served_card(
    folder: Path, layers: Mapping[str, LayerSpec], manifest: Mapping[str, Any], settings: Mapping[str, str]
) -> None:
    """Write the card of a folder in a format that others read; see `write_export_card`."""
    _write(folder, _title(manifest), {**_facts(layers, manifest), **settings}, _SERVED)


def put_results(folder: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Put a table of results into the card of a folder, in place of an earlier one; a folder without a card gets one.

    Args:
        folder: A checkpoint or an exported folder.
        results: As `rankbook.calibration.checkpoint.results` keeps them.
    """
    front, text = _source(folder / CARD, _RESULTS)
    place = max(0, text.find(_USAGE, text.find(_BEGIN))) if _BEGIN in text else 0
    rows = "\n".join(f"| {' | '.join(map(_cell, row))} |" for result in results for row in _rows(result))
    table = f"## Results\n\n| measured on | measure | value | computed by |\n|---|---|---|---|\n{rows}\n"
    commands = "\n".join(f"{result.get('command', '')}  # {_made(result)}" for result in results)
    block = f"{_FIRST}\n{table}\n```sh\n{commands}\n```\n{_LAST}\n\n"
    head = f"---\n{front}---\n\n" if front else ""
    write_text_atomic(folder / CARD, head + text[:place] + block + text[place:])


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield what was measured on, measure, value and runtime."""
    on = str(result.get("on", ""))
    runtime = str(result.get("runtime", "")) + (", the checkpoint" if result.get("model") == "checkpoint" else "")
    for name, measure in _MEASURES.items():
        if result.get(name) is not None:
            yield on, measure, f"{result[name]:.5g}", runtime
    for task, metrics in result.get("tasks", {}).items():
        for metric, value in metrics.items():
            if isinstance(value, (int, float)):
                yield f"{task}{on and f', {on}'}", metric.removesuffix(",none"), f"{value:.5g}", runtime


def _made(result: Mapping[str, Any]) -> str:
    """Say when a result was measured, and with which versions."""
    found = " ".join(f"{package} {version}" for package, version in result.get("versions", {}).items())
    return f"{result.get('date', '')}, {found}"


def _cell(text: str) -> str:
    """Return text that stays within a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def spread(layers: Iterable[LayerSpec], name: str) -> str:
    """Say how many layers have each value of a property; the value alone where all have it."""
    counts = Counter(getattr(spec, name) for spec in layers)
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{counts[value]} of {value}" for value in sorted(counts))


def _title(manifest: Mapping[str, Any]) -> str:
    """Return the name of the source without its place on the machine that read it."""
    return PurePath(str(manifest.get("source", {}).get("name", ""))).name or "A model"


def _facts(layers: Mapping[str, LayerSpec], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return properties and their values; what another program has dropped from the manifest is left out."""
    own = [spec for spec in layers.values() if not spec.shared_with]
    columns = {"method": "method", "bits of a code": "bits", "group size": "group", "planes of the codebooks": "planes"}
    facts = {what: spread(own, name) for what, name in columns.items()}
    if any(spec.branch_rank for spec in own):
        facts["rank of the error branch"] = spread(own, "branch_rank")
    bits, weights = sum(sum(spec.stored_bits().values()) for spec in own), sum(spec.weights for spec in own)
    facts["stored bits per weight of packed layers"] = f"{bits / weights:.3f} in {len(own)} layers"
    totals = manifest.get("totals", {})
    left = [f"{totals[part]['float_share']:.1%} of the {part}" for part in ("blocks", "model") if part in totals]
    errors = [entry["error"] for entry in manifest.get("layers", {}).values() if entry.get("error") is not None]
    facts |= {"weights left in float": ", ".join(left)} if left else {}
    facts |= {"calibrated on": str(manifest["calibration"])} if "calibration" in manifest else {}
    if errors:
        mean = sum(errors) / len(errors)
        facts["squared error of layer outputs, relative"] = f"mean {mean:.3g}, largest {max(errors):.3g}"
    return facts


def _write(folder: Path, title: str, facts: Mapping[str, str], usage: str, base: str = "") -> None:
    front, text = _source(folder / CARD, _OLD)
    if base and not re.search(r"^base_model\s*:", front, re.MULTILINE):
        front += f"base_model: {base}\nbase_model_relation: quantized\n"
    rows = "\n".join(f"| {what} | {_cell(value)} |" for what, value in facts.items())
    parts = [f"---\n{front}---\n"] if front else []
    parts += [f"{_BEGIN}\n# {title}, quantized\n", f"| | |\n|---|---|\n{rows}\n", f"{_USAGE}{usage}"]
    parts += ["## The model that it was made from\n"] if text else []
    (folder / CARD).write_text("\n".join([*parts, f"{_END}\n", text]), encoding="utf-8")


def _source(path: Path, left_out: re.Pattern[str]) -> tuple[str, str]:
    """Return front matter and text of a README, without what an earlier step put there."""
    try:
        text = left_out.sub("", path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "", ""
    except UnicodeDecodeError:
        path.rename(path.with_name(BESIDE))
        note(f"the model's {CARD} is not UTF-8 text: it is {BESIDE} beside the model card now")
        return "", ""
    found = _FRONT.match(text)
    return (found[1], text[found.end() :]) if found else ("", text)
