"""``rankbook serve``: answer OpenAI-compatible requests with an exported file."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankbook.calibration.option import argument, option
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import MissingError, UsageError
from rankbook.tools.kernel_options import KernelOptions
from rankbook.tools.runtimes import Setting, open_model

KEY = "RANKBOOK_API_KEY"
"""Environment variable with the API key: a flag would show it in the list of processes."""


@dataclass(frozen=True, kw_only=True)
class Serve(KernelOptions, Common):
    """Options of the verb."""

    model: str = argument("folder exported with --graph ort or static, or an engine folder", metavar="MODEL")
    host: str = option("127.0.0.1", "address to listen on; any but a loopback address needs an API key", metavar="HOST")
    port: int = option(8000, "port to listen on", metavar="N", least=0)
    name: str | None = option(None, "name of the model in requests; default: the folder's name", metavar="NAME")
    tokenizer: str | None = option(None, "take the tokenizer from this model when MODEL has none", metavar="MODEL")
    slots: int = option(8, "sequences that are decoded at the same time", metavar="N", least=1)
    max_context: int | None = option(
        None,
        "longest sequence, prompt and answer together, in tokens; default: what the model allows, at most 4096",
        metavar="N",
        least=2,
    )
    queue: int = option(64, "requests that may wait; further ones get status 429", metavar="N", least=1)
    max_new_tokens: int = option(
        1024, "longest answer in tokens, and the limit of a chat that sets none", metavar="N", least=1
    )
    max_body: int = option(1 << 20, "largest body of a request, in bytes", metavar="N", least=1)
    api_key_file: Path | None = option(
        None, f"file with the API key that requests must send; or set {KEY}", metavar="FILE"
    )
    threads: int | None = option(
        None,
        "CPU threads of the model; default: all cores but one, which the server itself needs",
        metavar="N",
        least=1,
    )


def run(options: Serve) -> Outcome:
    """Serve until Ctrl-C or a polite kill."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise MissingError(f"serve needs {', '.join(missing)}: pip install 'rankbook[serve]'")
    key = _api_key(options)
    if not key and not _is_loopback(options.host):
        raise UsageError(
            f"--host {options.host} can be reached from other machines; give an API key with --api-key-file or {KEY},"
            " or listen at 127.0.0.1"
        )
    import uvicorn

    from rankbook.tools.serve.app import create_app

    served = prepare(options, key)
    console = Console(quiet=options.quiet)
    console.log(
        f"serving {served.name} at http://{options.host}:{options.port}/v1 with {options.slots} slots; Ctrl-C ends"
    )
    level = "warning" if options.quiet else "info"
    uvicorn.run(create_app(served), host=options.host, port=options.port, log_level=level, timeout_graceful_shutdown=5)
    now = served.scheduler.counters
    return Outcome(
        {"steps": now.steps, "prompt_tokens": now.prompt_tokens, "tokens": now.tokens, "requests": now.finished}
    )


def prepare(options: Serve, key: str = "") -> Any:
    """Open the model and start decoding; return what `rankbook.tools.serve.app.create_app` takes.

    Raises:
        UsageError: A file whose cache is not written in place, or no tokenizer.
    """
    from rankbook.tools.generation.settings import GenerationSettings
    from rankbook.tools.serve.app import Limits, Served
    from rankbook.tools.serve.scheduler import Scheduler
    from rankbook.tools.serve.slots import slots_of

    # ONNX Runtime's threads wait for each other in every layer: where the server's own thread, or a client on this
    # machine, takes a core from one of them, all others stand still.
    setting = Setting(options.threads or max(1, len(os.sched_getaffinity(0)) - 1))
    model = open_model(options.model, options.chosen_kernels(), setting, tokenizer=options.tokenizer)
    if model.tokenizer is None:
        raise UsageError(f"{model.name} has no tokenizer; name a model that has it: --tokenizer MODEL")
    slots = slots_of(model, options.slots, options.max_context)
    settings = GenerationSettings.of(model.generation_config, model.tokenizer)
    scheduler = Scheduler(slots, model.tokenizer, settings, queue=options.queue)
    limits = Limits(options.max_body, options.max_new_tokens)
    return Served(options.name or Path(options.model).resolve().name, model.tokenizer, scheduler, limits, key)


def _api_key(options: Serve) -> str:
    if options.api_key_file is None:
        return os.environ.get(KEY, "")
    key = options.api_key_file.read_text(encoding="utf-8").strip()
    if not key:
        raise UsageError(f"{options.api_key_file} is empty; put the key into it")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


COMMAND = Command(
    name="serve",
    summary="serve a model over an OpenAI-compatible API, many requests at once",
    example="rankbook serve model-onnx --port 8000 --slots 8",
    options=Serve,
    run=run,
)
