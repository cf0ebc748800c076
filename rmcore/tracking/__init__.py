"""Reports a run while it trains: console, metrics.jsonl, TensorBoard, wandb, run_status.json."""
