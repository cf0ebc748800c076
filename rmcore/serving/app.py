"""The HTTP endpoints of `rmcore serve`, for the requests of RL trainers and vLLM's clients.

Input: a `Scorer`, its `Batcher`, `Limits`. Output: an ASGI application.
Example: POST /get_reward {"query": ["Q: 2+2? A: 4<eos>"], "prompts": ["Q: 2+2? A: "]} -> {"rewards": [1.25]}.

POST /get_reward   OpenRLHF's remote reward model (utils/remote_rm_utils.py): whole texts, rendered by the client
     /classify     vLLM's (entrypoints/pooling/classify/protocol.py): `input`, whole texts, or `messages`
     /score        vLLM's (entrypoints/pooling/scoring/protocol.py): prompt text_1 and answers text_2, rendered here
     /rewards      the rows of `rmcore score`
GET  /health, /metrics (Prometheus)

A request is answered as a whole or refused as a whole, with {"error": one sentence} and 400 (not JSON), 408 (its body
came too slowly), 413 (too large), 422 (invalid for the endpoint, too many or too long texts), 503 (the queue is full),
504 (not done in time), 500 (the model failed, or a reward is NaN).
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from rmcore.config import UserError
from rmcore.scoring.files import with_rewards
from rmcore.scoring.rows import Rendered
from rmcore.scoring.scorer import Scorer, Text
from rmcore.serving.batcher import Batcher, Full, Late, Stopping
from rmcore.serving.limits import BodyLimit, Limits, Refused, error_answer
from rmcore.serving.prometheus import Metrics


class Body(BaseModel):
    """A request. Unknown keys are ignored, because clients send more than is needed here."""

    model_config = ConfigDict(strict=True, extra="ignore")


Texts = str | list[str]


class GetReward(Body):
    query: Texts
    prompts: list[str] | None = None


class Classify(Body):
    input: Texts | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ScorePairs(Body):
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None


class Rows(Body):
    rows: list[dict[str, Any]] = Field(min_length=1)


class Service:
    """Computes the rewards of rendered rows within the limits, for all endpoints."""

    def __init__(self, scorer: Scorer, batcher: Batcher, limits: Limits) -> None:
        self.scorer, self.batcher, self.limits = scorer, batcher, limits
        self.metrics = Metrics(batcher)

    async def rewards(self, render: Callable[[], Sequence[Rendered]]) -> tuple[list[list[float]], int]:
        """The rewards of each row, and the tokens of all texts. Raises Refused."""
        deadline = time.monotonic() + self.limits.seconds
        encoded = await run_in_threadpool(self._encode, render)
        texts = [text for row in encoded for text in row]
        try:
            waiting = self.batcher.submit(texts, deadline)
            found = await asyncio.wait_for(asyncio.wrap_future(waiting), self.limits.seconds)
        except (Full, Stopping) as error:
            why = "too many requests are waiting" if isinstance(error, Full) else "the service is stopping"
            raise Refused(503, f"{why}: try again later") from None
        except (Late, TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            raise Refused(504, f"not done within {self.limits.seconds:g} seconds") from None
        if any(reward is None for reward in found):
            raise Refused(500, "a reward of the model is not a number")
        numbers = iter([reward for reward in found if reward is not None])
        return [[next(numbers) for _ in row] for row in encoded], sum(len(text.ids) for text in texts)

    def _encode(self, render: Callable[[], Sequence[Rendered]]) -> list[list[Text]]:
        try:
            rendered = render()
        except UserError as error:
            raise Refused(422, str(error)) from None
        count = sum(len(row.texts) for row in rendered)
        if not 0 < count <= self.limits.texts:
            raise Refused(422, f"{count} texts: a request may have 1 to {self.limits.texts}")
        for number, text in enumerate(text for row in rendered for text in row.texts):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise Refused(422, f"text {number} contains a lone surrogate, which is half a character")
        encoded = self.scorer.encode(rendered)
        longest = min(self.limits.tokens, self.scorer.longest)
        for number, one in enumerate(text for row in encoded for text in row):
            if not 0 < len(one.ids) <= longest:
                raise Refused(422, f"text {number} has {len(one.ids)} tokens: a text may have 1 to {longest}")
        return encoded

    def whole(self, texts: Texts, prompts: Sequence[str] | None = None) -> list[Rendered]:
        """Whole texts, each with the prompt that it may share with others."""
        listed = [texts] if isinstance(texts, str) else texts
        if prompts is not None and len(prompts) != len(listed):
            raise Refused(422, f"{len(prompts)} prompts for {len(listed)} texts")
        return [
            Rendered(prompts[place] if prompts else "", [self.scorer.as_rendered(self._unpadded(text))], True)
            for place, text in enumerate(listed)
        ]

    def _unpadded(self, text: str) -> str:
        """The text without padding tokens at its ends, which trainers that decode whole batches leave there."""
        pad = self.scorer.pad
        while pad and text.startswith(pad):
            text = text.removeprefix(pad)
        while pad and text.endswith(pad):
            text = text.removesuffix(pad)
        return text


def create_app(service: Service) -> FastAPI:
    """The application. At its end (lifespan) it answers the waiting requests and ends the model's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.batcher.stop)

    app = FastAPI(title="rmcore", lifespan=lifespan, docs_url=None, redoc_url=None)

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
        return error_answer(422, f"{place or 'the body'}: {first['msg']}".encode("ascii", "backslashreplace").decode())

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return error_answer(500, f"the model failed: {type(error).__name__}")

    _add_endpoints(app, service)
    app.middleware("http")(service.metrics.measure)
    app.add_middleware(BodyLimit, limits=service.limits, refused=service.metrics.count)
    return app


def _add_endpoints(app: FastAPI, service: Service) -> None:
    scorer = service.scorer

    @app.post("/get_reward")
    async def get_reward(asked: GetReward) -> dict[str, Any]:
        found, _ = await service.rewards(lambda: service.whole(asked.query, asked.prompts))
        return {"rewards": [reward for row in found for reward in row]}

    @app.post("/classify")
    async def classify(asked: Classify) -> dict[str, Any]:
        if (asked.input is None) == (asked.messages is None):
            raise Refused(422, "give input (texts) or messages (turns)")
        if asked.messages is not None:
            row = asked.model_dump(exclude={"input"})
            found, tokens = await service.rewards(lambda: [scorer.render(row, "messages")])
        else:
            found, tokens = await service.rewards(lambda: service.whole(asked.input or []))
        data = [{"index": index, "label": "reward", "probs": row, "num_classes": 1} for index, row in enumerate(found)]
        return _listed(scorer.name, "classify", data, tokens)

    @app.post("/score")
    async def score(asked: ScorePairs) -> dict[str, Any]:
        prompts, answers = asked.text_1 or asked.queries, asked.text_2 or asked.documents
        if not prompts or not answers:
            raise Refused(422, "give text_1 (prompt) and text_2 (answers), or queries and documents")
        found, tokens = await service.rewards(
            lambda: [scorer.render(row, f"pair {number}") for number, row in enumerate(paired(prompts, answers))]
        )
        rewards = [reward for row in found for reward in row]
        data = [{"index": index, "object": "score", "score": reward} for index, reward in enumerate(rewards)]
        return _listed(scorer.name, "score", data, tokens)

    @app.post("/rewards")
    async def rewards(asked: Rows) -> dict[str, Any]:
        rendered: list[Rendered] = []

        def render() -> list[Rendered]:
            rendered.extend(scorer.render(row, f"row {number}") for number, row in enumerate(asked.rows))
            return rendered

        found, _ = await service.rewards(render)
        pairs = zip(rendered, found, strict=True)
        return {"rows": [with_rewards({}, list(row), one.single) for one, row in pairs]}

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = service.batcher.alive
        return JSONResponse({"status": "ok" if alive else "stopping", "model": scorer.name}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
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
