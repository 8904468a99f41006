"""What one model family does, and docs/families.md from the rows of all of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from rankbook.tools.dev.family_models import FAMILIES, FURTHER
from rankbook.tools.report import Table

SERVED = ("standard", "ort", "static", "fp16")
"""Exports that are compared with PyTorch: the three graphs in float32, and the standard one in half precision."""
DEPLOYED = ("genai", "engine")
"""What else a checkpoint can be asked for: ONNX Runtime GenAI with the file of ``ort``, compared too, and an engine."""
_SAME = 1e-5
"""Largest difference after a reload, relative to the largest logit: sums of float32 in another order."""
_REFUSED = "refused"
ALL = (*FAMILIES, *FURTHER)


@dataclass
class Row:
    """What one family does.

    Attributes:
        family: Its ``model_type``.
        packed: Share of the weights in the blocks that are packed; None where quantization fails.
        cannot_export: What `quantize` says before it begins.
        reload: Largest relative difference of logits after a reload, from those of the original with decoded weights.
        errors: Largest relative difference of logits, with and without a cache, by export; None where it fails.
        passed: Whether that is within tolerance, by export; of an engine whether it was built.
        kept: Why layers of the export ``ort`` keep the standard attention, by number.
        reasons: Why a step ended, by step.
        seconds: Wall time.
        engine: What the builder made of attention.
    """

    family: str
    packed: float | None = None
    cannot_export: str = ""
    reload: float | None = None
    errors: dict[str, float | None] = field(default_factory=dict)
    passed: dict[str, bool] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    engine: str = ""

    @property
    def wrong(self) -> bool:
        """Whether something was written that computes other numbers: worse than any refusal."""
        stale = self.reload is not None and self.reload > _SAME
        return stale or any(error is not None and not self.passed[name] for name, error in self.errors.items())

    @property
    def served(self) -> bool:
        """Whether the family passes quantize, reload, export and parity on both graphs."""
        return not self.wrong and all(self.passed.get(name) for name in ("standard", "ort"))


def document(rows: Mapping[str, Row]) -> str:
    """Return docs/families.md."""
    found, listed, further = (
        [rows[family] for family in names if family in rows] for names in (ALL, FAMILIES, FURTHER)
    )
    wrong = sum(row.wrong for row in found)
    tried = [row for row in found if "static" in row.passed]
    fixed = sum(row.passed["static"] for row in tried)
    missing = [f"`{family}`" for family in ALL if family not in rows]
    said = sum(bool(row.cannot_export or "quantize" in row.reasons) for row in found)
    columns = ("family", "packed", "reload", *SERVED, *DEPLOYED, "why not")
    lines = [
        "# Model families",
        "<!-- Made by `python -m rankbook.tools.dev.families`. -->",
        "The decoder families of transformers, each tried as a tiny random model (two blocks, 64 features, 4 experts of"
        " which 2 are used, attention windows shorter than the sequence), quantized with RTN at 4 bits in groups of 32."
        " *Packed* is the share of the blocks' weights that is quantized. *Reload* says whether the loaded checkpoint"
        " gives the logits of the original model with the decoded weights. The next five columns are differences of"
        " logits between PyTorch and ONNX Runtime, relative to the largest logit, with or without a cache, whichever is"
        " larger: `export`, `export --graph ort`, `export --graph static`, `export --dtype fp16`, and the file of"
        " `--graph ort` in ONNX Runtime GenAI. *Engine* is `rankbook build` (the static graph in fp16) for SM86 without"
        " plugins, built by TensorRT-RTX and not run on a GPU yet: *fused* means one fused attention kernel for every"
        " layer with keys and values, and caches written in place; *with plugins* means that the builder crashes"
        " without them (TensorRT-RTX 1.7.1, where a recurrence and the loop of a body for experts meet). `*`: some"
        " layers keep the standard attention, because ONNX Runtime's operator cannot express theirs. `-`: not"
        " measured.",
        f"Of the {len(listed)} families on the original list, {sum(row.served for row in listed)} pass quantization,"
        " reload, export and parity on the graphs `standard` and `ort`; of"
        f" {len(further)} families added later, {sum(row.served for row in further)} do. Of {len(tried)} families tried"
        f" on the graph `static`, {fixed} pass. {said} cannot be quantized, or cannot be exported, which `quantize`"
        f" says before it begins; {wrong} give wrong results. The last column has the reasons.",
        *([f"Not run: {', '.join(missing)}."] if missing else []),
        Table("", columns, [_cells(row) for row in found]).markdown(),
    ]
    return "\n\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    packed = "-" if row.packed is None else f"{row.packed:.0%}"
    reload = "-" if row.reload is None else "same" if row.reload <= _SAME else f"**{row.reload:.0e}**"
    exports = [_verdict(row, name) for name in (*SERVED, *DEPLOYED)]
    own = [f"{name}: {row.reasons[name]}" for name in DEPLOYED if name in row.reasons]
    others = [reason for name, reason in row.reasons.items() if name not in DEPLOYED]
    why = dict.fromkeys([row.cannot_export] if row.cannot_export else [*others, *own])
    return f"`{row.family}`", packed, reload, *exports, "; ".join(why).replace("|", "\\|").replace("\n", " ")


def _verdict(row: Row, name: str) -> str:
    error = row.errors.get(name)
    if error is None and row.passed.get(name):
        return row.engine or "built"
    if error is None:
        return "-" if name not in row.passed and (name in DEPLOYED or not row.cannot_export) else _REFUSED
    mark = " *" if row.kept and name == "ort" else ""
    return f"{error:.0e}{mark}" if row.passed[name] else f"**{error:.0e}**"


def without_result(page: str, rows: Collection[str]) -> list[str]:
    """Return the families of a written document that ``rows`` would leave out."""
    return [family for family in re.findall(r"^\| `([^`]+)`", page, re.MULTILINE) if family not in rows]


def changed(page: str, rows: Mapping[str, Row]) -> list[str]:
    """Return the families that a written document says other things of: packed, served or refused, by column.

    What was not asked for ("-") is no change; that a family is not packed or not read back any more is one.
    """
    known = {cells[0]: cells for cells in map(_split, page.splitlines()) if cells}
    found = []
    for family, row in rows.items():
        now = _cells(row)
        kinds = zip(map(_kind, known.get(now[0], now)[1:-1]), map(_kind, now[1:-1]), strict=True)
        if any(old != new and (place < 2 or "-" not in (old, new)) for place, (old, new) in enumerate(kinds)):
            found.append(family)
    return found


def _split(line: str) -> list[str]:
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
    return cells[1:-1] if line.startswith("| `") else []


def _kind(cell: str) -> str:
    """Return what a cell says, without its number; shares stay as they are."""
    return "wrong" if cell.startswith("**") else "right" if re.match(r"\de-\d", cell) else cell
