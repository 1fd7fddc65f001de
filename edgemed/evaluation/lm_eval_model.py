"""Our engines as a model of lm-evaluation-harness: `edgemed lm-eval --model edgemed --model_args
engine=DIR --tasks medqa_4options`.

What is scored is the very file that ships, ONNX or GGUF, through the same session as everywhere
else; contexts that requests share are read once. Only lm_eval imports this module; it needs no
torch, unless a task of lm_eval's does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.engines.engine import open_engine
from edgemed.errors import EdgemedError, need
from edgemed.evaluation.option_scoring import PrefixReader
from edgemed.inference.decoding import Sampling, continued, log_softmax
from edgemed.models.chat_template import begun_answer_text, chat_template, chat_text
from edgemed.models.tokenizer import encode, encode_text, special_tokens

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM
else:
    TemplateLM = need("lm_eval.api.model", "lm-eval").TemplateLM
# Rows of scores held at once: a thousand rows over a large vocabulary would be gigabytes.
ROWS = 64
FOLLOWED = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class EngineLM(TemplateLM):
    """One engine, one sequence at a time. Truncation, prefix token and rolling windows are those of
    lm_eval's own `hf` model, so that scores compare.
    """

    def __init__(
        self,
        engine: str,
        threads: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ):
        """engine: its directory; every file is hashed, an altered one refused. threads: None for
        the physical cores available. device is lm_eval's own default ('cuda:0' whether there is one
        or not) and says nothing: an engine runs where its target runs it.

        add_bos_token, prefix_token_id: as those of lm_eval's `hf` model. A text gets the tokens its
        tokenizer adds (None), a begin token (True) or nothing (False), unless it begins with the
        prefix token already, as a chat template writes it.

        Raises EdgemedError where it is no engine with a language-model head and a tokenizer, or a
        batch is asked for.
        """
        super().__init__()
        if str(batch_size) not in ("1", "auto"):
            raise EdgemedError(
                f"an engine reads one sequence at a time, not {batch_size}",
                "Leave --batch_size out",
            )
        self.engine = open_engine(engine, check=True)
        if self.engine.head != "lm" or self.engine.random_weights:
            what = (
                "random weights and no tokenizer"
                if self.engine.random_weights
                else f"a '{self.engine.head}' head"
            )
            raise EdgemedError(
                f"{engine} has {what}, lm_eval scores text",
                "Give an engine of a trained language model",
            )
        self.tokenizer = self.engine.tokenizer()
        self.session = self.engine.open(threads)
        self.max_length = self.session.context
        self.max_gen_toks = max_gen_toks
        self.batch_size = 1
        self.reader = PrefixReader(self.session)
        self.add_bos_token = add_bos_token
        self.custom_prefix_token_id = prefix_token_id
        self.named = special_tokens(self.engine.path)
        self.template: str | None = None
        self.context: list[int] = []
        self.first = np.empty(0)

    @property
    def eot_token_id(self) -> int:
        eos = self._eos()
        if eos is None:
            raise EdgemedError(
                f"{self.engine.path} names no end-of-text token, which this task puts before every"
                " text",
                "Choose a task with a context",
            )
        return eos

    def _eos(self) -> int | None:
        """The tokenizer's end token, else that of the model's configuration."""
        eos = self.token_id("eos_token")
        return self.engine.eos if eos is None else eos

    def token_id(self, name: str) -> int | None:
        """Id of a token by its name in transformers, such as 'bos_token'; None where it is not
        set.
        """
        token = self.named.get(name)
        number: int | None = None if token is None else self.tokenizer.token_to_id(token)
        return number

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the begin token, else the end token."""
        if self.custom_prefix_token_id is not None:
            return self.custom_prefix_token_id
        bos = self.token_id("bos_token")
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.engine.key

    def get_model_info(self) -> dict[str, Any]:
        """Goes into lm_eval's result file: which engine was scored, by its key, and its runtime."""
        e = self.engine
        return {
            "engine": e.name,
            "engine_key": e.key,
            "engine_target": e.target,
            "engine_precision": e.precision,
            "engine_context": e.context,
            "engine_begin_tokens": self.tok_encode(""),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids as lm_eval's `hf` model makes them."""
        if add_special_tokens is None:
            add_special_tokens = not self._begins_with_prefix(string)
        if not add_special_tokens or self.add_bos_token is False:
            return encode(self.tokenizer, string)
        bos = self.token_id("bos_token")
        if self.add_bos_token and bos is not None:
            return [bos, *encode(self.tokenizer, string)]
        return encode_text(self.tokenizer, string)

    def _begins_with_prefix(self, string: str) -> bool:
        prefix_id = self.custom_prefix_token_id
        for number in (self.token_id("bos_token"), self._eos()):
            prefix_id = number if prefix_id is None else prefix_id
        if prefix_id is None:
            return False
        return string.startswith(self.tokenizer.decode([prefix_id], skip_special_tokens=False))

    def chat_template(self, chat_template_name: bool | str = False) -> str:
        """The engine's template: False for none, True for its default, or one by name."""
        if chat_template_name is False:
            return ""
        name = chat_template_name if isinstance(chat_template_name, str) else None
        self.template = name or None
        return chat_template(self.engine.path, self.template)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text. add_generation_prompt: False where its last message is an answer
        begun for the model.
        """
        if not chat_template(self.engine.path, self.template):
            raise EdgemedError(
                f"{self.engine.path} has no chat template", "Leave --apply_chat_template out"
            )
        if not add_generation_prompt:
            return begun_answer_text(self.engine.path, chat_history)
        return chat_text(self.engine.path, chat_history, template=self.template)

    # --- scoring

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """(sum of token log-probabilities, whether greedy decoding would write the same)."""
        if not 0 < len(continuation) <= self.max_length:
            raise EdgemedError(
                f"a continuation has {len(continuation)} tokens, the context is {self.max_length}",
                "Choose a task that fits this engine",
            )
        prefix = [*context, *continuation][-(self.max_length + 1) : -len(continuation)]
        if prefix != self.context:
            self.first = log_softmax(self.reader.read(prefix))
            self.context = prefix
        total = float(self.first[continuation[0]])
        greedy = int(self.first.argmax()) == continuation[0]
        for start in range(1, len(continuation), ROWS):
            part = continuation[start : start + ROWS]
            rows = log_softmax(
                self.session.prefill(continuation[start - 1 : start - 1 + len(part)], every=True)
            )
            total += float(rows[np.arange(len(part)), part].sum())
            greedy = greedy and rows.argmax(-1).tolist() == part
        self.session.rewind(len(prefix))
        return total, greedy

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        tqdm = need("tqdm", "lm-eval").tqdm
        scores = []
        for strings, context, continuation in tqdm(
            requests, disable=disable_tqdm, desc="edgemed loglikelihood"
        ):
            scores.append(self._score(context, continuation))
            self.cache_hook.add_partial("loglikelihood", strings, scores[-1])
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        utils = need("lm_eval.utils", "lm-eval")
        tqdm = need("tqdm", "lm-eval").tqdm
        scores = []
        for (string,) in tqdm(
            [request.args for request in requests],
            disable=disable_tqdm,
            desc="edgemed rolling loglikelihood",
        ):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(string), self.prefix_token_id, self.max_length, 1
            )
            total = sum(self._score(*utils.make_disjoint_window(window))[0] for window in windows)
            scores.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
        return scores

    # --- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        tqdm = need("tqdm", "lm-eval").tqdm
        texts = []
        for turn, (context, settings) in enumerate(
            tqdm(
                [request.args for request in requests],
                disable=disable_tqdm,
                desc="edgemed generate",
            )
        ):
            texts.append(self._generate(context, settings, turn))
            self.cache_hook.add_partial("generate_until", (context, settings), texts[-1])
        return texts

    def _generate(self, context: str, settings: dict[str, Any], turn: int) -> str:
        utils = need("lm_eval.models.utils", "lm-eval")
        wanted = utils.normalize_gen_kwargs(settings, self.max_gen_toks)
        if unknown := [name for name in wanted if name not in FOLLOWED]:
            raise EdgemedError(
                f"generation setting '{unknown[0]}' is not supported",
                f"Known: {', '.join(FOLLOWED)}",
            )
        eos = self._eos()
        eos = None if eos is None else self.tokenizer.decode([eos], skip_special_tokens=False)
        until = utils.handle_stop_sequences(wanted["until"], eos=eos)
        most = wanted["max_gen_toks"]
        if most >= self.max_length:
            raise EdgemedError(
                f"{most} new tokens leave no room for a question, the context is {self.max_length}",
                "Give a smaller max_gen_toks",
            )
        tokens = self.tok_encode(context)[-(self.max_length - most) :]
        # Every request has its own seed, or repeats of one question would all be the same answer.
        sampling = Sampling(
            wanted.get("temperature", 0.0) if wanted["do_sample"] else 0.0,
            wanted.get("top_k", 0),
            wanted.get("top_p", 1.0),
            turn,
            most,
        )
        self.context = []
        written = []
        text = ""
        for token in continued(self.session, self.reader.read(tokens), sampling, self.engine.stop):
            written.append(token)
            text = self.tokenizer.decode(written)
            if any(term and term in text for term in until):
                break
        self.reader.held = [*tokens, *written][: self.session.position]
        return utils.postprocess_generated_text(text, until, None)
