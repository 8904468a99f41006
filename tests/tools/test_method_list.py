"""The methods and their options, as the command line lists them."""

from __future__ import annotations

import dataclasses

import pytest

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.methods import METHODS
from rankbook.calibration.settings import method_names
from rankbook.tools import errors, method_list
from tests.tools.files import run_cli, stdout_json


def test_the_names_that_help_shows_are_those_of_the_methods():
    assert set(method_names()) == set(METHODS)


def test_every_method_says_what_it_does_and_each_of_its_fields_is_an_option(capsys):
    assert run_cli("methods", "--json") == 0
    found = stdout_json(capsys)
    assert [entry["name"] for entry in found] == sorted(METHODS)
    for entry in found:
        assert entry["summary"]
        assert "arXiv" in entry["source"] or entry["name"] == "rtn"
        fields = [field.name for field in dataclasses.fields(METHODS[entry["name"]].config_type)]
        assert [item["name"] for item in entry["options"]] == fields
        # What a run without flags takes: the method's bits, and a group size that fits the layers.
        taken = {**dataclasses.asdict(QuantizeOptions(method=entry["name"]).method_config()), "group_size": "auto"}
        assert {item["name"]: item["default"] for item in entry["options"]} == taken
        assert all(item["text"] for item in entry["options"])


def test_options_of_one_method(capsys):
    assert run_cli("methods", "lrq") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "options of lrq" in text
    assert "Lee et al. 2024, arXiv 2407.11534" in text
    entry = {item.name: item for item in method_list.find("lrq").options}
    assert entry["format"].flag == "--weight-format"
    assert entry["compute"].flag == ""
    assert entry["compute"].choices == ("auto", "float32", "bfloat16")


def test_help_of_quantize_lists_the_options_of_the_method_that_is_named(capsys):
    with pytest.raises(SystemExit):
        run_cli("quantize", "--method", "lrq", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "method lrq: low-rank weight-scaling matrices" in text
    assert "scale_rate step size of the grid's scales; 0 derives it from the steps (default: 0.0)" in text
    assert "fit_rounds" not in text
    assert "flags above that it reads, with its defaults: --effort default, --bits 3, --group-size auto" in text


@pytest.mark.parametrize("command", [["methods", "lqr"], ["quantize", "--method=lqr", "--help"]])
def test_an_unknown_method_is_named_with_those_near(command, capsys):
    assert run_cli(*command) == errors.USAGE
    said = capsys.readouterr().err
    assert "method 'lqr' is unknown; choose one of awq, flexround" in said
    assert "did you mean" in said
    assert "lrq" in said.rpartition("did you mean")[2]


def test_an_unknown_option_of_a_method_is_named_with_those_near(tmp_path, capsys):
    command = ["quantize", tmp_path, "--method", "lcq", "-o", tmp_path / "q", "--method-option", "step=2"]
    assert run_cli(*command) == errors.USAGE
    said = capsys.readouterr().err
    assert "method 'lcq' has no options ['step']; it has batch, bits" in said
    assert "did you mean steps" in said
