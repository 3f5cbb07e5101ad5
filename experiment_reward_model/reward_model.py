"""What judges a completion where no rule does: a reward model, a target length, a safety check.

Any `AutoModelForSequenceClassification` with one logit is a reward model: the higher the logit, the
better the answer. Its tokenizer says how it reads an answer:

    with a chat template    the dialogue: system prompt, question, answer (Skywork, Qwen, Llama)
    without one             the pair of question and answer (OpenAssistant's DeBERTa)
"""

import re
import unicodedata
import zlib
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from model import (
    DATE,
    is_out_of_memory,
    out_of_memory_names,
    pattern_of,
    prompt_messages,
    take_out,
    takes_system_message,
    weight_that_is_not_finite,
)
from run import fail, first_line, refuse_empty
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

# A phrase of a file of safety patterns: words, each of which may end in *.
PHRASE = r"\w[\w'-]*\*?( \w[\w'-]*\*?)*"
LONGEST_PHRASE = 200  # characters
MOST_PHRASES = 2000  # ten times as many take a second to find in the completions of a step
FEWEST_TOKENS = 32  # that a question and an answer may be cut to
ANSWER = "\ue000"  # stands for the answer in a rendered dialogue; a character that nobody writes
# What trains where there is no reward model: the rules of experiment_base.
RULES = {"learned_weight": 0.0, "accuracy_weight": 1.0, "format_weight": 0.1}


class CannotLoad(ValueError):
    """A classifier is missing, damaged or of another kind; the text says which."""


def check_reward_config(config) -> None:
    """Refuse what cannot be a reward before anything is loaded."""
    names = ("learned", "accuracy", "format", "length", "safety")
    if not any(getattr(config, f"{name}_weight") for name in names):
        fail("every weight is 0, so every reward is; --learned-weight 1 takes the reward model's")
    if config.accuracy_weight and not config.answer_field:
        fail("--accuracy-weight: the right answers are not known, because --answer-field is empty")
    refuse_empty(config, "reward_model", "reward_device", "safety_patterns", "safety_model")
    if config.reward_max_length and config.reward_max_length < FEWEST_TOKENS:
        wanted = f"too few for a question and its answer; take at least {FEWEST_TOKENS}"
        fail(f"--reward-max-length {config.reward_max_length}: {wanted}")
    if config.length_low > config.length_high:
        target = f"--length-low {config.length_low} --length-high {config.length_high}"
        fail(f"{target}: no length lies between them")
    if config.safety_model and not config.safety_weight:
        fail("--safety-model: is not used, because --safety-weight is 0")
    if config.reward_device is not None:
        try:
            torch.zeros(1, device=config.reward_device)
        except (RuntimeError, AssertionError) as error:
            fail(f"--reward-device {config.reward_device}: {first_line(error)}")


def load_reward_model(config, device: torch.device):
    """(config, RewardModel). Where it cannot be loaded: (config with the rules' weights, None).

    By default the rules are taken where the model that comes with the repository cannot be loaded.
    What was asked for by a flag ends the program, and so does a run that is resumed.
    """
    if not config.learned_weight:
        return config, None
    try:
        with out_of_memory_names("the size of reward_model, or take reward_in_8bit"):
            return config, RewardModel(config, device)
    except CannotLoad as error:
        message = f"--reward-model {config.reward_model}: {error}"
    is_default = Path(config.reward_model).resolve() == Path(type(config).reward_model).resolve()
    is_asked_for = not is_default or config.reward_device or config.reward_in_8bit
    goes_on = config.fallback == "auto" and not is_asked_for and not config.resume
    if not config.answer_field:
        fail(f"{message}; the rules need right answers, and --answer-field names none")
    if config.fallback != "rules" and not goes_on:
        fail(f"{message}; --fallback rules trains without it")
    weights = dict(RULES)
    for name in ("accuracy_weight", "format_weight"):
        weights[name] = getattr(config, name) or weights[name]
    used = ", ".join(f"{name} {value:g}" for name, value in weights.items())
    print(f"warning: {message}; training goes on with the rules: {used}", flush=True)
    return replace(config, **weights), None


# ---------------------------------------------------------------- classifiers
class Classifier:
    """A sequence-classification model with a tokenizer, device and precision of its own.

    It is never trained. Raises CannotLoad.
    """

    def __init__(self, name: str, config, device: torch.device) -> None:
        self.rows_at_once = config.reward_rows
        self.device = torch.device(config.reward_device or device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = load_classifier(name, config, self.device)
        except CannotLoad:
            raise
        except Exception as error:  # a missing or damaged file leads to many kinds
            if is_out_of_memory(error):
                raise
            raise CannotLoad(f"cannot be loaded ({why_not(name, error)})") from None
        text_config = self.model.config.get_text_config()
        self.vocabulary = text_config.vocab_size
        if len(self.tokenizer) > self.vocabulary:
            sizes = f"{len(self.tokenizer)} tokens, its model {self.vocabulary}"
            raise CannotLoad(f"its tokenizer has {sizes}; they do not belong together")
        self.pad_id = text_config.pad_token_id
        if self.pad_id is not None and not 0 <= self.pad_id < self.vocabulary:
            self.pad_id = None
        limits = [self.tokenizer.model_max_length]
        limits.append(getattr(text_config, "max_position_embeddings", None) or limits[0])
        limits.append(config.reward_max_length or limits[0])
        self.max_length = min(limits)

    @torch.no_grad()
    @out_of_memory_names("reward_rows")
    def logits(self, rows: list[dict[str, list[int]]]) -> torch.Tensor:
        """The logits of tokenised texts: (rows, labels), float32, on the CPU."""
        logits = torch.empty(len(rows), self.model.config.num_labels)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        for start in range(0, len(rows), self.rows_at_once):
            chosen = by_length[start : start + self.rows_at_once]
            batch = self.pad([rows[i] for i in chosen])
            logits[chosen] = self.model(**batch).logits.float().cpu()
        if not logits.isfinite().all():
            fail("--reward-precision: a score is not finite; take bfloat16 or float32")
        return logits

    def pad(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """(rows, tokens) each, padded on the right, whatever side the tokenizer would take.

        A decoder scores the last token that is no pad token. Where a model has none, it gets one
        that stands in no row.
        """
        pad_id = self.pad_id
        if pad_id is None:
            used = {token for row in rows for token in row["input_ids"]}
            pad_id = max(set(range(self.vocabulary)) - used)
            self.model.config.get_text_config().pad_token_id = pad_id
        width = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in rows[0]:  # input_ids, attention_mask and, of BERT's kind, token_type_ids
            filler = pad_id if name == "input_ids" else 0
            padded = [row[name] + [filler] * (width - len(row[name])) for row in rows]
            batch[name] = torch.tensor(padded, device=self.device)
        return batch


def load_classifier(name: str, config, device: torch.device):
    """The model, whole: in half precision or 8 bits where the device is a GPU."""
    model_config = AutoConfig.from_pretrained(name)
    precision = config.reward_precision
    if precision == "auto":
        precision = "float32" if device.type == "cpu" else config.precision
    in_8bit = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["score", "classifier"])
    model_config.get_text_config().use_cache = False  # one forward; a cache would take gigabytes
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # missing weights are told of below
    model, report = AutoModelForSequenceClassification.from_pretrained(
        name,
        config=model_config,
        dtype=getattr(torch, precision),
        quantization_config=in_8bit if config.reward_in_8bit else None,
        device_map={"": device},
        output_loading_info=True,
    )
    transformers.logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:  # of a language model: the head that gives the score
        raise CannotLoad(f"is no classifier: its weight {missing[0]} is missing, so it is random")
    key = weight_that_is_not_finite(model)
    if key:
        raise CannotLoad(f"its weight {key} holds NaN or infinity")
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Linear):  # in bfloat16, 20 and 20.06 would be the same score
            head.float()
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return model.eval()


def why_not(name: str, error: Exception) -> str:
    """Why a model could not be loaded, where its name says more than the error."""
    if Path(name).is_file():
        return "it is a file; name its directory"
    if Path(name).is_dir():
        hint = "a file in this directory is missing, damaged or of no classifier"
        return f"{hint}: {first_line(error)}"
    return f"there is no such directory, and the hub does not give it: {first_line(error)}"


class RewardModel(Classifier):
    """Scores answers."""

    def __init__(self, config, device: torch.device) -> None:
        super().__init__(config.reward_model, config, device)
        labels = self.model.config.num_labels
        if labels != 1:
            raise CannotLoad(f"has {labels} logits; a reward model has one")
        self.system_prompt = config.system_prompt
        self.has_template = bool(self.tokenizer.chat_template)
        self.takes_system = self.has_template and takes_system_message(self.tokenizer)
        self.special_tokens = special_tokens(self.tokenizer)
        self.truncated_fraction = 0.0  # of the answers that were scored last
        self.has_warned = False
        try:
            row = self.encode("QUESTION", "ANSWER")
        except Exception as error:  # whatever a template does
            raise CannotLoad(f"its chat template cannot be used ({first_line(error)})") from None
        if not row["input_ids"]:
            raise CannotLoad("its tokenizer makes no tokens; a file of it may be missing")
        read = "the dialogue" if self.has_template else "the pair of question and answer"
        print(f"reward model {config.reward_model}: reads {read}, at most {self.max_length} tokens")

    def checksum(self) -> int:
        """Of the weights of the score, which differ after any training."""
        weights = list(self.model.parameters())[-1].detach().float().cpu()
        return zlib.crc32(weights.numpy().tobytes())

    def score(self, questions: list[str], answers: list[str]) -> torch.Tensor:
        """(answers,). An answer that was given twice to a question is scored once."""
        pairs = list(zip(questions, answers))
        distinct = list(dict.fromkeys(pairs))
        rows = [self.encode(*pair) for pair in distinct]
        too_long = [i for i, row in enumerate(rows) if len(row["input_ids"]) > self.max_length]
        if too_long and not self.has_warned:
            length = len(rows[too_long[0]]["input_ids"])
            what = f"an answer with its question, {length} tokens, is cut to {self.max_length}"
            print(f"\nwarning: {what} for the reward model (metric score_truncated_fraction)")
            self.has_warned = True
        for i in too_long:
            rows[i] = self.encode(*distinct[i], cut=True)
        self.truncated_fraction = len(too_long) / len(rows)
        scores = dict(zip(distinct, self.logits(rows)[:, 0].tolist()))
        return torch.tensor([scores[pair] for pair in pairs])

    def encode(self, question: str, answer: str, cut: bool = False) -> dict[str, list[int]]:
        """The model's inputs. cut: to at most `max_length` tokens."""
        answer = take_out(self.special_tokens, answer)
        if self.has_template:
            text = self.render(question, answer)
            # The template has written BOS already, where the model has one.
            row = dict(self.tokenizer(text, add_special_tokens=False, verbose=False))
            if cut and len(row["input_ids"]) > self.max_length:
                # The middle: BOS is at the beginning, and the score is read at the end.
                first = self.max_length // 4
                last = self.max_length - first
                row = {name: values[:first] + values[-last:] for name, values in row.items()}
            return row
        limit = {"truncation": True, "max_length": self.max_length} if cut else {}
        return dict(self.tokenizer(question, answer, verbose=False, **limit))

    def render(self, question: str, answer: str) -> str:
        """The whole dialogue, as the chat template writes it.

        The answer is put in afterwards: Qwen3's template would drop what stands between one
        </think> and another, and a policy could hide anything there.
        """
        chat = prompt_messages(self.system_prompt, question, self.takes_system)
        chat.append({"role": "assistant", "content": ANSWER})
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, **DATE)
        before, found, after = text.rpartition(ANSWER)
        if not found:
            raise ValueError("it drops the answer")
        return before + answer + after


def special_tokens(tokenizer) -> re.Pattern:
    """What an answer must not hold: it could end its turn, and go on as somebody who praises it."""
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            tokens.add(token.content)
    return pattern_of(tokens)


class RunningStatistics:
    """Mean and standard deviation of all scores so far, by which scores are standardised.

    state: `state_dict` of an earlier part of the run. It counts where the reward model is the same.
    """

    def __init__(self, reward_model: RewardModel | None, state: dict | None = None) -> None:
        self.checksum = reward_model.checksum() if reward_model else 0
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0  # the sum of squared distances from the mean
        if state and state["checksum"] == self.checksum:
            self.__dict__.update(state)
        elif state and state["count"] and reward_model:
            print("the mean and deviation of scores begin anew: they were of another reward model")

    def add_and_standardise(self, scores: torch.Tensor | None) -> torch.Tensor | None:
        """(scores - mean) / std, of any shape, after they were counted in. None stays None.

        Two sets of scores are joined by their means and squares (Chan et al. 1979).
        """
        if scores is None:
            return None
        new = scores.double()
        count = self.count + new.numel()
        distance = new.mean().item() - self.mean
        self.squares += (new - new.mean()).square().sum().item()
        self.squares += distance**2 * self.count * new.numel() / count
        self.mean += distance * new.numel() / count
        self.count = count
        std = (self.squares / max(count - 1, 1)) ** 0.5
        return (scores - self.mean) / (std + 1e-4)

    def state_dict(self) -> dict:
        return dict(vars(self))


# ---------------------------------------------------------------- length and safety
def length_reward(tokens: int, low: int, high: int) -> float:
    """0 for a completion of `low` to `high` tokens; else minus the tokens outside, over `high`.

    With 10 to 40: 10 and 40 tokens earn 0, 6 earn -0.1, 60 earn -0.5.
    """
    outside = max(low - tokens, tokens - high, 0)
    return -outside / high


class Safety:
    """-1 where a completion holds a phrase of a file; else minus a classifier's probability."""

    def __init__(self, config, device: torch.device) -> None:
        self.pattern = read_phrases(config.safety_patterns)
        self.classifier = None
        if not config.safety_model:
            return
        try:
            self.classifier = Classifier(config.safety_model, config, device)
        except CannotLoad as error:
            fail(f"--safety-model {config.safety_model}: {error}")
        labels = self.classifier.model.config.label2id
        if config.safety_label not in labels:
            has = ", ".join(map(str, labels))[:200]
            fail(f"--safety-label {config.safety_label!r}: {config.safety_model} has {has}")
        self.label = labels[config.safety_label]

    def rewards(self, completions: list[str]) -> torch.Tensor:
        """(completions,), from -1 to 0."""
        found = [self.pattern.search(plain(text)) for text in completions]
        unsafe = torch.tensor([float(match is not None) for match in found])
        if self.classifier:
            unsafe = torch.maximum(unsafe, self.probabilities(completions))
        return -unsafe

    def probabilities(self, completions: list[str]) -> torch.Tensor:
        """(completions,), how likely the classifier finds the label."""
        model = self.classifier
        arguments = {"truncation": True, "max_length": model.max_length, "verbose": False}
        rows = [dict(model.tokenizer(text or " ", **arguments)) for text in completions]
        logits = model.logits(rows)  # (completions, labels)
        one_by_one = model.model.config.problem_type == "multi_label_classification"
        if one_by_one or logits.shape[1] == 1:
            return logits.sigmoid()[:, self.label]
        return logits.softmax(-1)[:, self.label]


def read_phrases(path: str) -> re.Pattern:
    """One phrase a line, found in any case as whole words; * at a word's end is any ending.

    Lines that begin with # and empty ones are left out. No other sign has a meaning: a pattern
    that anybody can write could take minutes on a completion that was made for it.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--safety-patterns {path}: cannot be read ({first_line(error)})")
    phrases = []
    for number, line in enumerate(lines, 1):
        line = plain(line).strip()
        if not line or line.startswith("#"):
            continue
        if len(line) > LONGEST_PHRASE or not re.fullmatch(PHRASE, line):
            wanted = "expected words with one space between them, each of which may end in *"
            fail(f"{path}, line {number}: {wanted}; is {line[:50]!r}")
        words = [re.escape(word).replace(r"\*", r"[^\W_]*") for word in line.split(" ")]
        phrases.append(r"[\W_]+".join(words))
    if not 0 < len(phrases) <= MOST_PHRASES:
        fail(f"{path}: holds {len(phrases)} phrases; expected 1 to {MOST_PHRASES}")
    # Neither a letter nor a digit before and behind; \b would take _ for a letter.
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(phrases)})(?![^\W_])")


def plain(text: str) -> str:
    """One spelling of texts that look alike: case, accents, apostrophes, characters of no width."""
    text = (
        unicodedata.normalize("NFKC", text)
        .casefold()
        .replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    )
    return "".join(sign for sign in text if unicodedata.category(sign) != "Cf")
