"""`rmcore plan`: predicts memory, time, disk and communication of a run, and prints every assumption that it made.

    dry_run.py        parameters and activation bytes of a model, from its config
    memory.py         memory of a step by part; the token budget and the recompute that fit a device
    data_size.py      number and lengths of the pairs, read or assumed
    shapes.py         the model's config: its own, a file, or a table of well-known models
    machines.py       peak rates, memory and links of GPUs; measured rates of a CPU
    flops.py          FLOPs of training
    communication.py  bytes that a step sends
    estimate.py       memory and time under one strategy; the cheapest strategy that fits
    run_cost.py       the prediction for a whole run
    report.py         the prediction as text and as JSON

README.md explains the models behind the predictions and compares them with measurements.
"""
