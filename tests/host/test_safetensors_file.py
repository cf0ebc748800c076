"""The safetensors files that rmcore writes by hand are those that the safetensors library reads and writes."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from rmcore.host import safetensors_file
from rmcore.host.safetensors_file import chunks, layout


def test_the_layout_of_the_docstring() -> None:
    found = layout({"a": (torch.float32, [2]), "b": (torch.bfloat16, [3])})
    assert (len(found.header), found.offsets, found.size) == (136, {"a": 136, "b": 144}, 150)


def test_the_library_reads_what_is_written_in_any_order(tmp_path: Path) -> None:
    """Header first, then the tensors backwards, each at its place: scalars, empty and strided tensors too."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randn(3, 5, generator=generator).to(dtype).t()  # strided
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    found = layout({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, {"format": "pt"})
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(found.header)
        for name, tensor in reversed(tensors.items()):
            file.seek(found.offsets[name])
            file.write(b"".join(chunks(tensor)))
    assert path.stat().st_size == found.size
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_chunks_are_short_and_converted(monkeypatch) -> None:
    monkeypatch.setattr(safetensors_file, "CHUNK", 8)
    pieces = list(chunks(torch.arange(10.0), torch.bfloat16))
    assert [len(piece) for piece in pieces] == [8, 8, 4], "4 bf16 numbers at a time"
    assert b"".join(pieces) == torch.arange(10.0).bfloat16().view(torch.uint8).numpy().tobytes()
