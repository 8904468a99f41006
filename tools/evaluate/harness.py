"""Tasks of lm-evaluation-harness, scored by a model of this project on whatever runtime it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rankbook.calibration.notes import note
from rankbook.tools.errors import MissingError, UsageError

if TYPE_CHECKING:
    from rankbook.tools.evaluate.options import HarnessOptions
    from rankbook.tools.runtimes.base import LanguageModel

MOST_NEW = 256
"""Tokens of an answer where the task does not say."""
LONGEST = 2048
"""Positions of a window where nothing limits the model, as in the harness."""


def evaluate_tasks(model: LanguageModel, options: HarnessOptions) -> dict[str, dict[str, Any]]:
    """Return the metrics of each task by name, as the harness names them (``word_perplexity,none``).

    Raises:
        MissingError: The harness is not installed.
        UsageError: It does not know a task, or the model gives the logits of the last position only.
    """
    if find_spec("lm_eval") is None:
        raise MissingError("--tasks needs lm-evaluation-harness: pip install 'rankbook[harness]'")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if options.task_folder is None else str(options.task_folder))
    if unknown := [name for name in options.tasks if not manager.match_tasks([name])]:
        raise UsageError(f"{unknown[0]} is no task of lm-evaluation-harness; `lm-eval ls tasks` lists them")
    scorer = type("RankbookLM", (Scorer, TemplateLM), {})(model)
    found = simple_evaluate(
        scorer,
        tasks=list(options.tasks),
        task_manager=manager,
        limit=options.limit,
        num_fewshot=options.fewshot,
        bootstrap_iters=0,
        log_samples=False,
    )
    scorer.note_cut()
    results: dict[str, dict[str, Any]] = found["results"]
    return results


class Scorer:
    """What the harness asks of a model; joined with its ``TemplateLM`` where that is installed.

    Attributes:
        tokenizer: Of the model.
    """

    def __init__(self, model: LanguageModel) -> None:
        """Hold the model.

        Raises:
            UsageError: It has no tokenizer, or none with a token that begins or ends a text.
        """
        super().__init__()
        self._model, self.tokenizer = model, model.tokenizer
        if self.tokenizer is None:
            raise UsageError(f"{model.name} has no tokenizer; name a model that has it: --tokenizer MODEL")
        if self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None:
            raise UsageError(f"the tokenizer of {model.name} has no token that begins or ends a text")
        self.max_length = model.context or LONGEST
        self._cut = 0

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        ends = self.tokenizer.eos_token_id
        return int(self.tokenizer.bos_token_id if ends is None else ends)

    @property
    def prefix_token_id(self) -> int:
        """Token in front of a text that has nothing before it, as in the harness's own ``hf``."""
        begins = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if begins is None else begins)

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's cache of chats."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text, as the harness's own ``hf`` does.

        Without a word on special tokens the tokenizer decides, as for a prompt: models trained with a token in front
        of every text, like Gemma, are far off without. A text that begins with it (a rendered chat) gets no second one.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def note_cut(self) -> None:
        """Say how many texts lost their beginning."""
        if self._cut:
            note(f"{self._cut} texts of the tasks do not fit {self.max_length} positions: they lost their beginning")

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in requests]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Return the log likelihood of a continuation in nats, and whether it is the most likely one."""
        import numpy as np

        given = [*context, *continuation]
        self._cut += len(given) > self.max_length + 1
        given = given[-(self.max_length + 1) :]
        targets = np.array(given[1:][-len(continuation) :], np.int64)
        scores = self._model.logits(np.array([given[:-1]], np.int64))[0, -len(targets) :].astype(np.float64)
        scores -= scores.max(-1, keepdims=True)
        likelihoods = scores[np.arange(len(targets)), targets] - np.log(np.exp(scores).sum(-1))
        return float(likelihoods.sum()), bool((scores.argmax(-1) == targets).all())

    def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log likelihood of whole texts, in windows that do not overlap."""
        del disable_tqdm
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            found.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return found

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """Return answers, greedily, each up to the first of the texts that end it.

        Raises:
            UsageError: A task wants to sample.
        """
        del disable_tqdm
        from rankbook.tools.generation.loop import GenerateOptions, NextTokens

        answers = []
        for request in requests:
            prompt, how = request.args
            if how.get("do_sample") and how.get("temperature", 1.0):
                raise UsageError("a task that samples gives another result in every run; choose one that does not")
            ends = how.get("until") or []
            ends = [end for end in ([ends] if isinstance(ends, str) else ends) if end]
            most = int(how.get("max_gen_toks", MOST_NEW))
            ids, room = self.tok_encode(prompt), max(1, self.max_length - most)
            self._cut += len(ids) > room
            ids = ids[-room:]
            produced: list[int] = []
            for token in NextTokens(self._model, ids, GenerateOptions(max_new_tokens=most)):
                produced.append(token)
                if any(end in self.tokenizer.decode(produced[-16:]) for end in ends):
                    break
            text = str(self.tokenizer.decode(produced, skip_special_tokens=True))
            answers.append(min((text.partition(end)[0] for end in ends), key=len, default=text))
        return answers
