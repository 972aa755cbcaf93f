"""A vision language model as the judge, such as UnifiedReward (arXiv 2503.05236), by any OpenAI-compatible endpoint."""

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from aegpo.rewards import Metadata, Reward
from aegpo.rewards.chat import Chat
from aegpo.types import Judgement

QUESTION = """This picture was generated for the prompt below.

Prompt: {prompt}

Judge two things:
1. How well the picture fits the prompt: is all that it asks for there, as many, as described, and where it should be?
2. How good the picture is: composition, light and detail, and nothing deformed, blurred or out of place.

Give both together one score from {lowest}, a picture that fits in nothing or is ruined, to {highest}, one that fits in
everything and has no flaw. Use the whole scale, decimals too.

Answer by JSON alone: {"score": NUMBER}"""
QUESTION_OF_PAIRS = """These two pictures were generated for the prompt below.

Prompt: {prompt}

Which of them is better? Judge two things, the first before the second:
1. How well a picture fits the prompt: is all that it asks for there, as many, as described, and where it should be?
2. How good a picture is: composition, light and detail, and nothing deformed, blurred or out of place.

Answer by JSON alone: {"better": "first"}, {"better": "second"}, or, if there is no difference, {"better": "neither"}"""
OWN_WORDS = re.compile("score:|image 1 is better", re.IGNORECASE)  # a question that has this says itself what to write
ANOTHER_TEMPERATURE = 0.7  # where it is asked again: at 0 it would say the same

NUMBER = r"(-?\d+(?:\.\d+)?)(?![\d.]*\d)"
SCORE = re.compile(rf"score(?:\s*\([^)]*\))?(?:\s+is|\s+of)?\W*?{NUMBER}(?!\s*(?:-|–|to)\s*\d)", re.IGNORECASE)
ONLY_NUMBER = re.compile(rf"\W*?{NUMBER}(?:\s*/\s*\d+)?\W*")
WINNER = re.compile(
    r"\b(first|second|neither|(?:image|picture) [12])(?: (?:image|picture))? is "
    r"(?:(?:the|slightly|much|clearly) )?better|\b(equally) good",
    re.IGNORECASE,
)
WINS = {  # what an answer says: how often the first is better
    **{"first": 1.0, "image 1": 1.0, "picture 1": 1.0},
    **{"second": 0.0, "image 2": 0.0, "picture 2": 0.0},
    **{"neither": 0.5, "equally": 0.5},
}


def load(
    url: str,
    model: str,
    question: str | None = None,
    lowest: float = 1,
    highest: float = 10,
    pairs: bool = False,
    concurrency: int = 8,
    timeout: float = 120,
    retries: int = 3,
    cache: str | None = None,
) -> Reward:
    """The reward: the score that the judge gives, in [lowest, highest]; or how often an image wins, in [0, 1].

    The judge answers by a JSON schema if the server can; else the score is found in its words, as UnifiedReward's are
    in `Final Score: 4.5`. A question that has "Score:" in it is answered in the judge's own words. A judge that gives
    no score, or one off the scale, is asked again; if it never does, the score is NaN. A key is taken from the
    environment, AEGPO_VLM_KEY or else, for OpenAI alone, OPENAI_API_KEY.

    Args:
        url: the endpoint's base, such as http://localhost:8000/v1.
        model: its name there.
        question: what is asked beside the picture; `{prompt}`, `{lowest}` and `{highest}` in it are filled in.
        lowest, highest: ends of the scale.
        pairs: whether each two images of a group are compared, in both orders, instead: the score is the mean over the
            others of the group, 0.5 for an image that is alone. A question that has "Image 1 is better" in it, as
            UnifiedReward's has, is answered in the judge's own words.
        concurrency: how many answers are awaited at once.
        timeout: seconds for an answer.
        retries: how often it is asked again, where there is no answer or none that can be used.
        cache: a folder for answers, so that none is asked for twice; by default they are kept as long as the program.

    Raises:
        ValueError: a setting makes no sense, the server cannot be reached or refuses, or it has no such model. Later,
            from the reward: the server cannot be reached any more, keeps failing or refuses.
    """
    if not -math.inf < lowest < highest < math.inf:
        raise ValueError(f"reward: vlm: lowest should be less than highest, got {lowest:g} and {highest:g}")
    for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
        if value < least:
            raise ValueError(f"reward: vlm: {name}: should be {least} or more, got {value}")
    if not timeout > 0:
        raise ValueError(f"reward: vlm: timeout: should be more than 0 seconds, got {timeout:g}")
    if question is None:
        question = QUESTION_OF_PAIRS if pairs else QUESTION
    question = question.replace("{lowest}", f"{lowest:g}").replace("{highest}", f"{highest:g}")
    kept = Cache(cache)
    if pairs:
        name, answer, read = "better", {"type": "string", "enum": ["first", "second", "neither"]}, winner_in
    else:
        name, answer, read = "score", {"type": "number"}, score_in
    schema = {"type": "object", "properties": {name: answer}, "required": [name], "additionalProperties": False}
    chat = Chat(url, model, None if OWN_WORDS.search(question) else schema, concurrency, timeout, retries)
    asked = Asked(chat, question, (0.0, 1.0) if pairs else (lowest, highest), read, retries, kept)

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        return Judgement(asked([(image,) for image in images], prompts).astype(np.float32))

    def compare(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        orders = list(permutations(range(len(images)), 2))
        said = asked([(images[i], images[j]) for i, j in orders], [prompts[i] for i, _ in orders])
        return Judgement(won(orders, said, len(images)).astype(np.float32))

    if pairs:
        return Reward("vlm", compare, (0.0, 1.0), groupwise=True, elsewhere=True)
    return Reward("vlm", judge, (lowest, highest), elsewhere=True)


def won(orders: Sequence[tuple[int, int]], said: np.ndarray, count: int) -> np.ndarray:
    """How often each of `count` images wins, float64 (count,): the mean over both orders, and then over the others.

    A pair that lacks an answer does not count; an image that is left without any has NaN, and one that is alone 0.5.

    Args:
        orders: the first and the second image of each question; all that there can be.
        said: float64, how often the first of them is better, or NaN.
    """
    if count == 1:
        return np.full(1, 0.5)
    wins = np.full((count, count), np.nan)
    for (first, second), win in zip(orders, said, strict=True):
        wins[first, second] = win
    wins = (wins + 1 - wins.T) / 2
    known = np.isfinite(wins)
    total = np.where(known, wins, 0).sum(1)
    return np.divide(total, known.sum(1), out=np.full(count, np.nan), where=known.any(1))


@dataclass(frozen=True)
class Asked:
    """The judge, asked one question about pictures and prompts.

    Attributes:
        chat: the model.
        question: with `{prompt}` to be filled in.
        limits: the lowest and the highest answer.
        read: an answer's text -> the number that it means, if any.
        retries: how often it is asked again for an answer that can be used.
        cache: of answers.
    """

    chat: Chat
    question: str
    limits: tuple[float, float]
    read: Callable[[str], float | None]
    retries: int
    cache: "Cache"

    def __call__(self, pictures: Sequence[tuple[np.ndarray, ...]], prompts: Sequence[str]) -> np.ndarray:
        """The answer to each question, float64 (n,), NaN where there is none that can be used.

        Args:
            pictures: of n questions, one or two uint8 (H, W, 3) each.
            prompts: of n questions.
        """
        asked = [
            (shown, self.question.replace("{prompt}", prompt)) for shown, prompt in zip(pictures, prompts, strict=True)
        ]
        keys = [self._key(shown, text) for shown, text in asked]
        answers = {key: self._valid(self.cache.get(key)) for key in keys}
        missing = {key: question for key, question in zip(keys, asked, strict=True) if answers[key] is None}
        if missing:
            answers |= dict(zip(missing, self.chat.each(self._ask, missing.items()), strict=True))
        return np.array([answers[key] for key in keys], np.float64)  # None is NaN

    async def _ask(
        self, client: httpx.AsyncClient, item: tuple[str, tuple[tuple[np.ndarray, ...], str]]
    ) -> float | None:
        key, (shown, text) = item
        for attempt in range(self.retries + 1):
            said = await self.chat.say(client, shown, text, ANOTHER_TEMPERATURE if attempt else 0)
            answer = self._valid(self.read(said)) if said is not None else None
            if answer is not None:
                self.cache.put(key, answer)
                return answer
        return None

    def _valid(self, answer: Any) -> float | None:
        low, high = self.limits
        number = isinstance(answer, int | float) and not isinstance(answer, bool)
        return float(answer) if number and low <= answer <= high else None

    def _key(self, shown: tuple[np.ndarray, ...], text: str) -> str:
        about = [self.chat.model, text, self.limits, [picture.shape for picture in shown]]
        key = hashlib.sha256(json.dumps(about).encode())
        for picture in shown:
            key.update(picture.tobytes())
        return key.hexdigest()


class Cache:
    """Answers by key: in a folder, a file each, or in memory.

    Raises:
        ValueError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | None):
        self.folder = Path(folder).expanduser() if folder else None
        self.answers: dict[str, float] = {}
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._error(error) from None

    def get(self, key: str) -> Any:
        """What is there, which may be anything if others have written it; None if it cannot be read."""
        if not self.folder:
            return self.answers.get(key)
        try:
            return json.loads((self.folder / f"{key}.json").read_bytes())["answer"]
        except (OSError, LookupError, TypeError, ValueError):
            return None

    def put(self, key: str, answer: float) -> None:
        """Keeps it; a reader of the file sees all of it or none."""
        if not self.folder:
            self.answers[key] = answer
            return
        unfinished = self.folder / f".{uuid.uuid4().hex}"
        try:
            unfinished.write_text(json.dumps({"answer": answer}))
            os.replace(unfinished, self.folder / f"{key}.json")
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> ValueError:
        return ValueError(f"reward: vlm: cache: {self.folder} cannot be used as a folder: {error.strerror}")


def score_in(text: str) -> float | None:
    """The number of an answer: of its last JSON object with a "score", else after its last "score", else its all."""
    text = _conclusion(text)
    value = _field(text, "score")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    found = SCORE.findall(text)
    if found:
        return float(found[-1])
    only = ONLY_NUMBER.fullmatch(text)
    return float(only[1]) if only else None


def winner_in(text: str) -> float | None:
    """How often the first is better, by an answer's last JSON object with "better", else by its last verdict."""
    text = _conclusion(text)
    found = [first or second for first, second in WINNER.findall(text)]
    for word in (_field(text, "better"), *found[-1:], text.strip(" .*\"'")):
        if isinstance(word, str) and word.lower() in WINS:
            return WINS[word.lower()]
    return None


def _conclusion(text: str) -> str:
    """The answer on one line without the thoughts before it; of thoughts that do not end, nothing."""
    text = text.rpartition("</think>")[2]
    return "" if "<think>" in text else " ".join(text.split())


def _field(text: str, name: str) -> Any:
    """What the last JSON object that has that field has in it."""
    for start in reversed([found.start() for found in re.finditer("{", text)]):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start)
        except (RecursionError, ValueError):
            continue
        if name in value:
            return value[name]
    return None
