"""`rmcore plan`: memory, time, disk and communication of a run before it starts; what is assumed is said.

Held against what was measured, on one AMD EPYC with AVX512:
- Activation bytes, counted on fake tensors, against a real forward and backward of the packed path (small GPT-NeoX and
  Llama; fp32, autocast and bf16 weights; each recompute): kept within 4 %, at most within 10 %. Weights, gradients and
  AdamW's averages to the byte. `pytest tests/cost/test_memory.py`.
- FLOPs against torch's FlopCounterMode: within 3 %. `pytest tests/commands/test_plan.py`.
- Peak resident memory of a rank (the kernel's VmHWM while training; 8 pairs of the embedded task a step; foretold and
  measured GiB): Pythia 1b, zero3 on 4 gloo ranks, bf16: 5.27 and 4.96 (+6 %). Pythia 160m on 2: zero3 bf16 1.95 and
  1.91 (+2 %), zero3 fp32 2.12 and 1.99 (+7 %), zero2 fp32 2.38 and 2.09 (+14 %), ddp fp32 2.60 and 2.90 (-10 %: there
  freed memory is kept). `python -m rmcore.bench memory`, then `python -m rmcore.bench plan --memory FILES`.
- Seconds a step of one process with two threads (16 HH pairs; `--gpu cpu`, at this machine's measured rates): too low,
  by 39, 29 and 18 % in fp32 (Pythia 14m shape, small Llama, Pythia 70m shape) and 54, 42 and 31 % in bf16: the rate is
  that of a large matrix product, which narrow models do not reach. `python -m rmcore.bench plan --help`; plan.json.
- Nothing of a GPU: its memory, its MFU and its links are data sheets and assumptions until one is measured.
"""
