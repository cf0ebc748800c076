"""The shapes of what `rmcore serve` answers, for the page /openapi.json.

Input: nothing. Output: pydantic models, and the `responses` of every endpoint.
Example: POST /rewards with {"rows": [{"prompt": "2+2?", "answers": ["4", "5"]}]} -> {"rows": [{"rewards": [1.25, -0.5],
"best": 0}]}, a `RewardsAnswer`.

They describe, and check nothing while the service runs; a test compares real answers with the page.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """An answer; it has no other keys."""

    model_config = ConfigDict(extra="forbid")


class GetRewardAnswer(Answer):
    rewards: list[float] = Field(description="the reward of each text of `query`, in its order")


class Usage(Answer):
    prompt_tokens: int = Field(description="tokens of all texts")
    total_tokens: int
    completion_tokens: Literal[0]


class Classified(Answer):
    index: int
    label: str = Field(description="reward; of a model with several outputs, the name of the largest one")
    probs: list[float] = Field(description="the outputs of the model, in most cases one, the reward: no probabilities")
    num_classes: int = Field(description="the number of outputs")


class ScoredPair(Answer):
    index: int
    object: Literal["score"]
    score: float = Field(description="the reward")


class Listed(Answer):
    """vLLM's frame of a list of results."""

    id: str
    object: Literal["list"]
    created: int = Field(description="seconds since 1970")
    model: str
    usage: Usage


class ClassifyAnswer(Listed):
    data: list[Classified]


class ScoreAnswer(Listed):
    data: list[ScoredPair]


class OneReward(Answer):
    reward: float


class SeveralRewards(Answer):
    rewards: list[float]
    best: int = Field(description="the place of the highest reward, the first one of several")
    calibrated: list[float] | None = Field(
        None, description="the probability of each text, of models that `rmcore export --calibrate` wrote"
    )


class RewardsAnswer(Answer):
    rows: list[OneReward | SeveralRewards]


class Health(Answer):
    status: Literal["ok", "stopping"]
    model: str


class Error(Answer):
    error: str = Field(description="one sentence")


REFUSALS = {
    400: "The body is not JSON in UTF-8.",
    401: "The bearer token is missing or wrong; only where the service has one.",
    403: "The Host header is not that of a loopback address, on a service that listens on one.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    422: "Invalid for the endpoint, or too many or too long texts.",
    500: "The model failed, or a reward is not a number.",
    503: "Too much is waiting, or the service stops; see Retry-After.",
    504: "Not done in time.",
}


def responses(answer: type[Answer]) -> dict[int | str, dict[str, Any]]:
    """The answers of an endpoint that computes rewards, by status."""
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": why} for status, why in REFUSALS.items()
    }
    return {200: {"model": answer, "description": "All rewards."}, **refusals}


HEALTH: dict[int | str, dict[str, Any]] = {
    200: {"model": Health, "description": "The service answers."},
    403: {"model": Error, "description": REFUSALS[403]},
    503: {"model": Health, "description": "The service stops."},
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."},
    **{status: {"model": Error, "description": REFUSALS[status]} for status in (401, 403)},
}
