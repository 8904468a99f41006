"""The public API: what `rankbook` itself offers (``rankbook.quantize``), gathered from where it lies."""

from __future__ import annotations

from rankbook.calibration.driver import run
from rankbook.calibration.driver.options import QuantizeOptions as QuantizeOptions
from rankbook.calibration.driver.report import QuantizeReport as QuantizeReport
from rankbook.calibration.evaluate import EvalResult as EvalResult
from rankbook.calibration.imports.run import ImportReport as ImportReport
from rankbook.calibration.imports.run import import_model as import_model
from rankbook.calibration.methods import METHODS as METHODS
from rankbook.calibration.model import loading
from rankbook.exporter.export import ExportReport as ExportReport
from rankbook.exporter.export import export as export
from rankbook.exporter.options import ExportOptions as ExportOptions
from rankbook.tools.deploy.engine import build as build
from rankbook.tools.deploy.manifest import EngineReport as EngineReport
from rankbook.tools.deploy.options import BuildOptions as BuildOptions
from rankbook.tools.evaluate.options import EvalOptions as EvalOptions
from rankbook.tools.evaluate.options import ParityOptions as ParityOptions
from rankbook.tools.evaluate.parity import ParityReport as ParityReport
from rankbook.tools.evaluate.parity import parity as parity
from rankbook.tools.evaluate.quality import evaluate as evaluate
from rankbook.tools.generation.loop import GenerateOptions as GenerateOptions
from rankbook.tools.generation.loop import Generation as Generation
from rankbook.tools.generation.loop import generate as generate
from rankbook.tools.inspect.inspection import Inspection as Inspection
from rankbook.tools.inspect.inspection import inspect as inspect
from rankbook.tools.runtimes import LanguageModel as LanguageModel
from rankbook.tools.runtimes import Setting as Setting
from rankbook.tools.runtimes import open_model as open_model

quantize = run.quantize_model
load = loading.load_model
