"""Writes plugins/csrc/contract.h (``python -m rankbook.tools.contract_header``): C++ spells no operator string."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rankbook.plugins import attention_contract, contract, layout, merged, row_contract


def header_text() -> str:
    """Return the header that belongs to the contract."""
    lines = [
        "#pragma once",
        "",
        "// Generated from plugins/contract.py: `python -m rankbook.tools.contract_header`. A test finds a stale one.",
        "",
        "namespace rankbook::contract {",
        "",
        f'inline constexpr const char* kDomain = "{contract.DOMAIN}";',
        f'inline constexpr const char* kPluginNamespace = "{contract.PLUGIN_NAMESPACE}";',
        f'inline constexpr const char* kPluginVersion = "{contract.PLUGIN_VERSION}";',
        f"inline constexpr int kBits[] = {{{', '.join(map(str, layout.BITS))}}};",
        f'inline constexpr const char* kMerged = "{merged.SUFFIX}";',
        f"inline constexpr int kMostMerged = {merged.MOST};",
        f"inline constexpr const char* kMergedParts[] = {{{_quoted(merged.PARTS)}}};",
    ]
    attributes = contract.OPERATORS[contract.op_name(contract.MATMUL, layout.BITS[0])].attributes
    names = [attribute.name for attribute in attributes if attribute.kind == "int"]
    lines += [f'inline constexpr const char* k{_camel(name)} = "{name}";' for name in names]
    for kind in contract.KINDS:
        operator = contract.OPERATORS[contract.op_name(kind, layout.BITS[0])]
        name, suffix = operator.name.split(str(operator.bits), 1)
        lines += ["", f"struct {kind} {{  // {name}<bits>{suffix}"]
        lines += [
            f'  static constexpr const char* kName = "{name}";',
            f'  static constexpr const char* kSuffix = "{suffix}";',
        ]
        lines.append(
            f"  enum Input {{ {', '.join(f'k{_camel(name)}' for name in operator.input_names())}, kInputCount }};"
        )
        lines += [f"  static constexpr const char* kInputs[] = {{{_quoted(operator.input_names())}}};", "};"]
    return "\n".join([*lines, *_attention(), *_rows(), "", "}  // namespace rankbook::contract", ""])


def _rows() -> list[str]:
    lines: list[str] = []
    for operator in row_contract.OPERATORS.values():
        lines += [
            "",
            f"struct {operator.name} {{",
            f'  static constexpr const char* kName = "{operator.name}";',
            f"  enum Input {{ {', '.join(f'k{_camel(name)}' for name in operator.inputs)}, kInputCount }};",
            f"  enum Output {{ {', '.join(f'kOut{_camel(name)}' for name in operator.outputs)}, kOutputCount }};",
            f"  static constexpr const char* kInputs[] = {{{_quoted(operator.inputs)}}};",
            *(f'  static constexpr const char* k{_camel(name)} = "{name}";' for name in operator.floats),
            "};",
        ]
    return lines


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def header_path() -> Path:
    """Return where the header lies in a checkout."""
    return Path(contract.__file__).resolve().parent / "csrc" / "contract.h"


def _attention() -> list[str]:
    inputs = [*attention_contract.INPUTS, *attention_contract.ROTARY_INPUTS]
    lines = [
        "",
        "struct Attention {",
        f'  static constexpr const char* kName = "{attention_contract.NAME}";',
        f"  static constexpr int kLargestHead = {attention_contract.LARGEST_HEAD};",
        f"  static constexpr int kHeadStep = {attention_contract.HEAD_STEP};",
        f"  static constexpr int kRotaryStep = {attention_contract.ROTARY_STEP};",
        f"  enum Input {{ {', '.join(f'k{_camel(name)}' for name in inputs)}, kInputCount }};",
        f"  enum Output {{ {', '.join(f'k{_camel(name)}' for name in attention_contract.OUTPUTS)}, kOutputCount }};",
        f"  static constexpr const char* kInputs[] = {{{_quoted(inputs)}}};",
    ]
    names = [*attention_contract.INT_ATTRIBUTES, *attention_contract.FLOAT_ATTRIBUTES]
    return [*lines, *(f'  static constexpr const char* k{_camel(name)} = "{name}";' for name in names), "};"]


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


if __name__ == "__main__":
    header_path().write_text(header_text(), encoding="utf-8")
