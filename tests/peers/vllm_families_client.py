"""Loads exports of many families in vLLM: python tests/peers/vllm_families_client.py TASKS FOUND, with a vLLM's Python.

Input: the JSON file that tests/peers/vllm_families.py wrote. Output: FOUND, a line of JSON for each family, such as
{"family": "mamba", "weights": 43, "unread": [], "unset": [], "error": "AttributeError: ... selective_scan_fwd"}.

vLLM's own engine loads each family in a forked process, so that vLLM is imported once and a crash ends one family only.
While the weights are read, every parameter of vLLM's model is NaN at first, and each operation on a tensor of the files
is followed up to the parameter that it is copied into. So a weight that nothing reads (`unread`), a parameter that no
weight fills (`unset`) and a head that the pooler does not use are found where the CPU has no kernel to compute a
reward, too.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Next to this file lies vllm.py, which must not be imported in place of the package.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine computes in the process of the family

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402


def main(tasks: str, found: str) -> None:
    sys.path.append(str(Path(sys.prefix, "aside")))  # torchvision, by launch/peers.sh
    declare_operators()
    import vllm
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()  # vLLM looks at each class in a Python of its own
    with open(found, "w", encoding="utf-8") as file:
        for task in json.loads(Path(tasks).read_text(encoding="utf-8")):
            result = forked(task, Path(found).with_name(f"{task['family']}.log"))
            print(json.dumps({"version": vllm.__version__, **result}), file=file, flush=True)


def declare_operators() -> None:
    """Make torchvision importable where it was built for another torch; nothing here computes with its operators."""
    place = importlib.util.find_spec("torchvision")
    if place is None or place.origin is None:
        return
    try:
        for library in Path(place.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declare_operators.kept = library  # type: ignore[attr-defined]


def forked(task: dict[str, Any], log: Path) -> dict[str, Any]:
    """The result of `loaded` in a child process, whose output goes to `log`."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        with open(write, "w", encoding="utf-8") as answer:
            json.dump(loaded(task), answer)
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"family": task["family"], "error": f"ended by {status}"}


def loaded(task: dict[str, Any]) -> dict[str, Any]:
    """What became of a model: how its weights were read, its outputs, and the error that ended it, if any."""
    from vllm import LLM
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    result: dict[str, Any] = {"family": task["family"]}
    load = DefaultModelLoader.load_weights
    DefaultModelLoader.load_weights = lambda loader, model, config: result.update(followed(load, loader, model, config))
    try:
        options = {"dtype": task["dtype"], "enforce_eager": True, "max_model_len": 256}
        llm = LLM(model=task["directory"], runner="pooling", **options)
        prompts = [{"prompt_token_ids": ids} for ids in task["token_ids"]]
        outputs = llm.encode(prompts, pooling_task="classify", use_tqdm=False)
        result["outputs"] = [number for one in outputs for number in one.outputs.data.tolist()]
    except BaseException as error:  # whatever vLLM raises is the result
        result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return result


def followed(load: Any, loader: Any, model: torch.nn.Module, config: Any) -> dict[str, Any]:
    """How the weights of the files got into the model."""
    names: set[str] = set()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)
    follower, read = Follower(model), loader.get_all_weights

    def tagged(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in read(*arguments):
            names.add(name)
            yield name, follower.tag(name, tensor)

    loader.get_all_weights = tagged
    with follower:
        load(loader, model, config)
    head = getattr(model.pooler.poolers_by_task["classify"], "head", None)
    return {
        "class": type(model).__name__,
        "weights": len(names),
        "unread": sorted(names - follower.used),
        # The class of some families keeps a language-model head, which no reward reads.
        "unset": [n for n, p in model.named_parameters() if _is_unset(p) and not n.startswith("lm_head.")],
        "heads": [name for name, module in model.named_modules() if module is getattr(head, "classifier", None)],
    }


def _is_unset(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() and bool(parameter.isnan().any())


class Follower(TorchDispatchMode):
    """Which weights of the files each tensor was made of, up to the model's own tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._goals = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self._made_of: dict[int, set[str]] = {}
        self._kept: list[torch.Tensor] = []  # a freed address would be taken by another tensor
        self.used: set[str] = set()

    def tag(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a weight of the files, to follow."""
        copy = tensor.clone()
        self._kept.append(copy)
        self._made_of[copy.untyped_storage().data_ptr()] = {name}
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names: set[str] = set()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                names |= self._made_of.get(tensor.untyped_storage().data_ptr(), set())
        for tensor in tree_leaves(out) if names else ():
            if isinstance(tensor, torch.Tensor):
                address = tensor.untyped_storage().data_ptr()
                if address in self._goals:
                    self.used |= names
                else:
                    self._kept.append(tensor)
                    self._made_of[address] = self._made_of.get(address, set()) | names
        return out


if __name__ == "__main__":
    main(*sys.argv[1:])
