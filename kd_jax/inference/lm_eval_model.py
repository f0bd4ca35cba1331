"""The model `kd_jax` of the lm-eval harness, with the scores and answers of its `hf` model.

Importing this module registers the model and needs the `eval` extra:
`lm_eval.simple_evaluate("kd_jax", "pretrained=FOLDER_OR_WORKDIR,dtype=float32", tasks=[...])`.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    Collator,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from kd_jax.config import MeshConfig, UserError
from kd_jax.data.chat import chat_template_of
from kd_jax.inference.drawing import Sampling
from kd_jax.inference.likelihoods import Request, Scorer, score
from kd_jax.inference.load import describe_dtype, load_model, open_model
from kd_jax.inference.prompts import stop_tokens, template_stops, text_stops
from kd_jax.inference.sampling import generate
from kd_jax.inference.unstacking import unstack_layers
from kd_jax.parallel.mesh import make_mesh, traits
from kd_jax.setup.model_files import ModelFiles, shared_vocab
from kd_jax.setup.runtime import start_jax

ROW_TOKENS = 512
MAX_NEW_TOKENS = 256  # lm-eval's default


@register_model("kd_jax")
class KdJaxLM(TemplateLM):
    """A Hugging Face folder or the workdir of a run.

    Contexts are truncated on the left to max_length. Equal requests are run once; requests with a
    common context share its forward pass.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        step: int | None = None,
        student_path: str | None = None,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        compilation_cache: str | None = "~/.cache/kd_jax/xla",
    ):
        """Loads the model.

        Args:
          pretrained: Hugging Face folder, hub id, output of convert.from_hf, or a workdir.
          dtype: dtype of weights and matrix products: bfloat16, float32, or auto, the faster one.
          step: checkpoint of the workdir; None: the latest.
          student_path: the run's student where it is now; None: where the run had it.
          batch_size: rows of 512 tokens per batch over all devices, and prompts per batch.
          max_length: context length in tokens; None: config.json's.
          add_bos_token: encode texts with special tokens; None: the tokenizer's setting.
          prefix_token_id: token in place of an empty context; None: BOS, or else EOS.
          chat_template_args: more variables of the chat template.
          compilation_cache: folder of compiled programs; None disables it.
        """
        super().__init__()
        model = open_model(pretrained, dtype, step, student_path=student_path)  # type: ignore[arg-type]
        folder = model.files.folder
        start_jax(compilation_cache)
        mesh = make_mesh(MeshConfig(), jax.device_count())
        if line := describe_dtype(dtype, mesh):  # type: ignore[arg-type]
            print(line, file=sys.stderr)
        models = load_model(model, mesh)
        self.tokenizer = _tokenizer(model.files, add_bos_token)
        self.tokenizer.chat_template = model.files.tokenizer.chat_template  # the run's
        self.stop_tokens = stop_tokens(folder, self.tokenizer)
        self.stop_texts: list[str] = []
        if model.workdir is not None:
            data = dataclasses.replace(model.config.data, chat_template=None)  # it has the run's
            template = chat_template_of(data, self.tokenizer)
            ends, self.stop_texts = template_stops(self.tokenizer, template, data.date)
            self.stop_tokens |= ends
        self.max_length = max_length or _max_length(folder, self.tokenizer)
        self.add_bos_token = add_bos_token
        self.custom_prefix_token_id = prefix_token_id
        self.chat_template_args = chat_template_args or {}
        self.prompts_at_once = 16 if batch_size == "auto" else int(batch_size)
        self.scorer = Scorer(
            spec=models.student,
            arrays=models.frozen,
            mesh=mesh,
            vocab_size=shared_vocab(model.files, None).size,
            row_tokens=ROW_TOKENS,
            batch_tokens=traits(mesh).scored_tokens * mesh.size
            if batch_size == "auto"
            else int(batch_size) * ROW_TOKENS,
        )

    # The tokenizer's interface.

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        for token in (self.custom_prefix_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return token
        return self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        if add_special_tokens is None:
            begun = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if begun else self.add_bos_token
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given, **options)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.chat_template_args,
        )

    # Log-likelihoods.

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        places: dict[Request, list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            places.setdefault(self._fit(context, continuation), []).append(i)
        results: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for request, answer in score(self.scorer, list(places)):
                for i in places[request]:
                    results[i] = tuple(answer)
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                bar.update(len(places[request]))
        return results

    def _fit(self, context: list[int], continuation: list[int]) -> Request:
        """Returns a request with its context truncated on the left to the model's length."""
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"lm-eval: expected continuations of 1 to {self.max_length} tokens (context "
                f"length), got {len(continuation)}: "
                f"{self.tokenizer.decode(continuation[:20])!r}"
            )
        context = context[-(self.max_length + 1 - len(continuation)) :]
        return tuple(context), tuple(continuation)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (value, _) in zip(owners, scores, strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Generation.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        unstack_layers(self.scorer.spec, self.scorer.arrays)  # once, not for each batch
        asked = [request.args for request in requests]
        # Answers of one batch have equal options; the longest prompts come first.
        collator = Collator(asked, lambda args: -len(self._prompt(args[0])), group_by="gen_kwargs")
        results = []
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for batch in collator.get_batched(n=self.prompts_at_once):
                prompts = [self._prompt(context) for context, _ in batch]
                texts = self._answer(prompts, batch[0][1])
                for args, text in zip(batch, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", args, text)
                results += texts
                bar.update(len(batch))
        return collator.get_original(results)

    def _prompt(self, context: str) -> list[int]:
        begun = has_bos_prefix(context, self.tokenizer.bos_token)
        return self.tok_encode(context, add_special_tokens=False if begun else self.add_bos_token)

    def _answer(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Returns the texts that follow the prompts, each up to its stop text."""
        options = normalize_gen_kwargs(options, MAX_NEW_TOKENS)  # type: ignore[assignment]
        until = [text for text in options.pop("until") if text] + self.stop_texts
        room = self.max_length - options.pop("max_gen_toks")
        if room < 1:
            raise UserError(
                f"max_gen_toks: expected below {self.max_length} (context length), got "
                f"{self.max_length - room}"
            )
        steps = generate(
            self.scorer.spec,
            self.scorer.arrays,
            [prompt[-room:] for prompt in prompts],
            max_new_tokens=self.max_length - room,
            stop_tokens=self.stop_tokens | text_stops(self.tokenizer, until),
            sampling=_sampling(options),
        )
        rows: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(rows)
        recent = 4 * max(map(len, until), default=0) + 8  # tokens of the longest stop text
        for step in steps:
            for r, token in enumerate(step):
                if token is None:
                    ended[r] = True
                elif not ended[r]:
                    rows[r].append(token)
                    text = self._text(rows[r][-recent:])
                    ended[r] = any(stop in text for stop in until)
            if all(ended):
                break
        return [postprocess_generated_text(self._text(row), until, None) for row in rows]

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _tokenizer(files: ModelFiles, add_bos_token: bool | None) -> Any:
    if add_bos_token is None:
        return files.tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        files.folder, local_files_only=True, trust_remote_code=False, add_bos_token=add_bos_token
    )


def _max_length(folder: Path, tokenizer: Any) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return resolve_max_length(config, tokenizer)


def _sampling(options: dict[str, Any]) -> Sampling:
    """Returns the sampling options; raises UserError for an unknown one."""
    known = {"do_sample", "temperature", "top_k", "top_p"}
    if unknown := sorted(options.keys() - known):
        raise UserError(
            f"generation_kwargs: expected until, max_gen_toks or {', '.join(sorted(known))}, got "
            + ", ".join(unknown)
        )
    if not options.pop("do_sample"):
        return Sampling()
    return Sampling(**options)
