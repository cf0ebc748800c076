"""The HTTP endpoints of `rmcore serve`, for the requests of RL trainers and vLLM's clients.

Input: a `Scorer`, its `Batcher`, `Limits`. Output: an ASGI application.
Example: POST /get_reward {"query": ["Q: 2+2? A: 4<eos>"], "prompts": ["Q: 2+2? A: "]} -> {"rewards": [1.25]}.

POST /get_reward   OpenRLHF's remote reward model (utils/remote_rm_utils.py): whole texts, rendered by the client
     /classify     vLLM's (entrypoints/pooling/classify/protocol.py): `input`, whole texts, or `messages`
     /score        vLLM's (entrypoints/pooling/scoring/protocol.py): prompt text_1 and answers text_2, rendered here
     /rewards      the rows of `rmcore score`
GET  /health, /metrics (Prometheus), /openapi.json (the shapes of all requests and answers)

A request is answered as a whole or refused as a whole, with {"error": one sentence} and 400 (not JSON), 401 (without
the bearer token of the service), 403 (a Host header of another machine), 408 (its body came too slowly), 413 (too
large), 422 (invalid for the endpoint, too many or too long texts), 503 (the queue is full), 504 (not done in time), 500
(the model failed, or a reward is NaN).

What a request would take is counted on its raw rows first. Then it is rendered and tokenised in small steps, in turns
with other requests, and dropped when its time is over.
"""

import asyncio
import math
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from rmcore import __version__
from rmcore.config import UserError
from rmcore.data.sandbox import until
from rmcore.scoring.files import with_rewards
from rmcore.scoring.rows import Rendered
from rmcore.scoring.scorer import Scorer, Text, Valued
from rmcore.serving.answers import (
    HEALTH,
    METRICS,
    ClassifyAnswer,
    GetRewardAnswer,
    RewardsAnswer,
    ScoreAnswer,
    responses,
)
from rmcore.serving.batcher import Batcher, Full, Late, Stopping
from rmcore.serving.limits import Guard, Limits, Refused, check_rows, check_text, error_answer
from rmcore.serving.prometheus import Metrics


class Body(BaseModel):
    """A request. Unknown keys are ignored, because clients send more than is needed here."""

    model_config = ConfigDict(strict=True, extra="ignore")


# Only the first wrong item is reported: a list of a million errors would take gigabytes.
Strings = Annotated[list[str], Field(fail_fast=True)]
Texts = str | Strings


class GetReward(Body):
    query: Texts
    prompts: Strings | None = None


class Classify(Body):
    input: Texts | None = None
    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ScorePairs(Body):
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None


class Rows(Body):
    rows: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]


class Asked(NamedTuple):
    """A row of a request. `whole`: a text that the client has rendered, and perhaps the prompt that it begins with."""

    row: Mapping[str, Any]
    where: str
    whole: bool = False


class Answered(NamedTuple):
    """What the model gives a row's texts, and whether its form has only one text."""

    values: list[Valued]
    single: bool

    @property
    def rewards(self) -> list[float]:
        return [one.reward for one in self.values]


Encoded = tuple[list[Rendered], list[Text]]

ENCODERS = 2  # requests that are rendered and tokenised at once; the tokenizer itself uses all cores
SLICE_SECONDS = 0.05  # of this work on one request, before the next one has its turn
CHUNK = 500_000  # characters that are tokenised at once, which takes some 100 MB


class Service:
    """Computes the rewards of rows within the limits, for all endpoints."""

    def __init__(self, scorer: Scorer, batcher: Batcher, limits: Limits) -> None:
        self.scorer, self.batcher, self.limits = scorer, batcher, limits
        self.name = Path(scorer.name).resolve().name if os.path.isdir(scorer.name) else scorer.name  # shows no path
        self.metrics = Metrics(batcher)
        self._encoders = ThreadPoolExecutor(ENCODERS, "rmcore-encoder")

    async def rewards(self, asked: Sequence[Asked]) -> tuple[list[Answered], int]:
        """What the rows are worth, and the tokens of all texts. Raises Refused."""
        check_rows([one.row for one in asked], self.limits)
        deadline = time.monotonic() + self.limits.seconds
        try:
            return await asyncio.wait_for(self._rewards(asked, deadline), self.limits.seconds)
        except (Full, Stopping) as error:
            why = "too many requests are waiting" if isinstance(error, Full) else "the service is stopping"
            raise Refused(503, f"{why}: try again later") from None
        except (Late, TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            raise Refused(504, f"not done within {self.limits.seconds:g} seconds") from None

    async def _rewards(self, asked: Sequence[Asked], deadline: float) -> tuple[list[Answered], int]:
        steps = self._encode(asked)
        encoded = None
        while encoded is None:  # in turns with the other requests
            encoded = await asyncio.get_running_loop().run_in_executor(self._encoders, self._advance, steps, deadline)
        rows, texts = encoded
        found = await asyncio.wrap_future(self.batcher.submit(texts, deadline))
        if any(one is None or not all(map(math.isfinite, one.outputs)) for one in found):
            raise Refused(500, "a reward of the model is not a number")
        numbers = iter([one for one in found if one is not None])
        answered = [Answered([next(numbers) for _ in row.texts], row.single) for row in rows]
        return answered, sum(len(text.ids) for text in texts)

    def _advance(self, steps: Iterator[Encoded | None], deadline: float) -> Encoded | None:
        """Do a part of the work on a request; the result once it is complete. Raises Refused, TimeoutError."""
        began = time.monotonic()
        try:
            with until(deadline, self.limits.characters):
                for result in steps:
                    if result is not None:
                        return result
                    now = time.monotonic()
                    if now > deadline:
                        raise TimeoutError
                    if now > began + SLICE_SECONDS:
                        return None
        except Refused as error:
            # At the deadline a rendering is stopped, which reads as if its template did too much.
            raise (TimeoutError() if time.monotonic() > deadline else error) from None
        raise AssertionError("the last step gives the result")

    def _encode(self, asked: Sequence[Asked]) -> Iterator[Encoded | None]:
        """Render and tokenise, in steps: None after each row and each chunk, and in the end the rows and all texts."""
        rows: list[Rendered] = []
        count = 0
        for one in asked:
            rows.append(self._rendered(one))
            for text in rows[-1].texts:
                check_text(text, count, self.limits)
                count += 1
            yield None
        # A row without a prompt shares with no other row; its own texts may still begin alike.
        prompts = iter([one.prompt or f"row {number}" for number, one in enumerate(rows) for _ in one.texts])
        texts: list[Text] = []
        longest = min(self.limits.tokens, self.scorer.longest)
        for chunk in _chunks(rows):
            for made in chain.from_iterable(self.scorer.encode(chunk)):
                if not 0 < len(made.ids) <= longest:
                    raise Refused(422, f"text {len(texts)} has {len(made.ids)} tokens: a text may have 1 to {longest}")
                texts.append(made._replace(prompt=next(prompts)))
            yield None
        yield rows, texts

    def _rendered(self, asked: Asked) -> Rendered:
        if asked.whole:
            text = self.scorer.as_rendered(self._unpadded(asked.row["text"]))
            return Rendered(asked.row["prompt"], [text], True)
        try:
            return self.scorer.render(asked.row, asked.where, typed=True)
        except UserError as error:
            raise Refused(422, str(error)) from None

    def whole(self, texts: Texts, prompts: Sequence[str] | None = None) -> list[Asked]:
        """Whole texts, each with the prompt that it may share with others."""
        listed = [texts] if isinstance(texts, str) else texts
        if prompts is not None and len(prompts) != len(listed):
            raise Refused(422, f"{len(prompts)} prompts for {len(listed)} texts")
        return [
            Asked({"text": text, "prompt": prompts[place] if prompts else ""}, f"text {place}", whole=True)
            for place, text in enumerate(listed)
        ]

    def _unpadded(self, text: str) -> str:
        """The text without padding tokens at its ends, which trainers that decode whole batches leave there."""
        pad, first, last = self.scorer.pad, 0, len(text)
        while pad and text.startswith(pad, first):
            first += len(pad)
        while pad and last - len(pad) >= first and text.endswith(pad, first, last):
            last -= len(pad)
        return text[first:last]


def _chunks(rows: Sequence[Rendered]) -> Iterator[list[Rendered]]:
    """All texts in order, about CHUNK characters at a time; neighbours of one prompt together."""
    chunk: list[Rendered] = []
    characters = 0
    for row in rows:
        for text in row.texts:
            if row.prompt and chunk and chunk[-1].prompt == row.prompt:
                chunk[-1].texts.append(text)
            else:
                chunk.append(Rendered(row.prompt, [text], False))
            characters += len(text)
            if characters >= CHUNK:
                yield chunk
                chunk, characters = [], 0
    if chunk:
        yield chunk


def create_app(service: Service, local: bool = False, token: str | None = None) -> FastAPI:
    """The application. At its end (lifespan) it answers the waiting requests and ends the model's thread.

    `local`: only requests with the Host header of a loopback address are answered. `token`: every request but /health
    needs the header `Authorization: Bearer TOKEN`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.batcher.stop)

    app = FastAPI(title="rmcore", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error_answer(error.status, str(error))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return error_answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_answer(400, "the body is not JSON")
        place = ".".join(str(part) for part in first["loc"][1:])[:200]
        return error_answer(422, f"{place or 'the body'}: {first['msg']}")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return error_answer(500, f"the model failed: {type(error).__name__}")

    _add_endpoints(app, service, token)
    app.middleware("http")(service.metrics.measure)
    app.add_middleware(Guard, limits=service.limits, refused=service.metrics.count, local=local, token=token)
    return app


def _add_endpoints(app: FastAPI, service: Service, token: str | None) -> None:
    # The guard compares the token, before it reads a body; this only puts it on the page.
    guarded = [] if token is None else [Depends(HTTPBearer(auto_error=False))]

    @app.post("/get_reward", responses=responses(GetRewardAnswer), response_model=None, dependencies=guarded)
    async def get_reward(asked: GetReward) -> dict[str, Any]:
        """Rewards of whole texts, which the client has rendered (OpenRLHF's remote reward model)."""
        found, _ = await service.rewards(service.whole(asked.query, asked.prompts))
        return {"rewards": [reward for row in found for reward in row.rewards]}

    @app.post("/classify", responses=responses(ClassifyAnswer), response_model=None, dependencies=guarded)
    async def classify(asked: Classify) -> dict[str, Any]:
        """Rewards of whole texts (`input`) or of one conversation (`messages`), one of the two; vLLM's shape.

        Of a model with several outputs: all of them, and the name of the largest one.
        """
        if (asked.input is None) == (asked.messages is None):
            raise Refused(422, "give input (texts) or messages (turns)")
        if asked.messages is not None:
            rows = [Asked(asked.model_dump(exclude={"input"}, exclude_none=True), "messages")]
        else:
            rows = service.whole(asked.input or [])
        found, tokens = await service.rewards(rows)
        names = service.scorer.outputs
        data: list[dict[str, Any]] = []
        for index, row in enumerate(found):
            outputs = row.values[0].outputs
            label = names[outputs.index(max(outputs))] if len(outputs) > 1 else "reward"
            data.append({"index": index, "label": label, "probs": list(outputs), "num_classes": len(outputs)})
        return _listed(service.name, "classify", data, tokens)

    @app.post("/score", responses=responses(ScoreAnswer), response_model=None, dependencies=guarded)
    async def score(asked: ScorePairs) -> dict[str, Any]:
        """Rewards of a prompt and its answers, rendered here: text_1 and text_2, or queries and documents (vLLM's)."""
        prompts, answers = asked.text_1 or asked.queries, asked.text_2 or asked.documents
        if not prompts or not answers:
            raise Refused(422, "give text_1 (prompt) and text_2 (answers), or queries and documents")
        rows = [Asked(row, f"pair {number}") for number, row in enumerate(paired(prompts, answers))]
        found, tokens = await service.rewards(rows)
        rewards = [reward for row in found for reward in row.rewards]
        data = [{"index": index, "object": "score", "score": reward} for index, reward in enumerate(rewards)]
        return _listed(service.name, "score", data, tokens)

    @app.post("/rewards", responses=responses(RewardsAnswer), response_model=None, dependencies=guarded)
    async def rewards(asked: Rows) -> dict[str, Any]:
        """Rewards of rows as `rmcore score` reads them."""
        found, _ = await service.rewards([Asked(row, f"row {number}") for number, row in enumerate(asked.rows)])
        scorer = service.scorer
        return {
            "rows": [
                with_rewards(
                    {}, list(row.rewards), row.single, probabilities=scorer.probabilities(row.rewards, row.single)
                )
                for row in found
            ]
        }

    @app.get("/health", responses=HEALTH, response_model=None)
    async def health() -> JSONResponse:
        """Whether the service answers; needs no token."""
        alive = service.batcher.alive
        return JSONResponse({"status": "ok" if alive else "stopping", "model": service.name}, 200 if alive else 503)

    @app.get("/metrics", responses=METRICS, response_class=PlainTextResponse, dependencies=guarded)
    async def metrics() -> PlainTextResponse:
        """Counts and times of requests, batches, texts and tokens."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def paired(prompts: Texts, answers: Texts) -> list[dict[str, Any]]:
    """One row with a prompt and all answers, or, for two lists of one length, a row per prompt and answer."""
    if isinstance(prompts, list) and len(prompts) == 1 and isinstance(answers, list):
        prompts = prompts[0]
    if isinstance(prompts, str):
        return [{"prompt": prompts, "answers": [answers] if isinstance(answers, str) else answers}]
    if isinstance(answers, str) or len(answers) != len(prompts):
        raise Refused(422, f"{len(prompts)} prompts and {1 if isinstance(answers, str) else len(answers)} answers")
    return [{"prompt": prompt, "answers": [answer]} for prompt, answer in zip(prompts, answers, strict=True)]


def _listed(model: str, kind: str, data: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """A list of results in vLLM's form."""
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    name = f"{kind}-{uuid.uuid4().hex}"
    return {"id": name, "object": "list", "created": int(time.time()), "model": model, "data": data, "usage": usage}
